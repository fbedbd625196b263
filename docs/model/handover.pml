/* The hand-over of docs/handover.md, with everything around it that can go wrong. tests/model/ runs it.

   Two relays step through table.pml, which is written from proxy/handover/table.py: this file has no rule of theirs.
   It has what they stand in: the two hypervisors (as xl was measured, or as QEMU), commands that outlive who gave them,
   disks that outlive everything, the session that carries the handshake and the first words, the source's errand that
   asks again when the session is over, and words that come late or twice. `faults` bounds how many things go wrong in
   one run, `late` how many old words are heard; what goes wrong, and when, is spin's choice.

   By hand, in this folder:
       spin -a -DFAULTS=3 -DLATE=1 handover.pml
       gcc -O2 -DSAFETY -DNOFAIR -DCOLLAPSE -DMEMLIM=16000 -o pan pan.c && ./pan -m100000
   Options: -DQEMU, -DLOCALHOST; -DFAULTS and -DLATE as above. A counterexample: ./pan -r | tail -100 */

#ifdef CHOSEN
/* One binary for everything: what may go wrong, and what is wrong with the table, is said by its environment, once,
   before anything happens. tests/model builds it so. */
short mutant;   /* which entry of table.pml is another */
short without;  /* which assumption below does not hold */
short whims;    /* if not 0: any mutant below it, and another for each event */
byte faults;
byte late;
bit qemu;
bit localhost;
bit outcomes;
byte faults_max;
#define FAULTS_MAX faults_max
#define HOLDS(assumption) (without != assumption)
#define FORGET_THE_WHIM if :: whims -> mutant = 0 :: else fi
#else
#define FORGET_THE_WHIM skip
#ifndef FAULTS
#define FAULTS 2
#endif
#ifndef LATE
#define LATE 1
#endif
byte faults = FAULTS;
#define FAULTS_MAX FAULTS
byte late = LATE;
#define HOLDS(assumption) true
#ifdef OUTCOMES /* what becomes of it counts, not the order of the records */
#define outcomes true
#else
#define outcomes false
#endif
#ifdef QEMU
#define qemu true
#else
#define qemu false
#endif
#ifdef LOCALHOST
#define localhost true
#else
#define localhost false
#endif
#endif

#include "table.pml"

/* What the relays' surroundings owe to the table. Each is code elsewhere, and tests/model takes each away. */
#define GIVEN_UP_IS_SEEN 1   /* GAVE_UP: only if the hypervisor has really written GO (QEMU: has completed) */
#define TOOK_IS_SEEN 2       /* TOOK: only of a whole, paused copy */
#define DESTROYED_IS_SEEN 3  /* DESTROYED: only once the copy is gone */
#define STARTED_IS_SEEN 4    /* STARTED: only once the copy runs */
#define MISSING_IS_SEEN 5    /* MISSING: only if the hypervisor answers, and has no such copy */
#define RECEIVER_HAS_ENDED 6 /* a relay that finds a receiver winding down waits for its end before it looks */
#define OPERATOR_IS_TRUE 7   /* an operator's RUN_HERE: the other copy is gone for good, and has not run on */
#define DISK_IS_FIRST 8      /* what follows a WRITE begins when the record is on the disk */
#define ONE_ACTS 9           /* a relay that was restarted acts only once its predecessor is dead */
#define FAILURE_ENDS_THE_SESSION 10 /* what fails at one end is told to the other */
#define RECORD_IS_KEPT 11    /* a record is kept as long as the peer may ask */
#define ERRAND_GOES_ON 12    /* the source asks until both sides have ended, also when it has itself */
#define LOSS_IS_SEEN 13      /* LOST: in time, where the session that was is over */
#define WORDS_ARE_REPEATED 14 /* a session that was cut and goes on: each side says again where it stands */
#define VTPM_STOPS_FIRST 15   /* the source's vTPM answers nobody before GO may cross */
#define VTPM_ARRIVES_FIRST 16 /* and the destination has it before it is prepared */

#define NO_RECORD 15 /* the journal was lost */
#define FOREVER 255  /* `late`: any word, at any time, as often as it likes */

/* The copies. Both hosts see the same disks. */
#define RUNS 1
#define STILL 2 /* source: suspended; destination: whole and paused */
#define PART 3  /* destination: not whole */
#define GONE 4
byte s_copy = RUNS;
byte d_copy = PART;
/* Their vTPMs (docs/vtpm.md), which follow: RUNS, STILL, PART (not there yet) or GONE, as the copies. QEMU has its own. */
byte s_vtpm = RUNS;
byte d_vtpm = PART;
bit s_ran_on; /* since it was whole at the destination */
bit d_ran;
bit d_named;  /* has the machine's name */

/* The hypervisors' own part: xl migrate, xl migrate-receive. QEMU's GO is the rest of its stream. */
#define SENDS 1
#define WAITS 2  /* source: for READY; destination: for GO */
#define LEAVES 3 /* source: has READY, will write GO; destination: has GO, will report */
#define LEFT 4   /* source: has written GO, waits for REPORT */
#define CLOSES 5 /* destination: its pipe was shut; destroys its copy, or does not */
#define ENDED 6
byte s_xl = SENDS;
byte d_xl = SENDS;

/* What the session carries: READY one way, GO the other. */
bit session = 1;
bit alive = 1;    /* the network */
bit ready;        /* let through by the destination's relay */
bit go;           /* let through by the source's */

/* The relays: what they know, what is on their disks, which actions are left of the last step. */
bit s_up = 1;
bit d_up = 1;
byte s_state = OPEN;
byte d_state = OPEN;
byte s_journal = OPEN;
byte d_journal = OPEN;
unsigned s_todo : 16;
unsigned d_todo : 16;
unsigned s_undead : 16; /* what a predecessor would still do */
unsigned d_undead : 16;
byte s_undead_state;
byte d_undead_state;
bit s_asks;   /* its hooks */
bit d_asks;
bit s_lets;   /* its hypervisor have READY */
bit s_failed; /* has to be told of a failure here */
bit d_failed;
bit s_missing;
bit d_passed_go;
bit s_restarted; /* once there was a session, but not in this process */
bit d_restarted;

/* Commands to the hypervisors: they take their time, and whoever gave them may be gone by then. */
#define GIVEN 1
#define ORPHAN 2
byte s_revive;
byte s_remove;
byte d_take;
byte d_start;
byte d_destroy;
bit d_took;
bit d_started;
bit d_destroyed;
bit d_missing;

/* Words: those under way in the session; all that were ever said, for those that come late or twice; and whether the
   errand has carried the present ones, since either side last changed. */
short s_fresh;
short d_fresh;
short s_said;
short d_said;
bit s_heard;
bit d_heard;

/* For the properties only. */
bit excused;  /* the only copy was lost with its host, disk or hypervisor, or given up */
bit useless;  /* destination: its copy cannot be made to run */
bit operated;
bit calm;
bit s_voted;  /* its GO may have crossed: its copy does not run on by itself */
bit smooth;   /* nothing has gone wrong */
bit refused;  /* by somebody who has a say */
bit s_agreed; /* all who have a say have said yes */
bit d_agreed;
bit s_anew;   /* it was started from its disks by its host */
bit unkept;   /* it ran on, or was given up, and no record says so: the disk did not take it, or the host was lost again */
bit s_unwritten;
bit d_unwritten;
bit d_knew;   /* that its copy was gone, before it was told to run it */
bit reported; /* xl migrate has heard that the machine has arrived */
byte advice;  /* at the end: how often an operator was asked, and one */
bit there;    /* and whether there was a copy that may run on */
hidden byte action;
hidden byte before;
hidden unsigned rest : 16;

#define PROMISED(state) ((state) == PREPARED || (state) == VOTED || (state) == COMMITTED || (state) == DONE)
#define FINAL(state) ((state) == DONE || (state) == ABORTED || (state) == DOUBT || (state) == NO_RECORD)
#define TURNED(state) ((state) == UNDOING || (state) == ABORTED || (state) == DOUBT)
#define ASKS(state) ((state) == PREPARED || (state) == VOTED || (state) == COMMITTED || (state) == DOUBT)
#define ADVICE_MAX 5
#define ADVISE advice = (alive -> ADVICE_MAX : advice + 1)
#define UNSETTLED (advice && advice < ADVICE_MAX && (ASKS(s_state) || ASKS(d_state)))
#define S_IS_RIGHT (s_copy != GONE && !d_ran)
#define D_IS_RIGHT (d_copy == RUNS || PROMISED(d_state) && d_copy == STILL && !useless && !s_ran_on)
#define D_STANDS (d_up -> d_state : d_journal)
#define S_IDLE (s_up && s_todo == 0 && !s_missing)
#define D_IDLE (d_up && d_todo == 0 && !d_missing)

/* -------------------------------------------------------------------------------------------- properties that hold always */

inline never_two()
{
    assert(!(s_copy == RUNS && d_copy == RUNS)); /* two copies run */
    assert(!(s_vtpm == RUNS && s_copy != GONE && d_vtpm == RUNS && d_copy != GONE)) /* two vTPMs answer */
}

inline source_runs()
{
    s_ran_on = (s_copy == STILL || s_ran_on);
    assert(!d_ran || s_copy == RUNS); /* the source's memory is older than the disks */
    s_copy = RUNS;
    never_two()
}

inline destination_runs()
{
    assert(d_copy != PART);          /* half a machine was started */
    assert(!s_ran_on || unkept);  /* the destination's memory is older than the disks */
    d_copy = RUNS;
    d_ran = 1;
    never_two()
}

/* At an end: nothing is, what runs has its name, and what they know is on their disks. */
inline nothing_is_left_behind()
{
    assert(s_state != DONE || s_copy == GONE);
    assert(s_state != ABORTED || s_copy == RUNS || s_copy == GONE);
    assert(d_state != ABORTED || d_copy == GONE);
    assert(d_state != DONE || d_copy == GONE || d_copy == RUNS && d_named);
    assert(qemu || s_copy != RUNS || s_vtpm == RUNS); /* a machine runs, and its vTPM does not answer */
    assert(qemu || d_copy != RUNS || d_vtpm == RUNS);
    assert(qemu || s_state != DONE || s_vtpm == GONE); /* something of it is left where it must not be */
    assert(qemu || d_state != ABORTED || d_vtpm == GONE);
    assert((s_state == s_journal || s_unwritten) && (d_state == d_journal || d_unwritten))
}

/* ------------------------------------------------------------------------------------------------------- the two relays */

inline source(event)
{
    before = s_state;
    source_step(event);
    FORGET_THE_WHIM;
    if :: s_state != before -> s_heard = 0; d_heard = 0 :: else fi
}

inline destination(event)
{
    before = d_state;
    destination_step(event);
    FORGET_THE_WHIM;
    if :: d_state != before -> s_heard = 0; d_heard = 0 :: else fi
}

/* One action of a state; a record must be on the disk before anything follows from it. */
inline source_does(act, state)
{
    assert(act == WRITE || act == APPROVE || s_journal == state || s_unwritten || outcomes); /* the record is behind */
    if
    :: act == WRITE -> s_journal = state
    :: act == APPROVE -> s_asks = 1
    :: act == RELEASE && state == PREPARED -> s_lets = 1; assert(s_agreed && d_agreed) /* somebody was not asked */
    :: act == RELEASE && state == VOTED -> go = session; s_voted = 1;
        if :: !qemu && HOLDS(VTPM_STOPS_FIRST) && s_vtpm == RUNS -> s_vtpm = STILL :: else fi
    :: act == SAY ->
        if :: WORD(state) -> s_said = s_said | (1 << state) :: else fi;
        if :: WORD(state) && session -> s_fresh = s_fresh | (1 << state) :: else fi
    :: act == REVIVE -> s_revive = GIVEN; s_vtpm = (s_vtpm == STILL -> RUNS : s_vtpm); never_two()
    :: act == REMOVE -> s_remove = GIVEN; s_vtpm = (qemu -> s_vtpm : GONE)
    :: else
    fi
}

inline destination_does(act, state)
{
    assert(act == WRITE || act == APPROVE || d_journal == state || d_unwritten || outcomes || state == UNDOING && d_journal == OPEN);
    if
    :: act == WRITE -> d_journal = state
    :: act == APPROVE -> d_asks = 1
    :: act == RELEASE && state == PREPARED -> ready = session; assert(d_agreed)
    :: act == SAY ->
        if :: WORD(state) -> d_said = d_said | (1 << state) :: else fi;
        if :: WORD(state) && session -> d_fresh = d_fresh | (1 << state) :: else fi
    :: act == RELEASE && state == DONE -> reported = session
    :: act == TAKE -> d_take = GIVEN
    :: act == START -> d_start = GIVEN; d_vtpm = (d_vtpm == STILL -> RUNS : d_vtpm); never_two()
    :: act == DESTROY -> d_destroy = GIVEN; d_vtpm = (qemu -> d_vtpm : GONE)
    :: else
    fi
}

inline over()
{
    session = 0;
    go = 0;
    s_fresh = 0;
    d_fresh = 0
}

/* A relay dies. Its commands go on, or are lost with it. */
inline source_dies(goes_on)
{
    if :: !HOLDS(ONE_ACTS) -> s_undead = s_todo; s_undead_state = s_state :: else fi;
    s_up = 0; s_todo = 0; s_unwritten = 0; s_asks = 0; s_lets = 0; s_failed = 0; s_missing = 0; s_heard = 0; d_heard = 0; s_restarted = 1; s_state = OPEN;
    s_revive = (s_revive && goes_on -> ORPHAN : 0);
    s_remove = (s_remove && goes_on -> ORPHAN : 0);
    over()
}

inline destination_dies(goes_on)
{
    if :: !HOLDS(ONE_ACTS) -> d_undead = d_todo; d_undead_state = d_state :: else fi;
    d_up = 0; d_todo = 0; d_unwritten = 0; d_asks = 0; d_failed = 0; d_passed_go = 0; s_heard = 0; d_heard = 0; d_restarted = 1; d_state = OPEN;
    d_took = 0; d_started = 0; d_destroyed = 0; d_missing = 0;
    d_take = (d_take && goes_on -> ORPHAN : 0);
    d_start = (d_start && goes_on -> ORPHAN : 0);
    d_destroy = (d_destroy && goes_on -> ORPHAN : 0);
    ready = 0;
    over()
}

/* The pipe between a relay and its hypervisor is shut with the relay, where nothing holds it. */
inline source_pipe_shuts()
{
    if
    :: s_xl == SENDS || s_xl == WAITS -> s_xl = ENDED; source_runs()
    :: s_xl == LEAVES && qemu -> s_xl = ENDED; source_runs()
    :: s_xl == LEAVES && !qemu || s_xl == LEFT -> s_xl = ENDED
    :: else
    fi
}

inline destination_pipe_shuts()
{
    if
    :: d_xl == SENDS -> d_xl = ENDED; d_copy = GONE
    :: d_xl == WAITS -> d_xl = CLOSES
    :: else
    fi
}

inline source_is_gone()
{
    /* The machine dies with it unless the destination has promised, and the source was not to run it again. */
    excused = (excused || s_journal == ABORTED || s_unwritten && s_state == ABORTED || !PROMISED(d_journal) || !PROMISED(D_STANDS) || d_copy == GONE);
    unkept = (unkept || s_anew && s_journal != ABORTED);
    s_copy = GONE;
    s_vtpm = (s_vtpm == RUNS && !qemu -> STILL : s_vtpm); /* its state is on the disk; nobody asks it for anything */
    s_xl = ENDED
}

inline destination_is_gone()
{
    excused = (excused || d_copy == RUNS || s_copy == GONE || s_state == DONE || s_journal == DONE);
    d_copy = GONE;
    d_vtpm = (d_vtpm == RUNS && !qemu -> STILL : d_vtpm);
    d_xl = ENDED
}

/* One word of one side, as the other hears it: fresh from the session, or an old one. */
#define HEARS(word) \
    :: d_step { D_IDLE && alive && (s_fresh & (1 << word)) -> s_fresh = s_fresh & ~(1 << word); destination(WORD(word)) } \
    :: d_step { S_IDLE && alive && (d_fresh & (1 << word)) -> d_fresh = d_fresh & ~(1 << word); source(WORD(word)) } \
    :: d_step { D_IDLE && alive && late && (s_said & (1 << word)) && DESTINATION_HEEDS(WORD(word)) -> late = (late == FOREVER -> late : late - 1); destination(WORD(word)) } \
    :: d_step { S_IDLE && alive && late && (d_said & (1 << word)) && SOURCE_HEEDS(WORD(word)) -> late = (late == FOREVER -> late : late - 1); source(WORD(word)) }


active proctype world()
{
#ifdef CHOSEN
    d_step {
        c_code {
            now.mutant = getenv("MUTANT") ? atoi(getenv("MUTANT")) : 0;
            now.whims = getenv("WHIMS") ? atoi(getenv("WHIMS")) : 0;
            now.without = getenv("WITHOUT") ? atoi(getenv("WITHOUT")) : 0;
            now.faults = getenv("FAULTS") ? atoi(getenv("FAULTS")) : 2;
            now.faults_max = now.faults;
            now.late = getenv("LATE") ? atoi(getenv("LATE")) : 1;
            now.qemu = getenv("QEMU") != 0;
            now.localhost = getenv("LOCALHOST") != 0;
            now.outcomes = getenv("OUTCOMES") != 0;
        }
    }
#endif
    do
#ifdef CHOSEN
    :: d_step { mutant < whims -> mutant++ } /* the last is none, so that nothing ends by a whim */
#endif
    /* ---------------------------------------------------------------------------------------- the relays act */
    :: d_step { s_up && s_todo != 0 -> action = s_todo & 15; s_todo = s_todo >> 4; source_does(action, s_state) }
    :: d_step { d_up && d_todo != 0 -> action = d_todo & 15; d_todo = d_todo >> 4; destination_does(action, d_state) }
    /* Without the order of the disk, a record comes after what follows it. */
    :: d_step { !HOLDS(DISK_IS_FIRST) && s_up && (s_todo & 15) == WRITE && (s_todo >> 4) != 0 ->
        action = (s_todo >> 4) & 15; s_todo = ((s_todo >> 8) << 4) | WRITE; source_does(action, s_state) }
    :: d_step { !HOLDS(DISK_IS_FIRST) && d_up && (d_todo & 15) == WRITE && (d_todo >> 4) != 0 ->
        action = (d_todo >> 4) & 15; d_todo = ((d_todo >> 8) << 4) | WRITE; destination_does(action, d_state) }
    :: d_step { s_undead != 0 -> action = s_undead & 15; s_undead = s_undead >> 4; source_does(action, s_undead_state) }
    :: d_step { d_undead != 0 -> action = d_undead & 15; d_undead = d_undead >> 4; destination_does(action, d_undead_state) }

    /* ------------------------------------------------------------------------------ everybody who has a say */
    :: d_step { S_IDLE && s_asks -> s_asks = 0; s_agreed = 1; source(APPROVED) }
    :: d_step { S_IDLE && s_asks -> s_asks = 0; refused = 1; source(FAILED) }
    :: d_step { D_IDLE && d_asks -> d_asks = 0; d_agreed = 1;
        if :: !qemu && HOLDS(VTPM_ARRIVES_FIRST) -> d_vtpm = STILL :: else fi;
        destination(APPROVED) }
    :: d_step { D_IDLE && d_asks -> d_asks = 0; refused = 1; destination(FAILED) }

    /* -------------------------------------------------------------------- the hypervisors, and what is seen of them */
    :: d_step { s_xl == SENDS && s_up && session -> s_xl = WAITS; s_copy = STILL }
    :: d_step { s_xl == WAITS && D_IDLE && session && d_xl == SENDS ->
        d_xl = WAITS; d_copy = (qemu -> PART : STILL); destination(WHOLE) }
    /* A stream that breaks off is a failure at its other end. */
    :: d_step { s_xl == ENDED && D_IDLE && session && d_xl == SENDS -> d_xl = ENDED; destination(FAILED) }
    :: d_step { s_xl == WAITS && s_up && s_lets && (ready || qemu) -> s_xl = LEAVES }
    :: d_step { s_xl == LEAVES -> s_xl = LEFT }
    :: d_step { s_xl == LEFT && S_IDLE && SOURCE_HEEDS(GAVE_UP) -> source(GAVE_UP) }
    :: d_step { !HOLDS(GIVEN_UP_IS_SEEN) && s_xl < LEFT && S_IDLE && SOURCE_HEEDS(GAVE_UP) -> source(GAVE_UP) }
    :: d_step { go && alive && session && D_IDLE && d_xl == WAITS && d_state == PREPARED -> go = 0; d_passed_go = 1; d_xl = LEAVES }
    :: d_step { d_xl == LEAVES -> d_xl = ENDED; d_copy = (d_copy == PART -> STILL : d_copy); d_named = (d_copy != GONE || d_named) }
    :: d_step { d_xl == ENDED && d_passed_go && D_IDLE && DESTINATION_HEEDS(TOOK) ->
        d_passed_go = 0;
        if
        :: d_copy == GONE -> destination(MISSING)
        :: d_copy == STILL && d_named -> destination(TOOK)
        :: else
        fi }
    :: d_step { !HOLDS(TOOK_IS_SEEN) && D_IDLE && DESTINATION_HEEDS(TOOK) -> destination(TOOK) }
    :: d_step { d_xl == CLOSES -> d_xl = ENDED; d_copy = GONE; excused = (excused || s_copy == GONE) }
    :: d_step { d_xl == CLOSES -> d_xl = ENDED }
    :: d_step { S_IDLE && s_failed -> s_failed = 0; source(FAILED) }
    :: d_step { s_missing && s_todo == 0 -> s_missing = 0; source(MISSING) }
    :: d_step { D_IDLE && d_failed ->
        d_failed = 0;
        if :: DESTINATION_HEEDS(FAILED) -> destination(FAILED) :: else -> if :: HOLDS(FAILURE_ENDS_THE_SESSION) -> over() :: else fi fi }

    /* -------------------------------------------------------------------------------- commands to the hypervisors */
    :: d_step { s_revive ->
        s_revive = 0;
        if :: s_copy != GONE -> s_xl = ENDED; source_runs() :: else fi }
    :: d_step { s_remove -> s_remove = 0; s_copy = GONE; s_xl = ENDED }
    :: d_step { d_take && d_xl != LEAVES && (d_xl != CLOSES || !HOLDS(RECEIVER_HAS_ENDED)) &&
        (d_copy != PART || !session) && (!localhost || s_xl >= LEFT) ->
        if
        /* while the session runs, GO comes by itself, or the session ends and the errand asks again */
        :: session && d_xl == WAITS && d_state == PREPARED -> skip
        :: else ->
        if
        :: d_copy == GONE -> d_missing = (d_missing || d_take == GIVEN)
        :: d_copy == PART -> d_failed = (d_failed || d_take == GIVEN); useless = 1; excused = (excused || s_copy == GONE)
        :: else -> d_named = 1; d_took = (d_took || d_take == GIVEN); if :: d_xl == WAITS -> d_xl = ENDED :: else fi
        fi
        fi;
        d_take = 0 }
    :: d_step { d_start && (d_xl != CLOSES && d_xl != LEAVES || !HOLDS(RECEIVER_HAS_ENDED)) ->
        if
        :: d_copy == GONE -> d_missing = (d_missing || d_start == GIVEN)
        :: d_copy != GONE -> destination_runs(); d_started = (d_started || d_start == GIVEN)
        fi;
        d_start = 0 }
    :: d_step { d_destroy -> d_copy = GONE; d_xl = ENDED; d_destroyed = (d_destroyed || d_destroy == GIVEN); d_destroy = 0 }
    :: d_step { !HOLDS(DESTROYED_IS_SEEN) && d_destroy == GIVEN -> d_destroy = ORPHAN; d_destroyed = 1 }
    :: d_step { !HOLDS(STARTED_IS_SEEN) && d_start == GIVEN -> d_start = 0; d_started = 1 }
    /* Before a hand-over is settled its vTPM is seen to, where a copy was missing and no command was given. */
    :: d_step { S_IDLE && s_state == DONE && s_vtpm != GONE && !qemu -> s_vtpm = GONE }
    :: d_step { D_IDLE && d_state == ABORTED && d_vtpm != GONE && !qemu -> d_vtpm = GONE }
    :: d_step { D_IDLE && d_took -> d_took = 0; destination(TOOK) }
    :: d_step { D_IDLE && d_started -> d_started = 0; destination(STARTED) }
    :: d_step { D_IDLE && d_destroyed -> d_destroyed = 0; destination(DESTROYED) }
    :: d_step { d_missing && d_todo == 0 -> d_missing = 0; d_knew = (d_knew || d_state < COMMITTED); destination(MISSING) }

    /* ---------------------------------------------------------------------------------------------------- words */
    HEARS(PREPARED)
    HEARS(VOTED)
    HEARS(COMMITTED)
    HEARS(DONE)
    HEARS(ABORTED)
    HEARS(DOUBT)
    /* The errand: the source says where it stands, and hears where the destination does. */
    :: d_step { !session && alive && S_IDLE && D_IDLE && !d_heard && WORD(s_state) && (HOLDS(ERRAND_GOES_ON) || !FINAL(s_state)) -> d_heard = 1; destination(WORD(s_state)) }
    :: d_step { !session && alive && S_IDLE && D_IDLE && !s_heard && s_state != NO_RECORD && (HOLDS(ERRAND_GOES_ON) || !FINAL(s_state)) && WORD(d_state) ->
        s_heard = 1; source(WORD(d_state)) }
    :: d_step { !session && alive && S_IDLE && D_IDLE && !s_heard && s_state != NO_RECORD && (HOLDS(ERRAND_GOES_ON) || !FINAL(s_state)) && d_state == NO_RECORD ->
        s_heard = 1; source(PEER_UNKNOWN) }
    /* A side that has turned back, or is in doubt, ends the session. */
    :: d_step { session && HOLDS(FAILURE_ENDS_THE_SESSION) && (TURNED(s_state) || TURNED(d_state)) -> over() }
    /* The session is over, or nobody can be reached at all: that is seen in time. After a restart nobody waits. */
    :: d_step { S_IDLE && (!session && !s_restarted || !alive) && HOLDS(LOSS_IS_SEEN) && SOURCE_HEEDS(LOST) -> source(LOST) }
    :: d_step { D_IDLE && !session && !d_restarted && HOLDS(LOSS_IS_SEEN) && DESTINATION_HEEDS(LOST) -> destination(LOST) }

    /* ------------------------------------------------------------------------------------------------- restarts */
    :: d_step { !s_up ->
        s_up = 1; s_state = s_journal;
        if
        :: s_copy == GONE -> source(MISSING)
        :: s_copy != GONE -> source(RESTARTED)
        fi }
    :: d_step { !d_up && (d_xl != CLOSES || !HOLDS(RECEIVER_HAS_ENDED)) ->
        d_up = 1; d_state = d_journal;
        if
        :: d_copy == GONE -> d_knew = (d_knew || d_state < COMMITTED); destination(MISSING)
        :: d_copy != GONE -> destination(RESTARTED)
        fi }
    :: d_step { !HOLDS(MISSING_IS_SEEN) && !s_up -> s_up = 1; s_state = s_journal; source(MISSING) }
    :: d_step { !HOLDS(MISSING_IS_SEEN) && !d_up -> d_up = 1; d_state = d_journal; destination(MISSING) }

    :: d_step { !HOLDS(RECORD_IS_KEPT) && D_IDLE && (d_state == DONE || d_state == ABORTED) ->
        d_state = NO_RECORD; d_journal = NO_RECORD; s_heard = 0; d_heard = 0 }

    /* --------------------------------------------------------------------- what goes wrong: each is one of `faults` */
    :: d_step { faults && s_up -> faults--; source_dies(false) }
    :: d_step { faults && s_up && (s_revive || s_remove) -> faults--; source_dies(true) }
    :: d_step { faults && s_up && s_xl < ENDED -> faults--; source_dies(false); source_pipe_shuts() }
    :: d_step { faults && d_up -> faults--; destination_dies(false) }
    :: d_step { faults && d_up && (d_take || d_start || d_destroy) -> faults--; destination_dies(true) }
    :: d_step { faults && d_up && d_xl < CLOSES -> faults--; destination_dies(false); destination_pipe_shuts() }
    /* xl migrate: killed, or it fails while it may still resume the machine by itself */
    :: d_step { faults && s_xl < ENDED && !qemu -> faults--; s_xl = ENDED; s_failed = (s_failed || s_up) }
    :: d_step { faults && s_xl < LEFT && (s_xl != LEAVES || qemu) -> faults--; s_xl = ENDED; s_failed = (s_failed || s_up); source_runs() }
    /* xl migrate-receive: killed */
    :: d_step { faults && d_xl == SENDS && !qemu -> faults--; d_xl = ENDED; d_failed = (d_failed || d_up) }
    :: d_step { faults && (d_xl == WAITS || d_xl == LEAVES) && !qemu ->
        faults--; d_xl = ENDED; d_failed = (d_failed || d_up) }
    /* a command, once; the errand comes again */
    :: d_step { faults && d_take == GIVEN -> faults--; d_take = 0; d_failed = 1; s_heard = 0; d_heard = 0 }
    :: d_step { faults && d_start == GIVEN -> faults--; d_start = 0; d_failed = 1 }
    :: d_step { faults && d_destroy == GIVEN -> faults--; d_destroy = 0; d_failed = 1 }
    /* a host */
    :: d_step { faults && !localhost -> faults--; source_is_gone(); source_dies(false) }
    :: d_step { faults && !localhost -> faults--; destination_is_gone(); destination_dies(false) }
    :: d_step { faults && localhost -> faults--; source_is_gone(); destination_is_gone(); source_dies(false); destination_dies(false) }
    /* the source's, which starts its machines as it comes up: this one anew, from its disks */
    :: d_step { faults && !localhost && !operated && (s_journal < COMMITTED || s_journal == ABORTED) ->
        faults--; source_dies(false); s_xl = ENDED; s_copy = RUNS; s_vtpm = (qemu -> s_vtpm : RUNS); s_ran_on = 1; s_anew = 1; never_two() }
    /* one copy alone, by a crash of QEMU or somebody's xl destroy; seen at once, or when a command meets nothing */
    :: d_step { faults && s_copy != GONE -> faults--; excused = (excused || s_state == ABORTED); source_is_gone(); s_missing = s_up }
    :: d_step { faults && d_copy != GONE -> faults--; destination_is_gone(); d_missing = d_up }
    /* (xl migrate-receive does not see it before it renames) */
    :: d_step { faults && d_copy != GONE && d_state >= PREPARED ->
        faults--;
        action = d_xl;
        destination_is_gone();
        d_xl = (qemu -> ENDED : action) }
    /* the session's connection, and it goes on over another: what was under way is lost */
    :: d_step { faults && session && (s_fresh || d_fresh) ->
        faults--;
        s_fresh = (HOLDS(WORDS_ARE_REPEATED) && (s_journal == s_state || S_IDLE) && WORD(s_state) -> 1 << s_state : 0);
        d_fresh = (HOLDS(WORDS_ARE_REPEATED) && (d_journal == d_state || D_IDLE) && WORD(d_state) -> 1 << d_state : 0) }
    /* the session, by the network or a time-out; the network for good; an errand that takes too long */
    :: d_step { faults && session -> faults--; over() }
    :: d_step { faults && session && ready -> faults--; ready = 0; over() }
    :: d_step { faults && alive -> faults--; alive = 0; over() }
    :: d_step { faults && S_IDLE && !session && SOURCE_HEEDS(LOST) -> faults--; source(LOST) }
    /* a journal's disk */
    :: d_step { faults && s_up && (s_todo & 15) == WRITE && (s_state == ABORTED || s_state == DONE) -> faults--; s_todo = s_todo >> 4; s_unwritten = 1; unkept = 1 }
    :: d_step { faults && d_up && (d_todo & 15) == WRITE && (d_state == ABORTED || d_state == DONE) -> faults--; d_todo = d_todo >> 4; d_unwritten = 1 }
    :: d_step { faults && !s_up && s_journal != NO_RECORD -> faults--; s_journal = NO_RECORD; excused = 1 }
    :: d_step { faults && !d_up && d_journal != NO_RECORD -> faults--; d_journal = NO_RECORD; excused = 1 }

    /* ------------------------------------------ an operator, once, if at all, and not while a session has the journal */
    :: d_step { !operated && !calm && !session && S_IDLE && SOURCE_HEEDS(RUN_HERE) && (d_copy == GONE && !d_ran || !HOLDS(OPERATOR_IS_TRUE)) ->
        operated = HOLDS(OPERATOR_IS_TRUE); source(RUN_HERE) }
    :: d_step { !operated && !calm && !session && S_IDLE && SOURCE_HEEDS(GIVE_UP) && PROMISED(d_journal) && PROMISED(D_STANDS) && d_copy != GONE && d_copy != PART && !useless && !s_ran_on ->
        operated = 1; source(GIVE_UP) }
    :: d_step { !operated && !calm && !session && D_IDLE && DESTINATION_HEEDS(RUN_HERE) && (s_copy == GONE && !s_ran_on && d_copy != PART || !HOLDS(OPERATOR_IS_TRUE)) ->
        operated = HOLDS(OPERATOR_IS_TRUE); destination(RUN_HERE) }
    :: d_step { !operated && !calm && !session && D_IDLE && DESTINATION_HEEDS(GIVE_UP) && !d_ran && (s_copy != GONE && s_journal != DONE && s_state != DONE || d_copy == GONE) ->
        operated = 1; destination(GIVE_UP) }

    /* -------------------------------------------------------- from here on nothing goes wrong, and nobody steps in */
    :: d_step { !calm -> calm = 1; smooth = (faults == FAULTS_MAX); faults = 0; late = (late == FOREVER -> late : 0) }

    /* --------------------------------------------------------- nothing more will happen: properties of every end */
    :: timeout && advice == 0 -> d_step {
        /* where nothing went wrong and nobody refused, it has moved */
        assert(!smooth || refused || d_copy == RUNS && reported && s_state == DONE && d_state == DONE);
        /* exactly one runs */
        assert(s_copy == RUNS || d_copy == RUNS || excused || /* an operator is asked: */
            s_journal == DOUBT && s_copy == GONE && !s_voted && PROMISED(d_journal) ||
            s_journal == DOUBT && d_journal == DOUBT && s_copy != GONE ||
            !alive && (s_journal == COMMITTED || s_journal == DOUBT || s_copy == GONE && PROMISED(d_journal)));
        /* and everybody knows: nobody waits for what will not come */
        assert(FINAL(s_state) || (!alive || useless && s_copy == GONE) && s_state == COMMITTED);
        assert(FINAL(d_state) || (!alive || useless && s_copy == GONE || s_state == NO_RECORD || s_state == DOUBT) && (d_state == PREPARED || d_state == VOTED));
        assert(s_state != DOUBT || s_copy == GONE || d_state == DOUBT || d_state == NO_RECORD || !alive);
        assert(d_state != DOUBT || d_copy == GONE && !d_knew);
        assert(s_state != DOUBT || !alive || d_state != DONE && d_state != ABORTED);
        nothing_is_left_behind();
        /* the records agree */
        assert(!(s_state == ABORTED && d_state == DONE) || operated);
        assert(!(s_state == DONE && d_state == ABORTED) || operated && excused);
        advice = 1;
        there = s_state != NO_RECORD && d_state != NO_RECORD && (S_IS_RIGHT || D_IS_RIGHT);
        /* what no relay knows, an operator does away with by hand */
        s_copy = (s_state == NO_RECORD && s_copy == STILL -> GONE : s_copy);
        s_xl = (s_copy == GONE -> ENDED : s_xl);
        d_copy = (d_state == NO_RECORD && d_copy != RUNS -> GONE : d_copy)
    }
    /* Who waits, or is in doubt, waits for an operator, who sees both hosts. One word is enough while the network is
       there, but for a destination in DOUBT whose source is given up. With no copy that may run on he gives both up, and
       starts the machine anew from its disks. */
    :: timeout && UNSETTLED && ASKS(s_state) && (D_IS_RIGHT || d_copy == GONE && !S_IS_RIGHT) -> d_step {
        advice = (alive && d_state != DOUBT -> ADVICE_MAX : advice + 1); source(GIVE_UP) }
    :: timeout && UNSETTLED && ASKS(s_state) && d_copy == GONE && S_IS_RIGHT -> d_step { ADVISE; source(RUN_HERE) }
    :: timeout && UNSETTLED && ASKS(s_state) && d_copy != GONE && !D_IS_RIGHT -> d_step { ADVISE; destination(GIVE_UP) }
    :: timeout && UNSETTLED && !ASKS(s_state) && D_IS_RIGHT && s_copy == GONE -> d_step { ADVISE; destination(RUN_HERE) }
    :: timeout && UNSETTLED && !ASKS(s_state) && !(D_IS_RIGHT && s_copy == GONE) -> d_step { ADVISE; destination(GIVE_UP) }
    :: timeout && advice && !UNSETTLED -> d_step {
        /* an operator can always end it, and saves what there is */
        assert(!ASKS(s_state) && !ASKS(d_state));
        assert(!there || s_copy == RUNS || d_copy == RUNS);
        nothing_is_left_behind()
    }; break
    od;
end_progress:
    false
}

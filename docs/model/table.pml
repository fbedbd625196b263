/* Written by `python -m tests.model.generate` from proxy/handover/table.py; tests/model holds it against that. */

#define OPEN 0
#define ASKED 1
#define PREPARED 2
#define VOTED 3
#define COMMITTED 4
#define DONE 5
#define UNDOING 6
#define ABORTED 7
#define DOUBT 8

#define WHOLE 1
#define APPROVED 2
#define GAVE_UP 3
#define TOOK 4
#define STARTED 5
#define DESTROYED 6
#define MISSING 7
#define FAILED 8
#define LOST 9
#define RESTARTED 10
#define RUN_HERE 11
#define GIVE_UP 12
#define PEER_PREPARED 13
#define PEER_VOTED 14
#define PEER_COMMITTED 15
#define PEER_DONE 16
#define PEER_ABORTED 17
#define PEER_DOUBT 18
#define PEER_UNKNOWN 19

#define WRITE 1
#define APPROVE 2
#define RELEASE 3
#define SAY 4
#define TAKE 5
#define START 6
#define DESTROY 7
#define REVIVE 8
#define REMOVE 9

#define WORD(state) ((state) == PREPARED -> PEER_PREPARED : ((state) == VOTED -> PEER_VOTED : ((state) == COMMITTED -> PEER_COMMITTED : ((state) == DONE -> PEER_DONE : ((state) == ABORTED -> PEER_ABORTED : ((state) == DOUBT -> PEER_DOUBT : (0)))))))

inline source_step(event)
{
    if
    :: s_state == OPEN ->
        if
        :: event == MISSING -> s_state = DOUBT; s_todo = WRITE | (SAY << 4)
        :: event == FAILED -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == LOST -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == RESTARTED -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == PEER_PREPARED -> s_state = ASKED; s_todo = APPROVE
        :: event == PEER_ABORTED -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: else
        fi
    :: s_state == ASKED ->
        if
        :: event == APPROVED -> s_state = PREPARED; s_todo = WRITE | (RELEASE << 4)
        :: event == MISSING -> s_state = DOUBT; s_todo = WRITE | (SAY << 4)
        :: event == FAILED -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == LOST -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == PEER_ABORTED -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: else
        fi
    :: s_state == PREPARED ->
        if
        :: event == GAVE_UP -> s_state = VOTED; s_todo = WRITE | (RELEASE << 4) | (SAY << 8)
        :: event == MISSING -> s_state = DOUBT; s_todo = WRITE | (SAY << 4)
        :: event == FAILED -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == LOST -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == RESTARTED -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == PEER_ABORTED -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: else
        fi
    :: s_state == VOTED ->
        if
        :: event == MISSING -> s_state = COMMITTED; s_todo = WRITE | (SAY << 4)
        :: event == FAILED -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == LOST -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == RESTARTED -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == PEER_PREPARED -> s_state = VOTED; s_todo = SAY
        :: event == PEER_VOTED -> s_state = COMMITTED; s_todo = WRITE | (SAY << 4)
        :: event == PEER_ABORTED -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == PEER_UNKNOWN -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: else
        fi
    :: s_state == COMMITTED ->
        if
        :: event == RUN_HERE -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == GIVE_UP -> s_state = DONE; s_todo = WRITE | (REMOVE << 4) | (SAY << 8)
        :: event == PEER_VOTED -> s_state = COMMITTED; s_todo = SAY
        :: event == PEER_DONE -> s_state = DONE; s_todo = WRITE | (REMOVE << 4) | (SAY << 8)
        :: event == PEER_ABORTED -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == PEER_DOUBT -> s_state = DOUBT; s_todo = WRITE
        :: event == PEER_UNKNOWN -> s_state = DOUBT; s_todo = WRITE
        :: else
        fi
    :: s_state == DONE ->
        if
        :: event == RESTARTED -> s_state = DONE; s_todo = REMOVE | (SAY << 4)
        :: event == PEER_PREPARED -> s_state = DONE; s_todo = SAY
        :: event == PEER_VOTED -> s_state = DONE; s_todo = SAY
        :: else
        fi
    :: s_state == ABORTED ->
        if
        :: event == RESTARTED -> s_state = ABORTED; s_todo = REVIVE | (SAY << 4)
        :: event == PEER_PREPARED -> s_state = ABORTED; s_todo = SAY
        :: event == PEER_VOTED -> s_state = ABORTED; s_todo = SAY
        :: else
        fi
    :: s_state == DOUBT ->
        if
        :: event == RUN_HERE -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: event == GIVE_UP -> s_state = DONE; s_todo = WRITE | (REMOVE << 4) | (SAY << 8)
        :: event == PEER_VOTED -> s_state = COMMITTED; s_todo = WRITE | (SAY << 4)
        :: event == PEER_DONE -> s_state = DONE; s_todo = WRITE | (REMOVE << 4) | (SAY << 8)
        :: event == PEER_ABORTED -> s_state = ABORTED; s_todo = WRITE | (REVIVE << 4) | (SAY << 8)
        :: else
        fi
    :: else
    fi
}

#define SOURCE_HEEDS(event) ( \
    (event) == MISSING && s_state == OPEN || \
    (event) == FAILED && s_state == OPEN || \
    (event) == LOST && s_state == OPEN || \
    (event) == RESTARTED && s_state == OPEN || \
    (event) == PEER_PREPARED && s_state == OPEN || \
    (event) == PEER_ABORTED && s_state == OPEN || \
    (event) == APPROVED && s_state == ASKED || \
    (event) == MISSING && s_state == ASKED || \
    (event) == FAILED && s_state == ASKED || \
    (event) == LOST && s_state == ASKED || \
    (event) == PEER_ABORTED && s_state == ASKED || \
    (event) == GAVE_UP && s_state == PREPARED || \
    (event) == MISSING && s_state == PREPARED || \
    (event) == FAILED && s_state == PREPARED || \
    (event) == LOST && s_state == PREPARED || \
    (event) == RESTARTED && s_state == PREPARED || \
    (event) == PEER_ABORTED && s_state == PREPARED || \
    (event) == MISSING && s_state == VOTED || \
    (event) == FAILED && s_state == VOTED || \
    (event) == LOST && s_state == VOTED || \
    (event) == RESTARTED && s_state == VOTED || \
    (event) == PEER_PREPARED && s_state == VOTED || \
    (event) == PEER_VOTED && s_state == VOTED || \
    (event) == PEER_ABORTED && s_state == VOTED || \
    (event) == PEER_UNKNOWN && s_state == VOTED || \
    (event) == RUN_HERE && s_state == COMMITTED || \
    (event) == GIVE_UP && s_state == COMMITTED || \
    (event) == PEER_VOTED && s_state == COMMITTED || \
    (event) == PEER_DONE && s_state == COMMITTED || \
    (event) == PEER_ABORTED && s_state == COMMITTED || \
    (event) == PEER_DOUBT && s_state == COMMITTED || \
    (event) == PEER_UNKNOWN && s_state == COMMITTED || \
    (event) == RESTARTED && s_state == DONE || \
    (event) == PEER_PREPARED && s_state == DONE || \
    (event) == PEER_VOTED && s_state == DONE || \
    (event) == RESTARTED && s_state == ABORTED || \
    (event) == PEER_PREPARED && s_state == ABORTED || \
    (event) == PEER_VOTED && s_state == ABORTED || \
    (event) == RUN_HERE && s_state == DOUBT || \
    (event) == GIVE_UP && s_state == DOUBT || \
    (event) == PEER_VOTED && s_state == DOUBT || \
    (event) == PEER_DONE && s_state == DOUBT || \
    (event) == PEER_ABORTED && s_state == DOUBT)

inline destination_step(event)
{
    if
    :: d_state == OPEN ->
        if
        :: event == WHOLE -> d_state = ASKED; d_todo = APPROVE
        :: event == MISSING -> d_state = ABORTED; d_todo = WRITE | (SAY << 4)
        :: event == FAILED -> d_state = UNDOING; d_todo = DESTROY
        :: event == LOST -> d_state = UNDOING; d_todo = DESTROY
        :: event == RESTARTED -> d_state = UNDOING; d_todo = DESTROY
        :: event == PEER_ABORTED -> d_state = UNDOING; d_todo = DESTROY
        :: else
        fi
    :: d_state == ASKED ->
        if
        :: event == APPROVED -> d_state = PREPARED; d_todo = WRITE | (RELEASE << 4) | (SAY << 8)
        :: event == MISSING -> d_state = ABORTED; d_todo = WRITE | (SAY << 4)
        :: event == FAILED -> d_state = UNDOING; d_todo = DESTROY
        :: event == LOST -> d_state = UNDOING; d_todo = DESTROY
        :: event == PEER_ABORTED -> d_state = UNDOING; d_todo = DESTROY
        :: else
        fi
    :: d_state == PREPARED ->
        if
        :: event == TOOK -> d_state = VOTED; d_todo = WRITE | (SAY << 4)
        :: event == MISSING -> d_state = ABORTED; d_todo = WRITE | (SAY << 4)
        :: event == RUN_HERE -> d_state = COMMITTED; d_todo = WRITE | (TAKE << 4)
        :: event == GIVE_UP -> d_state = UNDOING; d_todo = WRITE | (DESTROY << 4)
        :: event == PEER_VOTED -> d_state = PREPARED; d_todo = TAKE
        :: event == PEER_COMMITTED -> d_state = PREPARED; d_todo = TAKE
        :: event == PEER_DONE -> d_state = PREPARED; d_todo = TAKE
        :: event == PEER_ABORTED -> d_state = UNDOING; d_todo = WRITE | (DESTROY << 4)
        :: else
        fi
    :: d_state == VOTED ->
        if
        :: event == MISSING -> d_state = ABORTED; d_todo = WRITE | (SAY << 4)
        :: event == RUN_HERE -> d_state = COMMITTED; d_todo = WRITE | (START << 4)
        :: event == GIVE_UP -> d_state = UNDOING; d_todo = WRITE | (DESTROY << 4)
        :: event == PEER_VOTED -> d_state = VOTED; d_todo = SAY
        :: event == PEER_COMMITTED -> d_state = COMMITTED; d_todo = WRITE | (START << 4)
        :: event == PEER_DONE -> d_state = COMMITTED; d_todo = WRITE | (START << 4)
        :: event == PEER_ABORTED -> d_state = UNDOING; d_todo = WRITE | (DESTROY << 4)
        :: else
        fi
    :: d_state == COMMITTED ->
        if
        :: event == TOOK -> d_state = COMMITTED; d_todo = START
        :: event == STARTED -> d_state = DONE; d_todo = WRITE | (SAY << 4) | (RELEASE << 8)
        :: event == MISSING -> d_state = DOUBT; d_todo = WRITE | (SAY << 4)
        :: event == FAILED -> d_state = COMMITTED; d_todo = TAKE
        :: event == RESTARTED -> d_state = COMMITTED; d_todo = TAKE
        :: else
        fi
    :: d_state == DONE ->
        if
        :: event == PEER_VOTED -> d_state = DONE; d_todo = SAY
        :: event == PEER_COMMITTED -> d_state = DONE; d_todo = SAY
        :: else
        fi
    :: d_state == UNDOING ->
        if
        :: event == DESTROYED -> d_state = ABORTED; d_todo = WRITE | (SAY << 4)
        :: event == MISSING -> d_state = ABORTED; d_todo = WRITE | (SAY << 4)
        :: event == FAILED -> d_state = UNDOING; d_todo = DESTROY
        :: event == RESTARTED -> d_state = UNDOING; d_todo = DESTROY
        :: else
        fi
    :: d_state == ABORTED ->
        if
        :: event == PEER_VOTED -> d_state = ABORTED; d_todo = SAY
        :: event == PEER_COMMITTED -> d_state = ABORTED; d_todo = SAY
        :: event == PEER_ABORTED -> d_state = ABORTED; d_todo = SAY
        :: else
        fi
    :: d_state == DOUBT ->
        if
        :: event == GIVE_UP -> d_state = UNDOING; d_todo = WRITE | (DESTROY << 4)
        :: event == PEER_COMMITTED -> d_state = DOUBT; d_todo = SAY
        :: event == PEER_ABORTED -> d_state = UNDOING; d_todo = WRITE | (DESTROY << 4)
        :: else
        fi
    :: else
    fi
}

#define DESTINATION_HEEDS(event) ( \
    (event) == WHOLE && d_state == OPEN || \
    (event) == MISSING && d_state == OPEN || \
    (event) == FAILED && d_state == OPEN || \
    (event) == LOST && d_state == OPEN || \
    (event) == RESTARTED && d_state == OPEN || \
    (event) == PEER_ABORTED && d_state == OPEN || \
    (event) == APPROVED && d_state == ASKED || \
    (event) == MISSING && d_state == ASKED || \
    (event) == FAILED && d_state == ASKED || \
    (event) == LOST && d_state == ASKED || \
    (event) == PEER_ABORTED && d_state == ASKED || \
    (event) == TOOK && d_state == PREPARED || \
    (event) == MISSING && d_state == PREPARED || \
    (event) == RUN_HERE && d_state == PREPARED || \
    (event) == GIVE_UP && d_state == PREPARED || \
    (event) == PEER_VOTED && d_state == PREPARED || \
    (event) == PEER_COMMITTED && d_state == PREPARED || \
    (event) == PEER_DONE && d_state == PREPARED || \
    (event) == PEER_ABORTED && d_state == PREPARED || \
    (event) == MISSING && d_state == VOTED || \
    (event) == RUN_HERE && d_state == VOTED || \
    (event) == GIVE_UP && d_state == VOTED || \
    (event) == PEER_VOTED && d_state == VOTED || \
    (event) == PEER_COMMITTED && d_state == VOTED || \
    (event) == PEER_DONE && d_state == VOTED || \
    (event) == PEER_ABORTED && d_state == VOTED || \
    (event) == TOOK && d_state == COMMITTED || \
    (event) == STARTED && d_state == COMMITTED || \
    (event) == MISSING && d_state == COMMITTED || \
    (event) == FAILED && d_state == COMMITTED || \
    (event) == RESTARTED && d_state == COMMITTED || \
    (event) == PEER_VOTED && d_state == DONE || \
    (event) == PEER_COMMITTED && d_state == DONE || \
    (event) == DESTROYED && d_state == UNDOING || \
    (event) == MISSING && d_state == UNDOING || \
    (event) == FAILED && d_state == UNDOING || \
    (event) == RESTARTED && d_state == UNDOING || \
    (event) == PEER_VOTED && d_state == ABORTED || \
    (event) == PEER_COMMITTED && d_state == ABORTED || \
    (event) == PEER_ABORTED && d_state == ABORTED || \
    (event) == GIVE_UP && d_state == DOUBT || \
    (event) == PEER_COMMITTED && d_state == DOUBT || \
    (event) == PEER_ABORTED && d_state == DOUBT)

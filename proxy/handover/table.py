"""The hand-over as one literal table, for both roles. docs/model/ checks it in every order of faults.

A two-phase commit with the source as coordinator. The destination promises nothing to run before it has read the
source's COMMITTED and written down its own; the source, having written down COMMITTED, does not run its copy again
without the destination's word that its copy never ran and is no more. Until COMMITTED is written down either side may
turn back. Every word between relays says where its sender stands, and may be lost, repeated and late.
"""

from collections.abc import Mapping
from enum import Enum, unique
from types import MappingProxyType
from typing import Final, NamedTuple


@unique
class Side(Enum):
    """Which copy of the machine this end has: the one that leaves, or the one that arrives."""

    SOURCE = "source"
    DESTINATION = "destination"


@unique
class State(Enum):
    """Where one side stands. All but ASKED are in the journal before anything follows from them.

    Only a destination that clears up before it has promised anything does so at once: found OPEN, it does so again.
    """

    OPEN = "open"  # memory is under way; the source's copy runs
    ASKED = "asked"  # whole at the destination; is everybody here agreed?
    PREPARED = "prepared"  # agreed: the hypervisors may do their last handshake
    VOTED = "voted"  # source: its hypervisor gave the machine up; destination: its copy is whole, paused and named
    COMMITTED = "committed"  # source: the destination is to run it; destination: it is being started
    DONE = "done"  # the destination's copy runs
    UNDOING = "undoing"  # destination: its copy is being destroyed
    ABORTED = "aborted"  # source: its copy is to run on; destination: its copy never ran and is no more
    DOUBT = "doubt"  # an operator must say which copy is to run


@unique
class Event(Enum):
    """What a side learns: of its own hypervisor and operator, or of its peer."""

    WHOLE = "whole"  # destination: its hypervisor has the whole machine, paused
    APPROVED = "approved"  # everything that has a say here has said yes
    GAVE_UP = "gave_up"  # source: its hypervisor has given the machine up
    TOOK = "took"  # destination: its copy is paused, and has the machine's name
    STARTED = "started"  # destination: its copy was seen to run
    DESTROYED = "destroyed"  # destination: its copy was seen to be gone
    MISSING = "missing"  # this side's copy is not there, and nobody here destroyed it
    FAILED = "failed"  # the local hypervisor, a hook or the relay will not go on
    LOST = "lost"  # the peer was away too long
    RESTARTED = "restarted"  # this relay was, and its copy is there
    RUN_HERE = "run_here"  # operator: run this side's copy; the other is gone or fenced
    GIVE_UP = "give_up"  # operator: give this side's copy up
    PEER_PREPARED = "peer_prepared"
    PEER_VOTED = "peer_voted"
    PEER_COMMITTED = "peer_committed"
    PEER_DONE = "peer_done"
    PEER_ABORTED = "peer_aborted"
    PEER_DOUBT = "peer_doubt"
    PEER_UNKNOWN = "peer_unknown"  # it keeps no record of this hand-over


@unique
class Action(Enum):
    """What has to be done, in the order given: WRITE is on the disk before anything after it begins.

    A command to the hypervisor may outlive the relay that gave it. What a table asks for again after FAILED is to be
    done after a pause.
    """

    WRITE = "write"  # the new state into the journal
    APPROVE = "approve"  # ask everybody who has a say; APPROVED or FAILED will follow
    RELEASE = "release"  # let the hypervisors take their next step
    SAY = "say"  # tell the peer where this side stands
    TAKE = "take"  # destination: give its copy the machine's name; TOOK, MISSING or FAILED will follow
    START = "start"  # destination: run its copy; STARTED, MISSING or FAILED will follow
    DESTROY = "destroy"  # destination: destroy its copy; DESTROYED or FAILED will follow
    REVIVE = "revive"  # source: see to it that its copy runs
    REMOVE = "remove"  # source: see to it that its copy is gone


class Step(NamedTuple):
    """Where an event leads, and what has to be done."""

    state: State
    actions: tuple[Action, ...] = ()


Table = Mapping[tuple[State, Event], Step]

_TURN_BACK: Final = Step(State.ABORTED, (Action.WRITE, Action.REVIVE, Action.SAY))
_GIVEN_AWAY: Final = Step(State.DONE, (Action.WRITE, Action.REMOVE, Action.SAY))
_UNDO: Final = Step(State.UNDOING, (Action.WRITE, Action.DESTROY))
_CLEAR_UP: Final = Step(State.UNDOING, (Action.DESTROY,))
_UNCERTAIN: Final = Step(State.DOUBT, (Action.WRITE, Action.SAY))
_NEVER_RAN: Final = Step(State.ABORTED, (Action.WRITE, Action.SAY))
_RUN: Final = Step(State.COMMITTED, (Action.WRITE, Action.START))
_RUN_AGAIN: Final = Step(State.COMMITTED, (Action.TAKE,))

# A source whose copy is MISSING has lost its host. If it had voted, that copy did not run on, and the destination's is
# the only one: from here on there is nothing to turn back to. Otherwise it may have run on meanwhile (xl resumes it by
# itself) and left the destination's memory older than the disks: an operator must say.
SOURCE: Final[Table] = MappingProxyType(
    {
        (State.OPEN, Event.PEER_PREPARED): Step(State.ASKED, (Action.APPROVE,)),
        (State.OPEN, Event.FAILED): _TURN_BACK,
        (State.OPEN, Event.LOST): _TURN_BACK,
        (State.OPEN, Event.RESTARTED): _TURN_BACK,
        (State.OPEN, Event.PEER_ABORTED): _TURN_BACK,
        (State.OPEN, Event.MISSING): _UNCERTAIN,
        (State.ASKED, Event.APPROVED): Step(State.PREPARED, (Action.WRITE, Action.RELEASE)),
        (State.ASKED, Event.FAILED): _TURN_BACK,
        (State.ASKED, Event.LOST): _TURN_BACK,
        (State.ASKED, Event.MISSING): _UNCERTAIN,
        (State.ASKED, Event.PEER_ABORTED): _TURN_BACK,
        (State.PREPARED, Event.GAVE_UP): Step(State.VOTED, (Action.WRITE, Action.RELEASE, Action.SAY)),
        (State.PREPARED, Event.FAILED): _TURN_BACK,
        (State.PREPARED, Event.LOST): _TURN_BACK,
        (State.PREPARED, Event.RESTARTED): _TURN_BACK,
        (State.PREPARED, Event.PEER_ABORTED): _TURN_BACK,
        (State.PREPARED, Event.MISSING): _UNCERTAIN,
        (State.VOTED, Event.PEER_VOTED): Step(State.COMMITTED, (Action.WRITE, Action.SAY)),
        (State.VOTED, Event.PEER_PREPARED): Step(State.VOTED, (Action.SAY,)),
        (State.VOTED, Event.FAILED): _TURN_BACK,
        (State.VOTED, Event.LOST): _TURN_BACK,
        (State.VOTED, Event.RESTARTED): _TURN_BACK,
        (State.VOTED, Event.MISSING): Step(State.COMMITTED, (Action.WRITE, Action.SAY)),
        (State.VOTED, Event.PEER_ABORTED): _TURN_BACK,
        (State.VOTED, Event.PEER_UNKNOWN): _TURN_BACK,
        (State.COMMITTED, Event.PEER_VOTED): Step(State.COMMITTED, (Action.SAY,)),
        (State.COMMITTED, Event.PEER_DONE): _GIVEN_AWAY,
        (State.COMMITTED, Event.PEER_ABORTED): _TURN_BACK,
        (State.COMMITTED, Event.PEER_UNKNOWN): Step(State.DOUBT, (Action.WRITE,)),
        (State.COMMITTED, Event.PEER_DOUBT): Step(State.DOUBT, (Action.WRITE,)),
        (State.COMMITTED, Event.RUN_HERE): _TURN_BACK,
        (State.COMMITTED, Event.GIVE_UP): _GIVEN_AWAY,
        (State.DOUBT, Event.PEER_VOTED): Step(State.COMMITTED, (Action.WRITE, Action.SAY)),
        (State.DOUBT, Event.PEER_DONE): _GIVEN_AWAY,
        (State.DOUBT, Event.PEER_ABORTED): _TURN_BACK,
        (State.DOUBT, Event.RUN_HERE): _TURN_BACK,
        (State.DOUBT, Event.GIVE_UP): _GIVEN_AWAY,
        (State.DONE, Event.RESTARTED): Step(State.DONE, (Action.REMOVE, Action.SAY)),
        (State.DONE, Event.PEER_PREPARED): Step(State.DONE, (Action.SAY,)),
        (State.DONE, Event.PEER_VOTED): Step(State.DONE, (Action.SAY,)),
        (State.ABORTED, Event.RESTARTED): Step(State.ABORTED, (Action.REVIVE, Action.SAY)),
        (State.ABORTED, Event.PEER_PREPARED): Step(State.ABORTED, (Action.SAY,)),
        (State.ABORTED, Event.PEER_VOTED): Step(State.ABORTED, (Action.SAY,)),
    }
)

# A destination that is PREPARED keeps its copy even if its source is LOST or something has FAILED here: it may be the
# only one left, and a source that lives hears of the failure and turns back. That it is UNDOING is written down: a
# destroy may outlive the relay that asked for it, and the copy must not be started meanwhile.
DESTINATION: Final[Table] = MappingProxyType(
    {
        (State.OPEN, Event.WHOLE): Step(State.ASKED, (Action.APPROVE,)),
        (State.OPEN, Event.FAILED): _CLEAR_UP,
        (State.OPEN, Event.LOST): _CLEAR_UP,
        (State.OPEN, Event.RESTARTED): _CLEAR_UP,
        (State.OPEN, Event.MISSING): _NEVER_RAN,
        (State.OPEN, Event.PEER_ABORTED): _CLEAR_UP,
        (State.ASKED, Event.APPROVED): Step(State.PREPARED, (Action.WRITE, Action.RELEASE, Action.SAY)),
        (State.ASKED, Event.FAILED): _CLEAR_UP,
        (State.ASKED, Event.LOST): _CLEAR_UP,
        (State.ASKED, Event.MISSING): _NEVER_RAN,
        (State.ASKED, Event.PEER_ABORTED): _CLEAR_UP,
        (State.PREPARED, Event.TOOK): Step(State.VOTED, (Action.WRITE, Action.SAY)),
        (State.PREPARED, Event.MISSING): _NEVER_RAN,
        (State.PREPARED, Event.RUN_HERE): Step(State.COMMITTED, (Action.WRITE, Action.TAKE)),
        (State.PREPARED, Event.GIVE_UP): _UNDO,
        (State.PREPARED, Event.PEER_VOTED): Step(State.PREPARED, (Action.TAKE,)),
        (State.PREPARED, Event.PEER_COMMITTED): Step(State.PREPARED, (Action.TAKE,)),
        (State.PREPARED, Event.PEER_DONE): Step(State.PREPARED, (Action.TAKE,)),
        (State.PREPARED, Event.PEER_ABORTED): _UNDO,
        (State.VOTED, Event.MISSING): _NEVER_RAN,
        (State.VOTED, Event.RUN_HERE): _RUN,
        (State.VOTED, Event.GIVE_UP): _UNDO,
        (State.VOTED, Event.PEER_VOTED): Step(State.VOTED, (Action.SAY,)),
        (State.VOTED, Event.PEER_COMMITTED): _RUN,
        (State.VOTED, Event.PEER_DONE): _RUN,
        (State.VOTED, Event.PEER_ABORTED): _UNDO,
        (State.COMMITTED, Event.TOOK): Step(State.COMMITTED, (Action.START,)),
        (State.COMMITTED, Event.STARTED): Step(State.DONE, (Action.WRITE, Action.SAY, Action.RELEASE)),
        (State.COMMITTED, Event.MISSING): _UNCERTAIN,
        (State.COMMITTED, Event.RESTARTED): _RUN_AGAIN,
        (State.COMMITTED, Event.FAILED): _RUN_AGAIN,
        (State.UNDOING, Event.RESTARTED): _CLEAR_UP,
        (State.UNDOING, Event.FAILED): _CLEAR_UP,
        (State.UNDOING, Event.DESTROYED): _NEVER_RAN,
        (State.UNDOING, Event.MISSING): _NEVER_RAN,
        (State.DONE, Event.PEER_VOTED): Step(State.DONE, (Action.SAY,)),
        (State.DONE, Event.PEER_COMMITTED): Step(State.DONE, (Action.SAY,)),
        (State.ABORTED, Event.PEER_VOTED): Step(State.ABORTED, (Action.SAY,)),
        (State.ABORTED, Event.PEER_COMMITTED): Step(State.ABORTED, (Action.SAY,)),
        (State.ABORTED, Event.PEER_ABORTED): Step(State.ABORTED, (Action.SAY,)),
        (State.DOUBT, Event.GIVE_UP): _UNDO,
        (State.DOUBT, Event.PEER_ABORTED): _UNDO,
        (State.DOUBT, Event.PEER_COMMITTED): Step(State.DOUBT, (Action.SAY,)),
    }
)

TABLES: Final[Mapping[Side, Table]] = MappingProxyType({Side.SOURCE: SOURCE, Side.DESTINATION: DESTINATION})

# What a side says of itself, and what the other hears of it. In OPEN, ASKED and UNDOING it says nothing.
HEARD: Final[Mapping[State, Event]] = MappingProxyType(
    {
        State.PREPARED: Event.PEER_PREPARED,
        State.VOTED: Event.PEER_VOTED,
        State.COMMITTED: Event.PEER_COMMITTED,
        State.DONE: Event.PEER_DONE,
        State.ABORTED: Event.PEER_ABORTED,
        State.DOUBT: Event.PEER_DOUBT,
    }
)

# What is found in the journal after a restart: ASKED is passed through in one process or not at all.
WRITTEN: Final = frozenset(State) - {State.ASKED}

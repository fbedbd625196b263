"""What could be wrong with proxy/handover/table.py: each entry left out, each of its actions left out or too late.

`named` are mistakes that somebody might make with the best intentions; several were made.
"""

from collections.abc import Iterator
from typing import Final

from proxy.handover.table import TABLES, Action, Event, Side, State, Step
from tests.model.generate import Key, Mutant

S: Final = Side.SOURCE
D: Final = Side.DESTINATION


def _name(side: Side, key: Key, what: str) -> str:
    return f"{side.value} {key[0].value} {key[1].value}: {what}"


def _of_entry(side: Side, key: Key, step: Step) -> Iterator[Mutant]:
    yield Mutant(_name(side, key, "ignored"), side, {key: None})
    for action in step.actions:
        rest = tuple(other for other in step.actions if other is not action)
        yield Mutant(_name(side, key, f"without {action.value}"), side, {key: Step(step.state, rest)})
        if action is Action.WRITE and rest:
            yield Mutant(_name(side, key, "write last"), side, {key: Step(step.state, (*rest, action))})


def of_entries() -> tuple[Mutant, ...]:
    """All that can be left out of one entry, or be too late in it."""
    return tuple(
        mutant for side, table in TABLES.items() for key, step in table.items() for mutant in _of_entry(side, key, step)
    )


_TURN_BACK: Final = TABLES[S][State.VOTED, Event.LOST]
_COMMIT: Final = TABLES[S][State.VOTED, Event.PEER_VOTED]
_UNCERTAIN: Final = TABLES[D][State.COMMITTED, Event.MISSING]
_GIVEN_AWAY: Final = TABLES[S][State.COMMITTED, Event.PEER_DONE]
_RUN: Final = TABLES[D][State.VOTED, Event.PEER_COMMITTED]
_UNDO: Final = TABLES[D][State.VOTED, Event.PEER_ABORTED]
_CLEAR_UP: Final = TABLES[D][State.OPEN, Event.LOST]
_NEVER_RAN: Final = TABLES[D][State.UNDOING, Event.DESTROYED]


def _of(side: Side, state: State, event: Event, step: Step, what: str) -> Mutant:
    return Mutant(_name(side, (state, event), what), side, {(state, event): step})


def named() -> tuple[Mutant, ...]:
    """Entries that lead elsewhere, or that should not be there."""
    turns_back, commits, starts, undoes = "turns back", "commits", "starts", "undoes"
    return (
        # The source decides what is not its to decide any more.
        *(
            _of(S, State.COMMITTED, event, _TURN_BACK, turns_back)
            for event in (
                Event.LOST,
                Event.FAILED,
                Event.RESTARTED,
                Event.PEER_PREPARED,
                Event.PEER_VOTED,
                Event.PEER_UNKNOWN,
                Event.PEER_DOUBT,
            )
        ),
        _of(S, State.DOUBT, Event.RESTARTED, _TURN_BACK, turns_back),
        _of(S, State.DONE, Event.PEER_ABORTED, _TURN_BACK, turns_back),
        _of(S, State.COMMITTED, Event.MISSING, _GIVEN_AWAY, "is done"),
        _of(S, State.COMMITTED, Event.LOST, _GIVEN_AWAY, "is done"),
        _of(S, State.COMMITTED, Event.PEER_COMMITTED, _GIVEN_AWAY, "is done"),
        _of(S, State.COMMITTED, Event.PEER_ABORTED, _UNCERTAIN, "in doubt"),
        # It commits to a copy that may be older than the disks, or not whole, or is not agreed upon.
        *(
            _of(S, state, Event.MISSING, _COMMIT, commits)
            for state in (State.OPEN, State.ASKED, State.PREPARED, State.ABORTED)
        ),
        _of(S, State.VOTED, Event.MISSING, _UNCERTAIN, "in doubt"),
        _of(S, State.PREPARED, Event.PEER_PREPARED, _COMMIT, commits),
        _of(S, State.PREPARED, Event.PEER_VOTED, _COMMIT, commits),
        _of(S, State.PREPARED, Event.LOST, _COMMIT, commits),
        _of(S, State.ABORTED, Event.PEER_VOTED, _COMMIT, commits),
        _of(S, State.VOTED, Event.PEER_PREPARED, _COMMIT, commits),
        _of(
            S,
            State.PREPARED,
            Event.GAVE_UP,
            Step(State.COMMITTED, (Action.WRITE, Action.RELEASE, Action.SAY)),
            "commits at once",
        ),
        _of(S, State.OPEN, Event.PEER_PREPARED, Step(State.PREPARED, (Action.WRITE, Action.RELEASE)), "asks nobody"),
        _of(S, State.OPEN, Event.PEER_PREPARED, _TURN_BACK, turns_back),
        # The destination runs its copy before it may.
        _of(D, State.PREPARED, Event.TOOK, _RUN, starts),
        _of(D, State.PREPARED, Event.PEER_VOTED, _RUN, starts),
        _of(D, State.PREPARED, Event.PEER_COMMITTED, _RUN, starts),
        _of(D, State.PREPARED, Event.LOST, _RUN, starts),
        _of(D, State.VOTED, Event.PEER_VOTED, _RUN, starts),
        _of(D, State.VOTED, Event.PEER_PREPARED, _RUN, starts),
        _of(D, State.VOTED, Event.LOST, _RUN, starts),
        _of(D, State.VOTED, Event.RESTARTED, _RUN, starts),
        _of(D, State.UNDOING, Event.PEER_COMMITTED, _RUN, starts),
        _of(D, State.DOUBT, Event.RESTARTED, _RUN, starts),
        _of(D, State.ASKED, Event.PEER_COMMITTED, _RUN, starts),
        _of(D, State.COMMITTED, Event.RESTARTED, _RUN, "starts without the name"),
        _of(
            D,
            State.OPEN,
            Event.WHOLE,
            Step(State.PREPARED, (Action.WRITE, Action.RELEASE, Action.SAY)),
            "asks nobody",
        ),
        # It gives its copy up although that may be the only one, or the one that runs.
        *(
            _of(D, state, event, _UNDO, undoes)
            for state in (State.PREPARED, State.VOTED)
            for event in (Event.LOST, Event.FAILED, Event.RESTARTED)
        ),
        *(
            _of(D, State.COMMITTED, event, _UNDO, undoes)
            for event in (Event.LOST, Event.FAILED, Event.RESTARTED, Event.PEER_ABORTED, Event.GIVE_UP)
        ),
        _of(D, State.DONE, Event.PEER_ABORTED, _UNDO, undoes),
        _of(D, State.DONE, Event.RESTARTED, _UNDO, undoes),
        # It says that its copy never ran and is gone, and nobody knows that.
        *(
            _of(D, state, Event.PEER_ABORTED, _NEVER_RAN, "destroys nothing")
            for state in (State.OPEN, State.PREPARED, State.VOTED, State.DOUBT)
        ),
        _of(D, State.PREPARED, Event.GIVE_UP, _NEVER_RAN, "destroys nothing"),
        _of(D, State.OPEN, Event.LOST, _NEVER_RAN, "destroys nothing"),
        _of(D, State.OPEN, Event.RESTARTED, _NEVER_RAN, "destroys nothing"),
        _of(D, State.COMMITTED, Event.MISSING, _NEVER_RAN, "says that it never ran"),
        _of(D, State.UNDOING, Event.FAILED, _NEVER_RAN, "says that it is gone"),
        _of(D, State.UNDOING, Event.RESTARTED, _NEVER_RAN, "says that it is gone"),
        # What is being destroyed is not written down, and may be started meanwhile.
        _of(D, State.PREPARED, Event.PEER_ABORTED, _CLEAR_UP, "not written"),
        _of(D, State.VOTED, Event.PEER_ABORTED, _CLEAR_UP, "not written"),
    )


def chatter() -> Mutant:
    """A source that only answers "voted" by "voted": nothing ever goes wrong, and nothing ever ends."""
    return _of(S, State.VOTED, Event.PEER_VOTED, Step(State.VOTED, (Action.SAY,)), "answers")


def all_mutants() -> tuple[Mutant, ...]:
    """All of them, in the order of their numbers in the binary."""
    return (*named(), *of_entries())

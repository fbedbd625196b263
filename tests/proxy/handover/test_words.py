"""Words between relays: each state that may be said means one event, and nothing else means any."""

from typing import get_args

import pytest

from proxy.control import MessageReader, Recover, Standing, Word, encode
from proxy.handover.table import HEARD, TABLES, Event, Side, State
from proxy.handover.words import event_of, word_of
from proxy.limits import REASON_CHARACTERS_MAX

SAYS_NOTHING = {"open", "asked", "busy"}


def test_every_word_and_what_it_means() -> None:
    """Once more, as the wire format has it."""
    assert {state: event_of(Word(state)) for state in get_args(Standing)} == {
        "open": None,
        "asked": None,
        "busy": None,
        "prepared": Event.PEER_PREPARED,
        "voted": Event.PEER_VOTED,
        "committed": Event.PEER_COMMITTED,
        "done": Event.PEER_DONE,
        "aborted": Event.PEER_ABORTED,
        "doubt": Event.PEER_DOUBT,
        "unknown": Event.PEER_UNKNOWN,
    }


def test_a_visit_s_first_word_means_the_same() -> None:
    for state in get_args(Standing):
        assert event_of(Recover(1, bytes(16), state)) is event_of(Word(state))


@pytest.mark.parametrize("state", HEARD, ids=lambda state: state.value)
def test_what_is_said_is_what_is_heard(state: State) -> None:
    word = word_of(state, "why")
    assert word == Word(state.value, "why")  # type: ignore[arg-type]
    assert event_of(word) is HEARD[state]


def test_every_event_of_a_peer_can_be_said() -> None:
    assert {event for event in Event if event.value.startswith("peer_")} == {
        event_of(Word(state)) for state in get_args(Standing) if state not in SAYS_NOTHING
    }


def test_every_state_has_a_word_but_those_in_between() -> None:
    unsaid = {state for state in State if state.value not in get_args(Standing)}
    assert unsaid == {State.UNDOING}
    assert set(HEARD) == set(State) - {State.OPEN, State.ASKED, State.UNDOING}


@pytest.mark.parametrize("side", Side, ids=lambda side: side.value)
def test_every_event_of_the_table_can_be_told(side: Side) -> None:
    """No row waits for a word that nobody can say."""
    said = {event_of(Word(state)) for state in get_args(Standing)}
    heard = {event for _, event in TABLES[side] if event.value.startswith("peer_")}
    assert heard <= said


def test_a_long_reason_is_cut_to_what_a_peer_takes() -> None:
    """A domain's name may have 255 characters, and be in a reason three times."""
    word = word_of(State.COMMITTED, "cannot start \x1b[2J" + "x" * 765)
    assert len(word.why) == REASON_CHARACTERS_MAX
    assert word.why.isprintable()
    assert MessageReader().feed(encode(word)) == [word]

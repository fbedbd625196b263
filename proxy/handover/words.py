"""What relays say to one another about a hand-over, and what it means to the table."""

from typing import Final, cast

from proxy.control import Recover, Standing, Word, printable
from proxy.handover.table import HEARD, Event, State

_HEARD: Final = {state.value: event for state, event in HEARD.items()} | {"unknown": Event.PEER_UNKNOWN}


def event_of(word: Word | Recover) -> Event | None:
    """What a peer's word means; None where it says nothing that counts."""
    return _HEARD.get(word.state)


def word_of(state: State, why: str, *, paused: bool = False) -> Word:
    """How a side says where it stands; of ``why`` what a peer takes, whose message it would not be otherwise."""
    return Word(cast("Standing", state.value), printable(why), paused)

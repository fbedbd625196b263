"""What a session does for its guard, whatever its peer does."""

import asyncio

import pytest

from crypto.keys import SessionId
from proxy.control import Message
from proxy.handover.table import State
from proxy.session import Role, Session
from proxy.shell import guarded
from proxy.shell.guarded import Guarded
from tests.proxy.support import run


class Unread(Guarded):
    """A session whose peer does not read what it is told."""

    async def say(self, message: Message) -> None:
        await asyncio.Event().wait()


def test_a_peer_that_does_not_read_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word is said while the hand-over is locked: it could never turn back."""
    monkeypatch.setattr(guarded, "CONTROL_SECONDS_MAX", 0.01)

    async def story() -> None:
        session = Unread(Session(Role.SOURCE, SessionId(bytes(16))))
        await session.say_word(State.VOTED, "")

    run(story(), 5.0)

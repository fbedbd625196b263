"""GO at the destination: xl is given its 44 bytes once, whoever gives them, whatever cuts them in two."""

import asyncio
import os
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import HypervisorFailed
from proxy.handover.record import Entry, Head
from proxy.handover.table import Side, State
from proxy.handover.xl import BANNER, GO, READY, SUCCEEDED
from proxy.hypervisors.base import CopyState
from proxy.rate import TokenBucket
from proxy.session import Role, Session
from proxy.shell.channel import Channel
from proxy.shell.journal import Journal, now
from proxy.shell.xl_guard import XlDestinationGuard
from proxy.wire import ChannelId
from tests.proxy.shell.handing import Host, Life, World, quick
from tests.proxy.shell.hosted import VM
from tests.proxy.support import run, until

__all__ = ["quick"]
pytestmark = pytest.mark.usefixtures("quick")


class Receiver:
    """xl migrate-receive, whose input takes so much at a time."""

    label, read_fd = "xl", None

    def __init__(self, world: World) -> None:
        self._world = world
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        with suppress(BlockingIOError):
            while True:
                os.write(self._pipe[1], bytes(4096))  # what is full is never ready
        self.write_fd = self._pipe[1]
        self.room = 0
        self.got = b""
        self._said = False

    def write(self, data: memoryview) -> int:
        took = min(len(data), self.room)
        self.got += bytes(data[:took])
        self.room -= took
        if self.got == GO:
            self._world.put(Side.DESTINATION, CopyState.PAUSED)
        return took

    def read_into(self, buffer: memoryview) -> int | None:
        if self.got != GO or self._said:
            return None
        self._said = True
        buffer[: len(SUCCEEDED)] = SUCCEEDED
        return len(SUCCEEDED)

    def finish(self) -> None: ...

    async def settle(self) -> None: ...

    async def abort(self) -> None:
        for fd in self._pipe:
            os.close(fd)


class Silent:
    """A session that says nothing and ends by itself."""

    async def say_word(self, state: State, why: str, *, paused: bool = False) -> None: ...

    def serve(self, work: Coroutine[Any, Any, None], name: str) -> object:
        return asyncio.ensure_future(work)

    def fail(self, error: BaseException) -> None: ...

    met = True

    async def until_delivered(self) -> None: ...


class Carrier:
    """What a channel tells of what it has written."""

    def __init__(self) -> None:
        self.session = Session(Role.DESTINATION, bytes(16))  # type: ignore[arg-type]
        self.intake = TokenBucket()

    def written(self, *_: object) -> None: ...

    def ended(self) -> None: ...


def prepared(folder: Path) -> tuple[XlDestinationGuard, Channel, Receiver]:
    """READY has been promised, and GO may come."""
    world = World()
    world.copies[Side.DESTINATION] = CopyState.INCOMING
    file = Journal(folder).begin(Head("1" * 32, "destination", "xl", "there", now()), Entry("open", now()))
    file.write(State.PREPARED, "", VM)
    guard = XlDestinationGuard(file, Host(Life(Side.DESTINATION, world)), Silent())
    guard._answers.feed(BANNER + READY)
    receiver = Receiver(world)
    guard.connection = receiver
    channel = Channel(ChannelId(0), receiver, Carrier(), guard)  # type: ignore[arg-type]
    return guard, channel, receiver


@pytest.mark.parametrize("first", [0, 1, 20, 43, 44])
def test_what_is_missing_of_it_is_given(tmp_path: Path, first: int) -> None:
    """The session ends while xl has some of it: all of it once more would be data that it does not expect."""

    async def story() -> None:
        guard, channel, receiver = prepared(tmp_path)
        delivering = asyncio.ensure_future(channel.deliver())
        receiver.room = first
        channel.take(bytearray(GO), memoryview(GO))
        await until(lambda: len(receiver.got) == first)
        await asyncio.sleep(0.01)
        delivering.cancel()
        await asyncio.gather(delivering, return_exceptions=True)
        guard.detached = True
        receiver.room = 1000
        assert await guard.take(VM)
        assert receiver.got == GO
        guard.close()
        await receiver.abort()

    run(story(), 20.0)


@pytest.mark.parametrize("said", [GO + b"\0", b"x", GO[:10] + b"x", b"\0" * 44])
def test_xl_hears_nothing_else(tmp_path: Path, said: bytes) -> None:
    """Or it takes its copy for one that it must destroy."""

    async def story() -> None:
        guard, channel, receiver = prepared(tmp_path)
        receiver.room = 1000
        with pytest.raises(HypervisorFailed):
            channel.take(bytearray(said), memoryview(said))
        assert receiver.got == b""
        guard.close()
        await receiver.abort()

    run(story(), 20.0)

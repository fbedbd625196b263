"""A destination, its hypervisor, and a source spoken by hand whose session may resume: where attacks on that begin."""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from crypto.keys import Direction
from crypto.records import RecordType
from crypto.tls import TlsConfig
from proxy.endpoints.sockets import TcpEgress
from proxy.shell.destination import Terms
from tests.attacks.relays import BOUND_SECONDS, Identities, Receiver, StubHypervisor, noise
from tests.attacks.rogue import MIB, HandLane, RogueSource, Stream, ack, message

PROLOGUE, EPILOGUE = noise(5000, 1), noise(3000, 2)
RESUME_SECONDS = 10


@dataclass
class Scene:
    """A session in good order: a lane, channel 0, and `PROLOGUE` delivered and acknowledged."""

    receiver: Receiver
    hypervisor: StubHypervisor
    rogue: RogueSource
    lane: HandLane
    stream: Stream = field(default_factory=Stream)
    order: int = 1

    @property
    def delivered(self) -> bytes:
        """What the hypervisor got."""
        return bytes(self.hypervisor.sides[0].received)

    async def hears(self, expected: bytes) -> None:
        """The hypervisor has heard exactly this."""
        side = self.hypervisor.sides[0]
        async with asyncio.timeout(5.0):
            await side.until(lambda: len(side.received) >= len(expected))
        assert side.received == expected

    def next(self, body: bytes) -> bytes:
        """The next frame in good order."""
        frame = self.stream.data(body, order=self.order)
        self.order += 1
        return frame

    async def away(self) -> None:
        """Cut the control connection, and wait until the destination has noticed."""
        self.rogue.control.sock.close()
        await until(lambda: self.receiver.runners[0].link is None)

    async def back(self, **changes: object) -> dict[str, Any]:
        """Resume in good order, with a new lane."""
        state = {"channel": 0, "frames": 0, "credit": MIB, "opened": True}
        answer = await self.rogue.comes_back(**({"channels": [state]} | changes))
        if answer["type"] == "resumed" and answer["lanes"]:
            self.lane = await self.rogue.lane()
        return answer

    async def finishes(self, delivered: bytes = PROLOGUE) -> None:
        """The session is none the worse: it goes on and ends well, byte-exact."""
        await self.lane.frame(self.next(EPILOGUE))
        await self.lane.frame(self.stream.end(order=self.order))
        while (found := await self.lane.receive())[0] is not RecordType.FRAME:
            pass
        assert found[1] == Stream(direction=Direction.BACKWARD).end(order=0)
        await self.lane.record(RecordType.ACK, ack(0, 1, 1, MIB))
        await self.rogue.control.say(message("finish"))
        assert await self.rogue.control.hear() == {"type": "finished"}
        await until(lambda: bool(self.receiver.codes) and self.receiver.codes[-1] == 0)
        await self.hypervisor.settled()
        assert self.delivered == delivered + EPILOGUE
        assert [side.ended for side in self.hypervisor.sides] == ["eof"]

    async def ends(self, code: int, delivered: bytes = PROLOGUE, seconds: float = 5.0) -> None:
        """The session has ended so, and the hypervisor knows."""
        assert await self.receiver.verdict(seconds) == code, self.receiver.errors
        await self.hypervisor.settled()
        assert self.delivered == delivered
        assert {side.ended for side in self.hypervisor.sides} == {"reset"}


@asynccontextmanager
async def scene(
    identities: Identities,
    *,
    seconds: int = RESUME_SECONDS,
    terms: Terms | None = None,
    destination: TlsConfig | None = None,
    reads: bool = True,
) -> AsyncIterator[Scene]:
    """A session that may resume.

    Args:
        identities: whose it is.
        seconds: how long it may be without a connection.
        terms: the destination's, if it matters.
        destination: its TLS context, if it matters.
        reads: whether its hypervisor reads.
    """
    async with (
        asyncio.timeout(BOUND_SECONDS),
        StubHypervisor(reads=reads) as hypervisor,
        Receiver(
            destination or identities.destination,
            TcpEgress("127.0.0.1", hypervisor.port, "tcp:egress"),
            terms=terms or Terms(resume_seconds=seconds),
        ) as receiver,
        RogueSource(identities.source, receiver.port) as rogue,
    ):
        answer = await rogue.offer(resume_seconds=seconds)
        assert answer["resume_seconds"] == seconds
        lane = await rogue.lane()
        await rogue.channel()
        made = Scene(receiver, hypervisor, rogue, lane)
        await lane.frame(made.stream.data(PROLOGUE, order=0))
        kind, _ = await lane.receive()
        assert kind is RecordType.ACK
        if reads:
            await made.hears(PROLOGUE)
        yield made


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Until a relay has got so far; it tells nobody."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)


@asynccontextmanager
async def bounded(limit: int) -> AsyncIterator[None]:
    """The peak of Python's memory in here stays within `limit` bytes of where it began."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < limit, f"{(peak - before) / MIB:.1f} MiB"

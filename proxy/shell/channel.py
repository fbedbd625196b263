"""One channel's local end: the pump that frames what its hypervisor sends, the delivery that writes what arrives."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

from proxy.channel import SendHalf
from proxy.endpoints.base import Connection
from proxy.errors import HypervisorFailed
from proxy.limits import FRAME_BYTES_MAX, SMALL_BODY_BYTES, TURN_FRAMES
from proxy.ordering import Outgoing
from proxy.rate import TokenBucket
from proxy.report import SessionReport
from proxy.session import Role, Session
from proxy.shell.framing import Framing
from proxy.shell.lane import FrameOwner
from proxy.shell.naming import Naming
from proxy.shell.waiting import Gate
from proxy.streams.formats import EndWatch
from proxy.wire import ChannelId

P = ParamSpec("P")
R = TypeVar("R")


class Carrier(Protocol):
    """What a channel needs of the session that carries it."""

    session: Session
    report: SessionReport
    bucket: TokenBucket
    """Of what leaves for the peer."""
    intake: TokenBucket
    """Of what has come from it, and goes to the hypervisor."""

    def framing(self, half: SendHalf) -> Framing:
        """How frames are made of what is read from a channel's hypervisor."""

    async def send_frame(self, frame: Outgoing) -> None:
        """Send a frame to the peer, as soon as a lane is free. Its buffer comes back to the pool by itself."""

    def written(self, channel: ChannelId, owner: FrameOwner | None, size: int) -> None:
        """A frame of ``size`` stream bytes has gone to the hypervisor; ``owner`` may be used again."""

    def ended(self) -> None:
        """One of the channel's directions has ended here."""


class Watch(Protocol):
    """Decides what passes between the two hypervisors, and when (``proxy.shell.guard``)."""

    async def read(self, piece: memoryview) -> bool:
        """The local hypervisor has said ``piece``: whether it may go to the peer now, or with what follows it."""

    def ended(self) -> None:
        """The local hypervisor says no more."""

    def arrived(self, body: memoryview) -> None:
        """The peer's hypervisor has said ``body``, which is to be written to the local one."""

    @property
    def free(self) -> bool:
        """Whether all that arrives may be written without asking ``passable``."""

    async def passable(self, size: int) -> int:
        """Wait until some of the next ``size`` bytes may be written to the local hypervisor: how many."""

    def wrote(self, size: int) -> None:
        """They were."""


class Channel:
    """One channel's local end and what waits for it.

    Args:
        number: the channel's.
        connection: its hypervisor.
        carrier: the session.
        guard: sees every byte both ways; None where nothing is guarded.
        naming: holds the migration until it is known to be one that may pass; None where nobody has a say.
    """

    def __init__(
        self,
        number: ChannelId,
        connection: Connection,
        carrier: Carrier,
        guard: Watch | None = None,
        naming: Naming | None = None,
    ) -> None:
        self.number = number
        self.connection = connection
        self.reading, self.writing = Gate(connection.read_fd), Gate(connection.write_fd)
        self.settled = False
        self._carrier, self._guard, self._naming = carrier, guard, naming
        self._inbound: deque[tuple[FrameOwner, memoryview, int] | None] = deque()
        """Checked frames to write onward: what owns the bytes, those left to write, the frame's size. None is END."""
        self._broken = False
        """Whether its hypervisor's connection has failed: a socket tells so once, and afterwards reads as ended."""
        self._held = False
        """Whether the guard waits for more before it lets go what was read."""
        self._blocked = False
        """Whether a delivery is under way that newer frames must not overtake."""

    @property
    def _leaves(self) -> bool:
        """Whether the machine leaves by this end, or arrives."""
        return self._carrier.session.role is Role.SOURCE

    @property
    def _may_pass(self) -> bool:
        """Whether what arrives here may be written: anything to a source, whose machine it is not."""
        if self._naming is None or self._leaves:
            return True
        return self._naming.passed if self.number else not self._naming.holds

    # ---- from the hypervisor

    async def pump(self) -> None:
        """Read the hypervisor into frames, never beyond its credit, until its clean end.

        Raises:
            HypervisorFailed: it broke, or its stream ended before its end.
        """
        try:
            if self._naming is not None and self._leaves and self.number:
                await self._naming.until_passed()  # the first channel tells
            await self._pump()
        finally:
            self.reading.release()  # before anything can close the descriptor

    async def _pump(self) -> None:
        session = self._carrier.session
        half = session.senders[self.number]
        watch = EndWatch() if session.role is Role.SOURCE else None
        framing = self._carrier.framing(half)
        filled = turn = seen = 0
        loop = asyncio.get_running_loop()
        while True:
            waited = loop.time()
            if await self._within_rate():
                framing.starved(loop.time() - waited)
            room = min(framing.room, self._carrier.bucket.frame_bytes or FRAME_BYTES_MAX)
            drained = False
            if filled < room:
                got = await self._read(framing.stream[filled:room])
                if got == 0:
                    break
                filled += got or 0
                # Only a read that found nothing may be followed by waiting: see Gate.
                drained = got is None
            if filled and not self._held and framing.due(filled, room, drained=drained):
                filled = seen = await self._send(framing, watch, filled, seen, final=False)
                turn += 1
                if turn % TURN_FRAMES == 0:
                    # A hypervisor always readable, a lane always writable: nobody else would ever run.
                    await asyncio.sleep(0)
            elif drained:
                waited = loop.time()
                await self.reading.wait_readable()
                framing.starved(loop.time() - waited)
            elif filled >= room:
                await self.reading.wait()
        await self._read_all()
        while filled:
            while half.credit_room < filled or (half.in_flight and framing.room < filled):
                await self.reading.wait()
            filled = seen = await self._send(framing, watch, filled, seen, final=True)
        framing.close()
        await self._check_end(watch)
        self._carrier.ended()
        await framing.end()

    async def _read(self, into: memoryview) -> int | None:
        """Read the hypervisor, under guard if there is one; see ``Connection.read_into``."""
        got = self._local(self.connection.read_into, into)
        if got and self._naming is not None and self._leaves and not self._naming.passed:
            self._naming.saw(into[:got])
            await self._naming.released()
        if got and self._guard is not None:
            self._held = not await self._guard.read(into[:got])
        return got

    async def _read_all(self) -> None:
        """The local hypervisor says no more; what it has said is not all passed on."""
        if self._naming is not None and self._leaves and not self.number:
            self._naming.ended()
            await self._naming.released()
        if self._guard is not None:
            self._guard.ended()

    async def _within_rate(self) -> bool:
        """Wait while the session has sent more than its rate allows; whether it had."""
        bucket = self._carrier.bucket
        if bucket.rate is None:
            return False
        waited = False
        loop = asyncio.get_running_loop()
        while (seconds := bucket.wait_seconds(loop.time())) > 0:
            waited = True
            timer = loop.call_later(seconds, self.reading.wake)
            try:
                await self.reading.wait()
            finally:
                timer.cancel()
        return waited

    async def _send(self, framing: Framing, watch: EndWatch | None, filled: int, seen: int, *, final: bool) -> int:
        """Send a frame of what was read; ``seen`` bytes of it were left over by the last one. Returns what is left."""
        if watch is not None:
            watch.feed(framing.stream[seen:filled])
        left = await framing.send(filled, final=final)
        self._carrier.bucket.spend(filled - left, asyncio.get_running_loop().time())
        return left

    async def _check_end(self, watch: EndWatch | None) -> None:
        """The hypervisor's stream has ended: was it whole?"""
        ended_well = getattr(self.connection, "ended_well", None)
        if ended_well is not None:
            await ended_well()
        if watch is None:
            return
        session = self._carrier.session
        if self.number == 0:
            self._carrier.report.stream_format = watch.format.value
        if watch.cut(answered=session.receivers[self.number].offset > 0):
            kind, size = watch.format.value, session.senders[self.number].offset
            raise HypervisorFailed(
                f"{self.connection.label}: the {kind} stream ended after {size} bytes, before its end"
            )

    # ---- to the hypervisor

    def take(self, owner: FrameOwner, body: memoryview) -> None:
        """A checked frame has arrived: write it now if that is possible, else let it wait for ``deliver``.

        Written here and now it is still in this core's cache, and no task has to wake for it.

        Raises:
            HypervisorFailed: the hypervisor's connection broke.
        """
        size = len(body)
        if self._naming is not None and not self._leaves and not self.number:
            self._naming.saw(body)
        if self._guard is not None:
            self._guard.arrived(body)
        free = self._may_pass and self._carrier.intake.rate is None and (self._guard is None or self._guard.free)
        if free and not self._inbound and not self._blocked:
            body = body[self._local(self.connection.write, body) :]
            if not body:
                self._carrier.written(self.number, owner, size)
                return
        if not isinstance(owner, bytearray) and len(body) < max(SMALL_BODY_BYTES, len(owner.buffer) // 2):
            # Credit counts stream bytes: a tiny frame that waits must not hold a buffer made for a large one.
            small = bytearray(body)
            owner.release()
            owner, body = small, memoryview(small)
        self._inbound.append((owner, body, size))
        self.writing.wake()

    def take_end(self) -> None:
        """A checked END has arrived."""
        if self._naming is not None and not self._leaves and not self.number:
            self._naming.ended()
        self._inbound.append(None)
        self.writing.wake()

    async def deliver(self) -> None:
        """Write what waits to the hypervisor, in order, until END; then pass the half-close on.

        Raises:
            HypervisorFailed: the hypervisor's connection broke.
        """
        try:
            await self._deliver()
        finally:
            self.writing.release()  # before anything can close the descriptor

    async def _deliver(self) -> None:
        connection = self.connection
        while True:
            while not self._inbound:
                await self.writing.wait()
            item = self._inbound.popleft()
            if not self._may_pass and self._naming is not None:
                self._blocked = True
                await (self._naming.until_passed() if self.number else self._naming.released())
                self._blocked = False
            if item is None:
                self.writing.release()  # finishing a pipe closes it
                self._local(connection.finish)
                self._carrier.written(self.number, None, 0)
                self._carrier.ended()
                return
            owner, view, size = item
            self._blocked = True
            await self._take_in(size)
            await self._write(view)
            self._blocked = False
            self._carrier.written(self.number, owner, size)
            if connection.write_fd is None:
                await asyncio.sleep(0)

    async def _take_in(self, size: int) -> None:
        """Wait until the rule of this host lets more in; meanwhile nothing is acknowledged, and credit runs out."""
        intake, loop = self._carrier.intake, asyncio.get_running_loop()
        intake.spend(size, loop.time())
        if (seconds := intake.wait_seconds(loop.time())) > 0:
            await asyncio.sleep(seconds)

    async def _write(self, view: memoryview) -> None:
        connection, guard = self.connection, self._guard
        while view:
            passable = len(view) if guard is None else await guard.passable(len(view))
            took = self._local(connection.write, view[:passable])
            if guard is not None:
                guard.wrote(took)
            view = view[took:]
            if view and took < passable and connection.write_fd is not None:
                await self.writing.wait_writable()

    def _local(self, act: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Do something to the hypervisor's connection; its errors are the hypervisor's failure."""
        if self._broken:
            raise HypervisorFailed(f"{self.connection.label} broke")
        try:
            return act(*args, **kwargs)
        except OSError as error:
            self._broken = True
            raise HypervisorFailed(f"{self.connection.label} broke: {error.strerror or error}") from None

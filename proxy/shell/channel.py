"""One channel's local end: the pump that frames what its hypervisor sends, the delivery that writes what arrives."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

from proxy.endpoints.base import Connection
from proxy.errors import HypervisorFailed
from proxy.limits import BUFFERS_EASY_MAX, FRAME_EAGER_BYTES, OPAQUE_FRAME_BYTES, SMALL_BODY_BYTES, TURN_FRAMES
from proxy.ordering import Outgoing
from proxy.rate import TokenBucket
from proxy.report import SessionReport
from proxy.session import Role, Session
from proxy.shell.lane import BufferPool, Record
from proxy.shell.waiting import Gate
from proxy.streams.formats import EndWatch
from proxy.wire import FRAME_HEADER_BYTES, ChannelId

P = ParamSpec("P")
R = TypeVar("R")

FrameOwner = Record | bytearray
"""What a frame's bytes live in: an opened record with its pool buffer, or a buffer of the frame's own."""


class Carrier(Protocol):
    """What a channel needs of the session that carries it."""

    session: Session
    report: SessionReport
    bucket: TokenBucket
    pool: BufferPool

    async def send_frame(self, frame: Outgoing) -> None:
        """Send a frame to the peer, as soon as a lane is free. Its buffer comes back to the pool by itself."""

    def written(self, channel: ChannelId, owner: FrameOwner | None, size: int) -> None:
        """A frame of ``size`` stream bytes has gone to the hypervisor; ``owner`` may be used again."""

    def ended(self) -> None:
        """One of the channel's directions has ended here."""


class Channel:
    """One channel's local end and what waits for it.

    Args:
        number: the channel's.
        connection: its hypervisor.
        carrier: the session.
    """

    def __init__(self, number: ChannelId, connection: Connection, carrier: Carrier) -> None:
        self.number = number
        self.connection = connection
        self.reading, self.writing = Gate(connection.read_fd), Gate(connection.write_fd)
        self.settled = False
        self._carrier = carrier
        self._inbound: deque[tuple[FrameOwner, memoryview, int] | None] = deque()
        """Checked frames to write onward: what owns the bytes, those left to write, the frame's size. None is END."""
        self._broken = False
        """Whether its hypervisor's connection has failed: a socket tells so once, and afterwards reads as ended."""
        self._blocked = False
        """Whether a delivery is under way that newer frames must not overtake."""

    # ---- from the hypervisor

    async def pump(self) -> None:
        """Read the hypervisor into frames, never beyond its credit, until its clean end.

        Raises:
            HypervisorFailed: it broke, or its stream ended before its end.
        """
        try:
            await self._pump()
        finally:
            self.reading.release()  # before anything can close the descriptor

    async def _pump(self) -> None:
        session, connection = self._carrier.session, self.connection
        half = session.senders[self.number]
        watch = EndWatch() if session.role is Role.SOURCE else None
        buffer = self._carrier.pool.take()
        stream = memoryview(buffer)[FRAME_HEADER_BYTES:]
        filled = turn = 0
        while True:
            await self._within_rate()
            room = min(
                OPAQUE_FRAME_BYTES, session.room_bytes(half), self._carrier.bucket.frame_bytes or OPAQUE_FRAME_BYTES
            )
            drained = False
            if filled < room:
                got = self._local(connection.read_into, stream[filled:room])
                if got == 0:
                    break
                filled += got or 0
                # Only a read that found nothing may be followed by waiting: see Gate.
                drained = got is None
            # A frame leaves when it is full, when it is long enough, or when nothing of this stream is in flight.
            if filled and (filled >= min(room, FRAME_EAGER_BYTES) or not half.in_flight) and room:
                if watch is not None:
                    watch.feed(stream[:filled])
                buffer = await self._send(buffer, filled)
                stream = memoryview(buffer)[FRAME_HEADER_BYTES:]
                filled = 0
                turn += 1
                if turn % TURN_FRAMES == 0:
                    # A hypervisor always readable, a lane always writable: nobody else would ever run.
                    await asyncio.sleep(0)
            elif drained:
                await self.reading.wait_readable()
            elif filled >= room:
                await self.reading.wait()
        if filled:
            while half.credit_room < filled or (half.in_flight and session.room_bytes(half) < filled):
                await self.reading.wait()
            if watch is not None:
                watch.feed(stream[:filled])
            buffer = await self._send(buffer, filled)
        self._carrier.pool.give(buffer)
        await self._check_end(watch)
        order = session.next_order()
        end = half.end(order)
        half.departed(session.flight.depart(0, asyncio.get_running_loop().time()))
        self._carrier.ended()
        await self._carrier.send_frame(Outgoing(order, self.number, memoryview(end), None))

    async def _within_rate(self) -> None:
        """Wait while the session has sent more than its rate allows."""
        bucket = self._carrier.bucket
        if bucket.rate is None:
            return
        loop = asyncio.get_running_loop()
        while (seconds := bucket.wait_seconds(loop.time())) > 0:
            timer = loop.call_later(seconds, self.reading.wake)
            try:
                await self.reading.wait()
            finally:
                timer.cancel()

    async def _send(self, buffer: bytearray, size: int) -> bytearray:
        """Make a frame of ``size`` stream bytes and send it; the buffer to read into next."""
        carrier, session = self._carrier, self._carrier.session
        half = session.senders[self.number]
        frame = memoryview(buffer)[: FRAME_HEADER_BYTES + size]
        order = session.next_order()
        half.data(frame, order)
        now = asyncio.get_running_loop().time()
        carrier.bucket.spend(size, now)
        half.departed(session.flight.depart(size, now))
        if size >= (FRAME_EAGER_BYTES if carrier.pool.out < BUFFERS_EASY_MAX else SMALL_BODY_BYTES):
            await carrier.send_frame(Outgoing(order, self.number, frame, buffer))
            return carrier.pool.take()
        # It may be kept until it is acknowledged: a small one must not hold a buffer made for a large one.
        await carrier.send_frame(Outgoing(order, self.number, memoryview(bytes(frame)), None))
        return buffer

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
        if not self._inbound and not self._blocked:
            body = body[self._local(self.connection.write, body) :]
            if not body:
                self._carrier.written(self.number, owner, size)
                return
        if isinstance(owner, Record) and len(body) < SMALL_BODY_BYTES:
            # Credit counts stream bytes: a tiny frame that waits must not hold a buffer made for a large one.
            small = bytearray(body)
            owner.release()
            owner, body = small, memoryview(small)
        self._inbound.append((owner, body, size))
        self.writing.wake()

    def take_end(self) -> None:
        """A checked END has arrived."""
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
            if item is None:
                self.writing.release()  # finishing a pipe closes it
                self._local(connection.finish)
                self._carrier.written(self.number, None, 0)
                self._carrier.ended()
                return
            owner, view, size = item
            self._blocked = True
            while view := view[self._local(connection.write, view) :]:
                if connection.write_fd is not None:
                    await self.writing.wait_writable()
            self._blocked = False
            self._carrier.written(self.number, owner, size)
            if connection.write_fd is None:
                await asyncio.sleep(0)

    def _local(self, act: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Do something to the hypervisor's connection; its errors are the hypervisor's failure."""
        if self._broken:
            raise HypervisorFailed(f"{self.connection.label} broke")
        try:
            return act(*args, **kwargs)
        except OSError as error:
            self._broken = True
            raise HypervisorFailed(f"{self.connection.label} broke: {error.strerror or error}") from None

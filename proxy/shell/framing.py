"""How a pump makes frames of what it reads: as it is, or by pages through the session's encoding line."""

import asyncio
from typing import Final, Protocol

from chunking.chunker import OpaqueChunker
from chunking.pages import Spans
from chunking.regime import Regime
from proxy.channel import SendHalf
from proxy.guest import GuestView
from proxy.limits import (
    BUFFERS_EASY_MAX,
    FRAME_BYTES_MAX,
    FRAME_EAGER_BYTES,
    IN_FLIGHT_BYTES_MIN,
    OPAQUE_FRAME_BYTES,
    PAGED_FRAME_BYTES_MIN,
    SMALL_BODY_BYTES,
)
from proxy.ordering import Outgoing
from proxy.session import Session
from proxy.shell.encoding import EncodingLine, Job
from proxy.shell.lane import BufferPool, Lent
from proxy.streams.parser import StreamParser
from proxy.wire import FRAME_HEADER_BYTES

_STARVED_SHARE: Final = 0.5  # of the time between two frames: above it the hypervisor is what everybody waits for


class Sender(Protocol):
    """What framing needs of the session that carries the frames."""

    session: Session
    pool: BufferPool
    encoding: EncodingLine | None

    async def send_frame(self, frame: Outgoing) -> None:
        """Send a frame to the peer, as soon as a lane is free. Its buffer comes back to the pool by itself."""


class Framing:
    """Frames that hold the stream's bytes as they are.

    Args:
        carrier: the session.
        half: the channel's sending half.
    """

    def __init__(self, carrier: Sender, half: SendHalf) -> None:
        self._carrier, self._half = carrier, half
        self._pool = carrier.pool
        self._buffer = self._pool.take()
        self.stream = memoryview(self._buffer)[FRAME_HEADER_BYTES:]
        """Where to read into."""

    @property
    def room(self) -> int:
        """Stream bytes the next frame may have now."""
        room = min(OPAQUE_FRAME_BYTES, self._carrier.session.room_bytes(self._half))
        line = self._carrier.encoding
        # What waits behind frames that are being encoded is not in flight yet, and must not pile up all the same.
        return room if line is None else min(room, max(0, IN_FLIGHT_BYTES_MIN - line.plain_bytes))

    def starved(self, seconds: float) -> None:
        """So long the hypervisor had nothing to give."""

    def due(self, filled: int, room: int, *, drained: bool) -> bool:
        """Whether a frame leaves: it is full, or long enough, or nothing of this stream is in flight."""
        del drained
        return bool(room) and (filled >= min(room, FRAME_EAGER_BYTES) or not self._half.in_flight)

    async def send(self, filled: int, *, final: bool) -> int:
        """Make a frame of the first ``filled`` bytes read and send it; how many of them are left for the next one.

        Args:
            filled: bytes read into ``stream``.
            final: whether they are the stream's last, none of which may be left.
        """
        del final
        await self._send_plain(filled)
        return 0

    async def _send_plain(self, size: int) -> None:
        carrier, session = self._carrier, self._carrier.session
        frame = memoryview(self._buffer)[: FRAME_HEADER_BYTES + size]
        line = carrier.encoding
        large = size >= (FRAME_EAGER_BYTES if carrier.pool.out < BUFFERS_EASY_MAX else SMALL_BODY_BYTES)
        order = session.next_order()
        if line is not None and not line.idle:
            claim = self._half.claim(size, order)
            # It may be kept until it is acknowledged: a small one must not hold a buffer made for a large one.
            owner = Lent(self._buffer, self._pool) if large else None
            whole = frame if large else memoryview(bytearray(frame))
            line.put(Job(self._half, claim, whole, owner, None, Regime.RAW))
        else:
            self._half.data(frame, order)
            self._half.departed(session.flight.depart(size, asyncio.get_running_loop().time(), order=order))
            if line is not None:
                line.left(order, size)
            if large:
                await carrier.send_frame(Outgoing(order, self._half.channel, frame, Lent(self._buffer, self._pool)))
            else:
                await carrier.send_frame(Outgoing(order, self._half.channel, memoryview(bytes(frame)), None))
        if large:
            self._renew(self._pool)

    def _renew(self, pool: BufferPool) -> None:
        self._pool = pool
        self._buffer = pool.take()
        self.stream = memoryview(self._buffer)[FRAME_HEADER_BYTES:]

    def close(self) -> None:
        """Nothing more will be read."""
        self._pool.give(self._buffer)

    async def end(self) -> None:
        """Send END, behind all that was sent before; nothing follows."""
        carrier, half = self._carrier, self._half
        line, order = carrier.encoding, carrier.session.next_order()
        claim = half.claim_end(order)
        if line is not None and not line.idle:
            line.put(Job(half, claim, memoryview(b""), None, None, Regime.RAW, last=True))
            return
        frame = memoryview(half.end_frame(claim))
        half.departed(carrier.session.flight.depart(0, asyncio.get_running_loop().time(), order=order))
        await carrier.send_frame(Outgoing(order, half.channel, frame, None))


class PagedFraming(Framing):
    """Frames that the page engine encodes, as far as it pays.

    Args:
        carrier, half: see ``Framing``.
        line: the session's encoding line.
        reader: knows the stream's format.
        large: buffers for a whole frame of pages.
        guest: told of all that is read.
    """

    def __init__(
        self,
        carrier: Sender,
        half: SendHalf,
        line: EncodingLine,
        reader: StreamParser,
        large: BufferPool,
        *,
        guest: GuestView,
    ) -> None:
        super().__init__(carrier, half)
        self._line, self._reader, self._large, self._guest = line, reader, large, guest
        self._regime = Regime.RAW
        """Of the last frame, and so what the next one is likely to be."""
        self._chunker: OpaqueChunker | None = None
        self._since = asyncio.get_running_loop().time()
        """When the last frame left."""
        self._starved = 0.0

    @property
    def room(self) -> int:
        """See ``Framing.room``; a frame that is encoded is bound by credit, and waits while the network is behind."""
        behind = not self._carrier.session.room_bytes(self._half)
        self._line.behind(behind)
        if self._regime is Regime.RAW:
            return super().room
        if behind or self._line.full:
            return 0
        return min(FRAME_BYTES_MAX, self._half.credit_room)

    def due(self, filled: int, room: int, *, drained: bool) -> bool:
        """See ``Framing.due``; a long frame costs less a byte, so while the line is busy it may grow."""
        if self._regime is Regime.RAW:
            return super().due(filled, room, drained=drained)
        if not room:
            return False
        eager = filled >= FRAME_EAGER_BYTES and self._line.idle
        return filled >= room or (drained and (eager or not self._half.in_flight))

    def starved(self, seconds: float) -> None:
        """See ``Framing.starved``."""
        self._starved += seconds

    def _tell_pace(self, used: int) -> None:
        """Tell the choice of work how fast the hypervisor is, where it is the one who takes the time."""
        now = asyncio.get_running_loop().time()
        took = now - self._since
        self._line.adapter.fed(used, took if self._starved > took * _STARVED_SHARE else 0.0)
        self._since, self._starved = now, 0.0

    def _describe(self, filled: int, *, final: bool) -> Spans:
        """Where pages lie in the bytes read; where nobody knows any more, where chunks do that take their place."""
        piece = self.stream[:filled]
        known = self._chunker is None
        describe = self._reader.feed if self._chunker is None else self._chunker.feed
        spans = describe(piece, final=final, urgent=final)
        if not spans.used:
            spans = describe(piece, final=final, urgent=True)
        if known:
            self._guest.saw(spans, self._reader.facts.vm_name)
            if self._reader.decided and not self._reader.paged:
                self._chunker = OpaqueChunker(self._half.offset + spans.used)
        return spans

    async def send(self, filled: int, *, final: bool) -> int:
        """See ``Framing.send``; the beginning of a page is left for the next frame, unless there is nothing else."""
        spans = self._describe(filled, final=final)
        used = spans.used
        rest = bytes(self.stream[used:filled])
        self._tell_pace(used)
        self._regime = regime = self._line.adapter.choose(used)
        self._line.tally.regimes[regime.name.lower()] += 1
        structured = len(spans.pfns) or bool(spans.runs[:, 1].any())  # Xen sends lists of PFNs without a page, too
        if regime is Regime.RAW or used < PAGED_FRAME_BYTES_MIN or not structured:
            await self._send_plain(used)
        else:
            claim = self._half.claim(used, self._carrier.session.next_order())
            whole = memoryview(self._buffer)[: FRAME_HEADER_BYTES + used]
            self._line.put(Job(self._half, claim, whole, Lent(self._buffer, self._pool), spans, regime))
            self._renew(self._pool)
        wanted = self._carrier.pool if self._regime is Regime.RAW else self._large
        if wanted is not self._pool:
            self._pool.give(self._buffer)
            self._renew(wanted)
        self.stream[: len(rest)] = rest
        return len(rest)

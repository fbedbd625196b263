"""The two halves of a channel's direction, sans-IO: numbering, running digest, credit, END.

``SendHalf`` stands where the hypervisor is read, ``ReceiveHalf`` where the stream is written onward. Between them
holds invariant 1: the receiver compares the running BLAKE3 with the frame's before one byte of it goes on.
"""

from collections import deque
from typing import Final, NamedTuple

from blake3 import blake3

from crypto.keys import Direction
from proxy.errors import ProtocolViolation, StreamCorrupt
from proxy.flow import Departure
from proxy.limits import CREDIT_BYTES_MAX, FRAMES_IN_FLIGHT_MAX
from proxy.wire import (
    DIGEST_BYTES,
    FRAME_DIGEST_BYTES,
    FRAME_HEADER,
    FRAME_HEADER_BYTES,
    Ack,
    ChannelId,
    Codec,
    FrameHeader,
    FrameKind,
)

CREDIT_MAX: Final = 2**63 - 1  # a stream offset no stream reaches


class Claim(NamedTuple):
    """A frame's place: numbered in its channel and in the session before its bytes are encoded."""

    number: int
    cache_order: int
    offset: int
    raw_bytes: int


class _Half:
    """Position and running digest of one channel's one direction."""

    def __init__(self, channel: ChannelId, direction: Direction) -> None:
        self.channel = channel
        self.direction = direction
        self.offset = 0
        """Stream bytes framed or received so far."""
        self.frames = 0
        """Frames so far, END included."""
        self.ended = False
        """Whether END has been framed or received."""
        self._hasher = blake3()

    @property
    def digest(self) -> bytes:
        """BLAKE3 of the stream so far (32 bytes)."""
        return self._hasher.digest(DIGEST_BYTES)

    def __str__(self) -> str:
        return f"channel {self.channel} {self.direction.label}"


class SendHalf(_Half):
    """Frames one channel's one direction.

    Args:
        channel: the channel.
        direction: the way the stream runs.
        credit: stream offset up to which the receiver has room.
    """

    def __init__(self, channel: ChannelId, direction: Direction, credit: int) -> None:
        super().__init__(channel, direction)
        self.credit = credit
        self.acknowledged = 0
        """Frames the receiver has written onward."""
        self.acknowledged_bytes = 0
        """Stream bytes in them."""
        self.under_way_bytes = 0
        """Bytes of bodies that have left and are not acknowledged."""
        self._departures: deque[Departure] = deque()

    @property
    def credit_room(self) -> int:
        """Stream bytes the receiver still has room for; 0 while too many frames are unacknowledged.

        Whatever it gives: no receiver has room for more than ``CREDIT_BYTES_MAX``, and what is encoded is kept here.
        """
        if self.in_flight >= FRAMES_IN_FLIGHT_MAX:
            return 0
        return max(0, min(self.credit, self.acknowledged_bytes + CREDIT_BYTES_MAX) - self.offset)

    @property
    def in_flight(self) -> int:
        """Frames sent and not acknowledged."""
        return self.frames - self.acknowledged

    @property
    def finished(self) -> bool:
        """Whether END has been sent and everything acknowledged."""
        return self.ended and self.in_flight == 0

    def claim(self, size: int, cache_order: int) -> Claim:
        """Give the next ``size`` stream bytes their place; ``digest`` and ``departed`` must follow, in the same order.

        Raises:
            ProtocolViolation: the direction has ended, or the credit does not cover the frame (a bug here).
        """
        if self.ended or not 0 < size <= self.credit_room:
            raise ProtocolViolation(f"{self}: a frame of {size} bytes with credit for {self.credit_room}")
        claim = Claim(self.frames, cache_order, self.offset, size)
        self.offset += size
        self.frames += 1
        return claim

    def hash(self, stream: memoryview) -> bytes:
        """Take the stream bytes of the next frame claimed into the running digest; 16 bytes of it. In any thread."""
        self._hasher.update(stream)
        return self._hasher.digest(FRAME_DIGEST_BYTES)

    def head_into(self, buffer: memoryview, claim: Claim, codec: Codec, body_bytes: int, digest: bytes) -> None:
        """Write a frame's header into the first 64 bytes of a buffer."""
        FRAME_HEADER.pack_into(  # as FrameHeader.pack_into, without making one: this runs once a frame
            buffer,
            0,
            FrameKind.DATA,
            codec,
            0,
            self.channel,
            self.direction,
            0,
            claim.number,
            claim.cache_order,
            claim.offset,
            claim.raw_bytes,
            body_bytes,
            digest,
            0,
        )

    def data(self, buffer: memoryview, cache_order: int) -> None:
        """Make an opaque frame of a buffer whose first 64 bytes are left free and whose rest is stream bytes.

        Raises:
            ProtocolViolation: see ``claim``.
        """
        size = len(buffer) - FRAME_HEADER_BYTES
        claim = self.claim(size, cache_order)
        self.head_into(buffer, claim, Codec.OPAQUE, size, self.hash(buffer[FRAME_HEADER_BYTES:]))

    def end(self, cache_order: int) -> bytearray:
        """The END frame: byte count in its offset, full digest as its body."""
        return self.end_frame(self.claim_end(cache_order))

    def claim_end(self, cache_order: int) -> Claim:
        """Give END its place: nothing can be claimed after it."""
        claim = Claim(self.frames, cache_order, self.offset, 0)
        self.frames += 1
        self.ended = True
        return claim

    def end_frame(self, claim: Claim) -> bytearray:
        """The END frame whose place was claimed, once all before it has been hashed. In any thread."""
        frame = bytearray(FRAME_HEADER_BYTES + DIGEST_BYTES)
        FrameHeader(
            kind=FrameKind.END,
            codec=Codec.OPAQUE,
            channel=self.channel,
            direction=self.direction,
            number=claim.number,
            cache_order=claim.cache_order,
            offset=claim.offset,
            raw_bytes=0,
            body_bytes=DIGEST_BYTES,
            digest=self._hasher.digest(FRAME_DIGEST_BYTES),
        ).pack_into(memoryview(frame))
        frame[FRAME_HEADER_BYTES:] = self.digest
        return frame

    def departed(self, departure: Departure) -> None:
        """Remember a frame until it is acknowledged; one call a frame (END's size is 0), before it leaves."""
        self._departures.append(departure)
        self.under_way_bytes += departure.size

    def acknowledge(self, ack: Ack) -> list[Departure]:
        """Take an acknowledgement, return the frames it newly covers; one that is overtaken by a newer says nothing.

        Raises:
            ProtocolViolation: it covers frames never sent, or gives more credit than there can be.
        """
        if ack.frames > self.frames or ack.credit > CREDIT_MAX:
            raise ProtocolViolation(f"{self}: acknowledges {ack.frames} of {self.frames} frames, credit {ack.credit}")
        covered = [self._departures.popleft() for _ in range(ack.frames - self.acknowledged)]
        self.acknowledged += len(covered)
        self.acknowledged_bytes += sum(departure.raw for departure in covered)
        self.under_way_bytes -= sum(departure.size for departure in covered)
        self.credit = max(self.credit, ack.credit)
        return covered


class ReceiveHalf(_Half):
    """Checks the frames of one channel's one direction.

    Args:
        channel: the channel.
        direction: the way the stream runs.
        credit: stream offset up to which the sender may send.
    """

    def __init__(self, channel: ChannelId, direction: Direction, credit: int) -> None:
        super().__init__(channel, direction)
        self.credit = credit
        self.written_bytes = 0
        """Stream bytes written onward."""
        self.written = 0
        """Frames written onward, END included."""
        self._corrupt = False

    @property
    def finished(self) -> bool:
        """Whether END has been received and everything written onward."""
        return self.ended and self.written == self.frames

    def expect(self, header: FrameHeader) -> None:
        """Is this the next frame? ``verify`` must follow, in the same order.

        Raises:
            ProtocolViolation: a frame after END, out of number or offset, or beyond the credit.
            StreamCorrupt: an earlier one was found to be wrong.
        """
        if self._corrupt:
            raise StreamCorrupt(f"{self}: a frame behind one that is wrong")
        if self.ended or header.number != self.frames or header.offset != self.offset:
            raise ProtocolViolation(
                f"{self}: frame {header.number} at {header.offset}, {self.frames} at {self.offset} expected"
            )
        waiting = self.frames - self.written
        # END holds no bytes and comes once: it may follow as many frames as there may be.
        too_many = waiting >= FRAMES_IN_FLIGHT_MAX and header.kind is FrameKind.DATA
        if self.offset + header.raw_bytes > self.credit or too_many:
            raise ProtocolViolation(f"{self}: frame {header.number} goes beyond its credit")
        self.offset += header.raw_bytes
        self.frames += 1
        self.ended = header.kind is FrameKind.END

    def verify(self, header: FrameHeader, stream: memoryview) -> None:
        """Check the bytes that an expected frame stands for (END: its body); only if this returns may they go on.

        In any thread, one frame after another.

        Raises:
            StreamCorrupt: the running digest, or END's count or digest, disagrees.
        """
        if self._corrupt:
            raise StreamCorrupt(f"{self}: a frame behind one that is wrong")
        if header.kind is FrameKind.DATA:
            self._hasher.update(stream)
        elif stream != self.digest:
            self._corrupt = True
            raise StreamCorrupt(f"{self}: END's digest is not that of the {header.offset} bytes received")
        if header.digest != self._hasher.digest(FRAME_DIGEST_BYTES):
            self._corrupt = True
            raise StreamCorrupt(f"{self}: the running digest disagrees at frame {header.number}")

    def accept(self, header: FrameHeader, body: memoryview) -> None:
        """``expect`` and ``verify`` a frame whose body is the stream's own bytes."""
        self.expect(header)
        self.verify(header, body)

    def wrote(self, raw_bytes: int, window: int) -> None:
        """One frame of ``raw_bytes`` has been written onward; the sender may be ``window`` bytes ahead of that."""
        self.written += 1
        self.written_bytes += raw_bytes
        # Credit never shrinks: a smaller window after more channels opened just waits until it is caught up.
        self.credit = max(self.credit, min(CREDIT_MAX, self.written_bytes + window))

    def acknowledgement(self) -> Ack:
        """What to tell the sender now."""
        return Ack(self.channel, self.direction, self.written, self.credit)

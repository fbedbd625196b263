"""One lane on a socket: sealed records out, opened records in, with as few copies and wake-ups as can be."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import NamedTuple

from crypto.errors import RecordTooLarge
from crypto.keys import Direction, EpochKeys, LaneId, Suite, lane_info, lane_secret
from crypto.records import (
    HEADER_BYTES,
    OVERHEAD_BYTES,
    PAYLOAD_BYTES_MAX,
    TAG_BYTES,
    Opener,
    RecordHeader,
    RecordType,
    Sealer,
)
from proxy.errors import PeerLost
from proxy.limits import DRAIN_SECONDS_MAX
from proxy.session import Session
from proxy.shell.waiting import Gate
from proxy.wire import WHOLE_FRAME, FrameFlags

_BUFFER_BYTES = PAYLOAD_BYTES_MAX + TAG_BYTES + HEADER_BYTES


class BufferPool:
    """Plaintext buffers, last in first out, so that the next one used is still cached.

    What bounds their number is the credit a receiver gives, never the pool.

    Args:
        size: bytes of each.
    """

    def __init__(self, size: int = PAYLOAD_BYTES_MAX) -> None:
        self._size = size
        self._free: list[bytearray] = []
        self._made = 0

    @property
    def out(self) -> int:
        """Buffers in use."""
        return self._made - len(self._free)

    def take(self) -> bytearray:
        """A buffer with undefined content. Any thread may take one."""
        try:
            return self._free.pop()
        except IndexError:
            self._made += 1
            return bytearray(self._size)

    def give(self, buffer: bytearray) -> None:
        """Give a buffer back."""
        self._free.append(buffer)


def _nothing() -> None:
    """Nobody wants to know."""


class LaneKeys:
    """Derives the sealer and opener of each lane of one TLS connection.

    Args:
        exporter: that connection's exporter for the session.
        session: the session.
        suite: the AEAD agreed on.
        source_leaf: SHA-256 of the source's leaf certificate.
        destination_leaf: SHA-256 of the destination's.
    """

    def __init__(
        self, exporter: bytes, session: Session, suite: Suite, *, source_leaf: bytes, destination_leaf: bytes
    ) -> None:
        self._exporter, self._session, self._suite = exporter, session, suite
        self._source_leaf, self._destination_leaf = source_leaf, destination_leaf

    def halves(self, lane: LaneId) -> tuple[Sealer, Opener]:
        """The two record halves of a lane, as this session's role uses them."""
        sends = self._session.role.sends
        return Sealer(self._epoch(lane, sends), lane), Opener(self._epoch(lane, sends.opposite), lane)

    def _epoch(self, lane: LaneId, direction: Direction) -> EpochKeys:
        info = lane_info(
            suite=self._suite,
            direction=direction,
            lane=lane,
            source_leaf_sha256=self._source_leaf,
            destination_leaf_sha256=self._destination_leaf,
        )
        return EpochKeys(self._suite, lane_secret(self._exporter, self._session.id, info))


class Record(NamedTuple):
    """An opened record: its header, and a pool buffer of which the first ``header.length`` bytes are its payload."""

    header: RecordHeader
    buffer: bytearray
    pool: BufferPool

    def release(self) -> None:
        """Give the buffer back; nothing of the payload may be used afterwards."""
        self.pool.give(self.buffer)

    @property
    def payload(self) -> memoryview:
        """The plaintext."""
        return memoryview(self.buffer)[: self.header.length]


class Lent(NamedTuple):
    """A buffer of a pool."""

    buffer: bytearray
    pool: BufferPool

    def release(self) -> None:
        """Give the buffer back; nothing of it may be used afterwards."""
        self.pool.give(self.buffer)


FrameOwner = Record | Lent | bytearray
"""What a frame's bytes live in: an opened record or a pool's buffer, to be released, or a buffer of the frame's own."""


def give_back(owner: FrameOwner | None) -> None:
    """Whoever had a frame needs it no more."""
    if owner is not None and not isinstance(owner, bytearray):
        owner.release()


def parts_of(kind: RecordType, payload: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The records that carry something: flags and payload of each; only a frame may need several."""
    size = len(payload)
    if kind is not RecordType.FRAME:
        yield 0, payload
    elif size <= PAYLOAD_BYTES_MAX:
        yield WHOLE_FRAME, payload
    else:
        for start in range(0, size, PAYLOAD_BYTES_MAX):
            part = payload[start : start + PAYLOAD_BYTES_MAX]
            flags = FrameFlags(0)
            if start == 0:
                flags |= FrameFlags.FIRST
            if start + len(part) == size:
                flags |= FrameFlags.LAST
            yield flags, part


class Lane:
    """One lane, carried by the loop itself.

    Args:
        sock: connected and non-blocking; this object owns it.
        lane: its id.
        sealer: for the records this side sends.
        opener: for those it receives.
        pool: where plaintext buffers come from.
    """

    threaded = False
    """Whether frames go to it by ``post_frame``, and are sent by a thread."""

    def __init__(self, sock: socket.socket, lane: LaneId, sealer: Sealer, opener: Opener, pool: BufferPool) -> None:
        self.id = lane
        self._sock = sock
        self._fd = sock.fileno()
        self._sealer, self._opener, self._pool = sealer, opener, pool
        self._sending = asyncio.Lock()
        self._send_gate, self._receive_gate = Gate(self._fd), Gate(self._fd)
        self._sealed = memoryview(bytearray(PAYLOAD_BYTES_MAX + OVERHEAD_BYTES))
        # [header of the record | its body | header of the next one]: each read asks for all that is certain to come.
        self._incoming = memoryview(bytearray(HEADER_BYTES + _BUFFER_BYTES))
        self._filled = 0
        self.idle = True
        """Whether nothing of a record has arrived that is not complete: the peer may be waiting for us."""
        self.on_idle: Callable[[], None] = _nothing
        self.sent_bytes = 0
        self.received_bytes = 0
        self.outstanding = 0
        """Records and frames it was taken for and has not sent yet (see ``Bundle.take``)."""
        self.turn = 0
        """When it was taken last, as ``Bundle`` counts."""

    @property
    def free(self) -> bool:
        """Whether it can be taken for one thing more."""
        return self.outstanding == 0

    @property
    def records_sent(self) -> int:
        """Records sealed so far."""
        return self._sealer.records

    @property
    def records_received(self) -> int:
        """Records opened so far."""
        return self._opener.records

    @property
    def rekeys(self) -> int:
        """Epochs begun after the first, both directions."""
        return self._sealer.epoch + self._opener.epoch

    @property
    def unused(self) -> bool:
        """Whether nothing has passed but the hello and its answer."""
        return self._sealer.records <= 1 and self._opener.records <= 1

    @property
    def position(self) -> tuple[int, int, int]:
        """Bytes that have arrived; how many of them belong to an incomplete record; how many that one lacks."""
        return self.received_bytes, self._filled, self._missing_bytes

    @property
    def _missing_bytes(self) -> int:
        if self._filled == 0:
            return 0
        if self._filled < HEADER_BYTES:
            return HEADER_BYTES - self._filled
        length = int.from_bytes(self._incoming[16:HEADER_BYTES], "big")
        return max(0, HEADER_BYTES + length + TAG_BYTES - self._filled)

    async def send_raw(self, data: bytes) -> None:
        """Send bytes that are no record: the hello's token.

        Raises:
            PeerLost: the connection broke.
        """
        async with self._sending:
            await self._send_all(memoryview(data))

    async def send(self, kind: RecordType, payload: bytes = b"") -> None:
        """Seal and send one small record.

        Raises:
            PeerLost: the connection broke.
        """
        async with self._sending:
            total = self._sealer.seal_into(kind, 0, memoryview(payload), self._sealed)
            await self._send_all(self._sealed[:total])

    async def send_frame(self, frame: memoryview) -> None:
        """Seal and send one frame, its records one behind the other.

        Raises:
            PeerLost: the connection broke.
        """
        async with self._sending:
            for flags, part in parts_of(RecordType.FRAME, frame):
                total = self._sealer.seal_into(RecordType.FRAME, flags, part, self._sealed)
                await self._send_all(self._sealed[:total])

    def start(self) -> None:
        """The hello has been exchanged: from now on records go both ways."""

    def post_frame(self, frame: memoryview, done: Callable[[BaseException | None], None]) -> None:
        """Seal and send one frame on the lane's own thread; ``done`` is called on the loop, with what went wrong."""
        raise NotImplementedError

    async def _send_all(self, view: memoryview) -> None:
        self.sent_bytes += len(view)
        try:
            while True:
                try:
                    sent = self._sock.send(view)
                except BlockingIOError:
                    sent = 0
                if sent == len(view):
                    return
                view = view[sent:]
                await self._send_gate.wait_writable()
        except OSError as error:
            raise PeerLost(f"lane {self.id} broke ({error.strerror})") from None

    async def receive(self) -> Record:
        """The next record, authenticated. Whoever takes it releases it.

        Raises:
            IntegrityError: it is not the record that must come next; nothing of it may be used.
            PeerLost: the connection broke, or ended without FINAL.
        """
        if self._filled < HEADER_BYTES:
            await self._fill(HEADER_BYTES, HEADER_BYTES)
        header = self._opener.parse_header(self._incoming[:HEADER_BYTES])
        end = HEADER_BYTES + header.body_bytes
        # A FINAL is the last thing a lane carries: nothing may be asked for beyond it.
        if self._filled < end:
            await self._fill(end, end if header.type is RecordType.FINAL else end + HEADER_BYTES)
        return self._open(header, end)

    def _open(self, header: RecordHeader, end: int) -> Record:
        """Open the record that stands whole at the buffer's start, and make room for the next."""
        buffer = self._pool.take()
        header_bytes, body = self._incoming[:HEADER_BYTES], self._incoming[HEADER_BYTES:end]
        self._opener.open_into(header, header_bytes, body, memoryview(buffer)[: header.length])
        rest = self._filled - end
        if rest:
            self._incoming[:rest] = self._incoming[end : self._filled]
        self._filled = rest
        return Record(header, buffer, self._pool)

    async def receive_exactly(self, record_bytes: int) -> Record:
        """The next record, which must have this size on the wire: a hello is bounded before it is authenticated.

        Raises:
            RecordTooLarge: it claims another size; else as ``receive``.
        """
        await self._fill(HEADER_BYTES, HEADER_BYTES)
        claimed = HEADER_BYTES + self._opener.parse_header(self._incoming[:HEADER_BYTES]).body_bytes
        if claimed != record_bytes:
            raise RecordTooLarge(f"lane {self.id}: a record of {claimed} bytes, {record_bytes} expected")
        return await self.receive()

    async def _fill(self, least: int, most: int) -> None:
        """Read until at least ``least`` bytes stand in the buffer, asking for ``most``."""
        while self._filled < least:
            try:
                got = self._sock.recv_into(self._incoming[self._filled : most])
            except BlockingIOError:
                await self._wait()
                continue
            except OSError as error:
                raise PeerLost(f"lane {self.id} broke ({error.strerror})") from None
            if got == 0:
                raise PeerLost(f"lane {self.id} ended without FINAL")
            self._filled += got
            self.received_bytes += got

    async def _wait(self) -> None:
        """Until more has arrived."""
        if self._filled <= HEADER_BYTES:
            self.idle = True
            self.on_idle()
        await self._receive_gate.wait_readable()
        self.idle = False

    async def finish(self) -> None:
        """Send FINAL. Raises PeerLost if the connection broke."""
        await self.send(RecordType.FINAL)

    async def close(self) -> None:
        """Half-close and wait for the peer's end, so that FINAL arrives; then close."""
        loop = asyncio.get_running_loop()
        self._release()
        try:
            async with asyncio.timeout(DRAIN_SECONDS_MAX):
                self._sock.shutdown(socket.SHUT_WR)
                while await loop.sock_recv(self._sock, _BUFFER_BYTES):
                    pass
        except (OSError, TimeoutError):
            pass
        finally:
            self._sock.close()

    def drop(self) -> None:
        """Close at once; whoever waits for it finds it broken."""
        self._release()
        self._sock.close()
        self._send_gate.wake()
        self._receive_gate.wake()

    def _release(self) -> None:
        self._send_gate.release()
        self._receive_gate.release()

"""What the rungs of the cost ladder do, one piece at a time: each is a context that gives a function to call.

All of it runs in one thread of one process, so GiB/s and CPU-s/GiB are two ways of saying one thing, unless the
machine is busy with something else. Two kinds of data:

- warm: the same piece again and again, in the L2 cache after its first use;
- cold: the pieces of a block far larger than L2, in turn. Where the L3 cache is larger than the block, that is where
  they come from; the run's metadata has the sizes.

Results go into one buffer that is used again, as the relays do it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import uvloop
from blake3 import blake3

from crypto.keys import SECRET_BYTES, Direction, EpochKeys, LaneId, Suite
from crypto.records import HEADER_BYTES, OVERHEAD_BYTES, Opener, RecordType, Sealer
from proxy.channel import CREDIT_MAX, ReceiveHalf, SendHalf
from proxy.endpoints.sockets import tune
from proxy.flow import Departure
from proxy.shell.lane import BufferPool, Lane
from proxy.wire import FRAME_HEADER_BYTES, WHOLE_FRAME, Ack, ChannelId, FrameHeader

KiB: Final = 1024
MiB: Final = 1024 * KiB
PIECE_BYTES: Final = MiB  # an opaque frame of the relays
BLOCK_BYTES: Final = 256 * MiB  # walked through for cold data: over a hundred times an L2 cache
LANE: Final = LaneId(1)
CHANNEL: Final = ChannelId(0)
LANE_BATCH: Final = 16  # pieces a turn of the event loop, so that starting it does not count
LANE_TIMEOUT_S: Final = 30.0  # for one batch

Act = Callable[[], int]
"""Does one portion of the work and returns how many bytes that was."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one timed slice did."""

    bytes: int
    seconds: float
    cpu_s: float


class Pieces:
    """Where the rungs' bytes come from.

    Args:
        block_bytes: for cold data; a multiple of a piece.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        """Fill the block; a tenth of a second."""
        seed = random_bytes(min(block_bytes, 16 * MiB))
        self._block = bytearray(seed) * (block_bytes // len(seed))
        whole = memoryview(self._block)
        self._cold = [whole[at : at + PIECE_BYTES] for at in range(0, block_bytes, PIECE_BYTES)]

    @property
    def count(self) -> int:
        """Pieces in the block."""
        return len(self._cold)

    def warm(self) -> Iterator[memoryview]:
        """One piece for ever."""
        return itertools.repeat(self._cold[0])

    def cold(self) -> Iterator[memoryview]:
        """All pieces in turn, for ever."""
        return itertools.cycle(self._cold)


def random_bytes(count: int) -> bytes:
    """Incompressible bytes, always the same."""
    return blake3(b"korora bench").digest(count)


def timed(act: Act, slice_s: float) -> Work:
    """Run `act` for about `slice_s` seconds, once before that unmeasured."""
    act()
    total = 0
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    while time.perf_counter() - start_s < slice_s or total == 0:
        total += act()
    return Work(total, time.perf_counter() - start_s, time.process_time() - cpu_start_s)


@contextmanager
def memcpy(pieces: Iterator[memoryview]) -> Iterator[Act]:
    """Copy a piece into a buffer."""
    target = memoryview(bytearray(PIECE_BYTES))

    def act() -> int:
        target[:] = next(pieces)
        return PIECE_BYTES

    yield act


@contextmanager
def digest(pieces: Iterator[memoryview]) -> Iterator[Act]:
    """Feed a piece to a running BLAKE3 and take 16 bytes of it, one thread, as a relay does for each frame."""
    hasher = blake3()

    def act() -> int:
        hasher.update(next(pieces))
        hasher.digest(16)
        return PIECE_BYTES

    yield act


def _keys() -> EpochKeys:
    return EpochKeys(Suite.AES_256_GCM, bytes(SECRET_BYTES))


@contextmanager
def seal(pieces: Iterator[memoryview]) -> Iterator[Act]:
    """Seal a piece into a record."""
    sealer = Sealer(_keys(), LANE)
    out = memoryview(bytearray(PIECE_BYTES + OVERHEAD_BYTES))

    def act() -> int:
        sealer.seal_into(RecordType.FRAME, WHOLE_FRAME, next(pieces), out)
        return PIECE_BYTES

    yield act


@contextmanager
def unseal(pieces: Iterator[memoryview], records_per_round: int) -> Iterator[Act]:
    """Open records into a buffer.

    An opener takes only the next number, so the records are sealed beforehand (`records_per_round` of them: one for
    warm data, a block's worth for cold), and each round of them meets an opener of its own.
    """
    sealer = Sealer(_keys(), LANE)
    records = []
    for _ in range(records_per_round):
        record = memoryview(bytearray(PIECE_BYTES + OVERHEAD_BYTES))
        sealer.seal_into(RecordType.FRAME, WHOLE_FRAME, next(pieces), record)
        records.append(record)
    out = memoryview(bytearray(PIECE_BYTES))
    opener = Opener(_keys(), LANE)
    turn = 0

    def act() -> int:
        nonlocal opener, turn
        if turn == records_per_round:
            opener, turn = Opener(_keys(), LANE), 0
        record = records[turn]
        header_bytes = record[:HEADER_BYTES]
        opener.open_into(opener.parse_header(header_bytes), header_bytes, record[HEADER_BYTES:], out)
        turn += 1
        return PIECE_BYTES

    yield act


@contextmanager
def frame(pieces: Iterator[memoryview]) -> Iterator[Act]:
    """Make a frame of each piece and check it at the other end: header, number, offset, credit, running digests.

    A frame's header stands before its bytes, so the pieces are used in place, each but for its first bytes.
    """
    sender = SendHalf(CHANNEL, Direction.FORWARD, CREDIT_MAX)
    receiver = ReceiveHalf(CHANNEL, Direction.FORWARD, CREDIT_MAX)
    size = PIECE_BYTES - FRAME_HEADER_BYTES

    def act() -> int:
        buffer = next(pieces)
        sender.data(buffer, sender.frames)
        sender.departed(Departure(size, 0.0, 0, raw=size))
        receiver.accept(FrameHeader.parse(buffer), buffer[FRAME_HEADER_BYTES:])
        receiver.wrote(size, CREDIT_MAX)
        sender.acknowledge(Ack(CHANNEL, Direction.FORWARD, receiver.written, CREDIT_MAX))
        return size

    yield act


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection over loopback, non-blocking, set up as the relays set up theirs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname(), timeout=LANE_TIMEOUT_S)
        with sender:
            receiver, _ = listener.accept()
            with receiver:
                for sock in (sender, receiver):
                    sock.setblocking(False)
                    tune(sock)
                yield sender, receiver


@contextmanager
def loopback(pieces: Iterator[memoryview]) -> Iterator[Act]:
    """Send a piece and receive it, in turns as far as the socket's buffers go, with no event loop between."""
    with connected() as (sender, receiver):
        buffer = memoryview(bytearray(PIECE_BYTES))

        def act() -> int:
            left = next(pieces)
            received = 0
            while received < PIECE_BYTES:
                with contextlib.suppress(BlockingIOError):
                    if left:
                        left = left[sender.send(left) :]
                with contextlib.suppress(BlockingIOError):
                    received += receiver.recv_into(buffer[received:])
            return PIECE_BYTES

        yield act


@contextmanager
def lane(pieces: Iterator[memoryview]) -> Iterator[Act]:
    """Send pieces through a sealed lane of the relays and receive them, both ends on one uvloop."""
    pool = BufferPool()
    loop = uvloop.new_event_loop()
    try:
        with connected() as (left, right):

            async def both() -> tuple[Lane, Lane]:
                # Made on the loop, which their gates ask for.
                return (
                    Lane(left, LANE, Sealer(_keys(), LANE), Opener(_keys(), LANE), pool),
                    Lane(right, LANE, Sealer(_keys(), LANE), Opener(_keys(), LANE), pool),
                )

            sending, receiving = loop.run_until_complete(both())

            async def send() -> None:
                for _ in range(LANE_BATCH):
                    await sending.send_frame(next(pieces))

            async def carry() -> None:
                async with asyncio.timeout(LANE_TIMEOUT_S), asyncio.TaskGroup() as group:
                    group.create_task(send())
                    for _ in range(LANE_BATCH):
                        (await receiving.receive()).release()

            def act() -> int:
                loop.run_until_complete(carry())
                return LANE_BATCH * PIECE_BYTES

            try:
                yield act
            finally:
                # Dropped while the loop is there: their gates take their descriptors off it.
                sending.drop()
                receiving.drop()
    finally:
        loop.close()

"""One lane over a socket pair: records however they are cut on the way, and what a receiver may ask for."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.errors import IntegrityError, RecordForged, RecordTooLarge
from crypto.keys import Direction, EpochKeys, LaneId, SessionId, Suite
from crypto.records import HEADER_BYTES, OVERHEAD_BYTES, PAYLOAD_BYTES_MAX, Opener, RecordType, Sealer
from proxy.errors import PeerLost
from proxy.session import Role, Session
from proxy.shell.lane import BufferPool, Lane, LaneKeys
from proxy.wire import WHOLE_FRAME, FrameFlags
from tests.crypto import oracle
from tests.proxy.support import run

LANE = LaneId(1)
SECRET = bytes(range(32))


def keys() -> EpochKeys:
    return EpochKeys(Suite.AES_256_GCM, SECRET)


@contextlib.asynccontextmanager
async def receiving() -> AsyncIterator[tuple[Lane, socket.socket, Sealer]]:
    """A lane that receives, the raw socket that feeds it, and the sealer of the other end."""
    near, far = socket.socketpair()
    for sock in (near, far):
        sock.setblocking(False)
    lane = Lane(near, LANE, Sealer(keys(), LANE), Opener(keys(), LANE), BufferPool())
    try:
        yield lane, far, Sealer(keys(), LANE)
    finally:
        lane.drop()
        far.close()


async def drip(sock: socket.socket, data: bytes, cuts: list[int]) -> None:
    """Send `data` in pieces cut there, a few turns of the loop between them."""
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for index in range(len(edges) - 1):
        await asyncio.get_running_loop().sock_sendall(sock, data[edges[index] : edges[index + 1]])
        for _ in range(3):
            await asyncio.sleep(0)


@settings(max_examples=40)
@given(
    payloads=st.lists(st.one_of(st.binary(max_size=100), st.integers(0, 70_000).map(bytes)), min_size=1, max_size=10),
    cuts=st.lists(st.integers(0, 10**6), max_size=10),
)
def test_records_survive_any_cuts(payloads: list[bytes], cuts: list[int]) -> None:
    async def story() -> None:
        async with receiving() as (lane, far, sealer):
            stream = b"".join(bytes(sealer.seal(RecordType.FRAME, payload)) for payload in payloads)
            stream += bytes(sealer.seal(RecordType.FINAL))
            dripping = asyncio.ensure_future(drip(far, stream, cuts))
            for payload in payloads:
                record = await lane.receive()
                assert (record.header.type, bytes(record.payload)) == (RecordType.FRAME, payload)
            assert (await lane.receive()).header.type is RecordType.FINAL
            await dripping
            assert lane.received_bytes == len(stream)
            assert lane.position == (len(stream), 0, 0)

    run(story())


def test_nothing_is_read_beyond_a_final() -> None:
    """After it the connection may carry whatever its owner likes; the lane has asked for none of it."""

    async def story() -> None:
        async with receiving() as (lane, far, sealer):
            far.send(bytes(sealer.seal(RecordType.FINAL)) + b"not ours")
            await lane.receive()
            assert lane._sock.recv(100) == b"not ours"

    run(story())


def test_what_is_missing_of_a_record() -> None:
    async def story() -> None:
        async with receiving() as (lane, far, sealer):
            record = bytes(sealer.seal(RecordType.FRAME, bytes(100)))
            waiting = asyncio.ensure_future(lane.receive())
            for arrived in range(len(record)):
                expected = HEADER_BYTES - arrived if arrived < HEADER_BYTES else len(record) - arrived
                assert lane.position == (arrived, arrived, expected if arrived else 0)
                far.send(record[arrived : arrived + 1])
                for _ in range(5):
                    await asyncio.sleep(0)
            await waiting
            assert lane.position[1:] == (0, 0)

    run(story())


def test_buffers_are_used_again() -> None:
    async def story() -> None:
        async with receiving() as (lane, far, sealer):
            seen = set()
            for _ in range(20):
                far.send(bytes(sealer.seal(RecordType.FRAME, b"x")))
                record = await lane.receive()
                assert len(record.buffer) >= PAYLOAD_BYTES_MAX
                seen.add(id(record.buffer))
                lane._pool.give(record.buffer)
            assert len(seen) == 1

    run(story())


def test_a_forged_record_gives_nothing_and_stays_forged() -> None:
    async def story() -> None:
        async with receiving() as (lane, far, sealer):
            record = sealer.seal(RecordType.FRAME, b"x")
            record[-1] ^= 1
            far.send(record)
            with pytest.raises(RecordForged):
                await lane.receive()

    run(story())


def test_a_length_over_the_limit_is_refused_before_its_body() -> None:
    async def story() -> None:
        async with receiving() as (lane, far, _):
            far.send(oracle.RECORD_HEADER.pack(1, 3, 3, LANE, 0, 0, PAYLOAD_BYTES_MAX + 1))
            with pytest.raises(RecordTooLarge):
                await lane.receive()

    run(story())


@pytest.mark.parametrize("claimed", [1, 1000, PAYLOAD_BYTES_MAX])
def test_a_hello_of_another_size_is_refused_by_its_header(claimed: int) -> None:
    """Before a lane is authenticated it makes nobody wait for, or hold, more than a hello's bytes."""

    async def story() -> None:
        async with receiving() as (lane, far, _):
            far.send(oracle.RECORD_HEADER.pack(1, 1, 0, LANE, 0, 0, claimed))
            with pytest.raises(RecordTooLarge):
                await lane.receive_exactly(OVERHEAD_BYTES)

    run(story())


@settings(max_examples=60)
@given(st.binary(min_size=1, max_size=200))
def test_arbitrary_bytes_are_an_integrity_error_or_a_loss(data: bytes) -> None:
    async def story() -> None:
        async with receiving() as (lane, far, _):
            far.send(data)
            far.shutdown(socket.SHUT_WR)
            with pytest.raises((IntegrityError, PeerLost)):
                await lane.receive()

    run(story())


@pytest.mark.parametrize("arrived", [0, 1, HEADER_BYTES, HEADER_BYTES + 5])
def test_an_end_without_final_is_a_loss(arrived: int) -> None:
    async def story() -> None:
        async with receiving() as (lane, far, sealer):
            far.send(bytes(sealer.seal(RecordType.FRAME, bytes(50)))[:arrived])
            far.close()
            with pytest.raises(PeerLost, match="without FINAL"):
                await lane.receive()

    run(story())


def test_a_connection_that_breaks_while_sending() -> None:
    async def story() -> None:
        async with receiving() as (lane, far, _):
            far.close()
            with pytest.raises(PeerLost, match="broke"):
                await lane.send_frame(memoryview(bytes(PAYLOAD_BYTES_MAX)))

    run(story())


def test_a_frame_longer_than_a_record_goes_in_parts() -> None:
    size = 2 * PAYLOAD_BYTES_MAX + 1

    async def story() -> None:
        async with receiving() as (lane, far, _):
            other = Lane(far.dup(), LANE, Sealer(keys(), LANE), Opener(keys(), LANE), BufferPool())
            frame = bytes(range(256)) * (size // 256 + 1)
            sending = asyncio.ensure_future(other.send_frame(memoryview(frame[:size])))
            flags, got = [], b""
            while len(got) < size:
                record = await lane.receive()
                flags.append(FrameFlags(record.header.flags))
                got += bytes(record.payload)
            await sending
            assert got == frame[:size]
            assert flags == [FrameFlags.FIRST, FrameFlags(0), FrameFlags.LAST]
            await other.send_frame(memoryview(b"short"))
            assert FrameFlags((await lane.receive()).header.flags) == WHOLE_FRAME
            assert other.sent_bytes == lane.received_bytes == size + 5 + 4 * OVERHEAD_BYTES
            other.drop()

    run(story())


def test_senders_take_turns_by_whole_records() -> None:
    """Frames, acknowledgements and FINAL from several tasks at once, on a lane that is slow to take them."""

    async def story() -> None:
        async with receiving() as (lane, far, _):
            other = Lane(far.dup(), LANE, Sealer(keys(), LANE), Opener(keys(), LANE), BufferPool())
            work = [
                *(other.send_frame(memoryview(bytes([number]) * 500_000)) for number in range(4)),
                *(other.send(RecordType.ACK, bytes([number])) for number in range(4)),
            ]
            sending = asyncio.gather(*work)
            got = []
            for _ in work:
                record = await lane.receive()
                got.append((record.header.type, bytes(record.payload[:1]), len(set(record.payload))))
            await sending
            assert sorted(first for kind, first, _ in got if kind is RecordType.FRAME) == [b"\0", b"\1", b"\2", b"\3"]
            assert all(distinct == 1 for _, _, distinct in got)
            other.drop()

    run(story())


def test_both_ends_derive_matching_halves_and_each_lane_its_own() -> None:
    exporter, session_id = bytes(32), SessionId(bytes(16))
    leaves = {"source_leaf": b"s" * 32, "destination_leaf": b"d" * 32}
    source, destination = (
        LaneKeys(exporter, Session(role, session_id), Suite.AES_256_GCM, **leaves)
        for role in (Role.SOURCE, Role.DESTINATION)
    )
    for lane in (LaneId(0), LaneId(1), LaneId(0xFFFF)):
        ours, theirs = source.halves(lane), destination.halves(lane)
        for (sealer, _), (_, opener), direction in (
            (ours, theirs, Direction.FORWARD),
            (theirs, ours, Direction.BACKWARD),
        ):
            info = oracle.lane_info(1, direction, lane, b"s" * 32, b"d" * 32)
            epoch = oracle.epochs(oracle.lane_secret(exporter, session_id, info), 1)[0]
            assert sealer._keys.key == opener._keys.key == epoch.key
    assert source.halves(LaneId(0))[0]._keys.key != source.halves(LaneId(1))[0]._keys.key

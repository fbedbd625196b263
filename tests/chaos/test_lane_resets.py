"""Every lane is reset, again and again, wherever it happens to be in a frame, an acknowledgement or its hello.

Why: stateful firewalls and load balancers drop long connections by reset, and a mover of gigabytes meets that more
often than others. Resumption that was tried only between two frames loses or repeats bytes when it is cut within one.
"""

import asyncio
import socket
from pathlib import Path

import pytest

from crypto.keys import EpochKeys, LaneId, Suite
from crypto.records import Opener, RecordType, Sealer
from proxy.errors import PeerLost
from proxy.shell.lane import BufferPool, Lane
from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.attacks.wire import Kind
from tests.chaos.faults import Faults, Link, Plan, only
from tests.chaos.load import KIB, LINGER_RESET, MIB, Talk
from tests.chaos.patience import RESUMES, Patience, each_patience
from tests.chaos.relays import standing
from tests.proxy.support import run

LANES_CUT = 4  # so many lanes are reset, then one is left alone; of hellos, five may fail
LANE = LaneId(1)
RESET_SEEN_SECONDS_MAX = 5.0
HELLO_BYTES = 20 + 36  # prefix and sealed HELLO
OFFSETS = (10, 21, 55, 100, 64 * KIB, 64 * KIB + 1, 2 * MIB + 12_345)
"""In the prefix, behind it, in the hello, in the first frame's header, in its body, and later."""


@each_patience
@on_uvloop
async def test_each_lane_is_reset_at_an_offset(hosts: Hosts, tmp_path: Path, patience: Patience) -> None:
    """All lanes of a session die at the same place of what the source sends, one session after another."""
    doomed = -1
    offset = 0

    def plan(link: Link) -> Plan:
        nonlocal doomed
        if link.kind is not Kind.LANE or not doomed:
            return Plan()
        doomed -= 1
        return Plan(Faults(reset_at=offset))

    async with standing(hosts, tmp_path, plan=plan, seed=1, resume_seconds=patience.seconds) as pair:
        # Where a loss is final, each takes a second: for the other side's word about it.
        for number, offset in enumerate(OFFSETS if patience.seconds else OFFSETS[::3]):
            told = f"at {offset}"
            # A lane that dies in its hello costs that connection, never the session: another one is opened.
            doomed = LANES_CUT if patience.seconds or offset < HELLO_BYTES else 1
            before = pair.proxy.did.resets
            ends, codes = await pair.session(Talk(number, 16 * MIB, MIB))
            assert pair.proxy.did.resets > before, told
            if offset < HELLO_BYTES:
                assert codes == (0, 0), f"{told}: {codes}"
                assert ends[0].whole, f"{told}: {ends[0]}"
            else:
                patience.check(ends, codes, told)
                patience.check_reports(pair, control=False)
        doomed = 0
        ends, codes = await pair.session(Talk(100, MIB, MIB))
        assert codes == (0, 0), pair.send.lines
        assert ends[0].whole


@each_patience
@on_uvloop
async def test_acknowledgements_are_cut(hosts: Hosts, tmp_path: Path, patience: Patience) -> None:
    """What the destination has written and the source has not heard of must be sent once, not twice."""
    plan = only(Kind.LANE, Plan(backward=Faults(reset_at=300)), range(LANES_CUT))
    async with standing(hosts, tmp_path, plan=plan, seed=3, resume_seconds=patience.seconds) as pair:
        ends, codes = await pair.session(Talk(1, 24 * MIB, 0))
        patience.check(ends, codes)
        patience.check_reports(pair, control=False)


@each_patience
@pytest.mark.parametrize("lanes", [pytest.param(1, marks=pytest.mark.slow), 4])
@on_uvloop
async def test_lanes_are_reset_all_the_time(hosts: Hosts, tmp_path: Path, patience: Patience, lanes: int) -> None:
    """At moments of the clock, with four channels under way in both directions; all lanes at once."""
    async with standing(hosts, tmp_path, seed=4, resume_seconds=patience.seconds, lanes=lanes) as pair:
        talks = [Talk(seed, 6 * MIB, 6 * MIB) for seed in range(4)]
        pair.proxy.weather(Plan(Faults(bytes_per_second=24 * MIB), Faults(bytes_per_second=24 * MIB)))
        session = asyncio.ensure_future(pair.session(*talks))
        struck = 0
        while not session.done() and struck < LANES_CUT * lanes:
            await asyncio.wait({session}, timeout=0.2)
            if pair.proxy.did.forward_bytes > MIB:
                struck += pair.proxy.reset(Kind.LANE)
        ends, codes = await session
        assert struck >= 1
        patience.check(ends, codes, f"{struck} resets")


@on_uvloop
async def test_one_lane_of_several_is_reset_each_time(hosts: Hosts, tmp_path: Path) -> None:
    """What was on it arrives by another one, once and in its place; each replacement dies as well."""

    def plan(link: Link) -> Plan:
        # Lanes 0, 1 and 2 are the first; of each pair that follows one replaces what died.
        doomed = link.kind is Kind.LANE and link.index in {1, 3, 4, 5, 6}
        # Slow enough that on a busy machine, too, the last of them has come before the session is over.
        forward = Faults(bytes_per_second=5 * MIB, reset_at=(link.index + 1) * 100_001 if doomed else None)
        return Plan(forward, Faults(bytes_per_second=12 * MIB))

    async with standing(hosts, tmp_path, plan=plan, seed=5, resume_seconds=RESUMES.seconds, lanes=3) as pair:
        ends, codes = await pair.session(*(Talk(seed, 12 * MIB, 6 * MIB) for seed in range(3)))
        assert codes == (0, 0), pair.send.lines
        assert all(end.whole for end in ends), [str(end) for end in ends]
        assert pair.proxy.did.resets >= 3
        RESUMES.check_reports(pair, control=False)


@pytest.mark.parametrize("size", [1, 30], ids=["in the header", "in the body"])
def test_a_reset_on_the_heels_of_half_a_record(size: int) -> None:
    """Both arrive before the receiver has woken: it must not wait for a second wake-up to learn of the reset.

    libuv stops to watch a descriptor once epoll has told of an error, after one last call of its reader. Whoever reads
    once in that call and then waits is never called again: a relay sat before a dead lane for 20 s.
    """

    async def story() -> None:
        near, far = _connected()
        near.setblocking(False)
        secret = EpochKeys(Suite.AES_256_GCM, bytes(32))
        record = bytes(Sealer(secret, LANE).seal(RecordType.FRAME, bytes(100)))
        lane = Lane(near, LANE, Sealer(secret, LANE), Opener(secret, LANE), BufferPool())
        receiving = asyncio.ensure_future(lane.receive())
        await asyncio.sleep(0)  # now it waits
        far.send(record[:size])
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        far.close()
        try:
            with pytest.raises(PeerLost):
                async with asyncio.timeout(RESET_SEEN_SECONDS_MAX):
                    await receiving
        finally:
            lane.drop()

    run(story())


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    return near, far

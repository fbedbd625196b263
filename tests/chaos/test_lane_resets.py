"""Every lane is reset, again and again, wherever it happens to be in a frame, an acknowledgement or its hello.

Why: stateful firewalls and load balancers drop long connections by reset, and a mover of gigabytes meets that more
often than others. Resumption that was tried only between two frames loses or repeats bytes when it is cut within one.
"""

import asyncio
from pathlib import Path

from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.attacks.wire import Kind
from tests.chaos.faults import Faults, Link, Plan, only
from tests.chaos.load import KIB, MIB, Talk
from tests.chaos.patience import Patience, each_patience
from tests.chaos.relays import standing

LANES_CUT = 4  # so many lanes are reset, then one is left alone; of hellos, five may fail
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
        for number, offset in enumerate(OFFSETS):
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
                patience.check_reports(pair)
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
        patience.check_reports(pair)


@each_patience
@on_uvloop
async def test_lanes_are_reset_all_the_time(hosts: Hosts, tmp_path: Path, patience: Patience) -> None:
    """At moments of the clock, with four channels under way in both directions."""
    async with standing(hosts, tmp_path, seed=4, resume_seconds=patience.seconds) as pair:
        talks = [Talk(seed, 12 * MIB, 12 * MIB) for seed in range(4)]
        pair.proxy.weather(Plan(Faults(bytes_per_second=24 * MIB), Faults(bytes_per_second=24 * MIB)))
        session = asyncio.ensure_future(pair.session(*talks))
        struck = 0
        while not session.done() and struck < LANES_CUT:
            await asyncio.wait({session}, timeout=0.2)
            if pair.proxy.did.forward_bytes > MIB:
                struck += pair.proxy.reset(Kind.LANE)
        ends, codes = await session
        assert struck >= 1
        patience.check(ends, codes, f"{struck} resets")

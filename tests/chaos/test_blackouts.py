"""The whole network goes away for a while: every connection at once, and nobody can connect meanwhile.

Why: a switch that restarts, a failover, a cable. Code that handles the loss of one connection often handles that of
two at once by two recoveries that fight each other; and one that tries again at once, for ever, floods who comes back.
"""

import asyncio
from pathlib import Path

from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.attacks.wire import Kind
from tests.chaos.faults import Faults, Plan
from tests.chaos.load import MIB, Talk, eventually
from tests.chaos.patience import RESUMES, Patience, each_patience
from tests.chaos.relays import standing

SLOW = Plan(Faults(bytes_per_second=16 * MIB), Faults(bytes_per_second=16 * MIB))
SECONDS = 0.7
TIMES = 2


@each_patience
@on_uvloop
async def test_everything_is_reset_and_refused(hosts: Hosts, tmp_path: Path, patience: Patience) -> None:
    """Once where that ends the session, and again as soon as it has come back where it does not."""
    times = TIMES if patience.seconds else 1
    async with standing(hosts, tmp_path, plan=lambda _: SLOW, seed=times, resume_seconds=patience.seconds) as pair:
        session = asyncio.ensure_future(pair.session(*(Talk(seed, 8 * MIB, 2 * MIB) for seed in range(3))))
        struck = 0
        while not session.done() and struck < times:
            await asyncio.wait({session}, timeout=0.1)
            whole = {Kind.CONTROL, Kind.LANE} <= {link.kind for link in pair.proxy.links}
            if whole and pair.proxy.did.forward_bytes > (1 + 4 * struck) * MIB:
                await pair.proxy.blackout(SECONDS, silence=False)
                struck += 1
        ends, codes = await session
        assert struck == times
        patience.check(ends, codes)
        patience.check_reports(pair, control=True)


@on_uvloop
async def test_a_short_silence_is_no_loss(hosts: Hosts, tmp_path: Path) -> None:
    """TCP repeats what was lost: so short a time is within what heartbeats bear, with no patience at all."""
    async with standing(hosts, tmp_path, plan=lambda _: SLOW, seed=5) as pair:
        session = asyncio.ensure_future(pair.session(Talk(1, 12 * MIB, 6 * MIB)))
        await eventually(lambda: pair.proxy.did.forward_bytes >= 2 * MIB)
        await pair.proxy.blackout(SECONDS, silence=True)
        ends, codes = await session
        assert codes == (0, 0), pair.send.lines
        assert ends[0].whole, str(ends[0])


@on_uvloop
async def test_the_network_is_away_when_a_session_begins(hosts: Hosts, tmp_path: Path) -> None:
    """Nothing can be resumed that has not begun: the peer is unreachable, and the hypervisor knows at once."""
    async with standing(hosts, tmp_path, seed=6, resume_seconds=RESUMES.seconds) as pair:
        await pair.proxy.refuse(SECONDS)
        ends = await pair.talk(Talk(1, MIB, MIB))
        assert ends.near.ended == "reset"
        assert ends.far is None
        assert await pair.send.judged(1) == [6]
        await pair.proxy.calm_again()
        ends = await pair.talk(Talk(2, MIB, MIB))
        assert ends.whole
        assert await pair.send.judged(2) == [6, 0]
        assert await pair.receive.judged(1) == [0]

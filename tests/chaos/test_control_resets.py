"""The control connection is reset, again and again, while the lanes go on.

Why: control is small and idle most of the time, so it is what middleboxes forget first. A relay that notices only
when it next has something to say there finds out at the end, when it is too late to tell anybody.
"""

import asyncio
from pathlib import Path

import pytest

from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.attacks.wire import Kind
from tests.chaos.faults import Faults, Plan
from tests.chaos.load import MIB, Talk, eventually
from tests.chaos.patience import Patience, each_patience
from tests.chaos.relays import standing

TIMES = 4
AT_ONCE_SECONDS_MAX = 10.0  # a heartbeat's limit is 15 s: this was noticed by the reset itself
SLOW = Plan(Faults(bytes_per_second=16 * MIB), Faults(bytes_per_second=16 * MIB))


@each_patience
@pytest.mark.parametrize("how", ["reset", "end"])
@on_uvloop
async def test_control_is_lost_under_load(hosts: Hosts, tmp_path: Path, patience: Patience, how: str) -> None:
    async with standing(hosts, tmp_path, plan=lambda _: SLOW, seed=1, resume_seconds=patience.seconds) as pair:
        session = asyncio.ensure_future(pair.session(Talk(1, 24 * MIB, 8 * MIB), Talk(2, 8 * MIB, MIB)))
        struck = 0
        while not session.done() and struck < TIMES:
            await asyncio.wait({session}, timeout=0.25)
            if pair.proxy.did.forward_bytes > MIB:
                before = pair.proxy.did.resets + pair.proxy.did.shuts
                if how == "reset":
                    pair.proxy.reset(Kind.CONTROL)
                else:
                    pair.proxy.shut(Kind.CONTROL)
                struck += pair.proxy.did.resets + pair.proxy.did.shuts > before
        ends, codes = await session
        assert struck >= 1
        patience.check(ends, codes, f"{struck} times")
        patience.check_reports(pair, control=True)
        pair.proxy.weather(Plan())
        ends, codes = await pair.session(Talk(3, MIB, MIB))
        assert codes == (0, 0)
        assert ends[0].whole


@each_patience
@on_uvloop
async def test_control_is_lost_while_nothing_moves(hosts: Hosts, tmp_path: Path, patience: Patience) -> None:
    """A paused migration: what is said after the loss must still arrive, or both must know at once."""
    async with standing(hosts, tmp_path, seed=2, resume_seconds=patience.seconds) as pair:
        talk = Talk(1, MIB, MIB, hold=asyncio.Event())
        session = asyncio.ensure_future(pair.session(talk))
        await pair.backend.held(talk)
        async with asyncio.timeout(AT_ONCE_SECONDS_MAX):
            for _ in range(TIMES if patience.seconds else 1):
                await eventually(lambda: pair.proxy.reset(Kind.CONTROL))  # once it has come back
            if patience.seconds:
                assert talk.hold is not None
                talk.hold.set()
            ends, codes = await session
        patience.check(ends, codes)

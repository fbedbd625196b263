"""A daemon is reloaded again and again while sessions run, begin and end.

Why: a reload replaces what open sessions were made with. Where it is done in place, a session that begins in the
middle of it gets half of each; where listeners are closed and opened, who connects between finds nobody; where the old
is kept "until it is no longer used", it is kept for ever. A failed one must change nothing at all.
"""

import asyncio
import os
from itertools import count
from pathlib import Path

from tests.attacks.relays import on_uvloop
from tests.chaos.daemons import Daemons, Way, daemons
from tests.chaos.load import KIB, MIB, Talk
from tests.chaos.relays import Usage

WAYS = 3
RELOADS = 12  # of each daemon; every third is bad, every fourth brings a new certificate
WARM_UP_RELOADS = 2
LONG_BYTES = 96 * MIB
DESCRIPTORS_SLACK = 2
# The executor, which grows to 4 more than there are processors and is used up by signing; the store's writer; and a few
# that a process makes with its first session. One left behind by each of the sessions would be many more.
THREADS_SLACK = 8 + (os.cpu_count() or 1)


async def reload(pair: Daemons, turn: int) -> None:
    for daemon in (pair.alpha, pair.beta):
        host = daemon.host
        if turn % 4 == 3:
            pair.renew(host)
        host.settings = f"[limits]\nrate_limit = {(400 + turn % 2) * MIB}\n"
        host.write()
        if turn % 3 == 2:
            host.config.write_text(host.text() + "\n[limits]\n")  # a table twice
        await daemon.reload(good=turn % 3 != 2)


@on_uvloop
async def test_reloads_under_load(tmp_path: Path) -> None:
    async with daemons(tmp_path, WAYS) as pair:
        await pair.ways[0].session(Talk(1, MIB, MIB))
        for turn in range(WARM_UP_RELOADS):
            await reload(pair, turn)
        over = asyncio.Event()
        seeds = count(10)
        sessions = 1

        async def short(way: Way) -> None:
            """One session after another; whoever connects during a reload is served all the same."""
            nonlocal sessions
            while not over.is_set():
                ends, code = await way.session(Talk(next(seeds), 700 * KIB, 100 * KIB))
                assert (code, ends.whole) == (0, True), f"{code}: {ends}"
                sessions += 1

        async def long(way: Way) -> None:
            """One session that sees all the reloads."""
            nonlocal sessions
            talk = Talk(next(seeds), LONG_BYTES, MIB, hold=over)
            ends, code = await way.session(talk)
            assert (code, ends.whole) == (0, True), f"{code}: {ends}"
            sessions += 1

        async def reloading() -> None:
            try:
                for turn in range(RELOADS):
                    await reload(pair, turn)
            finally:
                over.set()

        before = await at_rest(pair)
        async with asyncio.TaskGroup() as group:
            group.create_task(long(pair.ways[0]))
            for way in pair.ways[1:]:
                group.create_task(short(way))
            group.create_task(reloading())
        assert sessions > WAYS
        source, destination = await pair.finished(sessions)
        assert source == destination == [0] * sessions
        for name, now in (await at_rest(pair)).items():
            assert now.descriptors <= before[name].descriptors + DESCRIPTORS_SLACK, (name, before[name], now)
            assert now.threads <= before[name].threads + THREADS_SLACK, (name, before[name], now)


async def at_rest(pair: Daemons) -> dict[str, Usage]:
    """What every process holds once that no longer changes."""
    usages = pair.usages
    for _ in range(40):
        await asyncio.sleep(0.1)
        last, usages = usages, pair.usages
        if all(usages[name].descriptors == last[name].descriptors for name in usages):
            break
    return usages

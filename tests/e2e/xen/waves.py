"""Several guests that migrate at once, and a cut of the link that meets each of them at a moment left to chance."""

import asyncio
import random
import time
from collections import Counter
from datetime import UTC, datetime

from tests.e2e.xen.cuts import (
    COMMAND_SECONDS,
    Migration,
    Records,
    check_ends,
    go_through,
    records_of,
    start,
)
from tests.e2e.xen.daemons import journals_of
from tests.e2e.xen.host import Guest
from tests.e2e.xen.rig import Pair

STAGGER_SECONDS = 1.0  # from one `xl migrate` to the next
CUT_SECONDS = 5.0  # longer than losses are waited out
LATE_ONES = 0.8  # of the cuts: while there are hand-overs; before that Python starts, and memory goes over


async def run_waves(two: Pair, *, waves: int, guests: int, seed: int) -> None:
    """Cut the link once in each wave, for CUT_SECONDS; every guest is then held to what cuts.py says of one.

    When a wave's hand-overs are is measured by two without a cut: a number of seconds would be another moment on each
    machine.
    """
    dice = random.Random(seed)
    for calm in ("first", "calm"):  # what migrates first takes longer
        names = await created(two, calm, guests)
        began = datetime.now(UTC)
        places = await check_ends(two, await all_started(two, names))
        assert places == ["b"] * guests, places
    first, last = [(moment - began).total_seconds() for moment in await handed_over(two, names)]
    met: Counter[str] = Counter()
    stay: list[str] = []
    for number in range(waves):
        after = dice.uniform(first, last) if dice.random() < LATE_ONES else dice.uniform(first / 4, first)
        names = stay + await created(two, f"w{number}", guests - len(stay))
        try:
            stay = await wave(two, names, after, met)
        except Exception as error:
            raise AssertionError(f"wave {number} of seed {seed}, cut after {after:.2f} s: {error!r}") from error
        when = f"cut after {after:.1f} s, hand-overs from {first:.1f} to {last:.1f}"
        print(f"wave {number}: {when}: {dict(met)}; {len(stay)} stayed", flush=True)
    assert len(met) > 2, met  # the cuts have met more than one state
    await go_through(two, stay)


async def handed_over(two: Pair, names: list[str]) -> tuple[datetime, datetime]:
    """From the first of these machines that was whole until the last one's source knew that all is done."""
    at: dict[str, list[datetime]] = {"prepared": [], "done": []}
    for lines in await journals_of(two.a):
        for state, moments in at.items():
            if lines[-1]["name"] in names:
                moments.append(next(datetime.fromisoformat(one["at"]) for one in lines[1:] if one["state"] == state))
    return min(at["prepared"]), max(at["done"])


async def created(two: Pair, name: str, guests: int) -> list[str]:
    """So many new guests on a."""
    names = [f"{name}-{number}" for number in range(guests)]
    for one in names:
        await two.a.create(Guest(one, "beat"))
    return names


async def all_started(two: Pair, names: list[str]) -> list[Migration]:
    """Migrate them beside each other, until every `xl migrate` has ended."""
    its = []
    for name in names:
        its.append(await start(two, name))
        await asyncio.sleep(STAGGER_SECONDS)
    await asyncio.gather(*(two.a.ended(f"migrate-{name}", COMMAND_SECONDS) for name in names))
    return its


async def wave(two: Pair, names: list[str], cut_after: float, met: Counter[str]) -> list[str]:
    """Migrate these with a cut; those that have stayed."""
    cutting = asyncio.create_task(cut_at(two, time.monotonic() + cut_after, CUT_SECONDS))
    try:
        its = await all_started(two, names)
        met.update(standing(await cutting, its))
    finally:
        cutting.cancel()
        await asyncio.gather(cutting, return_exceptions=True)
    places = await check_ends(two, its)
    return [name for name, where in zip(names, places, strict=True) if where == "a"]


async def cut_at(two: Pair, when: float, seconds: float) -> Records:
    """Cut the link at a time of the monotonic clock; how the journals stood then."""
    await asyncio.sleep(max(0.0, when - time.monotonic()))
    await two.to_b.proxy.blackout(seconds, silence=False)
    stood = dict(zip("ab", await asyncio.gather(*map(records_of, two.hosts)), strict=True))
    await asyncio.sleep(seconds)  # the cut is over before anybody asks how it went
    return stood


def standing(records: Records, its: list[Migration]) -> list[str]:
    """Where each guest's hand-over stood, as its source had written it down."""
    found = []
    for it in its:
        mine = [one for one in records["a"] if one.get("name") == it.name and one["session"] not in it.earlier]
        found.append(mine[-1]["state"] if mine else "not begun")
    return found

"""Several guests that migrate at once, and a cut of the link that meets each of them at a moment left to chance."""

import asyncio
import random
import time
from collections import Counter

from tests.e2e.xen.cuts import (
    COMMAND_SECONDS,
    Migration,
    Records,
    check_ends,
    records_of,
    start,
)
from tests.e2e.xen.host import Guest
from tests.e2e.xen.rig import Pair

STAGGER_SECONDS = 1.0  # from one `xl migrate` to the next
LATE = (0.8, 1.0)  # of a wave's time: the hand-overs; before them Python starts, and memory goes over
EARLY = (0.2, 0.8)
LATE_ONES = 0.7  # of the cuts


async def run_waves(two: Pair, *, waves: int, guests: int, cut_seconds: float, seed: int) -> None:
    """Cut the link once in each wave, for `cut_seconds`; every guest is then held to what cuts.py says of one.

    How long a wave takes is measured by one without a cut: a number of seconds would be another moment on each machine.
    """
    dice = random.Random(seed)
    took = await wave(two, [f"calm-{number}" for number in range(guests)], None, 0.0)
    met: Counter[str] = Counter()
    for number in range(waves):
        after = took * dice.uniform(*(LATE if dice.random() < LATE_ONES else EARLY))
        names = [f"w{number}-{guest}" for guest in range(guests)]
        try:
            took_now = await wave(two, names, after, cut_seconds, met)
        except Exception as error:
            raise AssertionError(f"wave {number} of seed {seed}, cut after {after:.2f} s: {error!r}") from error
        print(
            f"wave {number}: cut after {after:.1f} s of {took:.1f}, over in {took_now:.1f} s; {dict(met)}", flush=True
        )
    assert len(met) > 2, met  # the cuts have met more than one state


async def wave(
    two: Pair, names: list[str], cut_after: float | None, cut_seconds: float, met: Counter[str] | None = None
) -> float:
    """One wave; the seconds until every `xl migrate` had ended."""
    for name in names:
        await two.a.create(Guest(name, "beat"))
    began = time.monotonic()
    its = []
    cutting = None if cut_after is None else asyncio.create_task(cut_at(two, began + cut_after, cut_seconds))
    try:
        for name in names:
            its.append(Migration(two, name, two.a, 0, await start(two, name), set()))
            await asyncio.sleep(STAGGER_SECONDS)
        await asyncio.gather(*(two.a.ended(f"migrate-{name}", COMMAND_SECONDS) for name in names))
        took = time.monotonic() - began
        if cutting is not None and met is not None:
            met.update(standing(await cutting, names))
    finally:
        if cutting is not None:
            cutting.cancel()
            await asyncio.gather(cutting, return_exceptions=True)
    await check_ends(two, its)
    return took


async def cut_at(two: Pair, when: float, seconds: float) -> Records:
    """Cut the link at a time of the monotonic clock; how the journals stood then."""
    await asyncio.sleep(max(0.0, when - time.monotonic()))
    await two.to_b.proxy.blackout(seconds, silence=False)
    stood = dict(zip("ab", await asyncio.gather(*map(records_of, two.hosts)), strict=True))
    await asyncio.sleep(seconds)  # the cut is over before anybody asks how it went
    return stood


def standing(records: Records, names: list[str]) -> list[str]:
    """Where each guest's hand-over stood, as its source had written it down."""
    states = {record.get("name"): record["state"] for record in records["a"]}
    return [states.get(name, "not begun") for name in names]

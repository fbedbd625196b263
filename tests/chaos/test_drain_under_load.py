"""A daemon is told to end while sessions run and others knock.

Why: an update drains a host's daemon in the middle of evacuating the host. Drains that cut what runs, that accept what
comes in the gap and cut that, or that never end because one session never does, each lose migrations.
"""

import asyncio
import signal
from collections import Counter
from itertools import count
from pathlib import Path

import pytest

from tests.attacks.relays import on_uvloop
from tests.chaos.daemons import Way, daemons
from tests.chaos.load import KIB, MIB, Talk, eventually

EXIT_POLICY = 3
GONE = {4, 6}
RUNNING = 4
KNOCKING = 2
REFUSALS = 8  # of each
SECONDS_MAX = 30.0


def failed(tasks: list["asyncio.Task[None]"]) -> bool:
    """Raise what ended one of them early."""
    for task in tasks:
        if task.done():
            task.result()
    return False


@pytest.mark.parametrize("side", ["alpha", "beta"])
@on_uvloop
async def test_drain_under_load(tmp_path: Path, side: str) -> None:
    async with daemons(tmp_path, RUNNING + KNOCKING) as pair:
        drained = pair.alpha if side == "alpha" else pair.beta
        release = asyncio.Event()
        seeds = count(1)
        whole = 0
        refused: Counter[str] = Counter()

        async def knock(way: Way) -> None:
            """Session after session: each is served whole, or refused before it has carried a byte."""
            nonlocal whole
            while not release.is_set():
                try:
                    ends, code = await way.session(Talk(next(seeds), 300 * KIB, 50 * KIB))
                except ConnectionError:  # nobody listens any more, or stopped just before it took us
                    refused[way.name] += 1
                    await asyncio.sleep(0.02)
                    continue
                if ends.whole:
                    whole += 1
                else:
                    # Once its last session is over the daemon goes: whoever knocks then finds nobody.
                    codes = {EXIT_POLICY, None} | (GONE if release.is_set() else set())
                    assert code in codes, f"{code}: {ends}"
                    assert ends.near.ended == "reset", str(ends)
                    assert ends.far is None, "it was begun and cut"
                    refused[way.name] += 1

        talks = [Talk(1000 + number, 24 * MIB, 6 * MIB, hold=release) for number in range(RUNNING)]
        running = [asyncio.ensure_future(way.session(talk)) for way, talk in zip(pair.ways, talks, strict=False)]
        knockers = pair.ways[RUNNING:]
        knocking = [asyncio.ensure_future(knock(way)) for way in knockers]
        try:
            await eventually(lambda: whole >= KNOCKING)
            drained.process.send_signal(signal.SIGTERM)
            await drained.event("draining")
            # What each began before the drain is over once it has been refused.
            await eventually(lambda: min(refused[way.name] for way in knockers) >= 1 or failed(knocking))
            before = whole
            await eventually(lambda: min(refused[way.name] for way in knockers) >= REFUSALS or failed(knocking))
            assert whole == before, "a session was let in after the drain had begun"
            assert drained.process.returncode is None, "it ended before its sessions had"
            release.set()
            for ends, code in await asyncio.gather(*running):
                assert (code, ends.whole) == (0, True), str(ends)
            async with asyncio.timeout(SECONDS_MAX):
                assert await drained.ended() == 0
                await asyncio.gather(*knocking)
        finally:
            for task in (*running, *knocking):
                task.cancel()
            await asyncio.gather(*running, *knocking, return_exceptions=True)
        codes = [int(event.get("exit_code", 0)) for event in drained.verdicts]
        assert set(codes) == {0}, codes
        assert len(codes) == RUNNING + whole, drained.lines

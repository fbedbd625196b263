"""A daemon is told to end while sessions run and others knock.

Why: an update drains a host's daemon in the middle of evacuating the host. Drains that cut what runs, that accept what
comes in the gap and cut that, or that never end because one session never does, each lose migrations.
"""

import asyncio
import signal
from itertools import count
from pathlib import Path

import pytest

from tests.attacks.relays import on_uvloop
from tests.chaos.daemons import Way, daemons
from tests.chaos.load import KIB, MIB, Talk, eventually

EXIT_POLICY = 3
RUNNING = 4
KNOCKING = 2
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
        refused = whole = 0

        async def knock(way: Way) -> None:
            """Session after session: each is served whole, or refused before it has carried a byte."""
            nonlocal refused, whole
            while not release.is_set():
                try:
                    ends, code = await way.session(Talk(next(seeds), 300 * KIB, 50 * KIB))
                except ConnectionError:  # nobody listens any more, or stopped just before it took us
                    refused += 1
                    await asyncio.sleep(0.02)
                    continue
                if ends.whole:
                    whole += 1
                else:
                    assert (code, ends.near.ended) == (EXIT_POLICY, "reset"), f"{code}: {ends}"
                    assert ends.far is None, "it was begun and cut"
                    refused += 1

        talks = [Talk(1000 + number, 24 * MIB, 6 * MIB, hold=release) for number in range(RUNNING)]
        running = [asyncio.ensure_future(way.session(talk)) for way, talk in zip(pair.ways, talks, strict=False)]
        knocking = [asyncio.ensure_future(knock(way)) for way in pair.ways[RUNNING:]]
        try:
            await eventually(lambda: whole >= KNOCKING)
            drained.process.send_signal(signal.SIGTERM)
            await drained.event("draining")
            await eventually(lambda: refused >= 5 * KNOCKING or failed(knocking))
            before = whole
            await eventually(lambda: refused >= 10 * KNOCKING or failed(knocking))
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
        assert len(codes) == RUNNING + whole

"""Segments of a few bytes, latency and jitter, a slow link: nothing of that is a fault, and all must simply work.

Why: a parser that is right when whole records arrive is often wrong when they come byte by byte; code that waits a
fixed time is wrong on a long path; a window that is too small stops there.
"""

from pathlib import Path

import pytest

from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.chaos.faults import Faults, Plan
from tests.chaos.load import KIB, MIB, Talk
from tests.chaos.relays import standing

WEATHERS = {
    "splits of up to 7 bytes": (Faults(split_bytes=7), 100 * KIB),
    "splits of up to 3000 bytes": (Faults(split_bytes=3000), 8 * MIB),
    "20 ms and as much jitter": (Faults(delay_seconds=0.02, jitter_seconds=0.02), 16 * MIB),
    "100 ms": (Faults(delay_seconds=0.1), 6 * MIB),
    "2 MiB a second": (Faults(bytes_per_second=2 * MIB), MIB),
    "all of it": (Faults(split_bytes=2000, delay_seconds=0.03, jitter_seconds=0.05, bytes_per_second=4 * MIB), MIB),
}


@pytest.mark.parametrize("name", WEATHERS)
@on_uvloop
async def test_it_just_works(hosts: Hosts, tmp_path: Path, name: str) -> None:
    faults, size = WEATHERS[name]
    plan = Plan(faults, faults)
    async with standing(hosts, tmp_path, plan=lambda _: plan, seed=1) as pair:
        ends, codes = await pair.session(Talk(1, size, size // 3), Talk(2, size // 4, size // 4))
        assert codes == (0, 0), pair.send.lines
        assert all(end.whole for end in ends), [str(end) for end in ends]
        source, destination = pair.reports()
        assert source["digest_blake3"] == destination["digest_blake3"]

"""Segments of a few bytes, latency and jitter, a slow link: nothing of that is a fault, and all must simply work.

Why: a parser that is right when whole records arrive is often wrong when they come byte by byte; code that waits a
fixed time is wrong on a long path; a window that is too small stops there.
"""

from pathlib import Path

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


@on_uvloop
async def test_it_just_works(hosts: Hosts, tmp_path: Path) -> None:
    """One session after another through the same pair, each in another weather."""
    async with standing(hosts, tmp_path, seed=1) as pair:
        for number, (name, (faults, size)) in enumerate(WEATHERS.items()):
            pair.proxy.weather(Plan(faults, faults))
            talks = Talk(2 * number, size, size // 3), Talk(2 * number + 1, size // 4, size // 4)
            ends, codes = await pair.session(*talks)
            assert codes == (0, 0), f"{name}: {pair.send.lines}"
            assert all(end.whole for end in ends), f"{name}: {[str(end) for end in ends]}"
            source, destination = pair.reports()
            assert source["digest_blake3"] == destination["digest_blake3"], name

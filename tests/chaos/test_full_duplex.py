"""Eight channels, both directions of each at full speed.

Why: a relay that reads a connection only when it has nothing to write to it, or shares one queue among channels,
stops for ever once both ends push: each waits for the other to read. multifd with its return path does push.
"""

from pathlib import Path

import pytest

from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.chaos.faults import Faults, Plan
from tests.chaos.load import KIB, MIB, Talk
from tests.chaos.relays import standing

CHANNELS = 8
EACH = 12 * MIB
PEAK_KIB_MAX = 256 * KIB


@pytest.mark.parametrize("lanes", [1, 3])
@on_uvloop
async def test_both_ways_at_full_speed(hosts: Hosts, tmp_path: Path, lanes: int) -> None:
    async with standing(hosts, tmp_path, lanes=lanes) as pair:
        talks = [Talk(seed, EACH, EACH, writes=(MIB,)) for seed in range(CHANNELS)]
        ends, codes = await pair.session(*talks)
        assert codes == (0, 0), pair.send.lines
        assert all(end.whole for end in ends), [str(end) for end in ends]
        source, destination = pair.reports()
        assert source["channels"] == destination["channels"] == CHANNELS
        assert source["digest_blake3"] == destination["digest_blake3"]
        for relay in (pair.send, pair.receive):
            assert relay.usage.peak_kib <= PEAK_KIB_MAX, relay.usage


@pytest.mark.parametrize("slow", ["forward", "backward"])
@on_uvloop
async def test_one_way_slow_and_the_other_fast(hosts: Hosts, tmp_path: Path, slow: str) -> None:
    """The acknowledgements of the fast direction travel on the slow one: that must not stop either."""
    crawl = Faults(bytes_per_second=4 * MIB)
    plan = Plan(forward=crawl) if slow == "forward" else Plan(backward=crawl)
    async with standing(hosts, tmp_path, plan=lambda _: plan) as pair:
        sizes = (MIB, 6 * MIB) if slow == "forward" else (6 * MIB, MIB)
        ends, codes = await pair.session(*(Talk(seed, *sizes) for seed in range(4)))
        assert codes == (0, 0), pair.send.lines
        assert all(end.whole for end in ends), [str(end) for end in ends]

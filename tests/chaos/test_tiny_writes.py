"""A hundred thousand writes of one byte, both ways at once.

Why: Proxmox's tunnel handled bytes one at a time and reached 1 MB/s where the network had 300. A relay that makes a
record of each read turns a byte into a hundred and a microsecond into a wake-up of four processes; one that waits for
more instead holds up the last byte of a request for ever.
"""

import asyncio
from pathlib import Path

from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.chaos.load import KIB, Talk
from tests.chaos.relays import standing

WRITES = 100_000
SECONDS_MAX = 30.0  # 4 on an idle machine, most of it this test's own writes
WIRE_BYTES_PER_BYTE_MAX = 64  # a record alone is 100 bytes around a byte: most must have travelled together


@on_uvloop
async def test_one_byte_at_a_time(hosts: Hosts, tmp_path: Path) -> None:
    async with standing(hosts, tmp_path) as pair:
        async with asyncio.timeout(SECONDS_MAX):
            ends, codes = await pair.session(Talk(1, WRITES, WRITES, writes=(1,)))
        assert codes == (0, 0), pair.send.lines
        assert ends[0].whole, str(ends[0])
        wire = pair.reports()[0]["bytes_wire"]
        for way in ("forward", "backward"):
            assert wire[way] < WIRE_BYTES_PER_BYTE_MAX * WRITES, wire


@on_uvloop
async def test_tiny_ones_among_large_ones(hosts: Hosts, tmp_path: Path) -> None:
    """On four channels at once, each write of another size."""
    async with standing(hosts, tmp_path) as pair:
        talks = [Talk(seed, 400 * KIB, 400 * KIB, writes=(1, 2, 3, 17, 4095, 4096, 65_537)) for seed in range(4)]
        ends, codes = await pair.session(*talks)
        assert codes == (0, 0), pair.send.lines
        assert all(end.whole for end in ends), [str(end) for end in ends]

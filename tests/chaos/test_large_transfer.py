"""Far more bytes than any buffer holds.

Why: what is kept per byte or per frame (a list that is never cut, a retransmit buffer without a bound, a digest's
copies) shows only after gigabytes, as memory; and a guest of today has hundreds of them. Counters and offsets that
are kept in 32 bits break at 4 GiB, so the slow transfer goes beyond it.
"""

from pathlib import Path

import pytest

from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.chaos import load
from tests.chaos.load import KIB, MIB, Talk
from tests.chaos.relays import standing

GIB = 1024 * MIB
PEAK_KIB_MAX = 256 * KIB  # a one-session relay's share, by docs/security.md's bounds with room for the interpreter
SECONDS_MAX = 600.0
SMALL_SESSIONS = 8
"""What an allocator keeps of one session stands beside the next one's buffers, until there is enough of it."""


@pytest.mark.parametrize("encode", ["opaque", "pages", "auto"])
@pytest.mark.parametrize(
    "size",
    [512 * MIB, pytest.param(5 * GIB, marks=[pytest.mark.slow, pytest.mark.timeout(SECONDS_MAX)])],
    ids=["512 MiB", "5 GiB"],
)
def test_memory_does_not_follow_the_stream(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, encode: str
) -> None:
    monkeypatch.setattr(load, "TALK_SECONDS_MAX", SECONDS_MAX)

    @on_uvloop
    async def story() -> None:
        async with standing(hosts, tmp_path, encode=encode) as pair:
            for seed in range(SMALL_SESSIONS):
                await pair.session(Talk(seed, 64 * MIB, 0, writes=(MIB,)))
            before = [relay.usage.peak_kib for relay in (pair.send, pair.receive)]
            ends, codes = await pair.session(Talk(SMALL_SESSIONS, size, 1000, writes=(MIB,)))
            assert codes == (0, 0), pair.send.lines
            assert ends[0].whole, str(ends[0])
            source, destination = pair.reports()
            assert source["bytes_in"]["forward"] == destination["bytes_out"]["forward"] >= size
            assert source["digest_blake3"] == destination["digest_blake3"]
            for relay, peak in zip((pair.send, pair.receive), before, strict=True):
                assert relay.usage.peak_kib <= PEAK_KIB_MAX, relay.usage
                assert relay.usage.peak_kib - peak <= 32 * KIB, f"{peak} KiB after 64 MiB, then {relay.usage}"

    story()

"""A real network between two hosts: packets are lost, bandwidth is short, the cable is pulled.

Why: over loopback nothing is ever lost, late or partial, and a proxy speaks TCP itself, so that what it does to the
relays is always well-formed TCP. Here the kernel repeats, backs off and stalls as it does in a rack.
"""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.chaos.load import MIB, Talk, eventually
from tests.chaos.namespaces import NAME, NAMESPACES, Host, Link, missing, two_hosts
from tests.chaos.patience import LOSS_IS_FINAL, RESUMES, Patience
from tests.chaos.relays import Standing, apart

PULLED_SECONDS = 5.0
PID_OF_NOBODY = 2**22 + 1  # above the kernel's highest
BITS_PER_SECOND = 80_000_000
LIMITED_BYTES = 12 * MIB
UNPLUGGED_BITS_PER_SECOND = 40_000_000  # so that the transfer is still under way when the cable is pulled

Network = tuple[Host, Host, Link]


@pytest.fixture(scope="module")
def allowed() -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def network(allowed: None) -> Iterator[Network]:
    with two_hosts() as made:
        yield made


def ours() -> set[str]:
    return {path.name for path in NAMESPACES.glob(f"{NAME}-{os.getpid()}-*")} if NAMESPACES.exists() else set()


@pytest.mark.usefixtures("allowed")
def test_nothing_is_left_behind() -> None:
    before = ours()
    made = []
    with suppress(LookupError), two_hosts() as (here, there, _):
        made += sorted(ours() - before)
        raise LookupError
    assert made == [here.name, there.name]
    assert ours() == before
    stale = f"{NAME}-{PID_OF_NOBODY}-0-a"
    subprocess.run(("ip", "netns", "add", stale), check=True)
    with two_hosts():
        assert not (NAMESPACES / stale).exists(), "what a killed run left is swept by the next"


async def exact(pair: Standing, *talks: Talk) -> None:
    ends, codes = await pair.session(*talks)
    assert codes == (0, 0), (pair.send.lines, pair.receive.lines)
    assert all(end.whole for end in ends), [str(end) for end in ends]
    source, destination = pair.reports()
    assert source["digest_blake3"] == destination["digest_blake3"]


@pytest.mark.parametrize(("per_mille", "size"), [(10, 24 * MIB), (50, 3 * MIB)])
@on_uvloop
async def test_packets_are_lost(hosts: Hosts, tmp_path: Path, network: Network, per_mille: int, size: int) -> None:
    """One and five in a hundred, each way."""
    here, there, link = network
    link.lose(per_mille)
    async with apart(hosts, tmp_path, here, there) as pair:
        await exact(pair, Talk(1, size, size // 6), Talk(2, MIB, MIB))
        assert link.lost() > 20


@on_uvloop
async def test_bandwidth_is_short(hosts: Hosts, tmp_path: Path, network: Network) -> None:
    here, there, link = network
    link.limit(BITS_PER_SECOND)
    async with apart(hosts, tmp_path, here, there) as pair:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await exact(pair, Talk(1, LIMITED_BYTES, MIB))
        seconds = LIMITED_BYTES * 8 / BITS_PER_SECOND
        assert 0.8 * seconds < loop.time() - began < 5 * seconds


@pytest.mark.parametrize("patience", [pytest.param(LOSS_IS_FINAL, marks=pytest.mark.slow), RESUMES], ids=str)
@on_uvloop
async def test_the_cable_is_pulled(hosts: Hosts, tmp_path: Path, network: Network, patience: Patience) -> None:
    """For five seconds, in the middle of it: TCP bears that, and so does the session, whatever its patience."""
    here, there, link = network
    link.limit(UNPLUGGED_BITS_PER_SECOND)
    async with apart(hosts, tmp_path, here, there, resume_seconds=patience.seconds) as pair:
        talk = Talk(1, 12 * MIB, 2 * MIB)
        session = asyncio.ensure_future(exact(pair, talk))
        await eventually(lambda: (end := pair.backend.ends.get(1)) is not None and end.heard > 2 * MIB)
        async with link.unplugged(PULLED_SECONDS):
            await asyncio.sleep(0.5)  # what was on its way arrives
            heard = pair.backend.ends[1].heard
        assert pair.backend.ends[1].heard == heard, "the cable was not pulled at all"
        await session

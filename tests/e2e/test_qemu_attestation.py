"""A real guest changes hosts that attest, a swtpm each as their TPM; where a host was changed, it stays."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.tpms import SoftTpm, soft_tpm
from korora.agents.vtpm.tcti import Tpm
from korora.demo.relays import KORORA
from tests.e2e.guarded import Guarded, Which, guarded
from tests.e2e.rig import MIB, SPEC, STEP_SECONDS, Rig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
BOTH: tuple[Which, Which] = ("source", "destination")


@dataclass
class Hosts:
    """Both hosts' TPMs, and the folder of what either may be."""

    tpms: dict[Which, SoftTpm]
    known: Path

    def options(self, which: Which) -> list[str]:
        return ["--tpm", self.tpms[which].tcti, "--attestation", str(self.known)]

    def change(self, which: Which) -> None:
        """Another boot loader was started there."""
        Tpm(self.tpms[which].tcti).extend(4, b"another boot loader".ljust(32))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with soft_tpm(tmp_path / "tpm-source") as source, soft_tpm(tmp_path / "tpm-destination") as destination:
        made = Hosts({"source": source, "destination": destination}, tmp_path / "known")
        for which in BOTH:
            command = [*KORORA, "attest", "enrol", which, "--tpm", made.tpms[which].tcti, "--attestation", made.known]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        yield made


@asynccontextmanager
async def attested(rig: Rig, hosts: Hosts) -> AsyncIterator[Guarded]:
    options = {"source_options": hosts.options("source"), "destination_options": hosts.options("destination")}
    async with guarded(rig, **options) as made:  # type: ignore[arg-type]
        yield made


async def test_a_guest_goes_where_the_host_is_what_it_may_be(rig: Rig, hosts: Hosts) -> None:
    async with attested(rig, hosts) as made:
        await made.migrate()
        assert await made.one_runs() == "destination"
        assert made.logs().count("tpm2 ak 000b") == 2


@pytest.mark.parametrize("changed", BOTH)
async def test_a_guest_stays_where_a_host_was_changed(rig: Rig, hosts: Hosts, changed: Which) -> None:
    """Not a byte has gone to the destination's QEMU, which waits on, and the guest counts on at the source."""
    async with attested(rig, hosts) as made:
        hosts.change(changed)
        await made.migrate()
        await made.until(lambda: "PCR 4 of sha256" in told(made, other(changed)), STEP_SECONDS)
        await made.until(lambda: "attestation failed" in told(made, changed), STEP_SECONDS)
        assert "PCR" not in told(made, changed)
        last = made.source.serial.last
        assert last is not None
        enough = last.checked + SPEC.checks_of_everything
        await made.source.wait_beat(lambda beat: beat.checked >= enough, STEP_SECONDS)
        assert made.destination.serial.beats == []
        assert made.states() == {}
        status = await made.destination.qmp.execute("query-migrate")
        assert not status.get("ram", {}).get("transferred")


async def test_a_session_that_comes_back_is_attested_again(rig: Rig, hosts: Hosts) -> None:
    """The destination was changed while the network was away: the source gives it nothing more."""
    async with attested(rig, hosts) as made:
        await made.migrate(bandwidth=4 * 1024 * 1024)
        await made.until(lambda: "tpm2 ak" in told(made, "source"), STEP_SECONDS)
        async with asyncio.timeout(STEP_SECONDS):
            while await transferred(made) < MIB:  # noqa: ASYNC110 - QEMU tells of no such event
                await asyncio.sleep(0.02)
        hosts.change("destination")
        made.network.reset()
        await made.until(lambda: "PCR 4 of sha256" in told(made, "source"), STEP_SECONDS)
        assert await made.one_runs() == "source"


async def transferred(made: Guarded) -> int:
    """Bytes of its memory that the source's QEMU has sent."""
    status = await made.source.qmp.execute("query-migrate")
    return int(status.get("ram", {}).get("transferred", 0))


def other(which: Which) -> Which:
    return BOTH[1 - BOTH.index(which)]


def told(made: Guarded, which: Which) -> str:
    """All that the relay of that host has said."""
    return "".join(path.read_text(errors="replace") for path in sorted(made.folder.glob(f"{which}-relay-*")))

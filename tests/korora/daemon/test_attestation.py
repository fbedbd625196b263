"""Daemons that attest, a swtpm each: what is configured is demanded, in both directions, and a reload changes it."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bench.tpms import soft_tpm
from crypto.attestation.reference import render
from korora import enrolment
from korora.agents.vtpm.tcti import Tpm
from tests.korora.daemon.support import SECONDS_MAX, Host, Machine, Site, exchange, in_thread, until
from tests.korora.daemon.test_sessions import Pair, pair
from tests.proxy.support import run

pytestmark = pytest.mark.timeout(180)


def enrol(known: Path, host: str, tpm: Tpm) -> None:
    now = datetime.now(UTC)
    tpm.keep()
    asked, pending = enrolment.ask(enrolment.request(tpm), enrolment.PCRS_DEFAULT, None, now)
    made = enrolment.conclude(host, pending, enrolment.answer(tpm, asked), now)
    enrolment.put(known / f"{host}.toml", render(made).encode())


class Attested:
    def __init__(self, hosts: Pair, tpms: dict[str, Tpm]) -> None:
        self.hosts, self.tpms = hosts, tpms

    @property
    def both(self) -> tuple[Host, Host]:
        return self.hosts.alpha, self.hosts.beta


@pytest.fixture
def attested(site: Site, tmp_path: Path) -> Iterator[Attested]:
    hosts = pair(site, 1, 1)
    with soft_tpm(tmp_path / "tpm-alpha") as alpha, soft_tpm(tmp_path / "tpm-beta") as beta:
        tpms = {"alpha": Tpm(alpha.tcti), "beta": Tpm(beta.tcti)}
        for host, swtpm in ((hosts.alpha, alpha), (hosts.beta, beta)):
            host.settings += f'tpm = "{swtpm.tcti}"\nattestation = "{tmp_path / "known"}"\n'
            enrol(tmp_path / "known", host.name, tpms[host.name])
        yield Attested(hosts, tpms)
        hosts.close()


async def passes(machine: Machine) -> None:
    near, far = await machine.channel()
    await exchange(near, far, b"there" * 1000, b"back" * 1000)


async def refused(machine: Machine) -> None:
    assert await (await machine.connect()).broken()


def test_both_ways_until_a_host_is_changed(attested: Attested) -> None:
    attested.hosts.start()
    there, back = attested.hosts.machines

    async def story() -> None:
        await passes(there)
        await passes(back)
        attested.tpms["beta"].extend(4, b"another boot loader".ljust(32))
        await refused(there)
        await refused(back)
        alpha, beta = attested.both
        await in_thread(until, lambda: alpha.log().count("PCR 4 of sha256: expected") >= 2)
        assert "PCR 4" not in beta.log()
        for host in attested.both:
            done = [report for report in host.reports() if report["exit_code"] == 0]
            assert len(done) == 2
            assert all(report["attested"].startswith("tpm2 ak 000b") for report in done)
        failed = [report for report in alpha.reports() if report["exit_code"] == 4]
        assert [report["bytes_out"]["forward"] for report in failed] == [0]

    run(story(), SECONDS_MAX)


def test_a_folder_that_is_none_stops_a_daemon_before_it_begins(attested: Attested, tmp_path: Path) -> None:
    alpha = attested.hosts.alpha
    alpha.settings = alpha.settings.replace("known", "nowhere")
    alpha.start(ready=False)
    assert alpha.wait() == 2
    assert "is no folder of reference values" in alpha.log()


def test_a_reload_takes_what_is_demanded_over(attested: Attested) -> None:
    """beta demands nothing at first: alpha, whose TPM it would not know, sends to it until it does."""
    alpha, beta = attested.both
    settings = beta.settings
    beta.settings = ""
    alpha.settings = "\n".join(line for line in alpha.settings.splitlines() if "attestation" not in line) + "\n"
    attested.tpms["alpha"].extend(7, b"x" * 32)
    attested.hosts.start()
    there, _ = attested.hosts.machines

    async def story() -> None:
        await passes(there)
        beta.settings = settings
        beta.write()
        assert (await in_thread(beta.ask, "reload"))["ok"]
        await refused(there)
        await in_thread(until, lambda: "PCR 7 of sha256: expected" in beta.log())

    run(story(), SECONDS_MAX)

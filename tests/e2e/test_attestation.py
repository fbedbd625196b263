"""Two relays, a swtpm each as their host's TPM: what is attested migrates, and one changed PCR at either host stops it.

The files of reference values are made by the commands that an operator gives.
"""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.tpms import SoftTpm, soft_tpm
from korora.agents.vtpm.tcti import Tpm
from tests.attacks.processes import KORORA, Relay

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
STREAM = os.urandom(2 * 1024 * 1024)


@dataclass
class Hosts:
    """alpha sends, beta receives; each has a TPM and knows what the other may be."""

    alpha: SoftTpm
    beta: SoftTpm
    folder: Path
    identities: dict[str, Path]

    def known(self, host: str) -> Path:
        """The folder of references that ``host`` judges by."""
        return self.folder / f"{host}-knows"


async def run(*arguments: str | Path) -> tuple[int, str, list[str]]:
    """A command of ours: its exit code, its standard output, and what it told people."""
    command = [*KORORA, *(str(argument) for argument in arguments)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=False, timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode().splitlines()


async def enrol(hosts: Hosts, judge: str, judged: str, tpm: SoftTpm) -> None:
    code, _, lines = await run(
        *("attest", "enrol", judged, "--tpm", tpm.tcti, "--attestation", hosts.known(judge)),
        *("--pcrs", "sha256:0,1,2,3,4,5,7"),
    )
    assert code == 0, lines


@pytest.fixture
async def hosts(tmp_path: Path, identity_alpha: Path, identity_beta: Path) -> AsyncIterator[Hosts]:
    with soft_tpm(tmp_path / "tpm-alpha") as alpha, soft_tpm(tmp_path / "tpm-beta") as beta:
        made = Hosts(alpha, beta, tmp_path, {"alpha": identity_alpha, "beta": identity_beta})
        await enrol(made, "alpha", "beta", beta)
        await enrol(made, "beta", "alpha", alpha)
        yield made


@dataclass
class Outcome:
    codes: tuple[int, int]
    send: Relay
    receive: Relay
    arrived: bytes | None
    reports: dict[str, dict[str, Any]]

    @property
    def told(self) -> tuple[str, str]:
        """All that either operator reads."""
        return tuple(  # type: ignore[return-value]
            "\n".join([*relay.lines, *(json.dumps(event) for event in relay.events)])
            for relay in (self.send, self.receive)
        )


def platform(hosts: Hosts, host: str, *, attests: bool = True, judges: bool = True) -> list[str | Path]:
    tpm = getattr(hosts, host).tcti
    return [*(("--tpm", tpm) if attests else ()), *(("--attestation", hosts.known(host)) if judges else ())]


async def migrate(hosts: Hosts, alpha: list[str | Path], beta: list[str | Path]) -> Outcome:
    """One migration from a file into a file."""
    (hosts.folder / "in").write_bytes(STREAM)
    out = hosts.folder / "out"
    async with AsyncExitStack() as stack:
        receive = await stack.enter_async_context(
            Relay(
                *("receive", "--listen", "127.0.0.1:0", "--to", f"file:{out}", "--identity", hosts.identities["beta"]),
                *("--once", "--report", hosts.folder / "receive.json", "--resume-timeout", "1"),
                *("--state", hosts.folder / "state-beta", *beta),
            )
        )
        port = await receive.listening()
        send = await stack.enter_async_context(
            Relay(
                *("send", "--from", f"file:{hosts.folder / 'in'}", "--peer", f"127.0.0.1:{port}"),
                *("--identity", hosts.identities["alpha"], "--once", "--report", hosts.folder / "send.json"),
                *("--state", hosts.folder / "state-alpha", "--resume-timeout", "1", *alpha),
            )
        )
        codes = (await send.ended(), await receive.ended())
    reports = {name: json.loads((hosts.folder / f"{name}.json").read_text()) for name in ("send", "receive")}
    found = list(hosts.folder.glob("out*"))
    return Outcome(codes, send, receive, found[0].read_bytes() if found else None, reports)


async def test_hosts_that_are_what_they_may_be(hosts: Hosts) -> None:
    done = await migrate(hosts, platform(hosts, "alpha"), platform(hosts, "beta"))
    assert done.codes == (0, 0), done.told
    assert done.arrived == STREAM
    for report in done.reports.values():
        assert report["attested"].startswith("tpm2 ak 000b")
        assert report["attested"].endswith("pcrs sha256:0,1,2,3,4,5,7")
    shown = await run(
        "receipts", "show", done.reports["send"]["session_id"], "--json", "--state", hosts.folder / "state-beta"
    )
    assert shown[0] == 0
    said = json.dumps(json.loads(shown[1]))
    for side in ("send", "receive"):
        assert done.reports[side]["attested"] in said


@pytest.mark.parametrize("changed", ["alpha", "beta"])
async def test_one_pcr_changed_and_nothing_goes(hosts: Hosts, changed: str) -> None:
    """The PCR is told to the operator of the host that judges, not to the one that is judged."""
    Tpm(getattr(hosts, changed).tcti).extend(4, b"another boot loader".ljust(32))
    done = await migrate(hosts, platform(hosts, "alpha"), platform(hosts, "beta"))
    assert done.codes == (4, 4)
    assert done.arrived is None
    source, destination = done.told
    judge, judged = (destination, source) if changed == "alpha" else (source, destination)
    assert f"PCR 4 of sha256: expected {'00' * 32}, seen " in judge
    assert "PCR" not in judged
    assert "attestation failed" in judged
    assert done.reports["send"]["bytes_out"]["forward"] == 0


@pytest.mark.parametrize("lacks", ["alpha", "beta"])
async def test_a_host_that_does_not_attest(hosts: Hosts, lacks: str) -> None:
    """Where the other demands it, nothing goes; where none does, all goes as ever."""
    silent = platform(hosts, lacks, attests=False, judges=False)
    other = "beta" if lacks == "alpha" else "alpha"
    arguments = {lacks: silent, other: platform(hosts, other)}
    done = await migrate(hosts, arguments["alpha"], arguments["beta"])
    assert done.codes == (4, 4), done.told
    assert done.arrived is None
    arguments[other] = platform(hosts, other, judges=False)
    done = await migrate(hosts, arguments["alpha"], arguments["beta"])
    assert done.codes == (0, 0), done.told


async def test_one_tpm_in_anothers_place(hosts: Hosts) -> None:
    """beta's certificate with alpha's TPM: its key was enrolled, and for another host."""
    beta: list[str | Path] = ["--tpm", hosts.alpha.tcti, "--attestation", hosts.known("beta")]
    done = await migrate(hosts, platform(hosts, "alpha"), beta)
    assert done.codes == (4, 4)
    assert "enrolled is" in done.told[0]


async def test_a_policy_that_requires_it(hosts: Hosts) -> None:
    policy = hosts.folder / "policy.toml"
    policy.write_text(
        '[[rule]]\nname = "attested"\neffect = "allow"\npeer = ["alpha"]\nrequires_attestation = ["tpm2"]\n'
    )
    policy.chmod(0o600)
    rules: list[str | Path] = ["--policy", policy]
    refused = await migrate(hosts, [], rules)
    assert refused.codes == (3, 3)
    assert "the attestation tpm2, which the peer has not proved" in refused.told[1]
    allowed = await migrate(hosts, platform(hosts, "alpha"), [*platform(hosts, "beta"), *rules])
    assert allowed.codes == (0, 0), allowed.told

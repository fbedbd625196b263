"""The sheet that an operator reads: each step and each check once, the worse of both sides' findings."""

import json
import socket
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crypto.errors import CertificateExpired, PlatformChanged, TpmUnusable
from crypto.tls import TlsConfig
from korora.preflight import by_hand
from korora.preflight.agent import HostSurveyor
from korora.preflight.by_hand import Sheet, as_dict, compare, lines, look, memory_of, parse_memory, read_memory
from korora.preflight.gather import Gatherer, XlInfo
from proxy.control import Surveyed
from proxy.errors import (
    EXIT_AUTHENTICATION,
    EXIT_CONFIGURATION,
    EXIT_DONE,
    EXIT_LOST,
    EXIT_POLICY,
    ConfigurationError,
    PeerRefused,
    PeerUnreachable,
    PolicyRefused,
)
from proxy.preflight import Finding, HostFacts
from proxy.shell.contact import Contact, Peer

GIB = 1024**3
ROOMY = HostFacts(relay="1", hypervisor="kvm", machine="x86_64", features=("aes", "sse2"), room_bytes=2**40)


class Fixed(Gatherer):
    """Reads no host."""

    def facts(self, *, thorough: bool) -> HostFacts:
        return ROOMY


def surveyor(folder: Path) -> HostSurveyor:
    return HostSurveyor(Fixed(folder, xl=XlInfo))


class Told:
    """A contact that answers, or fails, once it has come so far."""

    where = Peer("198.51.100.7", 8010)

    def __init__(self, outcome: Surveyed | Exception, came: int = 3, proved: str = "") -> None:
        self._outcome, self._came, self._proved = outcome, came, proved

    async def survey(self, surveyor: HostSurveyor, need_bytes: int, came: Any) -> tuple[HostFacts, Surveyed, float]:
        steps = [("connection", self.where.address), ("authentication", "beta"), ("attestation", self._proved)]
        for name, words in steps[: self._came]:
            came(name, words)
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return surveyor.facts(thorough=True), self._outcome, 0.01


async def sheet(tmp_path: Path, outcome: Surveyed | Exception, came: int = 3, **rest: Any) -> Sheet:
    told = Told(outcome, came, rest.pop("proved", ""))
    return await compare(told, surveyor(tmp_path), -1, **rest)  # type: ignore[arg-type]


def grades(sheet: Sheet) -> dict[str, str]:
    return {finding.check: finding.grade for finding in sheet.findings}


async def test_a_peer_has_no_say_on_the_steps_of_this_host(tmp_path: Path) -> None:
    """Nor can it put a better finding in the place of one that this host has."""
    troubles = (Finding("attestation", "failed", "no such folder of references"),)
    told = Surveyed(ROOMY, tuple(Finding(step, "ok", "all is well") for step in by_hand.STEPS))
    found = await sheet(tmp_path, told, troubles=troubles)
    assert not [finding for finding in found.findings if "beta says" in finding.says]
    assert "no such folder of references" in "\n".join(lines(found))


async def test_all_is_well(tmp_path: Path) -> None:
    steps: list[str] = []
    found = await sheet(tmp_path, Surveyed(ROOMY, ()), proved="tpm2 beta", progress=steps.append)
    assert (found.code, found.peer, found.theirs) == (EXIT_DONE, "beta", ROOMY)
    assert list(grades(found))[:4] == ["connection", "authentication", "attestation", "relay"]
    assert "it has proved tpm2 beta" in {finding.says for finding in found.findings}
    assert steps[0] == "connecting"
    assert len(steps) == 4


async def test_the_worse_of_both_sides_counts(tmp_path: Path) -> None:
    theirs = (
        Finding("egress", "ok", "alpha may use it"),
        Finding("room", "failed", "no\x1b[2J room", "free\nsome"),
        Finding("architecture", "unknown", "nothing is said"),
        Finding("something_newer", "warning", "it is odd", "look"),
    )
    found = await sheet(tmp_path, Surveyed(ROOMY, theirs))
    told = {finding.check: finding for finding in found.findings}
    assert (told["room"].says, told["room"].remedy) == ("beta says: no?[2J room", "free?some")
    assert grades(found)["architecture"] == "unknown"
    assert told["something_newer"].grade == "warning"
    assert found.code == EXIT_POLICY
    assert len({finding.check for finding in found.findings}) == len(found.findings)


async def test_an_egress_that_is_not_for_this_host(tmp_path: Path) -> None:
    found = await sheet(tmp_path, Surveyed(None, (Finding("egress", "failed", "there is none", "name another"),)))
    assert (found.code, found.theirs) == (EXIT_POLICY, None)
    assert grades(found)["egress"] == "failed"
    assert grades(found)["hypervisor"] == "unknown"


@pytest.mark.parametrize(
    ("error", "came", "step", "code", "before"),
    [
        (PeerUnreachable("no route"), 0, "connection", EXIT_LOST, []),
        (CertificateExpired("expired"), 1, "authentication", EXIT_AUTHENTICATION, ["connection"]),
        (CertificateExpired("an alert, late"), 3, "authentication", EXIT_AUTHENTICATION, ["connection"]),
        (PeerRefused("it went away"), 1, "authentication", EXIT_AUTHENTICATION, ["connection"]),
        (PlatformChanged("PCR 7 is 00"), 2, "attestation", EXIT_AUTHENTICATION, ["connection", "authentication"]),
        (PeerRefused("attestation failed"), 2, "attestation", EXIT_AUTHENTICATION, ["connection", "authentication"]),
        (
            TpmUnusable("no answer", "load its driver"),
            2,
            "attestation",
            EXIT_CONFIGURATION,
            ["connection", "authentication"],
        ),
        (PolicyRefused("off"), 3, "survey", EXIT_POLICY, ["connection", "authentication", "attestation"]),
    ],
)
async def test_a_step_that_fails_is_a_finding_and_the_rest_is_shown(
    *, error: Exception, came: int, step: str, code: int, before: list[str], tmp_path: Path
) -> None:
    found = await sheet(tmp_path, error, came)
    assert found.code == code
    assert list(grades(found)) == [*before, step, "hypervisor", "memory", "room", "tpm"]
    assert grades(found)[step] == "failed"
    assert all(grades(found)[name] == "ok" for name in before)
    (told,) = (finding for finding in found.findings if finding.check == step)
    assert told.remedy
    if isinstance(error, PlatformChanged):
        assert told.says == "PCR 7 is 00"  # this host's operator reads more than the peer


async def test_nobody_listens_there(tmp_path: Path, client_tls: TlsConfig) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # bound, and not listening
        found = await compare(Contact(client_tls, Peer("127.0.0.1", sock.getsockname()[1])), surveyor(tmp_path), -1)
    assert found.code == EXIT_LOST
    assert grades(found)["connection"] == "failed"
    assert found.peer.startswith("127.0.0.1:")


def test_a_host_alone_and_what_was_found_before(tmp_path: Path) -> None:
    trouble = Finding("attestation", "failed", "the TPM does not answer", "load its driver")
    found = look(surveyor(tmp_path), 2**50, (trouble,))
    assert list(grades(found)) == ["attestation", "hypervisor", "memory", "room", "tpm"]
    assert found.code == EXIT_POLICY
    assert look(surveyor(tmp_path), -1).code == EXIT_DONE


def test_what_is_printed() -> None:
    own = msgspec.structs.replace(ROOMY, cpu="Intel(R) Xeon(R) Gold 6330 CPU @ 2.00GHz", relay="0.1\x1b[2J")
    findings = (
        Finding("connection", "ok", "198.51.100.7:8010 answers"),
        Finding("hypervisor", "failed", "KVM here, Xen there", "migrate elsewhere"),
        Finding("cpu", "unknown", "it does not say"),
    )
    shown = list(lines(Sheet(own, msgspec.structs.replace(ROOMY, hypervisor="xen"), "beta", findings, EXIT_POLICY)))
    assert shown[0].split() == ["CHECK", "THIS", "HOST", "BETA", "GRADE"]
    (at,) = (number for number, line in enumerate(shown) if line.startswith("hypervisor "))
    assert shown[at].split() == ["hypervisor", "KVM", "Xen", "failed"]
    assert shown[at + 1 : at + 3] == ["    KVM here, Xen there", "    → migrate elsewhere"]
    (cpu,) = (line for line in shown if line.startswith("cpu "))
    assert "…" in cpu
    assert all(line.isprintable() for line in shown)
    alone = list(lines(Sheet(own, None, "", findings[2:], EXIT_DONE)))
    assert alone[0].split() == ["CHECK", "THIS", "HOST", "GRADE"]
    assert any(line.startswith("room") for line in alone)  # what it has is shown, whether it was judged or not


def test_as_json() -> None:
    made = Sheet(ROOMY, None, "", (Finding("room", "ok", "much"),), EXIT_DONE)
    told = json.loads(json.dumps(as_dict(made)))
    assert (told["peer"], told["peer_host"], told["exit_code"]) == (None, None, 0)
    assert told["this_host"]["hypervisor"] == "kvm"
    assert told["findings"] == [{"check": "room", "grade": "ok", "says": "much", "remedy": ""}]


@pytest.mark.parametrize(
    ("text", "count"), [("4G", 4 * GIB), ("4GiB", 4 * GIB), ("512M", GIB // 2), ("1000", 1000), ("1k", 1024)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_memory(text) == count


@pytest.mark.parametrize("text", ["", "G", "-1", "4 G", "4P", "1e9", "4.5G", "9" * 13, "٤G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigurationError, match="no size"):
        parse_memory(text)


# The part of `xl list -l` of Xen 4.17 that counts.
DOMAIN: dict[str, Any] = {
    "domid": 3,
    "config": {
        "c_info": {"type": "pvh", "name": "g1"},
        "b_info": {"max_vcpus": 1, "max_memkb": 131072, "target_memkb": 98304, "shadow_memkb": 1792},
    },
}


@pytest.mark.parametrize(
    ("shown", "need"),
    [
        ([DOMAIN], (98304 + 1792) * 1024),
        ([{"config": {"b_info": {"max_memkb": 131072}}}], 131072 * 1024),
        (DOMAIN, (98304 + 1792) * 1024),
        ([], -1),
        ([DOMAIN, DOMAIN], -1),
        ([{"config": {"b_info": {"max_memkb": "many"}}}], -1),
        ([{"config": {"b_info": {"max_memkb": -1}}}], -1),
        ([{"config": {}}], -1),
        ([{"config": []}], -1),
        ("[", -1),
    ],
)
def test_a_domain_s_memory(shown: Any, need: int) -> None:
    assert read_memory((shown if isinstance(shown, str) else json.dumps(shown)).encode()) == need


def test_a_domain_is_asked_of_xl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConfigurationError, match="cannot be asked"):
        memory_of("g1")
    (tmp_path / "xl").write_text(f"#!/bin/sh\n[ \"$*\" = 'list -l g1' ] || exit 1\necho '{json.dumps([DOMAIN])}'\n")
    (tmp_path / "xl").chmod(stat.S_IRWXU)
    assert memory_of("g1") == (98304 + 1792) * 1024
    with pytest.raises(ConfigurationError, match="does not tell"):
        memory_of("other")


def test_a_platform_that_cannot_be_used_is_a_finding(tmp_path: Path) -> None:
    assert by_hand.open_platform("", None) == (None, ())
    platform, (finding,) = by_hand.open_platform("", tmp_path / "not there")
    assert platform is None
    assert (finding.check, finding.grade) == ("attestation", "failed")
    assert finding.remedy

"""Each rule of the checks, both ways; and what nobody has said refuses nothing."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from korora.preflight import checks
from korora.preflight.checks import (
    CLOCK_SECONDS_MAX,
    CLOCK_SECONDS_WARNED,
    FEATURES_NAMED,
    MIB,
    ROOM_BYTES_FEW,
    ROOM_BYTES_MIN,
    Case,
)
from proxy.preflight import CHECKS, Finding, HostFacts

GIB = 1024 * MIB
NOW_MS = 1_790_000_000_000
XEN = HostFacts(
    relay="0.1",
    hypervisor="xen",
    hypervisor_version="4.17.3",
    machine="x86_64",
    vendor="GenuineIntel",
    cpu="Intel(R) Xeon(R) Gold 6330",
    features=("aes", "avx2", "sse2"),
    virtualisation=("hvm", "pv"),
    memory_free_bytes=4 * GIB,
    room_bytes=GIB,
    tpm="2.0",
    clock_ms=NOW_MS,
)
KVM = msgspec.structs.replace(XEN, hypervisor="kvm", hypervisor_version="6.1.0-28-amd64", virtualisation=("ept", "vmx"))


def found(check: str, source: HostFacts, destination: HostFacts, **rest: Any) -> Finding:
    """What one check finds."""
    (finding,) = (one for one in checks.findings(Case(source, destination, **rest)) if one.check == check)
    return finding


def but(facts: HostFacts, **other: Any) -> HostFacts:
    return msgspec.structs.replace(facts, **other)


def test_each_check_in_order_and_two_that_are_alike_fit() -> None:
    for facts in (XEN, KVM):
        told = checks.findings(Case(facts, facts, need_bytes=GIB, own=facts))
        assert tuple(finding.check for finding in told) == CHECKS
        assert {finding.grade for finding in told} == {"ok"}


@pytest.mark.parametrize(
    ("source", "destination", "grade"),
    [
        (XEN, KVM, "failed"),
        (KVM, XEN, "failed"),
        (KVM, but(KVM, hypervisor="none"), "failed"),
        (XEN, but(XEN, hypervisor="none"), "failed"),
        (but(KVM, hypervisor="none"), KVM, "unknown"),  # an emulated machine, a relay beside its hypervisor's host
        (but(KVM, hypervisor="none"), but(KVM, hypervisor="none"), "ok"),
        (but(KVM, hypervisor=""), KVM, "unknown"),
        (KVM, but(KVM, hypervisor=""), "unknown"),
    ],
)
def test_hypervisors(source: HostFacts, destination: HostFacts, grade: str) -> None:
    assert found("hypervisor", source, destination).grade == grade


@pytest.mark.parametrize(
    ("before", "after", "grade"),
    [
        ("4.17.3", "4.17.1", "ok"),  # within a release either way
        ("4.17.3", "4.18.0", "ok"),
        ("4.17.3", "4.19.0", "warning"),
        ("4.17.3", "4.16.9", "failed"),
        ("4.9", "4.10", "ok"),
        ("4.10", "4.9", "failed"),
        ("4.20.0", "5.0", "warning"),
        ("4.17.3", "", "unknown"),
        ("unstable", "4.17", "unknown"),
    ],
)
def test_releases_of_xen(before: str, after: str, grade: str) -> None:
    finding = found("hypervisor_version", but(XEN, hypervisor_version=before), but(XEN, hypervisor_version=after))
    assert finding.grade == grade
    assert bool(finding.remedy) == (grade in {"failed", "warning"})


def test_releases_of_linux_are_told_and_not_judged() -> None:
    finding = found("hypervisor_version", KVM, but(KVM, hypervisor_version="5.10.0"))
    assert finding.grade == "ok"
    assert "6.1.0-28-amd64 to 5.10.0" in finding.says


@pytest.mark.parametrize(("there", "grade"), [("x86_64", "ok"), ("aarch64", "failed"), ("", "unknown")])
def test_architectures(there: str, grade: str) -> None:
    assert found("architecture", XEN, but(XEN, machine=there)).grade == grade


def test_features_that_the_destination_lacks_are_named() -> None:
    assert found("cpu", XEN, but(XEN, features=(*XEN.features, "avx512f"))).grade == "ok"
    finding = found("cpu", XEN, but(XEN, features=("sse2",)))
    assert finding.grade == "warning"
    assert "lacks aes avx2:" in finding.says
    assert "CPU model" in finding.remedy
    assert found("cpu", XEN, but(XEN, features=())).grade == "unknown"
    assert found("cpu", but(XEN, features=()), XEN).grade == "unknown"


def test_of_many_features_some_are_named() -> None:
    many = tuple(f"f{number:03}" for number in range(60))
    finding = found("cpu", but(XEN, features=many), XEN)
    assert finding.grade == "warning"
    assert sum(name in finding.says for name in many) == FEATURES_NAMED
    assert f"and {60 - FEATURES_NAMED} more" in finding.says


def test_processors_of_another_make() -> None:
    finding = found("cpu", XEN, but(XEN, vendor="AuthenticAMD"))
    assert finding.grade == "warning"
    assert "AuthenticAMD" in finding.says


def test_virtualisation_flags() -> None:
    assert (
        found("virtualisation", KVM, but(KVM, virtualisation=("npt", "svm"))).grade == "ok"
    )  # the same by other names
    assert found("virtualisation", XEN, but(XEN, virtualisation=("hvm", "pv"))).grade == "ok"
    finding = found("virtualisation", KVM, but(KVM, virtualisation=("vmx",)))
    assert (finding.grade, "nested paging" in finding.says) == ("warning", True)
    finding = found("virtualisation", XEN, but(XEN, virtualisation=("pv",)))
    assert (finding.grade, "hvm" in finding.says) == ("warning", True)
    assert found("virtualisation", but(KVM, virtualisation=()), KVM).grade == "unknown"
    assert found("virtualisation", KVM, HostFacts()).grade == "unknown"


@pytest.mark.parametrize(
    ("free", "need", "elastic", "grade"),
    [
        (4 * GIB, 4 * GIB, False, "ok"),
        (4 * GIB, 4 * GIB + 1, False, "failed"),
        (4 * GIB, 4 * GIB + 1, True, "warning"),
        (0, 1, False, "failed"),
        (-1, GIB, False, "unknown"),
        (4 * GIB, -1, False, "unknown"),
    ],
)
def test_memory(free: int, need: int, elastic: bool, grade: str) -> None:
    there = but(XEN, memory_free_bytes=free, memory_elastic=elastic)
    assert found("memory", XEN, there, need_bytes=need).grade == grade
    assert found("memory", but(XEN, memory_free_bytes=0), there, need_bytes=need).grade == grade  # the source gives


@pytest.mark.parametrize(
    ("room", "grade"),
    [
        (ROOM_BYTES_MIN - 1, "failed"),
        (ROOM_BYTES_MIN, "warning"),
        (ROOM_BYTES_FEW - 1, "warning"),
        (ROOM_BYTES_FEW, "ok"),
        (0, "failed"),
    ],
)
def test_room_at_either_end(room: int, grade: str) -> None:
    little = but(XEN, room_bytes=room)
    for source, destination, where in ((little, XEN, "the source"), (XEN, little, "the destination")):
        finding = found("room", source, destination)
        assert finding.grade == grade
        if grade != "ok":
            assert finding.says.startswith(where)
            assert where in finding.remedy
    assert found("room", but(XEN, room_bytes=-1), little).grade == grade
    assert found("room", but(XEN, room_bytes=-1), but(XEN, room_bytes=-1)).grade == "unknown"


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("apart", "waited", "grade"),
    [
        (0, 0, "ok"),
        (CLOCK_SECONDS_WARNED, 0, "ok"),
        (CLOCK_SECONDS_WARNED + 0.001, 0, "warning"),
        (CLOCK_SECONDS_WARNED + 0.001, 0.01, "ok"),  # half the round trip is not known
        (CLOCK_SECONDS_MAX, 0, "warning"),
        (CLOCK_SECONDS_MAX + 0.001, 0, "failed"),
        (CLOCK_SECONDS_MAX + 4, 10, "warning"),
        (CLOCK_SECONDS_MAX + 6, 10, "failed"),
    ],
)
def test_clocks(apart: float, waited: float, sign: int, grade: str) -> None:
    other = but(XEN, clock_ms=NOW_MS + sign * round(apart * 1000))
    assert found("clock", XEN, other, waited_seconds=waited).grade == grade


def test_a_host_that_attests_needs_a_tpm_of_its_own() -> None:
    none, old = but(XEN, tpm=""), but(XEN, tpm="1.2")
    assert found("tpm", none, XEN, own=none).grade == "unknown"
    assert found("tpm", none, XEN, own=none, thorough=True).grade == "warning"
    assert found("tpm", none, XEN, own=none, attests=True).grade == "failed"
    assert "1.2" in found("tpm", old, XEN, own=old, attests=True).says
    assert found("tpm", none, XEN, own=XEN, attests=True).grade == "ok"  # the other one's is its own affair


def test_one_host_alone() -> None:
    assert {one.check: one.grade for one in checks.alone(XEN)} == {
        "hypervisor": "ok",
        "memory": "unknown",
        "room": "ok",
        "tpm": "ok",
    }
    poor = HostFacts(hypervisor="none", memory_free_bytes=MIB, room_bytes=MIB)
    told = {one.check: one for one in checks.alone(poor, need_bytes=GIB)}
    assert {name: one.grade for name, one in told.items()} == {
        "hypervisor": "warning",
        "memory": "failed",
        "room": "failed",
        "tpm": "warning",
    }
    assert all(one.remedy for one in told.values())
    assert all("destination" not in one.says for one in told.values())


WORDS = st.lists(st.sampled_from(["sse2", "avx2", "vmx", "svm", "ept", "pv"]), max_size=6).map(tuple)
FACTS = st.builds(
    HostFacts,
    relay=st.text(max_size=128),
    hypervisor=st.sampled_from(["", "kvm", "none", "xen"]),
    hypervisor_version=st.sampled_from(["", "4.17", "4.18.1", "6.1.0", "x"]) | st.text(max_size=128),
    machine=st.sampled_from(["", "x86_64", "aarch64"]) | st.text(max_size=128),
    vendor=st.text(max_size=128),
    cpu=st.text(max_size=128),
    features=WORDS,
    virtualisation=WORDS,
    memory_free_bytes=st.integers(-1, 2**63 - 1),
    memory_elastic=st.booleans(),
    room_bytes=st.integers(-1, 2**63 - 1),
    tpm=st.sampled_from(["", "1.2", "2.0"]),
    clock_ms=st.integers(-1, 2**63 - 1),
)
ROOMY = FACTS.map(lambda facts: but(facts, room_bytes=-1))


@given(FACTS, FACTS, st.integers(-1, 2**63 - 1), st.floats(0, 100))
def test_whatever_a_peer_says_there_is_one_printable_finding_a_check(
    source: HostFacts, destination: HostFacts, need: int, waited: float
) -> None:
    told = checks.findings(Case(source, destination, need_bytes=need, waited_seconds=waited, own=source))
    assert tuple(finding.check for finding in told) == CHECKS
    for finding in told:
        assert finding.says.isprintable()
        assert finding.remedy.isprintable()
        assert bool(finding.remedy) == (finding.grade in {"failed", "warning"})
        msgspec.convert(msgspec.to_builtins(finding), Finding)  # it fits the wire


@given(ROOMY, st.integers(-1, 2**63 - 1))
def test_what_is_unknown_never_fails(facts: HostFacts, need: int) -> None:
    """A host that says nothing, of any other."""
    silent = HostFacts()
    for source, destination in ((facts, silent), (silent, facts)):
        told = checks.findings(Case(source, destination, own=facts))
        assert not [finding for finding in told if finding.grade in {"failed", "warning"}]
    told = checks.findings(Case(facts, silent, need_bytes=need, own=facts))
    assert not [finding for finding in told if finding.grade in {"failed", "warning"}]


@given(FACTS)
def test_the_columns_of_a_sheet_are_of_its_checks_and_printable(facts: HostFacts) -> None:
    columns = checks.columns(facts)
    assert tuple(columns) == CHECKS
    assert all(text.isprintable() for text in columns.values())

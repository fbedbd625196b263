"""Whether a machine can go from one host to the other, from what both say of themselves. Sans-IO, and pure.

What a host does not know, or a peer does not say, is `unknown`, and no reason to refuse. A peer that lies about itself
can have a session refused, which it could anyway, or a warning left out: nothing is allowed because of what it says.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from proxy.control import printable
from proxy.limits import KIB, REASON_CHARACTERS_MAX
from proxy.preflight import GRADES, Finding, Grade, HostFacts

MIB: Final = KIB * KIB
ROOM_BYTES_MIN: Final = 64 * MIB  # a session's journal, receipts and report take far below; a full disk ends it midway
ROOM_BYTES_FEW: Final = 256 * MIB  # and this is when somebody should look
CLOCK_SECONDS_WARNED: Final = 2.0  # what NTP keeps by a factor of a hundred
CLOCK_SECONDS_MAX: Final = 60.0  # receipts, attestations and new certificates are judged by time
FEATURES_NAMED: Final = 20  # in a message; a processor of another make lacks dozens

_VERSION: Final = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})", re.ASCII)
_HYPERVISORS: Final = {"xen": "Xen", "kvm": "KVM", "none": "neither Xen nor KVM"}
# What does the same under another name: a machine made with one can do with the other, as far as this goes.
_ALIKE: Final = {"vmx": "hardware virtualisation", "svm": "hardware virtualisation"} | {
    "ept": "nested paging",
    "npt": "nested paging",
}


@dataclass(frozen=True, slots=True)
class Case:
    """Two hosts and a machine between them.

    Attributes:
        source, destination: what they say of themselves; one that says nothing has no facts.
        need_bytes: memory of the machine; -1 where that is not known.
        waited_seconds: within which the other host must have said its time.
        own: this host's part.
        attests: whether this host is set up to attest itself.
        thorough: whether people look: then also what only they can mend is said.
        alone: whether there is but one host, which stands for both.
    """

    source: HostFacts
    destination: HostFacts
    need_bytes: int = -1
    waited_seconds: float = 0.0
    own: HostFacts = field(default_factory=HostFacts)
    attests: bool = False
    thorough: bool = False
    alone: bool = False

    @property
    def there(self) -> str:
        """Where the machine is to go, in words."""
        return "this host" if self.alone else "the destination"


def alone(own: HostFacts, *, need_bytes: int = -1, attests: bool = False) -> tuple[Finding, ...]:
    """What can be said of one host without another.

    Args:
        own: that host.
        need_bytes: memory of a machine that is to come; -1 where that is not known.
        attests: see ``Case``.
    """
    case = Case(own, own, need_bytes, own=own, attests=attests, thorough=True, alone=True)
    return (_runs_machines(own), _memory(case), _room(case), _tpm(case))


def findings(case: Case) -> tuple[Finding, ...]:
    """Every check of two hosts, in the order of ``proxy.preflight.CHECKS``."""
    return tuple(check(case) for check in _CHECKS.values())


def worse(grade: Grade, other: Grade) -> bool:
    """Whether the first is worse than the other."""
    return GRADES.index(grade) < GRADES.index(other)


def _finding(check: str, grade: Grade, says: str, remedy: str = "") -> Finding:
    return Finding(check, grade, printable(says)[:REASON_CHARACTERS_MAX], printable(remedy)[:REASON_CHARACTERS_MAX])


# ---------------------------------------------------------------- one host


def _runs_machines(own: HostFacts) -> Finding:
    if own.hypervisor == "none":
        remedy = "boot Xen, or load KVM: modprobe kvm_intel or kvm_amd, once the firmware allows virtualisation"
        return _finding("hypervisor", "warning", "neither Xen nor KVM runs here: QEMU has to emulate", remedy)
    if not own.hypervisor:
        return _finding("hypervisor", "unknown", "what runs machines here does not show")
    version = f" {own.hypervisor_version}" if own.hypervisor == "xen" else ""
    return _finding("hypervisor", "ok", f"{_HYPERVISORS[own.hypervisor]}{version} runs here")


# ---------------------------------------------------------------- one host and the other


def _relay(case: Case) -> Finding:
    here, there = case.source.relay, case.destination.relay
    if not here or not there:
        return _finding("relay", "unknown", "one of the relays does not say its version")
    if here != there:
        return _finding("relay", "ok", f"the source's relay is {here}, the destination's {there}")
    return _finding("relay", "ok", f"both relays are {here}")


def _hypervisor(case: Case) -> Finding:
    here, there = case.source.hypervisor, case.destination.hypervisor
    if not here or not there:
        return _finding("hypervisor", "unknown", "one of the hosts does not say what runs its machines")
    if here == there:
        return _finding("hypervisor", "ok", f"both hosts have {_HYPERVISORS[here]}")
    if here == "none":
        return _finding("hypervisor", "unknown", f"the source has neither, the destination {_HYPERVISORS[there]}")
    return _finding(
        "hypervisor",
        "failed",
        f"the source has {_HYPERVISORS[here]}, the destination {_HYPERVISORS[there]}",
        "migrate to a host with the same hypervisor; where a relay does not stand beside it, turn preflight off there",
    )


def _hypervisor_version(case: Case) -> Finding:
    name = "hypervisor_version"
    here, there = case.source, case.destination
    before, after = _numbers(here.hypervisor_version), _numbers(there.hypervisor_version)
    if here.hypervisor != there.hypervisor or before is None or after is None:
        return _finding(name, "unknown", "there are no two versions to compare")
    if here.hypervisor != "xen":
        return _finding(name, "ok", f"from Linux {here.hypervisor_version} to {there.hypervisor_version}")
    way = f"from Xen {here.hypervisor_version} to {there.hypervisor_version}"
    if after < before:
        return _finding(
            name,
            "failed",
            f"{way}: Xen does not support migration to an older release",
            "update Xen at the destination",
        )
    if after[0] != before[0] or after[1] > before[1] + 1:
        return _finding(
            name,
            "warning",
            f"{way}: Xen supports migration to the release that follows, and not beyond it",
            "try it with a machine that may be lost, or go by a host with a release between",
        )
    return _finding(name, "ok", way)


def _machine(case: Case) -> Finding:
    here, there = case.source.machine, case.destination.machine
    if not here or not there:
        return _finding("architecture", "unknown", "one of the hosts does not say its architecture")
    if here == there:
        return _finding("architecture", "ok", f"both hosts are {here}")
    return _finding(
        "architecture",
        "failed",
        f"the source is {here}, the destination {there}",
        "migrate to a host of the same architecture",
    )


def _cpu(case: Case) -> Finding:
    here, there = case.source, case.destination
    if not here.features or not there.features:
        return _finding("cpu", "unknown", "one of the hosts does not say what its processor can do")
    remedy = "give machines a CPU model that both hosts have (QEMU -cpu, Xen cpuid=), or see that this one needs less"
    if here.vendor and there.vendor and here.vendor != there.vendor:
        says = f"processors of {here.vendor} and {there.vendor}: most machines do not survive that"
        return _finding("cpu", "warning", says, remedy)
    lacking = sorted(set(here.features) - set(there.features))
    if not lacking:
        models = here.cpu if here.cpu == there.cpu else f"{here.cpu}, then {there.cpu}"
        return _finding("cpu", "ok", f"the destination's processor can do all that the source's can ({models})")
    more = f" and {len(lacking) - FEATURES_NAMED} more" if len(lacking) > FEATURES_NAMED else ""
    says = f"the destination's processor lacks {' '.join(lacking[:FEATURES_NAMED])}{more}: who uses them crashes there"
    return _finding("cpu", "warning", says, remedy)


def _virtualisation(case: Case) -> Finding:
    name = "virtualisation"
    here, there = (
        {_ALIKE.get(word, word) for word in facts.virtualisation} for facts in (case.source, case.destination)
    )
    if not here or case.source.hypervisor != case.destination.hypervisor or not case.destination.features:
        return _finding(name, "unknown", "one of the hosts does not say what it can do for machines")
    lacking = sorted(here - there)
    if not lacking:
        return _finding(name, "ok", f"both have {', '.join(sorted(here))}")
    return _finding(
        name,
        "warning",
        f"the destination lacks {', '.join(lacking)}: machines that use it do not start there",
        "turn it on in the destination's firmware, or migrate machines that do without",
    )


def _memory(case: Case) -> Finding:
    free, need = case.destination.memory_free_bytes, case.need_bytes
    if free < 0:
        return _finding("memory", "unknown", f"{case.there} does not say how much memory is free")
    has = f"{case.there} has {_size(free)} free"
    if need < 0:
        return _finding("memory", "unknown", f"{has}; what the machine needs is not known")
    if need <= free:
        return _finding("memory", "ok", f"{has}, the machine needs {_size(need)}")
    if case.destination.memory_elastic:
        return _finding(
            "memory",
            "warning",
            f"{has}, the machine needs {_size(need)}: dom0 has to give some of its own away",
            "set dom0_mem= on the destination's Xen command line, so that what is free is free",
        )
    return _finding(
        "memory",
        "failed",
        f"{has}, the machine needs {_size(need)}",
        "free memory there, or choose another host",
    )


def _room(case: Case) -> Finding:
    both = (("source", case.source.room_bytes), ("destination", case.destination.room_bytes))
    where, least = min(((name, room) for name, room in both if room >= 0), key=lambda one: one[1], default=("", -1))
    if least < 0:
        return _finding("room", "unknown", "neither host says how much room its relay has")
    where = "this host" if case.alone else f"the {where}"
    says = f"{where}'s relay has {_size(least)} for its journal, receipts and store"
    if least < ROOM_BYTES_FEW:
        grade: Grade = "failed" if least < ROOM_BYTES_MIN else "warning"
        return _finding("room", grade, says, f"free space in the state directory at {where}")
    return _finding("room", "ok", says)


def _clock(case: Case) -> Finding:
    here, there = case.source.clock_ms, case.destination.clock_ms
    if here < 0 or there < 0:
        return _finding("clock", "unknown", "one of the hosts does not say its time")
    apart = abs(here - there) / 1000
    certain = max(0.0, apart - case.waited_seconds / 2)
    says = f"the clocks are {certain:.1f} s apart" if certain else "the clocks agree as far as the network tells"
    if certain <= CLOCK_SECONDS_WARNED:
        return _finding("clock", "ok", says)
    grade: Grade = "warning" if certain <= CLOCK_SECONDS_MAX else "failed"
    remedy = "let both hosts keep time by NTP: receipts, attestation and certificates are judged by it"
    return _finding("clock", grade, says, remedy)


def _tpm(case: Case) -> Finding:
    tpm = case.own.tpm
    if tpm == "2.0":
        return _finding("tpm", "ok", "this host has a TPM 2.0")
    lack = "this host has a TPM 1.2, which cannot attest" if tpm else "this host shows no TPM"
    remedy = "turn the TPM 2.0 on in the firmware, and load its driver"
    if case.attests:
        return _finding("tpm", "failed", f"{lack}, and is set up to attest by one", remedy)
    if case.thorough:
        return _finding("tpm", "warning", f"{lack}: peers that demand attestation will refuse it", remedy)
    return _finding("tpm", "unknown", lack)


def _numbers(version: str) -> tuple[int, int] | None:
    match = _VERSION.match(version)
    return None if match is None else (int(match[1]), int(match[2]))


def _size(count: int) -> str:
    return f"{count / MIB / KIB:.1f} GiB" if count >= KIB * MIB else f"{count / MIB:.0f} MiB"


_CHECKS: Final[dict[str, Callable[[Case], Finding]]] = {
    "relay": _relay,
    "hypervisor": _hypervisor,
    "hypervisor_version": _hypervisor_version,
    "architecture": _machine,
    "cpu": _cpu,
    "virtualisation": _virtualisation,
    "memory": _memory,
    "room": _room,
    "clock": _clock,
    "tpm": _tpm,
}


# ---------------------------------------------------------------- what each host has


def columns(facts: HostFacts) -> dict[str, str]:
    """What one host says, a few words for each check; empty where it says nothing."""
    return dict(_columns(facts))


def _columns(facts: HostFacts) -> Iterator[tuple[str, str]]:
    yield "relay", printable(facts.relay)
    yield "hypervisor", _HYPERVISORS.get(facts.hypervisor, "")
    yield "hypervisor_version", printable(facts.hypervisor_version)
    yield "architecture", printable(facts.machine)
    yield "cpu", printable(facts.cpu or facts.vendor)
    yield "virtualisation", " ".join(facts.virtualisation)
    yield "memory", f"{_size(facts.memory_free_bytes)} free" if facts.memory_free_bytes >= 0 else ""
    yield "room", f"{_size(facts.room_bytes)} free" if facts.room_bytes >= 0 else ""
    yield "clock", ""
    yield "tpm", facts.tpm

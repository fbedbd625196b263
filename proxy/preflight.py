"""What two hosts say of themselves before a machine goes from one to the other, and what is found of it. Sans-IO.

Facts are a host's own words: they are bounded here, believed nowhere, and can only lead to a refusal or a warning.
"""

from typing import Annotated, Final, Literal, Protocol

import msgspec

from proxy.limits import FACTS_TEXT_CHARACTERS_MAX, FEATURES_MAX, REASON_CHARACTERS_MAX

Grade = Literal["failed", "ok", "unknown", "warning"]
GRADES: Final = ("failed", "warning", "unknown", "ok")
"""The worst first."""
CHECKS: Final = (
    *("relay", "hypervisor", "hypervisor_version", "architecture", "cpu", "virtualisation", "memory", "room", "clock"),
    "tpm",
)
"""What two hosts are compared by."""

_Text = Annotated[str, msgspec.Meta(max_length=FACTS_TEXT_CHARACTERS_MAX)]
_Word = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_]{1,24}\Z")]
_Words = Annotated[tuple[_Word, ...], msgspec.Meta(max_length=FEATURES_MAX)]
_Count = Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]
_Reason = Annotated[str, msgspec.Meta(max_length=REASON_CHARACTERS_MAX)]


class HostFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One host, in its own words. -1, empty strings and empty lists stand for what it does not know.

    Attributes:
        relay: version of Kororā.
        hypervisor: what runs its machines; ``none`` where it has looked and found neither.
        hypervisor_version: as MAJOR.MINOR and more.
        machine: architecture, as uname(2) has it.
        vendor: of the processor, as CPUID has it.
        cpu: its model.
        features: of the processor, by Linux's names, those that programs ask for and cannot be without afterwards.
        virtualisation: what the processor (KVM) or the hypervisor (Xen) can do for machines.
        memory_free_bytes: that a machine could have now.
        memory_elastic: whether dom0 gives memory away when a machine needs it.
        room_bytes: free where the relay keeps its state.
        tpm: its version.
        clock_ms: since 1970, when this was said.
    """

    relay: _Text = ""
    hypervisor: Literal["", "kvm", "none", "xen"] = ""
    hypervisor_version: _Text = ""
    machine: _Text = ""
    vendor: _Text = ""
    cpu: _Text = ""
    features: _Words = ()
    virtualisation: _Words = ()
    memory_free_bytes: _Count = -1
    memory_elastic: bool = False
    room_bytes: _Count = -1
    tpm: Literal["", "1.2", "2.0"] = ""
    clock_ms: _Count = -1


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one check has found.

    Attributes:
        check: its name.
        grade: ``failed`` refuses a session; ``unknown`` never does.
        says: what is the case, in words for people.
        remedy: what to do about it, without a full stop; empty where nothing is to be done.
    """

    check: Annotated[str, msgspec.Meta(pattern=r"^[a-z_]{1,24}\Z")]
    grade: Grade
    says: _Reason
    remedy: _Reason = ""


class Surveyor(Protocol):
    """Of a process: knows this host, and judges others."""

    def facts(self, *, thorough: bool = False) -> HostFacts:
        """This host. Reads files, so it is called in a thread; does not raise.

        Args:
            thorough: also what takes long to find out: with Xen, what memory is free.
        """

    def stamped(self, facts: HostFacts) -> HostFacts:
        """The same, said now."""

    def judge(
        self, own: HostFacts, theirs: HostFacts | None, *, departing: bool, waited_seconds: float = 0.0
    ) -> tuple[Finding, ...]:
        """Whether a machine may go.

        Args:
            own: this host.
            theirs: the other one; None where it says nothing.
            departing: whether the machine leaves this host.
            waited_seconds: within which the other one must have said it, for its clock.

        Returns:
            What is worth a warning.

        Raises:
            PreflightFailed: it may not.
        """

    def survey(
        self, own: HostFacts, theirs: HostFacts | None, *, departing: bool, need_bytes: int, waited_seconds: float = 0.0
    ) -> tuple[Finding, ...]:
        """Every check, for people to look at; none refuses.

        Args:
            own, theirs, departing, waited_seconds: see ``judge``.
            need_bytes: memory of the machine that is to go; -1 where that is not known.
        """

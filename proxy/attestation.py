"""What this host demands of its peers' platforms, and shows of its own: whoever is wired in does it. Sans-IO."""

from dataclasses import dataclass
from typing import Protocol

from crypto.attestation.binding import Binding
from crypto.attestation.structures import Clock
from proxy.control import Wanted


@dataclass(frozen=True, slots=True)
class Demand:
    """What a host is to show.

    Attributes:
        wanted: the PCRs and logs.
        since: its TPM's clock as it was last seen before that was demanded: what it quotes is later; None for never.
    """

    wanted: Wanted
    since: Clock | None = None


@dataclass(frozen=True, slots=True)
class Proved:
    """What a host has proved.

    Attributes:
        attested: in one line, its kind first; empty for nothing.
        hpke_public: the key that its TPM has vouched for in this session; empty for none.
    """

    attested: str = ""
    hpke_public: bytes = b""


class Platform(Protocol):
    """Of a process. Each method may read the disk or wait for a TPM: the shell calls them in a thread."""

    def demands(self, peer: str) -> Demand | None:
        """What the host of that name is to show; None for nothing. To be asked before its challenge is made.

        Raises:
            PlatformUnknown: it was not enrolled, so whatever it showed would not do.
            ReferenceInvalid: what is demanded of it cannot be read.
        """

    def attest(self, binding: Binding, wanted: Wanted) -> bytes:
        """What this host shows: evidence, encoded.

        Raises:
            TpmUnusable: its TPM does not answer.
        """

    def appraise(self, peer: str, evidence: bytes, binding: Binding, demand: Demand) -> Proved:
        """Judge what the host of that name shows to what was demanded.

        Raises:
            AttestationError: that is not what is demanded.
        """

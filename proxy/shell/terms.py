"""What a destination agrees to, and by which rules it judges who comes."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from crypto.keys import Suite
from crypto.tls import PeerInfo
from proxy.attestation import Platform
from proxy.authority import Authority
from proxy.control import Offer
from proxy.limits import SESSIONS_MAX
from proxy.paging import PagingTerms
from proxy.preflight import Surveyor
from proxy.shell.arrival import RandomBytes
from proxy.shell.handovers import Handovers
from proxy.witness import Notary

Admission = Callable[[PeerInfo, Offer], None]
Allowance = Callable[[PeerInfo, str], None]


def _anybody(peer: PeerInfo, offer: Offer) -> None:
    """Whoever has authenticated may use every egress."""


def _any_of_them(peer: PeerInfo, egress: str) -> None:
    """The same, asked before there is an offer."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a destination agrees to."""

    resume_seconds: int = 30
    lanes: int = 1
    """How many lanes a session is to have at least; a source may ask for more."""
    sessions_max: int = SESSIONS_MAX
    suites: tuple[Suite, ...] = (Suite.AES_256_GCM, Suite.CHACHA20_POLY1305)
    paging: PagingTerms = field(default_factory=PagingTerms)
    tenants: Mapping[str, str] = field(default_factory=dict)
    """Whose stored pages an egress uses; those not named use the terms'."""
    random: RandomBytes = field(default=os.urandom, repr=False)
    handovers: Handovers | None = field(default=None, repr=False)
    """Of this process; None to guard none."""
    monitors: Mapping[str, str] = field(default_factory=dict)
    """Where the QEMU behind an egress is asked, by the egress's name."""
    guarded: frozenset[str] = frozenset()
    """Egresses that take no session whose hand-over is not guarded."""
    admit: Admission = field(default=_anybody, repr=False)
    """Raises PolicyRefused where a peer may not use an egress, or not now; it has its turn then."""
    allow: Allowance = field(default=_any_of_them, repr=False)
    """Raises PolicyRefused where a peer may not use an egress at all, by its name."""
    authority: Authority | None = field(default=None, repr=False)
    """Who has a say on sessions beyond that; None: nobody."""
    platform: Platform | None = field(default=None, repr=False)
    """Of this host, and what it demands of others'; None: nothing is shown and nothing demanded."""
    surveyor: Surveyor | None = field(default=None, repr=False)
    """Of this host; None: nothing is said of it, and others are not judged."""
    notary: Notary | None = field(default=None, repr=False)
    """Who signs receipts; None: nobody."""

    def guards(self, egress: str, kind: str, offered: str) -> bool:
        """Whether the hand-over of a session to an egress would be guarded.

        Args:
            egress: its name.
            kind: of the hypervisor behind it, where no monitor tells.
            offered: what the source can guard, as OFFER says.
        """
        kind = "qmp" if self.monitors.get(egress) else kind
        return self.handovers is not None and bool(kind) and kind == offered

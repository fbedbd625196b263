"""What one session did, as both ends report it. Sans-IO."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from proxy.authority import Act
from proxy.guest import GuestView
from proxy.preflight import Finding
from proxy.session import Session
from proxy.tally import PageCounts, PageTally


@dataclass(frozen=True, slots=True)
class Decision:
    """What whoever has a say answered at one point of the session (``proxy.authority``)."""

    point: Literal["offer", "identity", "handover", "resume"]
    allowed: bool
    rule: str
    """Empty where it was refused for something that is no rule of a policy."""
    reason: str = ""
    approvers: list[int] = field(default_factory=list)


@dataclass(slots=True)
class SessionReport:
    """Facts of one session; the keys of ``--report`` are these names.

    ``bytes_in`` counts stream bytes that entered the pair in a direction, ``bytes_out`` those handed to a hypervisor
    at its end; ``bytes_wire`` counts TLS and lanes together as sent between the relays in a direction.
    """

    role: str
    session_id: str
    started: datetime
    peer: str | None = None
    peer_address: str | None = None
    vm: str | None = None
    vm_uuid: str | None = None
    bytes_in: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    bytes_out: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    bytes_wire: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    handover: str = "unguarded"
    handover_kind: str | None = None
    handover_seconds: float | None = None
    encode: str | None = None
    pages: dict[str, int] = field(default_factory=dict)
    regimes: dict[str, int] = field(default_factory=dict)
    bytes_saved: int = 0
    codec_seconds: float = 0.0
    pages_missing: int = 0
    rounds: int = 0
    dirty_pages: int = 0
    digest_blake3: dict[str, dict[str, str]] = field(default_factory=dict)
    stream_format: str | None = None
    cipher: str | None = None
    group: str | None = None
    lanes: int = 0
    lanes_lost: int = 0
    channels: int = 0
    resumes: int = 0
    ended: datetime | None = None
    seconds: float = 0.0
    handshake_seconds: float | None = None
    decisions: list[Decision] = field(default_factory=list)
    procedures: list[Act] = field(default_factory=list)
    policy: str | None = None
    attested: str | None = None
    preflight: list[Finding] = field(default_factory=list)
    vtpm_epoch: int | None = None
    vtpm_sha256: str | None = None
    rate_limit: int | None = None
    outcome: str = ""
    error: str | None = None
    exit_code: int = 0


def tally(
    report: SessionReport,
    session: Session,
    pages: PageTally | None,
    guest: GuestView | None,
    *,
    sent_bytes: int,
    received_bytes: int,
) -> None:
    """Write what a session did into its report.

    Args:
        report: filled in.
        session: its halves count and hash.
        pages: what page-aware encoding did; None where there was none.
        guest: what its streams told; None where nobody followed them.
        sent_bytes: what this end put on the network, TLS and lanes together.
        received_bytes: what it took from it.
    """
    sends = session.role.sends
    senders, receivers = session.senders, session.receivers
    report.channels = len(receivers)
    report.bytes_wire = {sends.label: sent_bytes, sends.opposite.label: received_bytes}
    report.bytes_in = {
        sends.label: sum(half.offset for half in senders.values()),
        sends.opposite.label: sum(half.offset for half in receivers.values()),
    }
    report.bytes_out = {
        sends.label: sum(half.acknowledged_bytes for half in senders.values()),
        sends.opposite.label: sum(half.written_bytes for half in receivers.values()),
    }
    for number, receiver in receivers.items():
        halves = [half for half in (senders.get(number), receiver) if half is not None]
        digests = {half.direction.label: half.digest.hex() for half in sorted(halves, key=lambda half: half.direction)}
        report.digest_blake3[str(number)] = digests
    if pages is not None:
        report.pages = {kind: getattr(pages.pages, kind) for kind in PageCounts.__slots__}
        report.regimes = dict(pages.regimes)
        report.bytes_saved = pages.saved_bytes
        report.codec_seconds = round(pages.seconds, 6)
        report.pages_missing = pages.missing
    if guest is not None:
        report.vm = guest.name or report.vm
        report.rounds, report.dirty_pages = guest.rounds, guest.dirty_pages

"""Counts what sessions, peers and processes do. One a process; called on the event loop, and never waits.

What is said of policy and receipts may come from any thread: its values are made at the start, and prometheus-client
locks each of them while it changes.

A session's status holds counts since its beginning. The observer remembers the highest it has seen of each and adds
only the rest, so that nothing is counted twice and no counter falls, whatever order samples and ends come in.
"""

import platform
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from crypto import errors as crypto
from crypto.identity import Identity
from crypto.keys import Direction
from korora import __version__
from korora.metrics import families as f
from korora.metrics import labels
from korora.metrics.family import Family, Side
from korora.metrics.instruments import Instruments
from korora.metrics.usage import Usage, usage_of_this_process
from proxy.errors import (
    EXIT_INTEGRITY,
    PeerAborted,
    PeerRefused,
    PolicyRefused,
    ProtocolViolation,
    StreamCorrupt,
    VtpmRefused,
)
from proxy.report import SessionReport
from proxy.session import Role
from proxy.status import SessionStatus

STALL_SECONDS_MAX: Final = 30.0  # six heartbeats: a network that is only slow has acknowledged something by then
SESSIONS_REMEMBERED_MAX: Final = 1024  # that have ended: a sample taken before the end may be handed in after it

# The counts of a status, and the metric and way that each belongs to.
COUNTED: Final = (
    ("channels", f.CHANNELS, ()),
    ("bytes_in", f.STREAM_BYTES, ("in",)),
    ("bytes_out", f.STREAM_BYTES, ("out",)),
    ("wire_sent", f.WIRE_BYTES, ("sent",)),
    ("wire_received", f.WIRE_BYTES, ("received",)),
    ("frames_sent", f.FRAMES, ("sent",)),
    ("frames_received", f.FRAMES, ("received",)),
    ("frames_resent", f.FRAMES_RESENT, ()),
    ("records_sent", f.RECORDS, ("sent",)),
    ("records_received", f.RECORDS, ("received",)),
    ("rekeys", f.REKEYS, ()),
    ("lanes_lost", f.LANES_LOST, ()),
    ("resumes", f.RESUMES, ()),
    *((f"pages_{kind}", f.PAGES, (kind,)) for kind in labels.PAGE_KINDS),
    ("paged_bytes", f.PAGED_BYTES, ("plain",)),
    ("body_bytes", f.PAGED_BYTES, ("encoded",)),
    ("delta_bytes", f.DELTA_BYTES, ()),
    ("codec_seconds", f.CODEC_SECONDS, ()),
    ("rounds", f.ROUNDS, ()),
    ("guest_pages", f.GUEST_PAGES, ()),
    ("dirty_pages", f.DIRTY_PAGES, ()),
    ("pages_missing", f.PAGES_MISSING, ()),
)
# The counts of the content store, and the metric and label that each belongs to.
STORED: Final = (
    ("pages_stored", f.STORE_PAGES, ("stored",)),
    ("pages_dropped", f.STORE_PAGES, ("dropped",)),
    ("hits", f.STORE_PAGES, ("found",)),
    ("misses", f.STORE_PAGES, ("not_found",)),
    ("pages_read", f.STORE_PAGES, ("read",)),
    ("pages_missing", f.STORE_PAGES, ("unreadable",)),
    ("bytes_written", f.STORE_WRITTEN, ()),
    ("segments_finished", f.STORE_SEGMENTS, ("finished",)),
    ("segments_abandoned", f.STORE_SEGMENTS, ("abandoned",)),
    ("segments_damaged", f.STORE_SEGMENTS, ("damaged",)),
    ("segments_evicted", f.STORE_SEGMENTS, ("evicted",)),
)
# What is summed over the sessions of a role.
SUMMED: Final = (
    ("lanes", f.LANES),
    ("queue_frames", f.QUEUE_FRAMES),
    ("queue_bytes", f.QUEUE_BYTES),
    ("window_bytes", f.WINDOW_BYTES),
    ("bytes_per_second", f.LINK_RATE),
    ("round_pages", f.ROUND_PAGES),
)

# The closest base class counts.
REFUSALS: Final = MappingProxyType(
    {
        crypto.IntegrityError: "other",
        crypto.RecordMalformed: "malformed",
        crypto.RecordTooLarge: "too_large",
        crypto.RecordForged: "forged",
        crypto.RecordOutOfOrder: "out_of_order",
        crypto.RecordReplayed: "replayed",
        crypto.RecordGap: "gap",
        crypto.RecordAfterFinal: "after_final",
        crypto.EpochInvalid: "epoch",
        crypto.ControlForged: "control",
        crypto.LaneReused: "lane_reused",
        crypto.KeyExhausted: "key_exhausted",
    }
)
CAUSES: Final = MappingProxyType(
    {
        crypto.IntegrityError: "record",
        StreamCorrupt: "stream",
        VtpmRefused: "vtpm",
        crypto.ReceiptError: "receipt",
        ProtocolViolation: "protocol",
        PeerAborted: "peer",
    }
)
REASONS: Final = MappingProxyType(
    {
        crypto.AuthenticationError: "tls",
        crypto.TlsFailure: "tls",
        crypto.GroupRefused: "group",
        crypto.PeerCertificateMissing: "no_certificate",
        crypto.CertificateUntrusted: "untrusted",
        crypto.CertificateExpired: "expired",
        crypto.CertificateRevoked: "revoked",
        crypto.CertificateMalformed: "malformed",
        crypto.PeerNameMismatch: "name",
        crypto.ResumeForged: "resume",
        crypto.AttestationError: "attestation",
        crypto.AttestationMissing: "attestation_missing",
        crypto.EvidenceMalformed: "attestation_malformed",
        crypto.QuoteInvalid: "attestation_quote",
        crypto.PlatformUnknown: "attestation_unknown",
        crypto.PlatformChanged: "attestation_changed",
        crypto.IntegrityError: "record",
        crypto.ReceiptError: "receipt",
        PolicyRefused: "policy",
        PeerRefused: "protocol",
    }
)
DISPUTES: Final = MappingProxyType(
    {
        crypto.LogTruncated: "truncated",
        crypto.LogForked: "forked",
        crypto.HeadMalformed: "malformed",
    }
)


@dataclass(slots=True)
class _Seen:
    """What has been counted of a session that runs."""

    counts: dict[str, float]
    acknowledged: int = 0
    moved_at: float = 0.0
    """When a frame was last acknowledged or none was in flight, in seconds of the session's own time."""
    stalled: bool = False


class Observer:
    """Turns what happens in this process into metrics.

    Args:
        instruments: of this process, alone or shared.
        side: what this process is; a relay of one process is both.
        worker: its name among the processes, as given to ``Instruments.shared``.
        clock: seconds since 1970.
        usage: what this process uses.
    """

    def __init__(
        self,
        instruments: Instruments,
        side: Side = Side.BOTH,
        worker: str = "0",
        *,
        clock: Callable[[], float] = time.time,
        usage: Callable[[], Usage] = usage_of_this_process,
    ) -> None:
        self._in = instruments
        self._side = side
        self._worker = worker
        self._clock = clock
        self._usage = usage
        self._cpu_seconds = 0.0
        self._stored: dict[str, int] = {}
        self._running: dict[tuple[str, str], _Seen] = {}
        self._ended: OrderedDict[tuple[str, str], None] = OrderedDict()
        for family in f.FAMILIES:
            if family.side & side:
                for said in _combinations(family):
                    instruments.touch(family, *said)
        if Side.SUPERVISOR in side:
            instruments.gauge(f.BUILD_INFO, __version__, platform.python_version()).set(1)
        if Side.WORKER in side:
            self._gauge([])  # a worker that takes the name of one that died starts with no sessions
            self.handovers_unsettled({})
            for role in labels.ROLE[1]:
                self.approvals_waiting(role, 0)

    # ---- sessions

    def session_begun(self, role: str) -> None:
        """A session was accepted, here (destination) or by the peer (source).

        Args:
            role: ``source`` or ``destination``.
        """
        self._in.counter(f.SESSIONS_BEGUN, role).inc()
        self._in.gauge(f.LAST_BEGUN, role).set(self._clock())

    def sample(self, statuses: Sequence[SessionStatus], lag_seconds: float) -> None:
        """Bring all values up to date; once a second.

        Args:
            statuses: of every session that runs in this process.
            lag_seconds: how late the event loop was at its worst since the last sample.
        """
        for status in statuses:
            key = (status.role, status.session_id)
            if key not in self._ended:
                self._watch(self._count(key, _counts(status)), status)
        if Side.WORKER in self._side:
            self._gauge([status for status in statuses if (status.role, status.session_id) not in self._ended])
        self._in.histogram(f.LOOP_LAG).observe(max(0.0, lag_seconds))
        usage = self._usage()
        self._in.counter(f.WORKER_CPU, self._worker).inc(max(0.0, usage.cpu_seconds - self._cpu_seconds))
        self._cpu_seconds = max(self._cpu_seconds, usage.cpu_seconds)
        self._in.gauge(f.WORKER_MEMORY, self._worker).set(usage.resident_bytes)
        self._in.gauge(f.WORKER_FILES, self._worker).set(usage.open_files)
        self._in.gauge(f.WORKER_SAMPLED, self._worker).set(self._clock())

    def store(self, counts: Mapping[str, int]) -> None:
        """What the content store of this process has done so far, by the names of ``chunking.store.Counters``."""
        for name, family, said in STORED:
            new = counts[name] - self._stored.get(name, 0)
            if new > 0:
                self._in.counter(family, *said).inc(new)
                self._stored[name] = counts[name]

    def session_ended(
        self, report: SessionReport, status: SessionStatus | None = None, error: BaseException | None = None
    ) -> None:
        """A session has ended, or a source's attempt at one came to nothing; its report is concluded.

        Args:
            report: with its outcome.
            status: its last one; without it the bytes of the report are counted, and no frames or records beyond
                those of the last sample.
            error: what ended it early; without it an integrity failure is counted as of unknown cause.
        """
        key = (report.role, report.session_id)
        if key in self._ended:
            return
        counts = _counts(status) if status is not None else _counts_of_report(report)
        if report.session_id:
            self._count(key, counts)
            self._running.pop(key, None)
            self._ended[key] = None
            while len(self._ended) > SESSIONS_REMEMBERED_MAX:
                self._ended.popitem(last=False)
        outcome = report.outcome if report.outcome in labels.OUTCOME[1] else "internal"
        self._in.counter(f.SESSIONS_ENDED, report.role, outcome).inc()
        self._in.gauge(f.LAST_ENDED, report.role, outcome).set(self._clock())
        self._in.histogram(f.SESSION_SECONDS, report.role).observe(report.seconds)
        if report.handshake_seconds is not None:
            self._in.histogram(f.HANDSHAKE_SECONDS, report.role).observe(report.handshake_seconds)
        if report.exit_code == EXIT_INTEGRITY:
            cause = "unknown" if error is None else _closest(CAUSES, error, "unknown")
            self._in.counter(f.INTEGRITY_FAILURES, report.role, cause).inc()
        self._record_refused(error)
        if report.vtpm_epoch is not None:
            became = {"done": "moved", "aborted": "stayed"}.get(report.handover, "undecided")
            self._in.counter(f.VTPMS, report.role, became).inc()
        if status is not None and not report.handover_kind:
            self._in.counter(f.HANDOVERS, report.role, labels.NO_KIND, "unguarded").inc()

    def handover_ended(self, role: str, kind: str, outcome: str, seconds: float | None) -> None:
        """A guarded hand-over has ended here; told once of each (``proxy.shell.handovers.Handovers``).

        Args:
            role, kind: of its journal.
            outcome: `done` or `aborted`.
            seconds: from `voted` to `done`; None where it was not both.
        """
        self._in.counter(f.HANDOVERS, role, kind, outcome).inc()
        if seconds is not None and role == Role.SOURCE.value:
            self._in.histogram(f.HANDOVER_SECONDS, role).observe(seconds)

    def handovers_unsettled(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Where the hand-overs stand that are not finished; for the one worker of a relay that finishes them.

        Args:
            counts: by role and state, as the journal has them.
        """
        for role in labels.ROLE[1]:
            for state in labels.HANDOVER_STATES:
                self._in.gauge(f.HANDOVERS_UNSETTLED, role, state).set(counts.get((role, state), 0))

    # ---- policy and receipts; see ``korora.watched.Watch``

    def decided(self, role: str, point: str, *, allowed: bool) -> None:
        """A session asked whether it may go on, at this point, and has its answer."""
        self._in.counter(f.DECISIONS, role, point, "allowed" if allowed else "refused").inc()

    def approvals_waiting(self, role: str, count: int) -> None:
        """So many sessions of this process wait for people now."""
        self._in.gauge(f.APPROVALS_WAITING, role).set(count)

    def receipt_logged(self, role: str, stage: str, *, both: bool) -> None:
        """A receipt is in the log, signed by both hosts or by this one alone."""
        self._in.counter(f.RECEIPTS, role, stage, "both" if both else "alone").inc()

    def attested(self, seconds: float) -> None:
        """This host has shown its platform, and its TPM took so long."""
        self._in.histogram(f.ATTESTATION_SECONDS).observe(seconds)

    def appraised(self, verdict: str) -> None:
        """A peer's platform was judged, and this was found."""
        self._in.counter(f.ATTESTATIONS, verdict).inc()

    def surveyed(self, check: str, grade: str) -> None:
        """Two hosts were compared before a session, by one check."""
        self._in.counter(f.PREFLIGHT_FINDINGS, check, grade).inc()

    def receipt_failed(self) -> None:
        """A session is over, and its outcome cannot be logged."""
        self._in.counter(f.RECEIPTS_FAILED).inc()

    def receipt_spared(self) -> None:
        """An offer was refused, and left no receipt: its peer has left enough of late."""
        self._in.counter(f.RECEIPTS_SPARED).inc()

    def log_disputed(self, error: crypto.ReceiptError) -> None:
        """A peer's log is not what it was, or its head is none."""
        self._in.counter(f.LOG_DISPUTES, _closest(DISPUTES, error, "malformed")).inc()

    # ---- peers and records

    def peer_refused(self, error: BaseException) -> None:
        """A TLS peer was not let in (the ``failed`` of proxy.shell.destination.Destination)."""
        self._in.counter(f.PEERS_REFUSED, _closest(REASONS, error, "other")).inc()
        self._record_refused(error)

    def _record_refused(self, error: BaseException | None) -> None:
        if isinstance(error, crypto.IntegrityError) and not isinstance(error, crypto.SealBroken | crypto.WrapBroken):
            self._in.counter(f.RECORD_REFUSALS, _closest(REFUSALS, error, "other")).inc()

    def _count(self, key: tuple[str, str], counts: dict[str, float]) -> _Seen:
        """Add what is new of a session's counts."""
        seen = self._running.setdefault(key, _Seen({}))
        for name, family, ways in COUNTED:
            new = counts.get(name, 0) - seen.counts.get(name, 0)
            if new > 0:
                self._in.counter(family, key[0], *ways).inc(new)
                seen.counts[name] = counts[name]
        return seen

    def _watch(self, seen: _Seen, status: SessionStatus) -> None:
        """Has the session's queue moved?"""
        acknowledged = status.frames_sent - status.queue_frames
        if status.queue_frames == 0 or acknowledged > seen.acknowledged:
            seen.moved_at = status.seconds
        seen.acknowledged = max(seen.acknowledged, acknowledged)
        seen.stalled = status.seconds - seen.moved_at >= STALL_SECONDS_MAX

    def _gauge(self, statuses: Sequence[SessionStatus]) -> None:
        """Set what is true of the present."""
        for role in labels.ROLE[1]:
            mine = [status for status in statuses if status.role == role]
            for state in labels.STATES:
                self._in.gauge(f.SESSIONS, role, state).set(sum(status.state == state for status in mine))
            for name, family in SUMMED:
                self._in.gauge(family, role).set(sum(getattr(status, name) for status in mine))
            self._in.gauge(f.LINK_DELAY, role).set(max((status.delay_seconds for status in mine), default=0.0))
            stalled = sum(self._running[role, status.session_id].stalled for status in mine)
            self._in.gauge(f.SESSIONS_STALLED, role).set(stalled)
        for regime in labels.REGIMES:
            self._in.gauge(f.SESSIONS_BY_REGIME, regime).set(sum(status.regime == regime for status in statuses))

    # ---- processes; for the supervisor

    def workers(self, alive: int) -> None:
        """How many worker processes live now."""
        self._in.gauge(f.WORKERS).set(alive)

    def worker_restarted(self) -> None:
        """A worker that had ended unasked was started again."""
        self._in.counter(f.WORKER_RESTARTS).inc()

    def ready(self, *, on: bool) -> None:
        """Whether new sessions are taken, as /readyz says."""
        self._in.gauge(f.READY).set(on)

    def draining(self, *, on: bool) -> None:
        """Whether no new session is taken, and those that run are seen to their end."""
        self._in.gauge(f.DRAINING).set(on)

    def reloaded(self, *, good: bool) -> None:
        """A reload of configuration and identity has been carried out, or refused and the old kept."""
        self._in.counter(f.RELOADS, "done" if good else "failed").inc()
        self._in.gauge(f.LAST_RELOAD).set(good)

    def session_died(self, role: str) -> None:
        """A session was lost with the worker that carried it, which could not say so itself."""
        self._in.counter(f.SESSIONS_ENDED, role, labels.DIED).inc()
        self._in.gauge(f.LAST_ENDED, role, labels.DIED).set(self._clock())

    # ---- either

    def identity(self, identity: Identity) -> None:
        """An identity was loaded; of those that processes use, the one that expires first is reported."""
        for name, certificate in (
            ("host", identity.certificate),
            ("signing", identity.signing_certificate),
            ("ca", identity.ca),
        ):
            self._in.gauge(f.CERTIFICATE_EXPIRY, name).set(certificate.not_valid_after_utc.timestamp())
        ends = identity.crl.next_update_utc
        if ends is not None:
            self._in.gauge(f.CRL_EXPIRY).set(ends.timestamp())


def _counts(status: SessionStatus) -> dict[str, float]:
    return {name: getattr(status, name) for name, _, _ in COUNTED}


def _counts_of_report(report: SessionReport) -> dict[str, float]:
    """A report counts by direction, this end by what it reads and writes."""
    sends: Direction = Role(report.role).sends
    mine, theirs = sends.label, sends.opposite.label
    return {
        "channels": report.channels,
        "bytes_in": report.bytes_in[mine],
        "bytes_out": report.bytes_out[theirs],
        "wire_sent": report.bytes_wire[mine],
        "wire_received": report.bytes_wire[theirs],
        "resumes": report.resumes,
    }


def _combinations(family: Family) -> list[tuple[str, ...]]:
    """Every combination of a family's label values."""
    found: list[tuple[str, ...]] = [()]
    for _, values in family.labels:
        found = [(*before, value) for before in found for value in values]
    return found


def _closest(names: "MappingProxyType[type[BaseException], str]", error: BaseException, otherwise: str) -> str:
    return next((names[kind] for kind in type(error).__mro__ if kind in names), otherwise)

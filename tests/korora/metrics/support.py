"""Statuses, reports and samples for the tests of metrics."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry

from korora import report as reports
from korora.metrics.family import Family
from korora.metrics.usage import Usage
from proxy.report import SessionReport
from proxy.session import Role
from proxy.status import SessionStatus

NOW = 1_764_000_000.0
IDLE = SessionStatus(
    session_id="00" * 16,
    role="source",
    peer="beta",
    peer_address="192.0.2.2",
    vm=None,
    state="open",
    seconds=1.0,
    channels=0,
    lanes=1,
    bytes_in=0,
    bytes_out=0,
    wire_sent=0,
    wire_received=0,
    frames_sent=0,
    frames_received=0,
    frames_resent=0,
    records_sent=0,
    records_received=0,
    rekeys=0,
    lanes_lost=0,
    resumes=0,
    queue_frames=0,
    queue_bytes=0,
    window_bytes=4096,
    delay_seconds=0.0,
    bytes_per_second=0.0,
    rate_limit=None,
)
NO_USAGE = Usage(0.0, 0, 0)


def status(number: int = 0, role: str = "source", **changes: object) -> SessionStatus:
    """The status of session ``number``."""
    return replace(IDLE, session_id=f"{number:032x}", role=role, **changes)  # type: ignore[arg-type]


def report(number: int = 0, role: str = "source", code: int = 0, seconds: float = 2.0) -> SessionReport:
    """The concluded report of session ``number``."""
    made = SessionReport(role=role, session_id=f"{number:032x}", started=datetime.now(UTC), seconds=seconds)
    reports.conclude(made, code, None if code == 0 else "korora: error: it failed")
    return made


def report_of(last: SessionStatus) -> SessionReport:
    """The report of a session with this last status."""
    made = report(int(last.session_id, 16), last.role)
    sends = Role(last.role).sends
    made.channels, made.resumes = last.channels, last.resumes
    made.bytes_in = {sends.label: last.bytes_in, sends.opposite.label: 999}
    made.bytes_out = {sends.label: 999, sends.opposite.label: last.bytes_out}
    made.bytes_wire = {sends.label: last.wire_sent, sends.opposite.label: last.wire_received}
    return made


def value(registry: CollectorRegistry, family: Family, *labels: str, suffix: str = "") -> float | None:
    """One sample; None where there is none."""
    named = dict(zip(family.label_names, labels, strict=True))
    return registry.get_sample_value(family.name + suffix, named)


def samples(registry: CollectorRegistry) -> Mapping[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All samples by name and labels."""
    found: Iterable[tuple[tuple[str, tuple[tuple[str, str], ...]], float]] = (
        ((sample.name, tuple(sorted(sample.labels.items()))), sample.value)
        for metric in registry.collect()
        for sample in metric.samples
    )
    return dict(found)

"""What is counted, and that nothing is counted twice or lost."""

import itertools
import time
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition, parser

from chunking.store import Counters
from crypto.errors import (
    CertificateRevoked,
    HeadMalformed,
    LaneReused,
    LogForked,
    LogTruncated,
    LogUnusable,
    RecordForged,
    RecordReplayed,
    SealBroken,
    SignatureMissing,
)
from crypto.identity import Identity
from korora.metrics import families as f
from korora.metrics import labels
from korora.metrics.family import Family, Kind, Side
from korora.metrics.instruments import Instruments
from korora.metrics.observer import COUNTED, SESSIONS_REMEMBERED_MAX, STALL_SECONDS_MAX, STORED, SUMMED, Observer
from korora.metrics.usage import Usage, usage_of_this_process
from proxy.errors import (
    OUTCOMES,
    PeerAborted,
    PeerRefused,
    PolicyRefused,
    ProtocolViolation,
    StreamCorrupt,
    VtpmRefused,
)
from proxy.handover.table import State
from proxy.status import SessionStatus
from tests.korora.metrics.support import NO_USAGE, NOW, report, report_of, samples, status, value

COUNTS = [name for name, _, _ in COUNTED]


def watching(side: Side = Side.BOTH) -> tuple[Observer, CollectorRegistry]:
    instruments = Instruments.alone()
    observer = Observer(instruments, side, clock=lambda: NOW, usage=lambda: NO_USAGE)
    return observer, instruments.registry()


# ---- the content store


def test_the_store_is_counted_once_by_the_names_it_counts_by() -> None:
    observer, registry = watching()
    counters = Counters()
    names = {field.name for field in fields(Counters) if not field.name.startswith("_")}
    assert {name for name, _, _ in STORED} == names
    for number, name in enumerate(sorted(names), 1):
        counters.add(**{name: number})
    for _ in range(2):
        observer.store({name: getattr(counters, name) for name in names})
    for number, name in enumerate(sorted(names), 1):
        _, family, labels = next(row for row in STORED if row[0] == name)
        assert value(registry, family, *labels) == number


# ---- counts


@st.composite
def histories(draw: st.DrawFn) -> list[list[SessionStatus]]:
    """Up to four sessions, each as the statuses it goes through: counts that only grow."""
    sessions = []
    for number in range(draw(st.integers(1, 4))):
        role = draw(st.sampled_from(["source", "destination"]))
        now = status(number, role)
        steps = [now]
        for _ in range(draw(st.integers(0, 5))):
            grown = {
                name: getattr(now, name) + draw(st.integers(0, 5))
                for name in draw(st.sets(st.sampled_from(COUNTS), max_size=4))
            }
            now = replace(now, seconds=now.seconds + 1, **grown)
            steps.append(now)
        sessions.append(steps)
    return sessions


@given(
    histories(),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), max_size=30),
    st.booleans(),
)
def test_the_counters_are_the_sums_of_the_last_statuses(
    sessions: list[list[SessionStatus]], moves: list[tuple[int, int, bool]], through_reports: bool
) -> None:
    """Whatever samples were taken, late ones and old ones too, and in whatever order the sessions ended."""
    observer, registry = watching()
    ended: set[int] = set()

    def end(number: int) -> None:
        last = sessions[number][-1]
        observer.session_ended(report_of(last), None if through_reports and number not in ended else last)
        ended.add(number)

    before: dict[object, float] = {}
    for number, step, ends in moves:
        if number < len(sessions):
            if ends:
                end(number)
            else:
                observer.sample([sessions[number][min(step, len(sessions[number]) - 1)]], 0.0)
        after = {key: count for key, count in samples(registry).items() if key[0].endswith("_total")}
        assert all(after[key] >= count for key, count in before.items()), "a counter fell"
        before = dict(after)
    # In the end each has been seen as it was last: sampled so, and ended.
    observer.sample([steps[-1] for steps in sessions], 0.0)
    for number in range(len(sessions)):
        end(number)
    observer.sample([], 0.0)
    by_report = {"channels", "bytes_in", "bytes_out", "wire_sent", "wire_received", "resumes"}
    for name, family, ways in COUNTED:
        if through_reports and name not in by_report:
            continue  # a report knows nothing of these; the next test says what becomes of them
        for role in ("source", "destination"):
            total = sum(getattr(steps[-1], name) for steps in sessions if steps[-1].role == role)
            assert value(registry, family, role, *ways) == total, name
    for role in ("source", "destination"):
        of_role = sum(steps[-1].role == role for steps in sessions)
        assert value(registry, f.SESSIONS_ENDED, role, "done") == of_role


def test_without_a_last_status_the_report_gives_the_bytes_and_the_last_sample_the_rest() -> None:
    observer, registry = watching()
    observer.sample([status(bytes_in=10, frames_sent=3)], 0.0)
    observer.session_ended(report_of(status(bytes_in=25, wire_sent=40, frames_sent=8)))
    assert value(registry, f.STREAM_BYTES, "source", "in") == 25
    assert value(registry, f.WIRE_BYTES, "source", "sent") == 40
    assert value(registry, f.FRAMES, "source", "sent") == 3


@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_report_counts_the_ways_as_this_end_does(role: str) -> None:
    observer, registry = watching()
    observer.session_ended(report_of(status(0, role, bytes_in=1, bytes_out=2, wire_sent=3, wire_received=4)))
    assert [value(registry, f.STREAM_BYTES, role, way) for way in ("in", "out")] == [1, 2]
    assert [value(registry, f.WIRE_BYTES, role, way) for way in ("sent", "received")] == [3, 4]


def test_both_ends_of_one_session_in_one_process() -> None:
    """A relay may serve as source and destination of the same session: they share its id."""
    observer, registry = watching()
    observer.sample([status(7, "source", bytes_in=5), status(7, "destination", bytes_out=5)], 0.0)
    observer.session_ended(report(7, "source"), status(7, "source", bytes_in=6))
    observer.sample([status(7, "destination", bytes_out=6)], 0.0)
    assert value(registry, f.STREAM_BYTES, "source", "in") == 6
    assert value(registry, f.STREAM_BYTES, "destination", "out") == 6


def test_attempts_without_a_session_are_counted_each() -> None:
    observer, registry = watching()
    for _ in range(3):
        attempt = report(code=6)
        attempt.session_id = ""
        observer.session_ended(attempt)
    assert value(registry, f.SESSIONS_ENDED, "source", "lost") == 3


def test_memory_of_ended_sessions_is_bounded() -> None:
    observer, registry = watching()
    for number in range(SESSIONS_REMEMBERED_MAX + 50):
        observer.sample([status(number)], 0.0)
        observer.session_ended(report(number), status(number))
    assert len(observer._ended) == SESSIONS_REMEMBERED_MAX
    assert observer._running == {}
    assert value(registry, f.SESSIONS_ENDED, "source", "done") == SESSIONS_REMEMBERED_MAX + 50


def test_every_outcome_and_times() -> None:
    observer, registry = watching()
    for number, code in enumerate([*OUTCOMES, 143]):
        ended = report(number, "destination", code, seconds=7.0)
        ended.handshake_seconds = 0.03
        observer.session_begun("destination")
        observer.session_ended(ended, status(number, "destination"))
    reported = [outcome for outcome in labels.OUTCOME[1] if outcome != labels.DIED]
    for outcome in reported:
        assert value(registry, f.SESSIONS_ENDED, "destination", outcome) == 1, outcome
        assert value(registry, f.LAST_ENDED, "destination", outcome) == NOW
        assert value(registry, f.LAST_ENDED, "source", outcome) is None, "never is not 1970"
    count = len(reported)
    assert value(registry, f.SESSIONS_BEGUN, "destination") == count
    assert value(registry, f.LAST_BEGUN, "destination") == NOW
    assert value(registry, f.SESSION_SECONDS, "destination", suffix="_sum") == 7.0 * count
    assert registry.get_sample_value("korora_session_seconds_bucket", {"role": "destination", "le": "5.0"}) == 0
    assert registry.get_sample_value("korora_session_seconds_bucket", {"role": "destination", "le": "10.0"}) == count
    assert registry.get_sample_value("korora_handshake_seconds_bucket", {"role": "destination", "le": "0.025"}) == 0
    assert registry.get_sample_value("korora_handshake_seconds_bucket", {"role": "destination", "le": "0.05"}) == count


# ---- hand-overs


def test_a_hand_over_is_counted_by_its_end_and_not_by_its_session_s() -> None:
    """The session may end before it is decided, or die with its worker; the journal comes to an end once."""
    observer, registry = watching()
    for number, state in enumerate(State):
        ended = report(number, "destination")
        ended.handover, ended.handover_kind = state.value, "xl"
        observer.session_ended(ended, status(number, "destination"))
    observer.handover_ended("destination", "xl", "done", 1.0)
    observer.handover_ended("source", "qmp", "aborted", None)
    counted = {("destination", "xl", "done"), ("source", "qmp", "aborted")}
    kinds = (*labels.HANDOVER_KINDS, labels.NO_KIND)
    for role, kind, outcome in itertools.product(labels.ROLE[1], kinds, labels.HANDOVER_OUTCOMES):
        wanted = (role, kind, outcome) in counted
        assert value(registry, f.HANDOVERS, role, kind, outcome) == wanted, (role, kind, outcome)


def test_a_session_that_nobody_guards_and_one_that_never_was() -> None:
    observer, registry = watching()
    observer.session_ended(report(1), status(1))
    observer.session_ended(report(2))  # a source's attempt that came to nothing
    assert value(registry, f.HANDOVERS, "source", "none", "unguarded") == 1


def test_what_became_of_vtpms() -> None:
    observer, registry = watching()
    for number, (handover, epoch) in enumerate((("done", 1), ("aborted", 2), ("committed", 3), ("done", None))):
        ended = report(number, "source")
        ended.handover, ended.handover_kind, ended.vtpm_epoch = handover, "xl", epoch
        observer.session_ended(ended, status(number, "source"))
    for became in ("moved", "stayed", "undecided"):
        assert value(registry, f.VTPMS, "source", became) == 1
        assert value(registry, f.VTPMS, "destination", became) == 0


def test_how_long_hand_overs_take() -> None:
    observer, registry = watching()
    for role, seconds in (("source", 0.04), ("source", 2.0), ("source", None), ("destination", 9)):
        observer.handover_ended(role, "qmp", "done", seconds)
    assert value(registry, f.HANDOVER_SECONDS, "source", suffix="_count") == 2
    assert value(registry, f.HANDOVER_SECONDS, "source", suffix="_sum") == 2.04
    assert registry.get_sample_value("korora_handover_seconds_bucket", {"role": "source", "le": "0.025"}) == 0
    assert registry.get_sample_value("korora_handover_seconds_bucket", {"role": "source", "le": "0.05"}) == 1


def test_what_is_unsettled_is_so_until_it_is_not() -> None:
    instruments = Instruments.alone()
    registry = instruments.registry()
    worker = Observer(instruments, Side.WORKER, "0", usage=lambda: NO_USAGE)
    worker.handovers_unsettled({("source", "doubt"): 2, ("destination", "unreadable"): 1})
    assert value(registry, f.HANDOVERS_UNSETTLED, "source", "doubt") == 2
    assert value(registry, f.HANDOVERS_UNSETTLED, "destination", "doubt") == 0
    assert value(registry, f.HANDOVERS_UNSETTLED, "destination", "unreadable") == 1
    worker.handovers_unsettled({("source", "prepared"): 1})
    assert value(registry, f.HANDOVERS_UNSETTLED, "source", "doubt") == 0
    assert value(registry, f.HANDOVERS_UNSETTLED, "source", "prepared") == 1
    # It dies; the worker in its place has not looked yet.
    Observer(instruments, Side.WORKER, "0", usage=lambda: NO_USAGE)
    assert value(registry, f.HANDOVERS_UNSETTLED, "source", "prepared") == 0


# ---- the present


def test_gauges_are_sums_of_the_sessions_that_run() -> None:
    observer, registry = watching()
    observer.sample(
        [
            status(1, lanes=2, queue_frames=3, queue_bytes=300, bytes_per_second=1e6, delay_seconds=0.02),
            status(2, lanes=4, queue_frames=1, queue_bytes=50, bytes_per_second=2e6, delay_seconds=0.05, round_pages=9),
            status(3, "destination", state="resuming"),
        ],
        0.0,
    )
    expected = {"lanes": 6, "queue_frames": 4, "queue_bytes": 350, "window_bytes": 8192, "bytes_per_second": 3e6}
    expected["round_pages"] = 9
    for name, family in SUMMED:
        assert value(registry, family, "source") == expected[name], name
    assert value(registry, f.LINK_DELAY, "source") == 0.05
    assert value(registry, f.SESSIONS, "source", "open") == 2
    assert value(registry, f.SESSIONS, "destination", "resuming") == 1
    observer.session_ended(report(1), status(1))
    observer.sample([status(2, state="finishing")], 0.0)
    assert value(registry, f.SESSIONS, "source", "open") == 0
    assert value(registry, f.SESSIONS, "source", "finishing") == 1
    assert value(registry, f.SESSIONS, "destination", "resuming") == 0
    assert value(registry, f.LANES, "source") == 1
    observer.sample([], 0.0)
    assert all(value(registry, family, role) == 0 for _, family in SUMMED for role in ("source", "destination"))


def test_what_pages_were_and_what_they_became() -> None:
    """The ratio of a relay, what it saved and its dirty rate follow from these counters."""
    observer, registry = watching()
    kinds = {f"pages_{kind}": number for number, kind in enumerate(labels.PAGE_KINDS, 1)}
    first = status(1, **kinds, paged_bytes=4096 * 15, body_bytes=5000, delta_bytes=700, codec_seconds=0.25)
    observer.sample([first, status(2, "destination", pages_zero=7, codec_seconds=0.5, pages_missing=3)], 0.0)
    observer.sample(
        [replace(first, pages_literal=10, codec_seconds=0.75, rounds=2, dirty_pages=4, guest_pages=20)], 0.0
    )
    assert {kind: value(registry, f.PAGES, "source", kind) for kind in labels.PAGE_KINDS} == {
        "zero": 1,
        "duplicate": 2,
        "delta": 3,
        "literal": 10,
        "copy": 5,
    }
    assert value(registry, f.PAGES, "destination", "zero") == 7
    assert [value(registry, f.PAGED_BYTES, "source", form) for form in ("plain", "encoded")] == [61_440, 5000]
    assert value(registry, f.DELTA_BYTES, "source") == 700
    assert [value(registry, f.CODEC_SECONDS, role) for role in ("source", "destination")] == [0.75, 0.5]
    assert [value(registry, family, "source") for family in (f.ROUNDS, f.DIRTY_PAGES, f.GUEST_PAGES)] == [2, 4, 20]
    assert value(registry, f.PAGES_MISSING, "destination") == 3


def test_how_much_work_frames_get() -> None:
    observer, registry = watching()
    running = [status(1, regime="fast"), status(2, regime="fast"), status(3, regime="raw"), status(4)]
    observer.sample(running, 0.0)
    assert {name: value(registry, f.SESSIONS_BY_REGIME, name) for name in labels.REGIMES} == {
        name: {"fast": 2, "raw": 1}.get(name, 0) for name in labels.REGIMES
    }
    observer.sample([status(1, regime="best")], 0.0)
    assert [value(registry, f.SESSIONS_BY_REGIME, name) for name in ("raw", "fast", "best")] == [0, 0, 1]


def test_a_session_is_stalled_when_nothing_of_its_queue_is_acknowledged() -> None:
    observer, registry = watching()

    def at(seconds: float, sent: int, waiting: int) -> float | None:
        observer.sample([status(seconds=seconds, frames_sent=sent, queue_frames=waiting)], 0.0)
        return value(registry, f.SESSIONS_STALLED, "source")

    assert at(1, 4, 4) == 0
    assert at(100, 4, 0) == 0, "idle is not stalled"
    assert at(101, 6, 2) == 0
    assert at(100 + STALL_SECONDS_MAX - 1, 7, 3) == 0
    assert at(100 + STALL_SECONDS_MAX, 8, 4) == 1, "more is sent, nothing is acknowledged"
    assert at(100 + STALL_SECONDS_MAX + 1, 8, 3) == 0, "one of them was"
    observer.sample([], 0.0)
    assert value(registry, f.SESSIONS_STALLED, "source") == 0


def test_the_process_itself() -> None:
    used = [Usage(1.5, 100, 10), Usage(1.25, 200, 11), Usage(4.0, 50, 9)]
    instruments = Instruments.alone()
    observer = Observer(instruments, worker="3", clock=lambda: NOW, usage=lambda: used.pop(0))
    registry = instruments.registry()
    for lag in (0.003, -0.1, 2.0):
        observer.sample([], lag)
    assert value(registry, f.WORKER_CPU, "3") == 4.0, "a clock that went back takes nothing away"
    assert value(registry, f.WORKER_MEMORY, "3") == 50
    assert value(registry, f.WORKER_FILES, "3") == 9
    assert value(registry, f.WORKER_SAMPLED, "3") == NOW
    assert registry.get_sample_value("korora_event_loop_lag_seconds_count") == 3
    assert registry.get_sample_value("korora_event_loop_lag_seconds_bucket", {"le": "1.0"}) == 2


def test_usage_is_the_kernel_s() -> None:
    before = usage_of_this_process()
    with open("/dev/null", "rb"):
        assert usage_of_this_process().open_files == before.open_files + 1
    assert before.cpu_seconds > 0
    assert before.resident_bytes > 5_000_000


# ---- policy and receipts


def counted(registry: CollectorRegistry, family: Family) -> dict[tuple[str, ...], float]:
    """What is not at 0, by label values."""
    found = itertools.product(*(values for _, values in family.labels))
    return {labels: number for labels in found if (number := value(registry, family, *labels))}


def test_what_was_answered_and_what_was_logged() -> None:
    observer, registry = watching()
    for allowed in (True, True, False):
        observer.decided("destination", "offer", allowed=allowed)
    observer.decided("source", "resume", allowed=True)
    assert counted(registry, f.DECISIONS) == {
        ("destination", "offer", "allowed"): 2,
        ("destination", "offer", "refused"): 1,
        ("source", "resume", "allowed"): 1,
    }
    for stage in ("offer", "transfer"):
        observer.receipt_logged("source", stage, both=True)
    observer.receipt_logged("source", "outcome", both=False)
    observer.receipt_failed()
    assert counted(registry, f.RECEIPTS) == {
        ("source", "offer", "both"): 1,
        ("source", "transfer", "both"): 1,
        ("source", "outcome", "alone"): 1,
    }
    assert value(registry, f.RECEIPTS_FAILED) == 1
    observer.receipt_spared()
    assert value(registry, f.RECEIPTS_SPARED) == 1
    for error in (LogTruncated("t"), LogForked("f"), HeadMalformed("m"), HeadMalformed("m")):
        observer.log_disputed(error)
    assert counted(registry, f.LOG_DISPUTES) == {("truncated",): 1, ("forked",): 1, ("malformed",): 2}


def test_a_worker_that_takes_the_name_of_one_that_died_has_nobody_waiting() -> None:
    instruments = Instruments.alone()
    Observer(instruments, Side.WORKER).approvals_waiting("source", 3)
    assert value(instruments.registry(), f.APPROVALS_WAITING, "source") == 3
    Observer(instruments, Side.WORKER)
    assert value(instruments.registry(), f.APPROVALS_WAITING, "source") == 0


# ---- faults


def test_refused_replays_and_other_integrity_failures() -> None:
    observer, registry = watching()
    errors = [
        RecordReplayed("again"),
        RecordForged("no"),
        StreamCorrupt("digest"),
        ProtocolViolation("what"),
        PeerAborted(5, "x"),
        SignatureMissing("of beta"),
        VtpmRefused("an older one"),
        None,
    ]
    for number, error in enumerate(errors):
        observer.session_ended(report(number, code=5), None, error)
    observer.session_ended(report(99, code=6), None, PeerAborted(6, "lost"))
    observer.session_ended(report(97, code=2), None, LogUnusable("the disk is full"))  # nobody has lied
    observer.session_ended(report(98, code=7), None, SealBroken("what is stored here is no record of a peer's"))
    by_cause = {cause: value(registry, f.INTEGRITY_FAILURES, "source", cause) for cause in labels.CAUSES}
    assert by_cause == {
        "record": 2,
        "stream": 1,
        "receipt": 1,
        "vtpm": 1,
        "protocol": 1,
        "peer": 1,
        "unknown": 1,
    }
    by_kind = {kind: value(registry, f.RECORD_REFUSALS, kind) for kind in labels.REFUSALS}
    assert {kind: count for kind, count in by_kind.items() if count} == {"replayed": 1, "forged": 1}


def test_peers_that_were_not_let_in() -> None:
    observer, registry = watching()
    for error in (
        CertificateRevoked("r"),
        PolicyRefused("p"),
        PeerRefused("v"),
        LaneReused("l"),
        LogForked("f"),
        ValueError("bug"),
    ):
        observer.peer_refused(error)
    by_reason = {reason: value(registry, f.PEERS_REFUSED, reason) for reason in labels.REASONS}
    found = {reason for reason, count in by_reason.items() if count == 1}
    assert found == {"revoked", "policy", "protocol", "record", "receipt", "other"}
    assert value(registry, f.RECORD_REFUSALS, "lane_reused") == 1


def test_what_the_supervisor_says() -> None:
    observer, registry = watching(Side.SUPERVISOR)
    assert value(registry, f.CRL_EXPIRY) is None, "not known is not 1970"
    observer.workers(4)
    observer.worker_restarted()
    observer.draining(on=True)
    observer.ready(on=True)
    observer.reloaded(good=True)
    assert value(registry, f.LAST_RELOAD) == 1
    observer.reloaded(good=False)
    assert value(registry, f.WORKERS) == 4
    assert value(registry, f.WORKER_RESTARTS) == 1
    assert value(registry, f.DRAINING) == 1
    assert value(registry, f.READY) == 1
    assert value(registry, f.LAST_RELOAD) == 0
    assert [value(registry, f.RELOADS, result) for result in ("done", "failed")] == [1, 1]
    observer.draining(on=False)
    assert value(registry, f.DRAINING) == 0


def test_a_session_that_died_with_its_worker() -> None:
    observer, registry = watching(Side.SUPERVISOR)
    observer.session_died("source")
    assert value(registry, f.SESSIONS_ENDED, "source", "died") == 1
    assert value(registry, f.LAST_ENDED, "source", "died") == NOW


def test_when_the_identity_expires(identity_alpha: Path) -> None:
    observer, registry = watching()
    identity = Identity.load(identity_alpha, now=datetime.now(UTC))
    assert value(registry, f.CRL_EXPIRY) is None, "not known is not 1970"
    observer.identity(identity)
    days = {
        name: (value(registry, f.CERTIFICATE_EXPIRY, name) or 0) / 86400 - time.time() / 86400
        for name in ("host", "signing", "ca")
    }
    assert 390 < days["host"] < 400
    assert 390 < days["signing"] < 400
    assert days["ca"] > 400
    assert 29 < (value(registry, f.CRL_EXPIRY) or 0) / 86400 - time.time() / 86400 < 31


# ---- what is scraped


def test_every_bounded_series_is_there_from_the_start_at_nought() -> None:
    """A counter that appears with its first event hides that event from rate() and increase()."""
    _, registry = watching()
    for family in f.FAMILIES:
        if family.side:
            found = [metric for metric in registry.collect() if metric.name == family.base_name]
            assert len(found) == 1, family.name
            combinations = 1
            for _, values in family.labels:
                combinations *= len(values)
            wanted = family.name + ("_count" if family.kind is Kind.HISTOGRAM else "")
            got = [sample for sample in found[0].samples if sample.name == wanted]
            assert len(got) == combinations, family.name
            assert all(sample.value == 0 for sample in got), family.name


@pytest.mark.parametrize("side", [Side.WORKER, Side.SUPERVISOR])
def test_each_side_reports_its_own(side: Side) -> None:
    observer, registry = watching(side)
    observer.sample([], 0.0)
    found = {metric.name for metric in registry.collect()}
    of_any = {"korora_build_info"} | {family.base_name for family in f.FAMILIES if "worker" in family.label_names}
    assert found - of_any == {family.base_name for family in f.FAMILIES if family.side & side}


def test_a_label_value_that_is_not_in_the_table_is_a_bug() -> None:
    instruments = Instruments.alone()
    with pytest.raises(ValueError, match="no role 'mallory'"):
        instruments.counter(f.SESSIONS_BEGUN, "mallory")
    with pytest.raises(ValueError, match="zip"):
        instruments.counter(f.SESSIONS_BEGUN)
    with pytest.raises(TypeError):
        instruments.gauge(f.SESSIONS_BEGUN, "source")


def everything(identity: Path) -> CollectorRegistry:
    """A relay that has used every metric."""
    observer, registry = watching()
    observer.session_begun("source")
    observer.sample([status(1)], 0.1)
    observer.session_ended(report(2, "destination"), status(2, "destination"))
    observer.reloaded(good=True)
    observer.identity(Identity.load(identity, now=datetime.now(UTC)))
    return registry


def test_both_formats_can_be_read_back(identity_alpha: Path) -> None:
    registry = everything(identity_alpha)
    wanted = {family.base_name: family for family in f.FAMILIES}
    parsed = list(parser.text_string_to_metric_families(exposition.generate_latest(registry).decode()))
    assert [metric.name for metric in parsed] == list(wanted), "all, in the order of the table"
    for metric in parsed:
        family: Family = wanted[metric.name]
        assert (metric.type, metric.unit) == (family.kind.value, family.unit), family.name
        assert metric.documentation == family.help
        names = {name for sample in metric.samples for name in sample.labels} - {"le"}
        assert names == set(family.label_names), family.name
    text = generate_latest(registry).decode()
    assert "_created" not in text
    for family in f.FAMILIES:
        assert f"# TYPE {family.name} {family.kind.value}\n" in text

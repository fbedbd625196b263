"""Several streams at once: what is counted, what the table concludes. No figure of time is held against anything."""

import json
from pathlib import Path

import pytest

from bench.budget import Outcome
from bench.daemon import start_daemons
from bench.measure import GiB
from bench.peers import Target
from bench.processes import BenchError, MachineTime, ProcessTree
from bench.streams import (
    PRIME_BYTES,
    StreamsResult,
    StreamsSample,
    _lanes_used,
    measure_streams,
    start_lanes,
)

MiB = 1024 * 1024


def direct(streams: int, _reports: Path, target: Target) -> list[int]:
    """No relay at all: every source meets the sink."""
    return [target.sink_port] * streams


def start_direct(_tree: ProcessTree, target: Target, count: int, reports: Path) -> list[int]:
    """As a starter of relays."""
    return direct(count, reports, target)


def sample(count: int, gib_per_s: float, busy: float, lanes: int | None = 1) -> StreamsSample:
    """Two GiB, relays that use 1.5 CPU seconds for each."""
    return StreamsSample(
        count=count,
        round=1,
        bytes=2 * GiB,
        seconds=2 / gib_per_s,
        relay_cpu_s=3.0,
        load_cpu_s=0.6,
        busy_cores=busy,
        stolen_cores=0.0,
        memory_largest_kib=70 * 1024,
        processes=2,
        lanes_used=lanes,
    )


def result_of(kind: str, *samples: StreamsSample, cores: int = 2) -> StreamsResult:
    """A section of these samples."""
    return StreamsResult(kind, "relays", cores, Outcome(list(samples), 1, 1))


@pytest.mark.parametrize("streams", [1, 3])
def test_all_bytes_of_all_streams_are_counted_but_the_primed_ones(streams: int, tmp_path: Path) -> None:
    total = 9 * MiB
    measured = measure_streams(start_direct, tmp_path, count=streams, streams=streams, number=1, total_bytes=total)
    assert measured.bytes == total - streams * PRIME_BYTES
    assert measured.seconds > 0
    assert measured.load_cpu_s > 0
    assert (measured.relay_cpu_s, measured.processes, measured.lanes_used) == (0, 0, None)


def test_a_session_with_lanes_says_how_many_it_used(tmp_path: Path) -> None:
    measured = measure_streams(start_lanes, tmp_path, count=2, streams=1, number=1, total_bytes=4 * MiB, reports=True)
    assert measured.bytes == 3 * MiB
    assert measured.lanes_used == 2


def test_two_sessions_go_through_daemons(tmp_path: Path) -> None:
    measured = measure_streams(start_daemons, tmp_path, count=2, streams=2, number=1, total_bytes=8 * MiB)
    assert measured.bytes == 6 * MiB
    assert measured.processes >= 4  # a parent and a worker or more at each end
    assert measured.relay_cpu_s > 0
    assert measured.memory_largest_kib > 0


def start_cutter(tree: ProcessTree, target: Target, count: int, reports: Path) -> list[int]:
    """Relays of which one is not there."""
    return [*direct(count - 1, reports, target), 1]


def test_a_stream_that_cannot_start_is_no_sample(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="source"):
        measure_streams(start_cutter, tmp_path, count=2, streams=2, number=1, total_bytes=4 * MiB)


def test_a_report_says_how_many_lanes_were_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "send.json"
    report.write_text(json.dumps({"lanes": 3}))
    assert _lanes_used(report) == 3
    report.write_text("{}")
    assert _lanes_used(report) is None
    monkeypatch.setattr("bench.streams.REPORT_PATIENCE_S", 0.05)
    assert _lanes_used(tmp_path / "absent.json") is None


def test_rows_are_medians_beside_one() -> None:
    rows = result_of(
        "sessions", sample(1, 1.0, 1.2), sample(1, 0.5, 1.2), sample(1, 0.75, 1.3), sample(2, 1.5, 1.9)
    ).rows()
    assert rows["1"].gib_per_s.median == 0.75
    assert rows["2"].speed_up == pytest.approx(2.0)
    assert rows["2"].cpu_s_per_gib.median == pytest.approx(1.5)
    assert rows["2"].relay_cores.median == pytest.approx(2.25)
    assert rows["2"].memory_largest_mib == 70


def test_without_a_single_one_there_is_no_speed_up() -> None:
    result = result_of("lanes", sample(2, 1.0, 1.0))
    assert result.rows()["2"].speed_up is None
    assert "| 2 | 1.00 (1.00–1.00) | – |" in "\n".join(result.to_markdown())


@pytest.mark.parametrize(
    ("two_gib_per_s", "busy_with_one", "words"),
    [
        (1.6, 1.9, "**met**"),
        (1.2, 1.9, "this machine does not allow it"),
        (1.2, 1.0, "so there was room for 2.00 times."),
    ],
)
def test_two_sessions_are_held_against_what_the_machine_had_left(
    two_gib_per_s: float, busy_with_one: float, words: str
) -> None:
    last = result_of("sessions", sample(1, 1.0, busy_with_one), sample(2, two_gib_per_s, 2.0)).to_markdown()[-1]
    assert words in last
    assert ("**missed**" in last) == (two_gib_per_s < 1.5)
    assert "on 2 cores" in last


def test_the_table_says_how_many_lanes_were_used_and_what_was_left_out() -> None:
    result = result_of("lanes", sample(1, 1.0, 1.0), sample(4, 1.0, 1.0, lanes=None))
    result.outcome.left_out["8"] = "no port"
    lines = [line for line in result.to_markdown() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].endswith("| 1 |")
    assert lines[3].endswith("| ? |")
    assert "left out: no port" in lines[4]


def test_the_machines_time_only_grows() -> None:
    earlier = MachineTime.now()
    passed = MachineTime.now().since(earlier)
    assert passed.total_s >= passed.busy_s >= 0
    assert passed.stolen_s >= 0
    assert earlier.total_s > 0

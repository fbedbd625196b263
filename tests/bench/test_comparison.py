"""The peers: from samples to medians, targets, JSON and the table."""

import json
from dataclasses import replace

import pytest

from bench.budget import Outcome
from bench.comparison import PeersResult, judge, summarise
from bench.measure import Sample
from bench.spread import Spread
from bench.work import Work

WORK = Work(blake3_s_per_gib=0.15, aes_256_gcm_s_per_gib=0.07)


def sample(peer: str, round_number: int, gib_per_s: float, cpu: float | None, ping_ms: float) -> Sample:
    """A sample of a relay in two processes of 10 and 20 MiB."""
    return Sample(
        peer=peer,
        round=round_number,
        bytes=2 * 1024**3,
        seconds=2 / gib_per_s,
        gib_per_s=gib_per_s,
        cpu_s_per_gib=cpu,
        memory_kib={} if cpu is None else {"0 relay": 10 * 1024, "1 relay": 20 * 1024},
        source_cpu_s_per_gib=0.2,
        sink_cpu_s_per_gib=0.1,
        ping_ns=[int(ping_ms * 1e6)] * 2,
        setup_ns=[5_000_000],
    )


SAMPLES = [
    sample("direct", 1, 5.0, None, 0.01),
    sample("socat", 1, 3.0, 0.2, 0.02),
    sample("ssh", 1, 0.5, 1.0, 0.1),
    sample("stunnel", 1, 1.0, 1.5, 0.05),
    sample("korora", 1, 1.5, 0.7, 0.3),
    sample("korora", 2, 1.8, 0.5, 0.3),
    sample("korora", 3, 9.0, 0.1, 0.3),
]


def result_of(samples: list[Sample], left_out: dict[str, str] | None = None) -> PeersResult:
    """A section of these samples."""
    return PeersResult(Outcome(samples, 3, 3, left_out=left_out or {}), WORK)


def table_of(samples: list[Sample], left_out: dict[str, str] | None = None) -> str:
    """Its table."""
    return "\n".join(result_of(samples, left_out).to_markdown())


def test_one_odd_round_does_not_move_a_median() -> None:
    korora = summarise(SAMPLES)["korora"]
    assert korora.gib_per_s.median == 1.8
    assert korora.cpu_s_per_gib == Spread(0.5, 0.1, 0.7)
    assert korora.rounds == 3


def test_memory_counts_every_process_and_names_the_largest() -> None:
    summary = summarise(SAMPLES)["ssh"]
    assert (summary.memory_sum_mib, summary.memory_largest_mib, summary.processes) == (30, 20, 2)
    assert summarise(SAMPLES)["direct"].processes == 0


def test_added_round_trip_is_beyond_direct() -> None:
    summaries = summarise(SAMPLES)
    assert summaries["korora"].added_ping_ms == pytest.approx(0.29)
    assert summaries["direct"].added_ping_ms is None
    assert summarise(SAMPLES[1:])["korora"].added_ping_ms is None


def test_throughput_is_held_against_the_fastest_and_cpu_against_the_thriftiest_encrypted_peer() -> None:
    throughput, cpu, memory, ping = judge(summarise(SAMPLES))
    assert "stunnel" in throughput.name
    assert throughput.value == pytest.approx(1.8)
    assert throughput.met
    assert "ssh" in cpu.name
    assert cpu.value == pytest.approx(0.5)
    assert cpu.met
    assert memory.met
    assert ping.met


def test_a_missed_target_is_said() -> None:
    slow = [replace(one, gib_per_s=1.69) if one.peer == "korora" else one for one in SAMPLES]
    results = judge(summarise(slow))
    assert [result.met for result in results] == [False, True, True, True]
    assert "**missed**" in table_of(slow)


def test_without_a_peer_there_is_nothing_to_hold_against() -> None:
    assert judge(summarise(SAMPLES[:4])) == []
    alone = judge(summarise([SAMPLES[4]]))
    assert len(alone) == 1
    assert "memory" in alone[0].name


def test_json_holds_every_sample() -> None:
    document = json.loads(json.dumps(result_of(SAMPLES, {"socat-openssl": "socat not found"}).to_json()))
    assert len(document["samples"]) == len(SAMPLES)
    assert document["samples"][0]["ping_ns"] == [10_000, 10_000]
    assert set(document["rows"]) == {"direct", "socat", "ssh", "stunnel", "korora"}
    assert document["rows"]["korora"]["gib_per_s"] == {"median": 1.8, "least": 1.5, "greatest": 9.0}
    assert document["left_out"] == {"socat-openssl": "socat not found"}
    assert all(set(target) == {"name", "value", "limit", "met"} for target in document["targets"])


def test_every_row_of_the_table_has_every_column() -> None:
    table = table_of(SAMPLES, {"socat-openssl": "socat | not found"})
    rows = [line for line in table.splitlines() if line.startswith("|")]
    first = rows.index(next(row for row in rows if row.startswith("| direct")))
    width = rows[0].count("|")
    peers = rows[: first + 6]
    assert all(row.count("|") == width for row in peers)
    assert "left out: socat / not found" in peers[-1]
    assert "| – |" in rows[first]
    assert "| **korora** | 1.80 (1.50–9.00) | 1.80 | 0.50 (0.10–0.70) | 0.50 | 30 (20) |" in table


def test_the_floor_is_two_hops_and_the_work() -> None:
    assert "that makes 0.84, and korora uses 0.60 times as much" in table_of(SAMPLES)
    assert "so a pair's digests and cryptography 0.44." in table_of(SAMPLES[2:])

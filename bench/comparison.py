"""The pair beside its peers: from raw samples to medians, targets and a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench.budget import Budget, Outcome, Teller, interleave
from bench.measure import Plan, Sample, measure
from bench.peers import DIRECT, KORORA, PEERS
from bench.spread import Spread, number_text, percentile, spread_text, table
from bench.work import Work, measure_work

NS_PER_MS: Final = 1e6
KIB_PER_MIB: Final = 1024
THROUGHPUT_RATIO_MIN: Final = 1.7  # of the fastest encrypted peer
CPU_RATIO_MAX: Final = 0.6  # of the thriftiest encrypted peer
RELAY_MEMORY_MIB_MAX: Final = 256.0  # each relay, whatever the stream's size
ADDED_ROUND_TRIP_MS_MAX: Final = 0.5  # idle session, median


@dataclass(frozen=True, slots=True)
class Summary:
    """One peer over all rounds."""

    peer: str
    encrypted: bool
    rounds: int
    gib_per_s: Spread
    cpu_s_per_gib: Spread | None
    memory_sum_mib: float
    memory_largest_mib: float
    processes: int
    ping_ms: Spread | None
    ping_p99_ms: float | None
    added_ping_ms: float | None
    setup_ms: Spread | None
    setups: int


@dataclass(frozen=True, slots=True)
class TargetResult:
    """One number to reach, and whether it was."""

    name: str
    value: float
    limit: str
    met: bool


def summarise(samples: Sequence[Sample]) -> dict[str, Summary]:
    """One summary a peer, in the order first met."""
    by_peer: dict[str, list[Sample]] = {}
    for sample in samples:
        by_peer.setdefault(sample.peer, []).append(sample)
    direct_ping = _pooled_ms(by_peer.get(DIRECT, []), lambda sample: sample.ping_ns)
    summaries: dict[str, Summary] = {}
    for name, rounds in by_peer.items():
        ping = _pooled_ms(rounds, lambda sample: sample.ping_ns)
        setup = _pooled_ms(rounds, lambda sample: sample.setup_ns)
        added = statistics.median(ping) - statistics.median(direct_ping) if ping and direct_ping else None
        summaries[name] = Summary(
            peer=name,
            encrypted=PEERS[name].encrypted,
            rounds=len(rounds),
            gib_per_s=Spread.over(sample.gib_per_s for sample in rounds),
            cpu_s_per_gib=Spread.of([s.cpu_s_per_gib for s in rounds if s.cpu_s_per_gib is not None]),
            memory_sum_mib=max(sum(s.memory_kib.values()) for s in rounds) / KIB_PER_MIB,
            memory_largest_mib=max(max(s.memory_kib.values(), default=0) for s in rounds) / KIB_PER_MIB,
            processes=max(len(s.memory_kib) for s in rounds),
            ping_ms=Spread.of(ping),
            ping_p99_ms=percentile(ping, 99) if ping else None,
            added_ping_ms=None if name == DIRECT else added,
            setup_ms=Spread.of(setup),
            setups=len(setup),
        )
    return summaries


def _pooled_ms(samples: Iterable[Sample], pick: Callable[[Sample], list[int]]) -> list[float]:
    """All rounds' single times in milliseconds."""
    return [nanoseconds / NS_PER_MS for sample in samples for nanoseconds in pick(sample)]


def best_peers(summaries: Mapping[str, Summary]) -> tuple[Summary, Summary] | None:
    """The fastest and the thriftiest encrypted peer that is not ours; None if none was measured."""
    peers = [summary for summary in summaries.values() if summary.encrypted and summary.peer != KORORA]
    if not peers:
        return None
    fastest = max(peers, key=lambda summary: summary.gib_per_s.median)
    thriftiest = min(peers, key=_cpu)
    return fastest, thriftiest


def _cpu(summary: Summary) -> float:
    """Median CPU-seconds per GiB; infinite where there is none to count."""
    return summary.cpu_s_per_gib.median if summary.cpu_s_per_gib is not None else math.inf


def judge(summaries: Mapping[str, Summary]) -> list[TargetResult]:
    """The project's numbers to reach, for as far as this run can tell."""
    ours = summaries.get(KORORA)
    if ours is None:
        return []
    results: list[TargetResult] = []
    best = best_peers(summaries)
    if best is not None:
        fastest, thriftiest = best
        faster = ours.gib_per_s.median / fastest.gib_per_s.median
        cheaper = _cpu(ours) / _cpu(thriftiest)
        results += [
            TargetResult(
                f"throughput ÷ the fastest encrypted peer's ({fastest.peer})",
                faster,
                f"≥ {THROUGHPUT_RATIO_MIN}",
                faster >= THROUGHPUT_RATIO_MIN,
            ),
            TargetResult(
                f"CPU-s/GiB ÷ the thriftiest encrypted peer's ({thriftiest.peer})",
                cheaper,
                f"≤ {CPU_RATIO_MAX}",
                cheaper <= CPU_RATIO_MAX,
            ),
        ]
    results.append(
        TargetResult(
            "memory of the larger relay, MiB",
            ours.memory_largest_mib,
            f"≤ {RELAY_MEMORY_MIB_MAX:.0f}",
            ours.memory_largest_mib <= RELAY_MEMORY_MIB_MAX,
        )
    )
    if ours.added_ping_ms is not None:
        results.append(
            TargetResult(
                "added 1-byte round trip on an idle session, ms (median)",
                ours.added_ping_ms,
                f"≤ {ADDED_ROUND_TRIP_MS_MAX}",
                ours.added_ping_ms <= ADDED_ROUND_TRIP_MS_MAX,
            )
        )
    return results


@dataclass(frozen=True, slots=True)
class PeersResult:
    """The peers of one run, and what the pair's duties cost by themselves."""

    outcome: Outcome[Sample]
    work: Work

    def rows(self) -> dict[str, Summary]:
        """A row a peer."""
        return summarise(self.outcome.samples)

    def to_json(self) -> dict[str, Any]:
        """Rows, targets and samples."""
        rows = self.rows()
        return {
            **self.outcome.to_json(),
            "work": asdict(self.work),
            "rows": {name: asdict(summary) for name, summary in rows.items()},
            "targets": [asdict(result) for result in judge(rows)],
            "samples": [asdict(sample) for sample in self.outcome.samples],
        }

    def to_markdown(self) -> list[str]:
        """The table, with the targets below."""
        summaries = self.rows()
        best = best_peers(summaries)
        head = (
            "", "GiB/s", "÷ fastest encrypted", "CPU-s/GiB", "÷ thriftiest encrypted", "peak MiB, all (largest)",
            "ping ms, median (p99)", "added ms", "set-up ms",
        )  # fmt: skip
        cells = [_cells(summary, best) for summary in summaries.values()]
        for name, reason in self.outcome.left_out.items():
            cells.append([name, f"left out: {reason}", *[""] * (len(head) - 2)])
        lines = ["### Peers", "", self.outcome.text(), "", *table(head, cells)]
        results = judge(summaries)
        if results:
            lines += ["", "| to reach | measured | limit | |", "| --- | --- | --- | --- |"]
            lines += [
                f"| {result.name} | {result.value:.2f} | {result.limit} | {'met' if result.met else '**missed**'} |"
                for result in results
            ]
        return [*lines, "", _floor(self.work, summaries)]


def measure_peers(
    names: Sequence[str], plan: Plan, rounds: int, directory: Path, *, budget: Budget, teller: Teller
) -> PeersResult:
    """Each peer's figures, interleaved."""
    absent = {name: f"{reason}, or leave it out with --peers" for name in names if (reason := PEERS[name].missing())}

    def act(name: str, number: int) -> Sample:
        return measure(PEERS[name], number, plan, directory)

    outcome = interleave(names, act, rounds=rounds, budget=budget, teller=teller, left_out=absent)
    return PeersResult(outcome, measure_work())


def _cells(summary: Summary, best: tuple[Summary, Summary] | None) -> list[str]:
    """One peer's line."""
    cpu = summary.cpu_s_per_gib
    speed_ratio = None if best is None else summary.gib_per_s.median / best[0].gib_per_s.median
    cpu_ratio = cpu.median / _cpu(best[1]) if best is not None and cpu is not None else None
    memory = f"{summary.memory_sum_mib:.0f} ({summary.memory_largest_mib:.0f})" if summary.processes else "–"
    ping = "–" if summary.ping_ms is None else f"{summary.ping_ms.median:.3f} ({number_text(summary.ping_p99_ms, 3)})"
    return [
        f"**{summary.peer}**" if summary.peer == KORORA else summary.peer,
        spread_text(summary.gib_per_s, 2),
        number_text(speed_ratio, 2),
        spread_text(cpu, 2),
        number_text(cpu_ratio, 2),
        memory,
        ping,
        number_text(summary.added_ping_ms, 3),
        spread_text(summary.setup_ms, 1),
    ]


def _floor(work: Work, summaries: Mapping[str, Summary]) -> str:
    """What the pair's duties cost by themselves, as a sentence."""
    text = (
        f"In the cache of one core BLAKE3 costs {work.blake3_s_per_gib:.3f} and AES-256-GCM "
        f"{work.aes_256_gcm_s_per_gib:.3f} CPU-s/GiB, so a pair's digests and cryptography "
        f"{work.pair_s_per_gib:.2f}"
    )
    hop, ours = summaries.get("socat"), summaries.get(KORORA)
    if hop is None or hop.cpu_s_per_gib is None:
        return text + "."
    floor = work.pair_s_per_gib + 2 * hop.cpu_s_per_gib.median
    text += f"; with two plain socat hops that makes {floor:.2f}"
    if ours is None or ours.cpu_s_per_gib is None:
        return text + "."
    return text + f", and korora uses {ours.cpu_s_per_gib.median / floor:.2f} times as much."

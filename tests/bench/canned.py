"""A whole run with made-up figures, for what reads runs."""

from dataclasses import replace
from typing import Any

from bench.budget import Outcome
from bench.comparison import PeersResult
from bench.ladder import ITEMS, LadderResult, LadderSample
from bench.machine import Machine
from bench.measure import GiB, Sample
from bench.migrations import VARIANTS, MigrationPlan, MigrationResult, MigrationSample
from bench.report import Result, Run
from bench.streams import StreamsResult, StreamsSample
from bench.work import Work

MACHINE = Machine(
    cpu="A CPU (6/1/1)",
    cores=2,
    caches="L1 32K, L2 1024K, L3 8192K",
    memory_mib=1024,
    virtualisation="none",
    governor="performance",
    kernel="6.1",
    congestion_control="cubic",
    python="3.11.2",
    tools={"socat": "1.7"},
    revision="0123456789ab",
    date="2026-01-01 00:00 UTC",
    load_before="0.00",
    load_after="1.00",
    stolen_percent=0.0,
)
SETTINGS: dict[str, Any] = {
    "rounds": 2,
    "gib": 2.0,
    "pings": 2,
    "setups": 1,
    "guest_mib": 512,
    "network": "host",
    "quick": False,
    "seconds": 100.0,
    "budgets_s": {},
}


def peers(factor: float) -> PeersResult:
    """Three peers, two rounds; throughput is `factor` times what it was."""
    samples = [
        Sample(name, number, GiB, 1.0, speed * factor * number, cpu, {} if cpu is None else {"0 relay": 1024}, 0.2, 0.1)
        for number in (1, 2)
        for name, speed, cpu in (("direct", 5.0, None), ("ssh", 0.9, 1.3), ("korora", 1.0, 1.2))
    ]
    return PeersResult(Outcome(samples, 2, 2, seconds=10.0), Work(0.13, 0.07))


def streams(kind: str, counts: tuple[int, ...]) -> StreamsResult:
    """Throughput that falls with the number."""
    samples = [
        StreamsSample(count, number, GiB, 1.0 + 0.1 * count, 1.5, 0.3, 1.9, 0.0, 70 * 1024, 2, 1)
        for number in (1, 2)
        for count in counts
    ]
    return StreamsResult(kind, "relays", MACHINE.cores, Outcome(samples, 2, 2, seconds=10.0))


def migrations() -> MigrationResult:
    """A second each."""
    samples = [
        MigrationSample(name, number, 1000 * number, 100, 1, 600 * 1024**2, 4000.0, 3, 1.0, 0.5 * variant.relays)
        for number in (1, 2)
        for name, variant in VARIANTS.items()
    ]
    return MigrationResult("QEMU 10.0, tcg", MigrationPlan(2, 512), Outcome(samples, 2, 2, seconds=10.0))


def ladder() -> LadderResult:
    """Every rung, two rounds."""
    samples = [
        LadderSample(item, number, GiB, 0.1 * index + 0.1, 0.1 * index + 0.1)
        for number in (1, 2)
        for index, item in enumerate(ITEMS)
    ]
    return LadderResult(Outcome(samples, 2, 2, seconds=10.0))


def canned_run(*, factor: float = 1.0, settings: dict[str, Any] | None = None, **machine: Any) -> Run:
    """All sections on a machine with these fields altered."""
    sections: dict[str, Result] = {
        "ladder": ladder(),
        "peers": peers(factor),
        "lanes": streams("lanes", (1, 2, 4, 8)),
        "sessions": streams("sessions", (1, 2, 4, 16)),
        "qemu": migrations(),
    }
    return Run(replace(MACHINE, **machine), {**SETTINGS, **(settings or {})}, sections)

"""A whole run with made-up figures, for what reads runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.budget import Outcome
from bench.codecs import FAST, ZSTD_1
from bench.comparison import PeersResult
from bench.corpus import IDLE_A, IDLE_B, Stream
from bench.engine import EngineSample
from bench.guests import GuestSample
from bench.ladder import ITEMS, LadderResult, LadderSample
from bench.linkmodel import AUTO, OPAQUE, RATES_GBIT, ModelSample
from bench.machine import Machine
from bench.measure import GiB, Sample
from bench.migrations import VARIANTS, MigrationPlan, MigrationResult, MigrationSample
from bench.pages import QUICK_PAGES, AfterSample, PagesResult
from bench.report import Result, Run
from bench.streams import StreamsResult, StreamsSample
from bench.wire import PairSample
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


def session(item: str, seconds: float, wire_bytes: int = 116 * 1024**2, number: int = 1) -> PairSample:
    """A GiB through a pair; `item` ends with how."""
    encode = item.rpartition(", ")[2]
    return PairSample(
        item, IDLE_A, encode, number, GiB, GiB, wire_bytes, 0, seconds, 0.1, 0.1, {}, 200 * 1024, 300 * 1024
    )


def engine(method: str, encode_s: float, decode_s: float, number: int = 1) -> EngineSample:
    """A GiB through a codec."""
    return EngineSample(method, number, GiB, GiB, GiB // 8, encode_s, decode_s, encode_s, decode_s, {IDLE_A: 0.125})


def pages() -> PagesResult:
    """Two streams, some of everything."""
    plan = QUICK_PAGES
    rounds = (1, 2)
    after, link = plan.afters[0].name, plan.links[0].name
    return PagesResult(
        plan,
        {name: Stream(name, Path("/nonexistent"), GiB, GiB // 4096) for name in (IDLE_A, IDLE_B)},
        {"qemu idle-a": "no such file"},
        Outcome([session(f"{IDLE_A}, best", 1.0), session(f"{after}, best", 1.0, 8 * 1024**2)], 1, 1),
        Outcome([AfterSample(f"{after}, cdc 1 MiB", "cdc 1 MiB", after, 0.03)], 1, 1),
        Outcome([engine(name, 0.8, 0.5, number) for number in rounds for name in (FAST, ZSTD_1)], 2, 2),
        Outcome(),
        Outcome(
            [
                engine(f"FAST, {text}", encode_s, 0.5, number)
                for number in rounds
                for text, encode_s in (("1 core, 1 chain", 0.9), ("2 cores, 2 chains", 0.5))
            ], 2, 2,
        ),
        Outcome([[ModelSample(way, rate, GiB, s / rate) for rate in RATES_GBIT] for way, s in ((OPAQUE, 8), (AUTO, 9))],
                1, 1),
        Outcome(
            [session(f"{link}, {way}", s, number=n) for n in rounds for way, s in ((OPAQUE, 8.0), (AUTO, 2.0))],
            2, 2, left_out={"loopback, auto": "it | failed"},
        ),
        Outcome([GuestSample("qemu idle-a, plain", "qemu idle-a", "plain", 1, GiB // 2, GiB, 400)], 1, 1),
    )  # fmt: skip


def canned_run(*, factor: float = 1.0, settings: dict[str, Any] | None = None, **machine: Any) -> Run:
    """All sections on a machine with these fields altered."""
    sections: dict[str, Result] = {
        "ladder": ladder(),
        "peers": peers(factor),
        "lanes": streams("lanes", (1, 2, 4, 8)),
        "sessions": streams("sessions", (1, 2, 4, 16)),
        "qemu": migrations(),
        "pages": pages(),
    }
    return Run(replace(MACHINE, **machine), {**SETTINGS, **(settings or {})}, sections)

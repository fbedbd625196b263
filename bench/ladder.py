"""The cost ladder: memcpy, BLAKE3, seal, open, frame, loopback, lane, pair; what each costs and adds to its parts.

A rung names the rungs it is made of. What it *adds* is its own CPU time beyond theirs: how much of a pair is copying,
digests or cryptography, and how much is left for the program between them. A rung can add less than nothing where its
parts, measured alone, met colder data than they do within it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench import rungs
from bench.budget import Budget, Outcome, Teller, interleave
from bench.measure import GiB, measure_stream
from bench.peers import KORORA, PEERS
from bench.processes import BenchError
from bench.rungs import Act, Pieces
from bench.spread import Spread, median_of, number_text, spread_text, table

WARM: Final = "warm"
COLD: Final = "cold"


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of the ladder.

    Args:
        name: what it is called everywhere.
        says: what it does.
        adds: what it adds to its parts, in words.
        parts: how often each byte passes each of the rungs below, as `name data`.
        data: which data it is measured on.
    """

    name: str
    says: str
    adds: str
    parts: Mapping[str, int]
    data: tuple[str, ...] = (WARM, COLD)


LADDER: Final = (
    Rung("memcpy", "copies a piece of 1 MiB", "one reading and one writing of every byte", {}),
    Rung("blake3", "digests it, in one thread", "reading and digesting instead of copying", {}),
    Rung("seal", "seals it, AES-256-GCM", "encryption and tag, header and counter", {}),
    Rung("open", "opens it", "decryption and check, the header's checks", {}),
    Rung(
        "frame",
        "frames it and checks the frame",
        "header, number, offset, credit, acknowledgement to two digests",
        {"blake3 cold": 1, "blake3 warm": 1},
    ),
    Rung(
        "loopback",
        "sends and receives it over TCP, one thread for both ends",
        "the kernel: system calls, two copies, the protocol",
        {},
        (COLD,),
    ),
    Rung(
        "lane",
        "sends and receives it sealed, both ends on one event loop",
        "records and waiting to seal, open and loopback",
        {"seal cold": 1, "open warm": 1, "loopback cold": 1},
        (COLD,),
    ),
    Rung(
        "pair",
        "carries it through korora send and receive, real processes (source and sink not counted)",
        "channels, credit, switching between processes, to a lane, its frames and the hop at the hypervisors",
        {"lane cold": 1, "frame cold": 1, "loopback cold": 1},
        (COLD,),
    ),
)
ITEMS: Final = tuple(f"{rung.name} {data}" for rung in LADDER for data in rung.data)
PAIR: Final = "pair cold"


@dataclass(frozen=True, slots=True)
class LadderSample:
    """One slice of one rung; `item` is `name data`."""

    item: str
    round: int
    bytes: int
    seconds: float
    cpu_s: float

    @property
    def gib_per_s(self) -> float:
        """Throughput."""
        return self.bytes / GiB / self.seconds

    @property
    def cpu_s_per_gib(self) -> float:
        """CPU time; of a pair that of both relays."""
        return self.cpu_s * GiB / self.bytes


@dataclass(frozen=True, slots=True)
class LadderPlan:
    """How long a slice of each rung is, and how much goes through the pair."""

    rounds: int
    slice_s: float
    pair_bytes: int
    block_bytes: int = rungs.BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class LadderRow:
    """A rung on one kind of data over all rounds."""

    gib_per_s: Spread
    cpu_s_per_gib: Spread
    parts_s_per_gib: float | None
    adds_s_per_gib: float | None


def measure_ladder(plan: LadderPlan, directory: Path, *, budget: Budget, teller: Teller) -> LadderResult:
    """Climb the ladder `plan.rounds` times, if the time allows."""
    pieces = Pieces(plan.block_bytes)

    def act(item: str, number: int) -> LadderSample:
        if item == PAIR:
            sample = measure_stream(PEERS[KORORA], number, plan.pair_bytes, directory)
            cpu_s = (sample.cpu_s_per_gib or 0.0) * sample.bytes / GiB
            return LadderSample(item, number, sample.bytes, sample.seconds, cpu_s)
        return measure_rung(item, number, plan.slice_s, pieces)

    return LadderResult(interleave(ITEMS, act, rounds=plan.rounds, budget=budget, teller=teller))


def measure_rung(item: str, number: int, slice_s: float, pieces: Pieces) -> LadderSample:
    """One slice of any rung but the pair.

    Raises:
        BenchError: loopback cannot be used.
    """
    name, _, data = item.partition(" ")
    source = pieces.warm() if data == WARM else pieces.cold()
    try:
        with _context(name, source, 1 if data == WARM else pieces.count) as act:
            work = rungs.timed(act, slice_s)
    except (OSError, TimeoutError, ExceptionGroup) as error:
        raise BenchError(f"{item}: {error}") from error
    return LadderSample(item, number, work.bytes, work.seconds, work.cpu_s)


def _context(name: str, pieces: Iterator[memoryview], records: int) -> AbstractContextManager[Act]:
    """The rung's work, ready to be called."""
    if name == "open":
        return rungs.unseal(pieces, records)
    makers: dict[str, Callable[[Iterator[memoryview]], AbstractContextManager[Act]]] = {
        "memcpy": rungs.memcpy,
        "blake3": rungs.digest,
        "seal": rungs.seal,
        "frame": rungs.frame,
        "loopback": rungs.loopback,
        "lane": rungs.lane,
    }
    return makers[name](pieces)


@dataclass(frozen=True, slots=True)
class LadderResult:
    """The ladder, measured."""

    outcome: Outcome[LadderSample]

    def rows(self) -> dict[str, LadderRow]:
        """A row for each rung and kind of data that has samples, in the ladder's order."""
        by_item: dict[str, list[LadderSample]] = {}
        for sample in self.outcome.samples:
            by_item.setdefault(sample.item, []).append(sample)
        cpu = {item: Spread.of([sample.cpu_s_per_gib for sample in samples]) for item, samples in by_item.items()}
        rows: dict[str, LadderRow] = {}
        for rung in LADDER:
            for item in (f"{rung.name} {data}" for data in rung.data):
                speed, own = Spread.of([sample.gib_per_s for sample in by_item.get(item, [])]), cpu.get(item)
                if speed is None or own is None:
                    continue
                parts = _sum_of_parts(rung, item, cpu)
                rows[item] = LadderRow(speed, own, parts, None if parts is None else own.median - parts)
        return rows

    def to_json(self) -> dict[str, Any]:
        """Rows and samples."""
        return {
            **self.outcome.to_json(),
            "rows": {item: asdict(row) for item, row in self.rows().items()},
            "samples": [asdict(sample) for sample in self.outcome.samples],
        }

    def to_markdown(self) -> list[str]:
        """The ladder as a table, warm beside cold."""
        rows = self.rows()
        lines = ["### Ladder", "", self.outcome.text(), ""]
        cells = []
        for rung in LADDER:
            warm, cold = rows.get(f"{rung.name} {WARM}"), rows.get(f"{rung.name} {COLD}")
            reason = self.outcome.left_out.get(f"{rung.name} {COLD}", "")
            cells.append(
                [
                    rung.name,
                    f"left out: {reason}" if reason else rung.says,
                    "–" if cold is None else spread_text(cold.gib_per_s, 2),
                    "–" if warm is None else number_text(median_of(warm.cpu_s_per_gib), 3),
                    "–" if cold is None else spread_text(cold.cpu_s_per_gib, 3),
                    "–" if cold is None else number_text(cold.parts_s_per_gib, 3),
                    "–" if cold is None else number_text(cold.adds_s_per_gib, 3),
                    rung.adds,
                ]
            )
        head = ("rung", "what it does", "GiB/s cold", "CPU-s/GiB warm", "cold", "its parts", "adds", "that is")
        return lines + table(head, cells)


def _sum_of_parts(rung: Rung, item: str, cpu: Mapping[str, Spread | None]) -> float | None:
    """CPU-s/GiB of the rungs below; None where one is missing, or there are none.

    A rung's warm row is made of warm parts.
    """
    if not rung.parts:
        return None
    total = 0.0
    for part, times in rung.parts.items():
        name = f"{part.partition(' ')[0]} {WARM}" if item.endswith(WARM) else part
        spread = cpu.get(name)
        if spread is None:
            return None
        total += times * spread.median
    return total

"""What page-aware encoding is to reach, and whether a run did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bench.codecs import FAST
from bench.corpus import BUSY, IDLE_A, QEMU_A, QEMU_FILES
from bench.engine import engine_rows, speed_ups
from bench.linkmodel import AUTO, OPAQUE, RATES_GBIT, SLOWER_MAX

if TYPE_CHECKING:
    from bench.pages import PagesResult

MEMORY_MIB_MAX: Final = 256 + 512  # of a relay: its own, and the page cache by default
RATIOS_MAX: Final = {
    IDLE_A: 0.117,
    BUSY: 0.072,
    QEMU_A: 0.226,
    QEMU_FILES: 0.190,
    "xen idle-b after idle-a": 0.018,
    "xen busy after idle-a": 0.020,
    "xen idle-a back again": 0.01,
}
ENCODE_GIB_PER_S_MIN: Final = 1.0
DECODE_GIB_PER_S_MIN: Final = 1.5
SPEED_UP_MIN: Final = 1.4


@dataclass(frozen=True, slots=True)
class Goal:
    """One of them.

    Args:
        what: for people.
        measured: None where it was not.
        limit: to reach.
        at_least: whether more is better.
    """

    what: str
    measured: float | None
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether it was."""
        if self.measured is None:
            return False
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


def goals(result: PagesResult) -> list[Goal]:
    """All that the plan measures, met or not."""
    found = [
        Goal(f"wire ÷ stream, best: {name}", result.ratio(name, "best"), limit)
        for name, limit in RATIOS_MAX.items()
        if name in {*result.plan.alone, *(after.name for after in result.plan.afters)}
    ]
    rows = engine_rows(result.engine.samples)
    pages = rows.get(FAST)
    fast = None if pages is None else (pages.encode_gib_per_s.median, pages.decode_gib_per_s.median)
    found.append(Goal("encode, pages, GiB/s on one core", fast and fast[0], ENCODE_GIB_PER_S_MIN, at_least=True))
    found.append(Goal("decode, pages, GiB/s on one core", fast and fast[1], DECODE_GIB_PER_S_MIN, at_least=True))
    for regime, (encode, decode) in speed_ups(engine_rows(result.parallel.samples)).items():
        found.append(Goal(f"2 cores ÷ 1, encode, {regime}", encode, SPEED_UP_MIN, at_least=True))
        found.append(Goal(f"2 cores ÷ 1, decode, {regime}", decode, SPEED_UP_MIN, at_least=True))
    found += _not_slower(result)
    memory = [max(sample.sender_kib, sample.receiver_kib) / 1024 for sample in result.pair_samples()]
    found.append(Goal("memory of a relay with its page cache, MiB", max(memory, default=None), MEMORY_MIB_MAX))
    return found


def _not_slower(result: PagesResult) -> Iterator[Goal]:
    """auto against opaque, on every link."""
    modelled = result.modelled()
    for rate in RATES_GBIT:
        auto, opaque = modelled.get((AUTO, rate)), modelled.get((OPAQUE, rate))
        ratio = None if auto is None or opaque is None else auto.median / opaque.median
        yield Goal(f"time, auto ÷ opaque, {rate:g} Gb/s modelled", ratio, SLOWER_MAX)
    for case in result.plan.links:
        times = {encode: _median(result, f"{case.name}, {encode}") for encode in (AUTO, OPAQUE)}
        auto_s, opaque_s = times[AUTO], times[OPAQUE]
        ratio = None if auto_s is None or opaque_s is None else auto_s / opaque_s
        yield Goal(f"time, auto ÷ opaque, {case.name}", ratio, SLOWER_MAX)


def _median(result: PagesResult, item: str) -> float | None:
    row = result.rows().get(f"link: {item}")
    return None if row is None else float(row["seconds"].median)

"""Medians with their extremes: the only statistics here, because rounds are few and machines are shared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of the rounds (or of single events)."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """The spread of `values`; None of none."""
        return cls.over(values) if values else None

    @classmethod
    def over(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value. Raises ValueError of none."""
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no values to take a median of")
        return cls(statistics.median(ordered), ordered[0], ordered[-1])


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile of a non-empty sequence."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def spread_text(spread: Spread | None, digits: int) -> str:
    """`median (least–greatest)`, or a dash."""
    if spread is None:
        return "–"
    return f"{spread.median:.{digits}f} ({spread.least:.{digits}f}–{spread.greatest:.{digits}f})"


def number_text(value: float | None, digits: int) -> str:
    """A number, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def median_of(spread: Spread | None) -> float | None:
    """The median, where there is a spread."""
    return None if spread is None else spread.median


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; a bar in a cell is written as a slash."""
    lines = [f"| {' | '.join(head)} |", "| " + " | ".join("---" for _ in head) + " |"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return lines

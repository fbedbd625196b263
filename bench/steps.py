"""Milliseconds of the steps of something that was done many times, and how they are told."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence

Summary = dict[str, dict[str, float]]


def summarise(found: Mapping[str, Sequence[float]]) -> Summary:
    """Of each step: median, ninth decile, and the most. At least two values of each."""
    return {
        step: {
            "median": statistics.median(values),
            "p90": statistics.quantiles(values, n=10)[-1],
            "max": max(values),
        }
        for step, values in found.items()
    }


def tell_all(
    summary: Summary, words: Mapping[str, str], tell: Callable[[str], object], *, digits: int, as_json: bool
) -> None:
    """As one JSON object, or a table with a line a step.

    Args:
        summary: of ``summarise``.
        words: for each step.
        tell: takes it.
        digits: behind the point.
        as_json: which of them.
    """
    if as_json:
        tell(json.dumps(summary))
        return
    tell("| step | median ms | ninth decile | most |\n| --- | --- | --- | --- |")
    for step, row in summary.items():
        figures = " | ".join(f"{row[name]:.{digits}f}" for name in ("median", "p90", "max"))
        tell(f"| {words[step]} | {figures} |")

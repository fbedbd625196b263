"""Interleaved rounds within a time: what is measured when, and where it is cut when the time is over.

Every round measures each item once, so that whatever else the machine does meets all alike. A round that would not end
in time is not begun, and dropped whole if it turns out so half-way, because medians over different rounds would compare
different moments; only the first is kept as far as it went.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from bench.processes import BenchError

S = TypeVar("S")


class Teller(Protocol):
    """Who is told what happens; `bench.progress.Progress` is one."""

    def step(self, what: str) -> None:
        """What is being measured now."""

    def warn(self, message: str) -> None:
        """A line that stays."""


class Budget:
    """A section's time.

    Args:
        seconds: how long it may take.
        clock: monotonic, in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._start_s = clock()

    @property
    def spent_s(self) -> float:
        """Seconds since it began."""
        return self._clock() - self._start_s

    @property
    def left_s(self) -> float:
        """Seconds left; below zero once it is over."""
        return self.seconds - self.spent_s


@dataclass(slots=True)
class Outcome(Generic[S]):
    """What came of a section's rounds.

    Args:
        samples: of complete rounds (and of the first, however far it went), without those of items left out.
        rounds: how many of them are complete.
        planned: how many were asked for.
        cut: why there are fewer, for people; empty if there are not.
        left_out: items without figures, each with its reason.
        seconds: what the section took.
    """

    samples: list[S] = field(default_factory=list)
    rounds: int = 0
    planned: int = 0
    cut: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """All but the samples."""
        return {
            "rounds": self.rounds,
            "planned": self.planned,
            "cut": self.cut,
            "left_out": dict(self.left_out),
            "seconds": round(self.seconds, 1),
        }

    def text(self) -> str:
        """How many rounds there were, as a sentence."""
        rounds = "1 round" if self.rounds == 1 else f"{self.rounds} interleaved rounds"
        return f"{rounds}; medians (least–greatest).{f' **{self.cut}.**' if self.cut else ''}"


def interleave(
    items: Sequence[str],
    act: Callable[[str, int], S],
    *,
    rounds: int,
    budget: Budget,
    teller: Teller,
    left_out: Mapping[str, str] | None = None,
) -> Outcome[S]:
    """Measure each of `items` once a round.

    Args:
        items: what to measure, in order.
        act: measures one item in one round (counted from 1); BenchError if it cannot.
        rounds: how many, if the time allows.
        budget: the time. No round is begun, and no item of it, that would not end within it going by the longest turns
            so far.
        teller: is told each step.
        left_out: items that cannot be measured, with reasons; shown, not tried.

    An item that fails is tried once more, because a port can be lost to somebody else on the machine. One that fails
    twice is left out from then on, with its reason, and its earlier samples with it.
    """
    outcome: Outcome[S] = Outcome(planned=rounds, left_out=dict(left_out or {}))
    for name, reason in outcome.left_out.items():
        teller.warn(f"{name}: {reason}; left out")
    kept: list[tuple[str, S]] = []
    longest_s: dict[str, float] = {}
    for number in range(1, rounds + 1):
        current: list[tuple[str, S]] = []
        waiting = [name for name in items if name not in outcome.left_out]
        for index, name in enumerate(waiting):
            # Before the first item of a round the question is about all of it.
            needed = waiting if index == 0 else [name]
            if budget.left_s <= sum(longest_s.get(each, 0.0) for each in needed):
                outcome.cut = f"Cut after {number - 1} of {rounds} rounds: its {budget.seconds:.0f} s were over"
                break
            teller.step(f"round {number} of {rounds}: {name}")
            start_s = budget.spent_s
            try:
                current.append((name, _patiently(act, name, number, budget, teller)))
            except BenchError as error:
                outcome.left_out[name] = str(error)
                teller.warn(f"{error}; {name} is left out")
            longest_s[name] = max(longest_s.get(name, 0.0), budget.spent_s - start_s)
        if outcome.cut:
            teller.warn(outcome.cut)
            if number == 1:
                kept = current
                measured = {name for name, _ in current}
                for name in items:
                    if name not in measured:
                        outcome.left_out.setdefault(name, "the section's time was over before its turn")
            break
        kept += current
        outcome.rounds = number
    outcome.samples = [sample for name, sample in kept if name not in outcome.left_out]
    outcome.seconds = budget.spent_s
    return outcome


def _patiently(act: Callable[[str, int], S], name: str, number: int, budget: Budget, teller: Teller) -> S:
    """One item's turn, with a second attempt if there is time for it."""
    try:
        return act(name, number)
    except BenchError as error:
        if budget.left_s <= 0:
            raise
        teller.warn(f"{error}; once more")
        return act(name, number)

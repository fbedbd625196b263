"""Rounds within a time, on a clock that only moves when something is measured."""

import pytest

from bench.budget import Budget, Outcome, interleave
from bench.processes import BenchError
from tests.bench.told import Told


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(
    budget_s: float, rounds: int, costs: dict[str, float], failing: dict[str, list[int]] | None = None
) -> tuple[Outcome[tuple[str, int]], Told]:
    """Items that take `costs` seconds each; `failing` says which attempts of an item (from 0) raise."""
    clock, told = Clock(), Told()
    attempts = dict.fromkeys(costs, 0)

    def act(name: str, number: int) -> tuple[str, int]:
        clock.now += costs[name]
        attempt = attempts[name]
        attempts[name] += 1
        if attempt in (failing or {}).get(name, []):
            raise BenchError(f"{name} broke")
        return name, number

    budget = Budget(budget_s, clock)
    return interleave(list(costs), act, rounds=rounds, budget=budget, teller=told), told


def test_every_round_measures_each_once_in_order() -> None:
    outcome, told = run(100, 2, {"a": 1, "b": 2})
    assert outcome.samples == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert (outcome.rounds, outcome.planned, outcome.cut, outcome.seconds) == (2, 2, "", 6)
    assert told.steps[2] == "round 2 of 2: a"
    assert told.warnings == []


def test_a_round_that_would_not_end_in_time_is_not_begun() -> None:
    outcome, told = run(10, 5, {"a": 1, "b": 3})
    # 4 s a round: the third would begin at 8 s and end at 12.
    assert outcome.samples == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert outcome.rounds == 2
    assert outcome.cut == "Cut after 2 of 5 rounds: its 10 s were over"
    assert told.warnings == [outcome.cut]
    assert "Cut after 2 of 5" in outcome.text()
    assert outcome.seconds == 8


def test_a_round_that_turns_out_too_long_is_dropped_whole() -> None:
    clock, told = Clock(), Told()

    def act(name: str, number: int) -> tuple[str, int]:
        clock.now += 4 if (name, number) == ("a", 2) else 2  # the second a takes longer than the first
        return name, number

    outcome = interleave(["a", "b"], act, rounds=5, budget=Budget(9, clock), teller=told)
    assert outcome.samples == [("a", 1), ("b", 1)]
    assert told.steps == ["round 1 of 5: a", "round 1 of 5: b", "round 2 of 5: a"]
    assert (outcome.rounds, outcome.cut) == (1, "Cut after 1 of 5 rounds: its 9 s were over")


def test_the_first_round_is_kept_as_far_as_it_went() -> None:
    outcome, _ = run(5, 3, {"a": 2, "b": 4, "c": 1})
    assert outcome.samples == [("a", 1), ("b", 1)]
    assert outcome.rounds == 0
    assert outcome.left_out == {"c": "the section's time was over before its turn"}


def test_a_failure_is_tried_once_more() -> None:
    outcome, told = run(100, 2, {"a": 1, "b": 1}, {"a": [0]})
    assert outcome.samples == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert told.warnings == ["a broke; once more"]


def test_what_fails_twice_is_left_out_with_its_earlier_samples() -> None:
    outcome, _ = run(100, 3, {"a": 1, "b": 1}, {"a": [1, 2]})
    assert outcome.samples == [("b", 1), ("b", 2), ("b", 3)]
    assert outcome.left_out == {"a": "a broke"}


def test_there_is_no_second_attempt_without_time() -> None:
    outcome, told = run(1, 1, {"a": 2}, {"a": [0]})
    assert outcome.left_out == {"a": "a broke"}
    assert told.warnings == ["a broke; a is left out"]
    assert outcome.seconds == 2


def test_what_cannot_be_measured_is_not_tried() -> None:
    told = Told()
    outcome: Outcome[str] = interleave(
        ["a", "b"],
        lambda name, _number: name,
        rounds=1,
        budget=Budget(10),
        teller=told,
        left_out={"a": "not installed"},
    )
    assert outcome.samples == ["b"]
    assert told.warnings == ["a: not installed; left out"]


@pytest.mark.parametrize(("rounds", "text"), [(1, "1 round;"), (3, "3 interleaved rounds;")])
def test_rounds_are_said(rounds: int, text: str) -> None:
    assert Outcome[str](rounds=rounds).text().startswith(text)

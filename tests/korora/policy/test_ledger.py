"""Numbers that limits go by: the first ones stay within a limit at every point, and an hour is an hour."""

from datetime import timedelta
from pathlib import Path

import pytest

from korora.policy.ledger import HOUR, STARTS_MAX, Begun, Usage, kept
from korora.policy.rules import PER_HOUR_MAX
from korora.policy.shared import Ledger
from tests.korora.policy.support import NOW, ask, rule

MINUTE = timedelta(minutes=1)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


def test_those_that_run_are_counted_by_each_of_their_names(ledger: Ledger) -> None:
    ledger.begin("a", "beta", "blue", 1001, NOW)
    ledger.begin("b", "beta", "red", None, NOW)
    ledger.begin("c", "gamma", "red", 1001, NOW)
    usage = ledger.usage(NOW)
    assert usage == Usage(3, {"beta": 2, "gamma": 1}, {"blue": 1, "red": 2}, {1001: 2}, {"beta": 2, "gamma": 1})
    ledger.end("b")
    ledger.end("b")
    ledger.end("never began")
    assert ledger.usage(NOW) == Usage(2, {"beta": 1, "gamma": 1}, {"blue": 1, "red": 1}, {1001: 2}, usage.started)


def test_a_session_counts_only_those_that_began_before_it(ledger: Ledger) -> None:
    """Of two that begin at once with room for one, the first is allowed at every point, and the second never."""
    text = rule("one", "allow", max_running=1)
    assert ask(text, usage=ledger.usage(NOW, "a")).allowed
    ledger.begin("a", "beta", "blue", None, NOW)
    ledger.begin("a", "beta", "blue", None, NOW)  # it comes back
    assert not ask(text, usage=ledger.usage(NOW, "b")).allowed
    ledger.begin("b", "beta", "blue", None, NOW)
    assert ask(text, usage=ledger.usage(NOW, "a")).allowed
    assert not ask(text, usage=ledger.usage(NOW, "b")).allowed
    ledger.end("a")
    assert ask(text, usage=ledger.usage(NOW, "b")).allowed


def test_starts_are_forgotten_after_an_hour_and_not_before(ledger: Ledger) -> None:
    for number in range(3):
        ledger.begin(str(number), "beta", "blue", None, NOW + number * MINUTE)
        ledger.end(str(number))
    assert ledger.usage(NOW + 2 * MINUTE).started == {"beta": 3}
    assert ledger.usage(NOW + HOUR - MINUTE / 60).started == {"beta": 3}
    assert ledger.usage(NOW + HOUR).started == {"beta": 2}
    assert ledger.usage(NOW + HOUR).running == 0
    assert ledger.usage(NOW - HOUR).started == {"beta": 3}  # a clock that was set back


def test_a_session_that_runs_for_hours_is_not_counted_against_itself(ledger: Ledger) -> None:
    ledger.begin("long", "beta", "blue", None, NOW)
    for number in range(5):
        ledger.begin(str(number), "beta", "blue", None, NOW + HOUR)
    late = ledger.usage(NOW + HOUR + MINUTE, "long")
    assert (late.running, late.started) == (0, {})


def test_no_flood_of_starts_loosens_a_limit() -> None:
    begun = [
        Begun(session=str(n), peer="beta", tenant="blue", user=None, at=NOW, runs=n == 0)
        for n in range(STARTS_MAX + 10)
    ]
    left = kept(begun, NOW)
    assert len(left) == STARTS_MAX > PER_HOUR_MAX
    assert left[0].runs
    assert left[-1] is begun[-1]

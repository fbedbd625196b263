"""Numbers that limits go by: the first ones stay within a limit at every point, and an hour is an hour."""

from datetime import timedelta

from korora.policy.ledger import HOUR, STARTS_MAX, Ledger, Usage
from korora.policy.rules import PER_HOUR_MAX
from tests.korora.policy.support import NOW, ask, rule

MINUTE = timedelta(minutes=1)


def test_those_that_run_are_counted_by_each_of_their_names() -> None:
    ledger = Ledger()
    ledger.begin("a", "beta", "blue", 1001, NOW)
    ledger.begin("b", "beta", "red", None, NOW)
    ledger.begin("c", "gamma", "red", 1001, NOW)
    usage = ledger.usage(NOW)
    assert usage == Usage(3, {"beta": 2, "gamma": 1}, {"blue": 1, "red": 2}, {1001: 2}, {"beta": 2, "gamma": 1})
    ledger.end("b")
    ledger.end("b")
    ledger.end("never began")
    assert ledger.usage(NOW) == Usage(2, {"beta": 1, "gamma": 1}, {"blue": 1, "red": 1}, {1001: 2}, usage.started)


def test_a_session_counts_only_those_that_began_before_it() -> None:
    """Of two that begin at once with room for one, the first is allowed at every point, and the second never."""
    ledger = Ledger()
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


def test_starts_are_forgotten_after_an_hour_and_not_before() -> None:
    ledger = Ledger()
    for number in range(3):
        ledger.begin(str(number), "beta", "blue", None, NOW + number * MINUTE)
        ledger.end(str(number))
    assert ledger.usage(NOW + 2 * MINUTE).started == {"beta": 3}
    assert ledger.usage(NOW + HOUR - MINUTE / 60).started == {"beta": 3}
    assert ledger.usage(NOW + HOUR).started == {"beta": 2}
    assert ledger.usage(NOW + HOUR).running == 0
    assert ledger.usage(NOW - HOUR).started == {"beta": 2}  # a clock that was set back


def test_a_session_that_runs_for_hours_is_not_counted_against_itself() -> None:
    ledger = Ledger()
    ledger.begin("long", "beta", "blue", None, NOW)
    for number in range(5):
        ledger.begin(str(number), "beta", "blue", None, NOW + HOUR)
    late = ledger.usage(NOW + HOUR + MINUTE, "long")
    assert (late.running, late.started) == (0, {})


def test_no_flood_of_starts_loosens_a_limit() -> None:
    ledger = Ledger()
    for number in range(STARTS_MAX + 10):
        ledger.begin(str(number), "beta", "blue", None, NOW)
        ledger.end(str(number))
    assert ledger.usage(NOW).started["beta"] == STARTS_MAX > PER_HOUR_MAX

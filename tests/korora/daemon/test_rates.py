"""The division of a total rate: never over, nothing left over, nobody over its limit, by weight."""

import math

from hypothesis import given
from hypothesis import strategies as st

from korora.daemon.rates import Claim, demand, share

RATE = st.floats(1.0, 1e10)
CLAIM = st.builds(Claim, st.sampled_from([1.0, 4.0, 16.0]), st.none() | st.floats(0.0, 1e10), st.none() | RATE)
CLAIMS = st.lists(CLAIM, min_size=1, max_size=20)


def given_out(total: float, claims: list[Claim]) -> list[float]:
    rates = share(total, claims)
    assert all(rate is not None for rate in rates)
    return [rate for rate in rates if rate is not None]


@given(RATE, CLAIMS)
def test_nothing_over_and_nothing_left_over(total: float, claims: list[Claim]) -> None:
    rates = given_out(total, claims)
    limits = sum(math.inf if claim.limit is None else claim.limit for claim in claims)
    assert math.isclose(sum(rates), min(total, limits), rel_tol=1e-6)


@given(RATE, CLAIMS)
def test_nobody_is_over_its_limit(total: float, claims: list[Claim]) -> None:
    for claim, rate in zip(claims, given_out(total, claims), strict=True):
        assert 0 <= rate <= (math.inf if claim.limit is None else claim.limit) * (1 + 1e-9)


@given(RATE, CLAIMS)
def test_everybody_has_its_fair_share_or_what_it_wants(total: float, claims: list[Claim]) -> None:
    weights = sum(claim.weight for claim in claims)
    for claim, rate in zip(claims, given_out(total, claims), strict=True):
        fair = total * claim.weight / weights
        wants = min(fair, *(bound for bound in (claim.demand, claim.limit, math.inf) if bound is not None))
        assert rate >= wants * (1 - 1e-6)


@given(RATE, st.lists(st.sampled_from([1.0, 4.0, 16.0]), min_size=2, max_size=9))
def test_those_who_want_all_get_it_by_weight(total: float, weights: list[float]) -> None:
    rates = given_out(total, [Claim(weight) for weight in weights])
    for weight, rate in zip(weights, rates, strict=True):
        assert math.isclose(rate, total * weight / sum(weights), rel_tol=1e-6)


@given(RATE, CLAIMS)
def test_the_order_does_not_matter(total: float, claims: list[Claim]) -> None:
    backwards = given_out(total, claims[::-1])[::-1]
    for one, other in zip(given_out(total, claims), backwards, strict=True):
        assert math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-3)


@given(CLAIMS)
def test_without_a_total_only_limits_count(claims: list[Claim]) -> None:
    assert share(None, claims) == [claim.limit for claim in claims]


def test_nobody() -> None:
    assert share(5.0, []) == []
    assert share(None, []) == []


def test_what_an_idle_session_leaves_goes_to_the_others() -> None:
    # 16 : 4 of 100; the first wants 2 and so the second may have nearly all, and what nobody uses is permitted to both.
    assert share(100.0, [Claim(16.0, 2.0), Claim(4.0)]) == [2.0, 98.0]
    assert share(100.0, [Claim(16.0, 2.0), Claim(4.0, 8.0)]) == [2.0 + 72.0, 8.0 + 18.0]
    assert share(100.0, [Claim(16.0, 2.0), Claim(4.0, None, 10.0)]) == [90.0, 10.0]


def test_what_a_session_is_thought_to_want() -> None:
    assert demand(0.0, None, 10.0) is None  # it was not limited: nothing can be told from what it used
    assert demand(91.0, 100.0, 10.0) is None
    assert demand(40.0, 100.0, 10.0) == 50.0
    assert demand(0.0, 100.0, 10.0) == 1.0  # enough to show that it is back

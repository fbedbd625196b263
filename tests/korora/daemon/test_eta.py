"""The time that is left is told where rounds tell it, and nowhere else."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from korora.daemon.eta import DAY_SECONDS, SHRINK_MAX, seconds_left
from tests.korora.metrics.support import status


def left(rounds: tuple[int, ...], under_way: int = 0, rate: float = 100.0, **more: Any) -> float | None:
    return seconds_left(status(rounds=len(rounds) + 1, rounds_ended=rounds, round_pages=under_way, **more), rate)


def test_rounds_that_shrink_are_a_geometric_series() -> None:
    assert left((8000, 4000)) == 40.0  # 2000 + 1000 + 500 + … = 4000
    assert left((8000, 4000), 1500) == 25.0  # 500 of the 2000, then 2000
    assert left((8000, 0)) == 0.0


def test_a_round_that_is_longer_than_expected_is_not_over_before_it_ends() -> None:
    assert left((8000, 4000), 3000) == 30.0


@pytest.mark.parametrize(
    ("rounds", "rate", "state"),
    [
        ((), 100.0, "open"),
        ((8000,), 100.0, "open"),  # nobody knows how much the guest changed meanwhile
        ((8000, 8000), 100.0, "open"),
        ((8000, 7000), 100.0, "open"),
        ((4000, 8000), 100.0, "open"),
        ((0, 0), 100.0, "open"),
        ((8000, 4000), 0.0, "open"),  # it stands still
        ((2**40, 2**39), 1.0, "open"),
        ((8000, 4000), 100.0, "resuming"),
        ((8000, 4000), 100.0, "finishing"),
    ],
)
def test_what_is_not_known_is_not_told(rounds: tuple[int, ...], rate: float, state: str) -> None:
    assert left(rounds, 0, rate, state=state) is None


@given(
    st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
    st.integers(0, 2**40),
    st.floats(0, 1e9, allow_nan=False),
)
def test_it_is_never_absurd(rounds: tuple[int, ...], under_way: int, rate: float) -> None:
    told = left(rounds, under_way, rate)
    assert told is None or 0 <= told <= DAY_SECONDS
    if told is not None:
        assert rounds[-1] <= SHRINK_MAX * rounds[-2]

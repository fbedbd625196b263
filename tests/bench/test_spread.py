"""Medians and the tables they stand in."""

import pytest

from bench.spread import Spread, number_text, percentile, spread_text, table


def test_a_spread_is_the_median_with_its_extremes() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([4.0, 1.0]) == Spread(2.5, 1.0, 4.0)
    assert Spread.of([]) is None
    assert Spread.over(iter([5.0])) == Spread(5.0, 5.0, 5.0)
    with pytest.raises(ValueError, match="no values"):
        Spread.over(iter([]))


@pytest.mark.parametrize(("percent", "value"), [(50, 50), (99, 99), (100, 100), (0, 1)])
def test_percentiles_are_nearest_rank(percent: float, value: float) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], percent) == value


def test_what_is_absent_is_a_dash() -> None:
    assert spread_text(Spread(1.0, 0.5, 2.25), 2) == "1.00 (0.50–2.25)"
    assert spread_text(None, 2) == "–"
    assert number_text(None, 1) == "–"


def test_a_bar_in_a_cell_does_not_make_a_column() -> None:
    assert table(["a", "b"], [["x | y", "z"]]) == ["| a | b |", "| --- | --- |", "| x / y | z |"]

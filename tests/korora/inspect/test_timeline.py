"""The timeline keeps every page and stays small, however long and wide the stream."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from korora.inspect.limits import REGIONS_MAX, TIME_BINS_MAX
from korora.inspect.timeline import Timeline


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3 * TIME_BINS_MAX), st.integers(0, 2**32))
def test_long_streams_get_coarser_and_lose_nothing(pieces: int, seed: int) -> None:
    dice = np.random.default_rng(seed)
    timeline = Timeline()
    kinds = dice.integers(0, 9, (pieces, 4))
    again = [dice.integers(0, 10_000, dice.integers(0, 5)).astype(np.uint64) for _ in range(pieces)]
    for number in range(pieces):
        timeline.add(10, kinds[number], again[number])
    assert sum(timeline.bytes) == 10 * pieces
    assert np.array_equal(np.sum(timeline.pages, axis=0), kinds.sum(axis=0))
    assert timeline.heat().sum() == sum(map(len, again))
    assert len(timeline.bytes) == len(timeline.pages) == len(timeline.dirty) <= TIME_BINS_MAX


def test_wide_guests_get_coarser() -> None:
    timeline = Timeline()
    far = np.arange(50_000, dtype=np.uint64) << np.uint64(9)
    for start in range(0, len(far), 1000):
        timeline.add(1, np.ones(4, np.int64), far[start : start + 1000])
    assert len(timeline.regions) <= REGIONS_MAX
    assert timeline.heat().sum() == len(far)
    assert timeline.regions == sorted(timeline.regions)


def test_pages_anywhere_at_all() -> None:
    timeline = Timeline()
    dice = np.random.default_rng(1)
    for _ in range(20):
        timeline.add(1, np.ones(4, np.int64), dice.integers(0, 2**64, 1000, np.uint64))
    assert len(timeline.regions) <= REGIONS_MAX
    assert timeline.heat().sum() == 20_000

"""Rounds and pages sent again, against a count that looks at one page after the other."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunking import dirty
from chunking.dirty import DirtyTracker
from chunking.limits import ROUNDS_KEPT_MAX


def plainly(pfns: list[int]) -> tuple[int, int, int, list[int]]:
    """Distinct pages, pages sent again, rounds and their sizes."""
    ever: set[int] = set()
    this_round: set[int] = set()
    rounds: list[int] = []
    again = 0
    for pfn in pfns:
        if not rounds or pfn in this_round:
            rounds.append(0)
            this_round = set()
        again += pfn in ever
        rounds[-1] += 1
        this_round.add(pfn)
        ever.add(pfn)
    return len(ever), again, len(rounds), rounds[-ROUNDS_KEPT_MAX:]


@given(
    pfns=st.lists(st.integers(0, 30) | st.integers(65530, 65542) | st.just(2**63), max_size=200),
    cuts=st.lists(st.integers(0, 200), max_size=5),
)
def test_like_a_plain_count(pfns: list[int], cuts: list[int]) -> None:
    tracker = DirtyTracker()
    places = [0, *sorted(cut for cut in cuts if cut <= len(pfns)), len(pfns)]
    for start, end in pairwise(places):
        tracker.take(np.array(pfns[start:end], np.uint64))
    dirt = tracker.dirt
    assert (dirt.distinct, dirt.again, dirt.rounds, list(dirt.round_pages)) == plainly(pfns)
    assert dirt.pages == len(pfns)
    assert dirt.untracked == 0


def test_rounds_of_a_live_migration() -> None:
    tracker, rng = DirtyTracker(), random.Random(1)
    for count in (10_000, 3000, 500, 20):
        pfns = np.array(sorted(rng.sample(range(10_000), count)), np.uint64)
        for part in np.array_split(pfns, 7):
            tracker.take(part)
    dirt = tracker.dirt
    assert dirt.distinct == 10_000
    assert dirt.again == 3520
    # A round shows only when one of its pages was in the round before: the last, of 20 pages, runs into that.
    assert dirt.rounds == 3
    assert dirt.round_pages[0] == 10_000


def test_a_page_over_and_over_takes_linear_time() -> None:
    tracker = DirtyTracker()
    for _ in range(3):
        tracker.take(np.zeros(200_000, np.uint64))
    assert tracker.dirt.rounds == 600_000
    assert len(tracker.dirt.round_pages) == ROUNDS_KEPT_MAX


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty, "DIRTY_CHUNKS_MAX", 2)
    tracker = DirtyTracker()
    tracker.take(np.arange(4, dtype=np.uint64) << np.uint64(16))
    tracker.take(np.arange(4, dtype=np.uint64) << np.uint64(16))
    assert tracker.dirt.untracked == 4
    assert (tracker.dirt.distinct, tracker.dirt.again) == (2, 2)


def test_scattered_page_numbers_cost_no_memory() -> None:
    """Two MiB of numbers that lie far apart would otherwise make a gigabyte of tables."""
    tracker = DirtyTracker()
    for start in range(0, 2000, 100):
        tracker.take((np.arange(start, start + 100, dtype=np.uint64) << np.uint64(20)) + np.uint64(5))
    assert tracker.dirt.pages == 2000
    assert tracker.dirt.untracked == 2000 - dirty.DIRTY_CHUNKS_FREE
    assert len(tracker._chunks) == dirty.DIRTY_CHUNKS_FREE

"""Pages sent again, unchanged ones and rounds, against a model that is slow and plain, and against the relay's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunking.dirty import DirtyTracker
from korora.inspect import versions as module
from korora.inspect.versions import Pages, Versions

sends = st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 65535, 65536, 1 << 40]), st.integers(1, 3)), max_size=40)


def pages(sent: list[tuple[int, int]]) -> Pages:
    return Pages(np.array([pfn for pfn, _ in sent], np.uint64), np.array([print_ for _, print_ in sent], np.uint64))


@given(sends, st.integers(1, 40))
def test_as_a_plain_model_says(sent: list[tuple[int, int]], size: int) -> None:
    versions, again = Versions(), []
    for start in range(0, len(sent), size):
        again += versions.add(pages(sent[start : start + size]))[0].tolist()
    seen: dict[int, int] = {}
    rounds: list[list[int]] = [[0, 0, 0]]
    inside: set[int] = set()
    for number, (pfn, print_) in enumerate(sent):
        if pfn in inside:
            rounds.append([0, 0, 0])
            inside = set()
        inside.add(pfn)
        assert again[number] == (pfn in seen)
        rounds[-1][0] += 1
        rounds[-1][1] += pfn in seen
        rounds[-1][2] += seen.get(pfn) == print_
        seen[pfn] = print_
    assert [[each.pages, each.again, each.unchanged] for each in versions.rounds] == rounds
    assert versions.distinct == len(seen)


@given(sends, st.integers(1, 40))
def test_as_the_relay_counts(sent: list[tuple[int, int]], size: int) -> None:
    versions, tracker = Versions(), DirtyTracker()
    for start in range(0, len(sent), size):
        piece = pages(sent[start : start + size])
        versions.add(piece)
        tracker.take(piece.pfns)
    dirt = tracker.dirt
    assert dirt.round_pages == tuple(each.pages for each in versions.rounds if each.pages)
    assert (dirt.distinct, dirt.again) == (versions.distinct, sum(each.again for each in versions.rounds))


def test_parts_of_a_piece_go_through_a_round_together() -> None:
    """QEMU's zero pages come without their place among the others: they do not belong to the next round for that."""
    versions = Versions()
    versions.add(pages([(1, 1), (2, 1)]), pages([(3, 1)]))
    versions.add(pages([(4, 1), (1, 2), (2, 1)]), pages([(5, 1), (3, 1)]))
    assert [(each.pages, each.again, each.unchanged) for each in versions.rounds] == [(5, 0, 0), (3, 3, 2)]


def test_a_hostile_stream_costs_neither_time_nor_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNKS_MAX", 4)
    monkeypatch.setattr(module, "ROUNDS_MAX", 100)
    versions = Versions()
    same = np.full(400_000, 7, np.uint64)
    for _ in range(3):
        versions.add(Pages(same, same))
    assert len(versions.rounds) <= 100 + module.ROUNDS_PIECE_MAX
    far = np.arange(400_000, dtype=np.uint64) << np.uint64(20)
    versions.add(Pages(far, far + np.uint64(1)))
    assert versions.not_followed >= 400_000 - 4
    assert len(versions._chunks) == 4

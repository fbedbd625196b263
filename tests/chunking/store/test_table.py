"""The page table says of each PFN which stored page it held last, through slots written over and segments past."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunking.limits import TABLE_CHUNKS_FREE, TABLE_PLACES_PER_CHUNK
from chunking.pages import NO_PFN
from chunking.store import Agreed, Store
from chunking.store.segment import Runs
from chunking.store.table import Kind, PageTable
from tests.chunking.store.support import (
    FIRST,
    SECOND,
    SECONDS,
    SLOTS,
    TENANT,
    THIRD,
    VM,
    frame,
    literals,
    opened,
    pages_of,
    written,
)

STARTS = np.array([0, 10, 10, 25], np.int64)  # three stored segments, of 10, none and 15 pages
FEW_SLOTS = 5

Rows = list[tuple[int, Kind, int, int]]  # PFN, kind, slot or stored page, copied page

_rows = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 2, 3, 4, 5, 4095, 4096, 2**52, 2**64 - 1]),
        st.sampled_from(Kind),
        st.integers(0, FEW_SLOTS - 1),
        st.integers(0, 24),
    ),
    max_size=30,
)


def expanded(runs: Runs) -> dict[int, tuple[int, int]]:
    """PFN to segment and ordinal."""
    table = {}
    for start, ordinal, length, segment in zip(*(column.tolist() for column in runs), strict=True):
        for step in range(length):
            table[start + step] = (segment, ordinal + step)
    return table


def stored(ordinal: int) -> tuple[int, int]:
    return (1, ordinal) if ordinal < 10 else (3, ordinal - 10)


@settings(max_examples=200, deadline=None)
@given(frames=st.lists(_rows, max_size=5), far=st.booleans())
def test_the_table_follows_frames_as_the_plainest_model_does(frames: list[Rows], far: bool) -> None:
    """One page after the other, in order, with slots written over and referred to within one frame."""
    table = PageTable(FEW_SLOTS, STARTS)
    slots: dict[int, tuple[int, int] | None] = {}
    model: dict[int, tuple[int, int] | None] = {}
    ordinal = 0
    for rows in frames:
        first, columns, copied = ordinal, [], []
        for pfn, kind, slot, old in rows:
            location = FEW_SLOTS + old if far and kind is Kind.REF else slot
            columns.append((pfn, kind, location))
            if kind is Kind.ZERO:
                now = None
            elif kind is Kind.REF:
                now = stored(old) if far else slots.get(slot)
            elif kind is Kind.COPY:
                copied.append(FEW_SLOTS + old)
                now = slots[slot] = stored(old)
            else:
                now = slots[slot] = (0, ordinal)
                ordinal += 1
            model[pfn] = now if pfn >> 12 != NO_PFN >> 12 else None  # there is no such page in any guest
        table.place(frame(columns, copied), first)
    assert expanded(table.runs(ordinal)) == {pfn: now for pfn, now in model.items() if now is not None}
    # Ordinals that did not come to be stored are left out.
    bound = ordinal // 2
    fewer = {pfn: now for pfn, now in model.items() if now is not None and (now[0] or now[1] < bound)}
    assert expanded(table.runs(bound)) == fewer


def test_runs_are_as_few_as_they_can_be() -> None:
    table = PageTable(SLOTS, STARTS)
    table.place(literals([10, 11, 12, 20, 21, 4095, 4096], range(7)), 5)
    runs = table.runs(100)
    assert [column.tolist() for column in runs] == [[10, 20, 4095], [5, 8, 10], [3, 2, 2], [0, 0, 0]]


def test_scattered_pfns_cost_no_memory() -> None:
    """A stream that names a page in every corner has some of them forgotten, not a table for each."""
    table = PageTable(SLOTS, STARTS)
    for start in range(0, 5000, 50):
        table.place(literals([pfn << 12 for pfn in range(start, start + 50)], range(50)), start)
    assert len(table._chunks) == TABLE_CHUNKS_FREE + 5000 // TABLE_PLACES_PER_CHUNK
    dense = PageTable(SLOTS, STARTS)
    for start in range(0, 200_000, 50):
        dense.place(literals(range(start, start + 50), range(50)), start)
    assert len(expanded(dense.runs(200_000))) == 200_000  # and an ordinary guest has none forgotten


@pytest.mark.parametrize(
    "columns",
    [
        frame([(1, Kind.LITERAL, SLOTS)]),
        frame([(1, Kind.REF, SLOTS + 25)]),
        frame([(1, Kind.COPY, 0)], [SLOTS + 25]),
        frame([(1, Kind.COPY, 0)], [SLOTS - 1]),
        frame([(1, Kind.COPY, 0)], []),
        frame([(1, Kind.LITERAL, 0)])._replace(pfns=np.zeros(2, np.uint64)),
    ],
    ids=["slot", "reference", "copy", "copy of a slot", "copy of nothing", "lengths"],
)
def test_what_points_nowhere_is_refused(columns: object) -> None:
    with pytest.raises(ValueError, match=r"range|length|shape|cannot"):
        PageTable(SLOTS, STARTS).place(columns, 0)  # type: ignore[arg-type]


def _write(store: Store, name: bytes, vm: str, now: float, old: list[Agreed]) -> None:
    """A segment whose page table points into the agreed ones and into itself."""
    with store.view(TENANT, old) as view:
        writer = store.writer(TENANT, name, vm, now=now, slots=SLOTS, view=view)
        writer.place(
            frame(
                [
                    (100, Kind.COPY, 0),
                    (101, Kind.LITERAL, 1),
                    (102, Kind.REF, SLOTS + 3),
                    (103, Kind.ZERO, 0),
                    (104, Kind.REF, 1),
                ],
                [SLOTS + 7],
            )
        )
        writer.add(pages_of(9, 1))
        writer.finish()
        assert writer.wait(SECONDS)
        assert writer.failure is None


def test_bases_lead_into_older_segments_while_those_are_at_hand(tmp_path: Path) -> None:
    """A machine that comes back is told by references: its newest table points into what it stored before."""
    pfns = np.arange(100, 106, dtype=np.uint64)
    with opened(tmp_path) as store:
        written(store, pages_of(1, 10), FIRST, vm="another")
        _write(store, SECOND, VM, 2.0, [Agreed(FIRST, 10)])
        with store.view(TENANT, [Agreed(FIRST, 10), Agreed(SECOND, 1)], VM) as view:
            # 103 is zero and 105 unknown to the machine's own table: the tenant's other segment has a guess.
            assert view.bases(pfns).tolist() == [7, 10, 3, 3, 10, 5]
            view.prefer("another")
            assert view.bases(pfns).tolist() == [0, 1, 2, 3, 4, 5]
        with store.view(TENANT, [Agreed(SECOND, 1)], VM) as view:
            assert view.bases(pfns).tolist() == [-1, 0, -1, -1, 0, -1]
        with store.view(TENANT, [Agreed(SECOND, 1), Agreed(FIRST, 5)], VM) as view:
            # Only five of FIRST's pages were agreed on: 7 is not at hand, its own table has a guess for 100.
            assert view.bases(pfns).tolist() == [1, 0, 4, 4, 0, -1]


def test_a_session_that_only_refers_keeps_its_table(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        written(store, pages_of(1, 10), FIRST)
        with store.view(TENANT, [Agreed(FIRST, 10)]) as view:
            writer = store.writer(TENANT, THIRD, VM, now=5.0, slots=SLOTS, view=view)
            writer.place(frame([(7, Kind.COPY, 0), (8, Kind.COPY, 1)], [SLOTS + 4, SLOTS + 2]))
            writer.finish()
            assert writer.wait(SECONDS)
        assert [(info.name, info.pages) for info in store.segments(TENANT)] == [(THIRD, 0), (FIRST, 10)]
        with store.view(TENANT, [Agreed(THIRD, 0), Agreed(FIRST, 10)]) as view:
            assert view.bases(np.array([7, 8, 100], np.uint64)).tolist() == [4, 2, 0]
            assert view.find(np.zeros(1, np.uint64), memoryview(bytes(4096)), np.zeros(1, np.uint32)).tolist() == [-1]


def test_a_frame_that_was_not_followed_leaves_no_wrong_guess(tmp_path: Path) -> None:
    """The queue was full once: what the slots hold is not known until they are written again."""
    with opened(tmp_path) as store:
        writer = store.writer(TENANT, FIRST, VM, now=1.0, slots=SLOTS)
        writer.add(pages_of(1, 4))
        writer.place(literals([1, 2], [0, 1]))
        assert store.wait(SECONDS)
        store._behind._bytes_max = 0
        writer.place(literals([3], [0]))  # dropped
        store._behind._bytes_max = 1 << 20
        writer.place(frame([(4, Kind.REF, 0), (5, Kind.LITERAL, 2), (6, Kind.REF, 2)]))
        writer.finish()
        assert writer.wait(SECONDS)
        with store.view(TENANT, [Agreed(FIRST, 4)]) as view:
            assert view.bases(np.arange(1, 7, dtype=np.uint64)).tolist() == [0, 1, -1, -1, 3, 3]

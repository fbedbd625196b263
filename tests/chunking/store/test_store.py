"""What is written is found and read, in this process or the next, and what cannot be read is missing, never wrong."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunking.errors import FrameMalformed, PageForged, PagesMissing, SegmentUnknown
from chunking.store import Agreed, Counters
from chunking.store.folder import Group
from tests.chunking.store.support import (
    FIRST,
    SECOND,
    SECONDS,
    SLOTS,
    TENANT,
    THIRD,
    VM,
    files_in,
    fingerprint,
    literals,
    offsets,
    opened,
    ordinals,
    pages_of,
    written,
)


def test_what_one_process_writes_the_next_finds_and_reads(tmp_path: Path) -> None:
    pages = pages_of(1, 50)
    with opened(tmp_path) as store:
        written(store, pages)
    with opened(tmp_path) as store:
        (info,) = store.segments(TENANT)
        assert (info.name, info.pages, info.kept, info.vm) == (FIRST, 50, 50, VM)
        with store.view(TENANT, [Agreed(FIRST, 50)]) as view:
            assert view.count == 50
            found = view.find(fingerprint(pages), pages.data.cast("B"), offsets(50))
            assert found.tolist() == list(range(50))
            others = pages_of(2, 5)
            assert set(view.find(fingerprint(others), others.data.cast("B"), offsets(5)).tolist()) == {-1}
            assert (view.read(ordinals(49, 3, 3, 17)) == pages[[49, 3, 3, 17]]).all()
            assert view.read(ordinals()).shape == (0, 4096)
            assert view.bases(np.array([100, 149, 99, 150, 0, 2**64 - 1], np.uint64)).tolist() == [
                0,
                49,
                -1,
                -1,
                -1,
                -1,
            ]
        assert (store.counters.hits, store.counters.misses, store.counters.pages_read) == (50, 5, 4)


def test_a_fingerprint_only_proposes(tmp_path: Path) -> None:
    """Another page with the fingerprint of a stored one is another page."""
    pages, others = pages_of(1, 3), pages_of(2, 3)
    with opened(tmp_path) as store:
        written(store, pages)
        with store.view(TENANT, [Agreed(FIRST, 3)]) as view:
            assert view.find(fingerprint(pages), others.data.cast("B"), offsets(3)).tolist() == [-1, -1, -1]


def test_ordinals_of_several_segments_follow_each_other(tmp_path: Path) -> None:
    first, second = pages_of(1, 20), pages_of(2, 30)
    with opened(tmp_path) as store:
        written(store, first)
        written(store, second, SECOND, now=2.0)
        assert [info.name for info in store.segments(TENANT)] == [SECOND, FIRST]
        agreed = [Agreed(SECOND, 30), Agreed(FIRST, 10)]
        with store.view(TENANT, agreed) as view:
            assert (view.count, view.agreed) == (40, agreed)
            assert (view.read(ordinals(29, 30, 39)) == np.stack([second[29], first[0], first[9]])).all()
            # What was not agreed on has no ordinal, though it is there.
            assert view.find(fingerprint(first), first.data.cast("B"), offsets(20)).tolist() == [
                *range(30, 40),
                *[-1] * 10,
            ]
            with pytest.raises(FrameMalformed):
                view.read(ordinals(40))
            with pytest.raises(FrameMalformed):
                view.read(ordinals(-1))


def test_both_hosts_number_alike_though_one_dropped_pages(tmp_path: Path) -> None:
    pages = pages_of(1, 40)
    with opened(tmp_path / "a") as one, opened(tmp_path / "b") as other:
        written(one, pages)
        writer = other.writer(TENANT, FIRST, now=1.0, slots=SLOTS)
        writer.add(pages[:10])
        writer.drop(7)
        writer.add(pages[17:])
        writer.finish()
        assert writer.wait(SECONDS)
        assert writer.dropped == 7
        (info,) = other.segments(TENANT) or [None]
        assert info is None  # each page it lacks would cost a round trip: it is not offered
        agreed = other.held(TENANT, [Agreed(i.name, i.pages) for i in one.segments(TENANT)])
        assert agreed == [Agreed(FIRST, 40)]
        with one.view(TENANT, agreed) as whole, other.view(TENANT, agreed) as holed:
            wanted = ordinals(5, 9, 17, 39)
            assert (whole.read(wanted) == holed.read(wanted)).all()
            with pytest.raises(PagesMissing) as missing:
                holed.read(ordinals(39, 12, 10, 12, 3))
            assert missing.value.ordinals == (10, 12)
            holed.verify(12, pages[12].tobytes())  # nothing to hold it against: the frame's digest speaks for it
            assert holed.find(fingerprint(pages), pages.data.cast("B"), offsets(40)).tolist() == [
                *range(10),
                *[-1] * 7,
                *range(17, 40),
            ]


def test_pages_dropped_at_the_end_do_not_count(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        writer = store.writer(TENANT, FIRST, now=1.0, slots=SLOTS)
        writer.add(pages_of(1, 5))
        writer.drop(100)
        writer.finish()
        assert writer.wait(SECONDS)
        (info,) = store.segments(TENANT)
        assert (info.pages, info.kept, writer.pages) == (5, 5, 105)


def test_ends_of_a_session_that_broke_off_agree_on_what_both_have(tmp_path: Path) -> None:
    pages = pages_of(1, 30)
    with opened(tmp_path / "a") as source, opened(tmp_path / "b") as destination:
        written(source, pages)
        written(destination, pages[:21])
        offered = [Agreed(info.name, info.pages) for info in destination.segments(TENANT)]
        assert source.held(TENANT, offered) == [Agreed(FIRST, 21)]
        assert source.held(TENANT, [*offered, *offered, Agreed(SECOND, 4), Agreed(b"", 0)]) == [Agreed(FIRST, 21)]
        assert source.held(TENANT, [Agreed(FIRST, -1)]) == []


def test_a_page_the_peer_gives_is_held_against_its_id(tmp_path: Path) -> None:
    pages = pages_of(1, 5)
    with opened(tmp_path) as store:
        written(store, pages)
        with store.view(TENANT, [Agreed(FIRST, 5)]) as view:
            view.verify(4, pages[4].tobytes())
            with pytest.raises(PageForged):
                view.verify(4, pages[3].tobytes())
            with pytest.raises(PageForged):
                view.verify(4, pages[4].tobytes()[:-1])
            with pytest.raises(FrameMalformed):
                view.verify(5, pages[4].tobytes())


@pytest.mark.parametrize(
    "agreed",
    [
        [Agreed(SECOND, 1)],
        [Agreed(FIRST, 6)],
        [Agreed(FIRST, -1)],
        [Agreed(FIRST, 2), Agreed(FIRST, 2)],
        [Agreed(bytes([n]) * 16, 0) for n in range(17)],
        [Agreed(b"../../../etc/pass", 1)],
    ],
    ids=["not held", "too long", "negative", "twice", "too many", "no name"],
)
def test_a_view_of_what_is_not_there_is_refused(tmp_path: Path, agreed: list[Agreed]) -> None:
    with opened(tmp_path) as store:
        written(store, pages_of(1, 5))
        with pytest.raises(SegmentUnknown):
            store.view(TENANT, agreed)


def test_an_aborted_segment_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        writer = store.writer(TENANT, FIRST, now=1.0, slots=SLOTS)
        writer.add(pages_of(1, 40))
        writer.abort()
        writer.finish()  # too late: says nothing
        assert writer.wait(SECONDS)
        assert not writer.stored
        assert files_in(tmp_path) == []


def test_closing_the_store_gives_up_what_is_not_finished(tmp_path: Path) -> None:
    store = opened(tmp_path)
    writer = store.writer(TENANT, FIRST, now=1.0, slots=SLOTS)
    writer.add(pages_of(1, 40))
    assert store.close(SECONDS)
    assert files_in(tmp_path) == []
    assert store.counters == Counters(pages_stored=40, bytes_written=store.counters.bytes_written, segments_abandoned=1)


def test_a_session_without_a_new_page_stores_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        written(store, pages_of(1, 0))
        assert files_in(tmp_path) == []


def test_a_segment_is_written_once(tmp_path: Path) -> None:
    """Both relays of a migration within one host may share a store: the second lets it be."""
    pages = pages_of(1, 10)
    with opened(tmp_path) as store, opened(tmp_path) as same:
        first, second = (each.writer(TENANT, FIRST, now=1.0, slots=SLOTS) for each in (store, same))
        for writer in (first, second):
            writer.add(pages)
            writer.finish()
        assert first.wait(SECONDS)
        assert second.wait(SECONDS)
        assert sorted([first.stored, second.stored]) == [False, True]
        third = store.writer(TENANT, FIRST, now=2.0, slots=SLOTS)
        third.abort()
        assert third.wait(SECONDS)
        with store.view(TENANT, [Agreed(FIRST, 10)]) as view:
            assert (view.read(ordinals(*range(10))) == pages).all()


def test_a_full_queue_drops_pages_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as store:
        store._behind._bytes_max = 30 * 4096
        with store._folder.locked():  # the thread waits to make the files: nothing leaves the queue
            writer = store.writer(TENANT, FIRST, now=1.0, slots=SLOTS)
            writer.add(pages_of(1, 20))
            writer.add(pages_of(2, 20))
            writer.add(pages_of(3, 10))
        writer.finish()
        assert writer.wait(SECONDS)
        assert (writer.pages, writer.dropped, store.counters.pages_dropped) == (50, 20, 20)
        with store.view(TENANT, [Agreed(FIRST, 50)]) as view:
            assert (view.read(ordinals(*range(20))) == pages_of(1, 20)).all()
            assert (view.read(ordinals(*range(40, 50))) == pages_of(3, 10)).all()
            with pytest.raises(PagesMissing):
                view.read(ordinals(20))


def test_a_view_that_was_closed_misses_and_marks_nothing(tmp_path: Path) -> None:
    pages = pages_of(1, 5)
    with opened(tmp_path) as store:
        written(store, pages)
        view = store.view(TENANT, [Agreed(FIRST, 5)])
        view.close()
        with pytest.raises(PagesMissing):
            view.read(ordinals(0))
        assert view.find(fingerprint(pages), pages.data.cast("B"), offsets(5)).tolist() == [-1] * 5
        assert store.counters.segments_damaged == 0
        assert len(store.segments(TENANT)) == 1


def test_the_machine_named_late_comes_first_in_offers_and_bases(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        writer = store.writer(TENANT, FIRST, now=1.0, slots=SLOTS)
        writer.name("late")
        writer.add(pages_of(1, 3))
        writer.place(literals([7, 8, 9]))
        writer.finish()
        assert writer.wait(SECONDS)
        written(store, pages_of(2, 3), SECOND, vm="other", now=2.0)
        written(store, pages_of(3, 3), THIRD, vm=None, now=3.0)
        assert [info.name for info in store.segments(TENANT)] == [THIRD, SECOND, FIRST]
        assert [info.name for info in store.segments(TENANT, "late")] == [FIRST, THIRD, SECOND]
        assert [info.name for info in store.segments(TENANT, "late", segments_max=1)] == [FIRST]
        assert [info.name for info in store.segments(TENANT, pages_max=7)] == [THIRD, SECOND]
        with store.view(TENANT, [Agreed(name, 3) for name in (FIRST, SECOND, THIRD)]) as view:
            pfns = np.array([8, 101], np.uint64)
            assert view.bases(pfns).tolist() == [1, 7]
            view.prefer("other")
            assert view.bases(pfns).tolist() == [1, 4]


def test_names_are_bounded(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for tenant, segment, vm in (("t" * 256, FIRST, None), ("t", FIRST[:-1], None), ("t", FIRST, "ā" * 128)):
            with pytest.raises(ValueError, match="bytes"):
                store.writer(tenant, segment, vm, now=1.0, slots=SLOTS)
        assert files_in(tmp_path) == []
        writer = store.writer("t" * 255, FIRST, "ā" * 127, now=1.0, slots=SLOTS)
        writer.add(pages_of(1, 1))
        writer.finish()
        assert writer.wait(SECONDS)
        (row,) = store.status().machines
        assert (row.tenant, row.vm) == ("t" * 255, "ā" * 127)


def test_pages_without_fingerprints_want_a_function(tmp_path: Path) -> None:
    pages = pages_of(1, 2)
    with opened(tmp_path, fingerprint=None) as store:
        writer = store.writer(TENANT, FIRST, now=1.0, slots=SLOTS)
        with pytest.raises(ValueError, match="fingerprints"):
            writer.add(pages)
        writer.add(pages, fingerprint(pages))
        writer.finish()
        assert writer.wait(SECONDS)
        with store.view(TENANT, [Agreed(FIRST, 2)]) as view:
            assert view.find(fingerprint(pages), pages.data.cast("B"), offsets(2)).tolist() == [0, 1]


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=12),
    skew=st.integers(0, 4095),
)
def test_any_order_of_adding_and_dropping(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int]], skew: int
) -> None:
    """Held against the plainest model: a list of pages, None where one was dropped. Pages lie at any offset."""
    folder = tmp_path_factory.mktemp("steps")
    model: list[bytes | None] = []
    with opened(folder) as store:
        writer = store.writer(TENANT, FIRST, now=1.0, slots=SLOTS)
        for number, (keep, count) in enumerate(steps):
            if keep:
                pages = pages_of(number, count)
                raw = memoryview(bytes(skew) + pages.tobytes())
                writer.add_from(raw, offsets(count) + np.uint32(skew))
                model += [page.tobytes() for page in pages]
            else:
                writer.drop(count)
                model += [None] * count
        writer.finish()
        assert writer.wait(SECONDS)
        assert writer.failure is None
        while model and model[-1] is None:
            model.pop()
        if not model:
            assert not writer.stored
            return
        with store.view(TENANT, [Agreed(FIRST, len(model))]) as view:
            kept = [at for at, page in enumerate(model) if page is not None]
            assert [page.tobytes() for page in view.read(ordinals(*kept))] == [model[at] for at in kept]
            for at in (at for at, page in enumerate(model) if page is None):
                with pytest.raises(PagesMissing):
                    view.read(ordinals(at))
        for group in list(store._folder.groups()):
            assert isinstance(group, Group)
            store._folder.shred(group)

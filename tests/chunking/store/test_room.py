"""The store stays below its limit, gives up the least recently used first, and forgets what it is told to."""

from pathlib import Path

import numpy as np
import pytest

from chunking import limits
from chunking.store import Agreed, Disk
from tests.chunking.store.support import (
    FIRST,
    SECOND,
    SECONDS,
    SLOTS,
    TENANT,
    THIRD,
    VM,
    files_in,
    opened,
    ordinals,
    pages_of,
    written,
)


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    with opened(tmp_path, bytes_max=500_000) as store:
        written(store, pages_of(1, 40), FIRST, now=1.0)
        written(store, pages_of(2, 40), SECOND, now=2.0)
        store.view(TENANT, [Agreed(FIRST, 40)]).close()  # used now, long after the other was made
        written(store, pages_of(3, 40), THIRD, now=3.0)
        assert {info.name for info in store.segments(TENANT)} == {FIRST, THIRD}
        assert store.counters.segments_evicted == 1
        assert store.status().bytes <= 500_000


def test_what_is_in_use_stays_and_the_new_one_keeps_what_fits(tmp_path: Path) -> None:
    with opened(tmp_path, bytes_max=500_000) as store:
        written(store, pages_of(1, 80), FIRST)
        with store.view(TENANT, [Agreed(FIRST, 80)]) as view:
            writer = store.writer(TENANT, SECOND, VM, now=2.0, slots=SLOTS)
            for start in range(0, 60, 10):
                writer.add(pages_of(2, 60)[start : start + 10])
            writer.finish()
            assert writer.wait(SECONDS)
            assert (view.read(ordinals(*range(80))) == pages_of(1, 80)).all()
            infos = {info.name: info for info in store.segments(TENANT)}
            assert set(infos) == {FIRST, SECOND}
            # A beginning without gaps: it is numbered, and offered, as far as it goes.
            kept = infos[SECOND].kept
            assert 0 < kept == infos[SECOND].pages < 60
            assert writer.dropped == 60 - kept == store.counters.pages_dropped
            with store.view(TENANT, [Agreed(SECOND, kept)]) as second:
                assert (second.read(ordinals(*range(kept))) == pages_of(2, 60)[:kept]).all()
        assert store.status().bytes <= 500_000


def test_a_segment_larger_than_the_store_pushes_nothing_out(tmp_path: Path) -> None:
    with opened(tmp_path, bytes_max=300_000) as store:
        written(store, pages_of(1, 40), FIRST)
        writer = store.writer(TENANT, SECOND, VM, now=2.0, slots=SLOTS)
        writer.add(pages_of(2, 200))
        writer.finish()
        assert writer.wait(SECONDS)
        assert not writer.stored
        assert [info.name for info in store.segments(TENANT)] == [FIRST]


class CrowdedDisk(Disk):
    """A disk of little room, most of which the store itself takes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size

    def free(self, path: Path) -> int:
        return self.size - sum(file.stat().st_blocks * 512 for file in files_in(self.folder))


def test_others_are_left_room_on_the_disk(tmp_path: Path) -> None:
    """Older segments go to that end, and a segment that could not leave it ends where it must."""
    with opened(tmp_path, disk=CrowdedDisk(tmp_path, 1_000_000), free_bytes_min=600_000) as store:
        written(store, pages_of(1, 40), FIRST)
        written(store, pages_of(2, 40), SECOND, now=2.0)
        assert [info.name for info in store.segments(TENANT)] == [SECOND]
        with store.view(TENANT, [Agreed(SECOND, 40)]):
            writer = store.writer(TENANT, THIRD, VM, now=3.0, slots=SLOTS)
            for start in range(0, 80, 10):
                writer.add(pages_of(3, 80)[start : start + 10])
            writer.finish()
            assert writer.wait(SECONDS)
            (newest, second) = store.segments(TENANT)
            assert (newest.name, second.name) == (THIRD, SECOND)
            assert 20 <= newest.pages <= 50
        assert store._disk.free(tmp_path) >= 600_000


def test_segments_are_bounded_in_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunking.store.folder.STORE_SEGMENTS_MAX", 3)
    assert limits.STORE_SEGMENTS_MAX > 3
    with opened(tmp_path) as store:
        for number in range(6):
            written(store, pages_of(number, 1), bytes([number]) * 16, now=float(number))
        assert [info.name[0] for info in store.segments(TENANT)] == [5, 4, 3]


def test_a_machine_is_forgotten_with_all_that_may_be_its(tmp_path: Path) -> None:
    with opened(tmp_path) as store, opened(tmp_path) as other:
        written(store, pages_of(1, 5), FIRST)
        written(store, pages_of(2, 5), SECOND, vm="another")
        nameless = other.writer(
            TENANT, THIRD, now=3.0, slots=SLOTS
        )  # unfinished, by another process, of who knows whom
        nameless.add(pages_of(3, 5))
        assert other.wait(SECONDS)
        status = store.status()
        assert (status.segments, status.unfinished) == (2, 1)
        assert [(row.vm, row.segments, row.pages) for row in status.machines] == [("another", 1, 5), (VM, 1, 5)]
        assert store.forget(vm="unheard of").segments == 1  # the nameless one
        assert store.forget(vm=VM, tenant="another").segments == 0
        assert store.forget(vm=VM, tenant=TENANT).segments == 1
        nameless.finish()
        assert nameless.wait(SECONDS)
        assert not nameless.stored
        assert [info.name for info in store.segments(TENANT)] == [SECOND]
        assert store.forget(tenant=TENANT).segments == 1
        assert files_in(tmp_path) == []
        assert store.status().machines == ()
        with pytest.raises(ValueError, match="which"):
            store.forget()


def test_a_view_reads_on_what_is_forgotten_here(tmp_path: Path) -> None:
    pages = pages_of(1, 30)
    with opened(tmp_path) as store:
        written(store, pages)
        with store.view(TENANT, [Agreed(FIRST, 30)]) as view:
            forgotten = store.forget(vm=VM)
            assert (forgotten.segments, forgotten.in_use) == (1, 1)
            assert files_in(tmp_path) == []
            assert (view.read(ordinals(*range(30))) == pages).all()
            assert view.bases(np.array([101], np.uint64)).tolist() == [1]
        assert store.segments(TENANT) == []


def test_a_forgotten_writer_lets_its_successor_be(tmp_path: Path) -> None:
    """Its name was given anew meanwhile: it neither names the other's index nor removes the other's files."""
    pages = pages_of(2, 20)
    for end in ("finish", "abort"):
        with opened(tmp_path) as store, opened(tmp_path) as other:
            first = store.writer(TENANT, FIRST, VM, now=1.0, slots=SLOTS)
            first.add(pages_of(1, 20))
            assert store.wait(SECONDS)
            assert store.forget(vm=VM).segments == 1
            second = other.writer(TENANT, FIRST, VM, now=2.0, slots=SLOTS)
            second.add(pages)
            assert other.wait(SECONDS)
            getattr(first, end)()
            assert first.wait(SECONDS)
            assert not first.stored
            assert store.segments(TENANT) == []
            second.finish()
            assert second.wait(SECONDS)
            with store.view(TENANT, [Agreed(FIRST, 20)]) as view:
                assert (view.read(ordinals(*range(20))) == pages).all()
            store.forget(vm=VM)


def test_two_sessions_at_once_write_apart(tmp_path: Path) -> None:
    one, other = pages_of(1, 60), pages_of(2, 60)
    with opened(tmp_path) as store:
        writers = [store.writer(TENANT, name, VM, now=1.0, slots=SLOTS) for name in (FIRST, SECOND)]
        for start in range(0, 60, 7):
            writers[0].add(one[start : start + 7])
            writers[1].add(other[start : start + 7])
        for writer in writers:
            writer.finish()
        for writer in writers:
            assert writer.wait(SECONDS)
        with store.view(TENANT, [Agreed(FIRST, 60), Agreed(SECOND, 60)]) as view:
            assert (view.read(ordinals(*range(120))) == np.concatenate([one, other])).all()

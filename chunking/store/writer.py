"""One session's segment in the making. The session calls and goes on; a thread seals and writes behind it.

Both relays of a session number the same pages alike: what one of them drops, it numbers all the same.
"""

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event, Lock
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from chunking.errors import SegmentTaken, StoreError
from chunking.limits import SEGMENT_PAGES_MAX
from chunking.pages import PAGE_BYTES
from chunking.store import layout
from chunking.store.behind import WriteBehind
from chunking.store.counters import Counters
from chunking.store.disk import Disk
from chunking.store.keys import SEAL_BYTES, Sealer
from chunking.store.layout import BLOCK_PAGES, ID_CHUNK_PAGES, PART_COLUMNS, PART_DATA, PART_IDS, PART_SUMMARY, Summary
from chunking.store.segment import Bytes, Runs
from chunking.store.table import Kind, PageTable, Placement
from chunking.store.view import StoreView, page_id

Fingerprints = NDArray[np.uint64]
Fingerprinter = Callable[[Bytes], Fingerprints]
INDEX_BYTES_BASE: Final = 2048  # of an index without a page
INDEX_BYTES_PER_PAGE: Final = 64  # what a page adds at most: fingerprint, place, a run of its own, its id counted twice


class Founded(Protocol):
    """What the store gives a writer on its thread: files, and room for them."""

    folder: Path
    data: int
    index: int
    sealer: Sealer
    page_key: bytes
    lease_bytes: int

    def lease(self, size: int) -> bool:
        """Have room for a data file of ``size`` bytes, others' segments removed if need be; says whether there is."""

    def publish(self) -> None:
        """Give the whole index its name, if the segment is still wanted.

        Raises:
            StoreError: it has been forgotten meanwhile.
        """

    def remove(self) -> None:
        """Leave nothing of the segment."""


class SegmentWriter:
    """Takes a session's new pages in cache order. Only ``wait`` ever waits, and nothing fails for the disk's sake.

    Args:
        found: makes the files, on the writing thread.
        behind: the process's queue.
        counters: of this process.
        disk: the steps on the disk.
        fingerprint: computes fingerprints of pages (n, 4096) where the session gives none.
        vm: the machine's name, if known yet.
        slots: of the session's page cache.
        view: the stored pages of the session.
    """

    def __init__(
        self,
        found: Callable[[], Founded],
        *,
        behind: WriteBehind,
        counters: Counters,
        disk: Disk,
        fingerprint: Fingerprinter | None,
        vm: str | None,
        slots: int,
        view: StoreView | None,
    ) -> None:
        self.pages = 0
        self.dropped = 0
        self.vm = vm
        self.failure: BaseException | None = None
        self._behind = behind
        self._counters = counters
        self._fingerprint = fingerprint
        self._placed = 0
        self._missed = False
        self._over = False
        self._done = Event()
        self._lock = Lock()
        agreed = view.agreed if view is not None else []
        starts = np.cumsum([0, *(segment.pages for segment in agreed)], dtype=np.int64)
        self._file = _SegmentFile(disk, counters, PageTable(slots, starts), tuple(segment.name for segment in agreed))
        behind.must(self._guarded(lambda: self._file.begin(found())))

    def name(self, vm: str) -> None:
        """Say whose pages these are, once that is known.

        Raises:
            ValueError: the name is too long.
        """
        layout.name_bytes(vm)
        self.vm = vm

    def add(self, pages: Bytes, fingerprints: Fingerprints | None = None) -> None:
        """Number these pages and keep them, or drop them if the queue is full. They are copied before this returns.

        Args:
            pages: shape (n, 4096).
            fingerprints: of them, if they are known.

        Raises:
            ValueError: fingerprints are wanted and cannot be computed here.
        """
        self.add_from(np.ascontiguousarray(pages).data.cast("B"), _every(len(pages)), fingerprints)

    def add_from(self, raw: memoryview, offsets: NDArray[np.uint32], fingerprints: Fingerprints | None = None) -> None:
        """As ``add``, for pages that lie at these offsets of ``raw``."""
        if fingerprints is None and self._fingerprint is None:
            raise ValueError("pages without fingerprints, and nothing to compute them with")
        count = len(offsets)
        with self._lock:
            first, self.pages = self.pages, self.pages + count
            if not count:
                return
            fits = not self._over and self.failure is None and self.pages <= SEGMENT_PAGES_MAX
            # Asked before the copy is made: a full queue must not cost one.
            if not fits or not self._behind.room(count * PAGE_BYTES):
                self._drop(count)
                return
            views = np.lib.stride_tricks.sliding_window_view(np.frombuffer(raw, np.uint8), PAGE_BYTES)
            pages = views[offsets]
            known = None if fingerprints is None else fingerprints.copy()
            if not self._behind.offer(pages.nbytes, self._guarded(lambda: self._keep(first, pages, known))):
                self._drop(count)

    def drop(self, count: int) -> None:
        """Number pages that are not kept here."""
        with self._lock:
            self.pages += count
            self._drop(count)

    def place(self, frame: Placement) -> None:
        """Follow where the guest's pages are: once a frame, in cache order, for all frames of the session or none.

        The ordinals of its new pages are counted apart from ``add``'s, so that it may be called before or after.

        Raises:
            ValueError: the columns differ in length.
        """
        if not len(frame.pfns) == len(frame.kinds) == len(frame.locations):
            raise ValueError("columns of a frame differ in length")
        kinds = frame.kinds
        with self._lock:
            first = self._placed
            self._placed += int(np.count_nonzero((kinds == Kind.DELTA) | (kinds == Kind.LITERAL)))
            if self._over:
                return
            copy = Placement(frame.pfns.copy(), kinds.copy(), frame.locations.copy(), frame.copied.copy())
            missed, size = self._missed, sum(column.nbytes for column in copy)
            job = self._guarded(lambda: self._file.place(copy, first, after_gap=missed))
            self._missed = not self._behind.offer(size, job)

    def finish(self) -> None:
        """Seal the segment once all of it is written, and give it its name."""
        self._end(lambda: self._file.finish(self.vm))

    def abort(self) -> None:
        """Leave nothing of the segment."""
        self._end(self._file.give_up)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is finished or gone, or for so long; says whether it is."""
        return self._done.wait(seconds)

    @property
    def stored(self) -> bool:
        """Whether the segment is whole and named."""
        return self._file.published

    def _end(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
        self._behind.must(self._guarded(job, last=True))

    def _drop(self, count: int) -> None:
        self.dropped += count
        self._counters.add(pages_dropped=count)

    def _keep(self, first: int, pages: Bytes, fingerprints: Fingerprints | None) -> None:
        if fingerprints is None and self._fingerprint is not None:
            fingerprints = self._fingerprint(pages)
        kept = self._file.keep(first, pages, fingerprints) if fingerprints is not None else 0
        if kept < len(pages):
            with self._lock:
                self._drop(len(pages) - kept)

    def _guarded(self, job: Callable[[], None], *, last: bool = False) -> Callable[[], None]:
        """On the thread: whatever goes wrong costs this segment, and nothing else."""

        def guarded() -> None:
            try:
                if self.failure is None:
                    job()
            except Exception as error:  # noqa: BLE001 - even our own mistake must not stop the thread that serves all
                self.failure = error
                self._file.give_up()
            finally:
                if last:
                    self._done.set()

        return guarded


class _SegmentFile:
    """The files of a segment in the making; used by the writing thread alone."""

    def __init__(self, disk: Disk, counters: Counters, table: PageTable, references: tuple[bytes, ...]) -> None:
        self.published = False
        self._disk = disk
        self._counters = counters
        self._table = table
        self._references = references
        self._founded: Founded | None = None
        self._block = bytearray(BLOCK_PAGES * PAGE_BYTES)
        self._filled = 0
        self._sealed = bytearray(len(self._block) + SEAL_BYTES)
        self._data_end = 0
        self._leased = 0
        self._full = False
        self._ids = bytearray()
        self._id_chunks = 0
        self._fingerprints: list[Fingerprints] = []
        self._ranges: list[tuple[int, int]] = []
        self._kept = 0

    def begin(self, founded: Founded) -> None:
        self._founded = founded
        self._disk.write(founded.index, layout.MAGIC, 0)

    def place(self, frame: Placement, first: int, *, after_gap: bool) -> None:
        if after_gap:
            self._table.forget_slots()
        self._table.place(frame, first)

    def keep(self, first: int, pages: Bytes, fingerprints: Fingerprints) -> int:
        """Write pages from ordinal ``first`` on; says how many of them, fewer once the store is full."""
        founded = self._here()
        count = min(len(pages), self._room(len(pages)))
        if not count:
            return 0
        key = founded.page_key
        rows = pages.data.cast("B")
        for start in range(0, count * PAGE_BYTES, PAGE_BYTES):
            self._ids += page_id(key, rows[start : start + PAGE_BYTES])
        self._fill(rows[: count * PAGE_BYTES])
        while len(self._ids) >= ID_CHUNK_PAGES * layout.ID_BYTES:
            self._flush_ids(ID_CHUNK_PAGES)
        self._fingerprints.append(fingerprints[:count])
        self._ranges.append((first, count))
        self._kept += count
        self._counters.add(pages_stored=count)
        return count

    def finish(self, vm: str | None) -> None:
        founded = self._here()
        if self._filled:
            self._flush_block(memoryview(self._block)[: self._filled])
        if self._ids:
            self._flush_ids(len(self._ids) // layout.ID_BYTES)
        # What was dropped at the end is not numbered: both sides agree on how many pages count anyway.
        pages = sum(self._ranges[-1]) if self._ranges else 0
        runs = self._table.runs(pages)
        summary = Summary(pages, self._kept, BLOCK_PAGES, len(runs.starts), self._references, vm)
        if not pages and not len(runs.starts):
            self.give_up()
            return
        if not founded.lease(self._data_end + layout.index_bytes(summary)):
            raise StoreError("no room for the index")
        self._write_columns(summary, runs)
        offset, _ = layout.summary_place()
        self._write_sealed(PART_SUMMARY, layout.pack_summary(summary), offset)
        self._disk.sync(founded.index)
        # Not before the index is written: the room leased for it is others' then.
        self._disk.resize(founded.data, self._data_end)
        self._disk.sync(founded.data)
        founded.publish()
        self.published = True
        self._counters.add(segments_finished=1)
        self._close()

    def give_up(self) -> None:
        founded = self._founded
        self._close()
        if founded is not None and not self.published:
            founded.remove()
            self._counters.add(segments_abandoned=1)

    def _here(self) -> Founded:
        if self._founded is None:
            raise SegmentTaken("the segment is closed")
        return self._founded

    def _close(self) -> None:
        founded, self._founded = self._founded, None
        self._fingerprints.clear()
        if founded is not None:
            os.close(founded.index)
            os.close(founded.data)

    def _room(self, pages: int) -> int:
        """How many of so many pages there is room for; once there is none, it stays so: a gap would serve nobody."""
        founded = self._here()
        wanted = self._data_end + self._filled + pages * (PAGE_BYTES + SEAL_BYTES)
        if not self._full and wanted > self._leased:
            lease = max(wanted, self._leased + founded.lease_bytes)
            if founded.lease(_with_index(lease)):
                self._leased = lease
            elif founded.lease(_with_index(wanted)):
                self._leased = wanted
            else:
                self._full = True
        return 0 if self._full else pages

    def _fill(self, rows: memoryview) -> None:
        """Collect pages into blocks; whole blocks are sealed from where they lie."""
        size = len(self._block)
        while rows:
            if not self._filled and len(rows) >= size:
                self._flush_block(rows[:size])
                rows = rows[size:]
                continue
            taken = min(size - self._filled, len(rows))
            self._block[self._filled : self._filled + taken] = rows[:taken]
            self._filled += taken
            rows = rows[taken:]
            if self._filled == size:
                self._flush_block(memoryview(self._block))
                self._filled = 0

    def _flush_block(self, plain: memoryview) -> None:
        founded = self._here()
        sealed = memoryview(self._sealed)[: len(plain) + SEAL_BYTES]
        founded.sealer.seal(PART_DATA, plain, sealed)
        self._disk.write(founded.data, sealed, self._data_end)
        self._data_end += len(sealed)
        self._counters.add(bytes_written=len(sealed))

    def _flush_ids(self, count: int) -> None:
        offset, _ = layout.id_chunk_place(ID_CHUNK_PAGES, 0)
        offset += self._id_chunks * (ID_CHUNK_PAGES * layout.ID_BYTES + SEAL_BYTES)
        self._write_sealed(PART_IDS, bytes(self._ids[: count * layout.ID_BYTES]), offset)
        del self._ids[: count * layout.ID_BYTES]
        self._id_chunks += 1

    def _write_columns(self, summary: Summary, runs: Runs) -> None:
        founded = self._here()
        empty = np.empty(0, np.uint64)
        fingerprints = np.concatenate(self._fingerprints) if self._fingerprints else empty
        self._fingerprints.clear()
        order = np.argsort(fingerprints, kind="stable")
        columns = (
            (fingerprints[order].astype("<u8"),),
            (order.astype("<u4"),),
            (runs.starts.astype("<u8"), *(column.astype("<u4") for column in runs[1:])),
            (self._kept_bits(summary),),
        )
        places = layout.column_places(summary)
        for (offset, _), column in zip(places, columns, strict=True):
            # An empty column spends its number too, and is overwritten by what follows.
            self._write_sealed(PART_COLUMNS, b"".join(part.tobytes() for part in column), offset)
        self._disk.resize(founded.index, layout.index_bytes(summary))

    def _kept_bits(self, summary: Summary) -> Bytes:
        if not summary.kept_bytes:
            return np.empty(0, np.uint8)
        kept = np.zeros(summary.pages, np.uint8)
        for first, count in self._ranges:
            kept[first : first + count] = 1
        return np.packbits(kept, bitorder="little")

    def _write_sealed(self, part: int, plain: bytes, offset: int) -> None:
        founded = self._here()
        sealed = bytearray(len(plain) + SEAL_BYTES)
        founded.sealer.seal(part, plain, sealed)
        self._disk.write(founded.index, sealed, offset)
        self._counters.add(bytes_written=len(sealed))


def _with_index(data_bytes: int) -> int:
    """The room that so many bytes of data need together with their index."""
    return data_bytes + INDEX_BYTES_BASE + data_bytes // PAGE_BYTES * INDEX_BYTES_PER_PAGE


def _every(count: int) -> NDArray[np.uint32]:
    return np.arange(count, dtype=np.uint32) * np.uint32(PAGE_BYTES)

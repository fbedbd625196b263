"""Stored pages as one session sees them: the segments both sides agreed on, their ordinals one after the other."""

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import RLock
from typing import Final, NamedTuple, Self, TypeVar

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from chunking.errors import FrameMalformed, PageForged, PagesMissing, SegmentDamaged, SegmentUnknown
from chunking.limits import VIEW_BLOCKS_MAX, VIEW_ID_CHUNKS_MAX, VIEW_SIEVE_BITS_MAX
from chunking.pages import PAGE_BYTES
from chunking.store import layout
from chunking.store.counters import Counters
from chunking.store.disk import Disk
from chunking.store.layout import ID_BYTES, ID_CHUNK_PAGES
from chunking.store.segment import ABSENT, Bytes, Ordinals, Segment

_SIEVE_BITS_MORE: Final = 1  # two to four places a page: a page that is not stored passes once in three times or less

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class Agreed(NamedTuple):
    """A segment that both sides of a session hold: its name, and how many of its pages count."""

    name: bytes
    pages: int


class StoreView:
    """The stored pages of one session (``chunking.stored.StoredPages``); threads may share it.

    Args:
        segments: open, in the order agreed on, each with the number of its pages that count; the view closes them.
        page_key: of the ids of the tenant's pages, 32 bytes.
        disk: where a segment found damaged is marked as such.
        counters: of this process.
        vm: the machine whose session it is, where that is known yet.
    """

    def __init__(
        self,
        segments: Sequence[tuple[Segment, int]],
        *,
        page_key: bytes,
        disk: Disk,
        counters: Counters,
        vm: str | None = None,
    ) -> None:
        self._segments = [segment for segment, _ in segments]
        self._starts = np.cumsum([0, *(pages for _, pages in segments)], dtype=np.int64)
        self._positions = {segment.name: position for position, segment in enumerate(self._segments)}
        self._page_key = page_key
        self._disk = disk
        self._counters = counters
        self._damaged: set[int] = set()
        self._lock = RLock()
        self._sieve_bits = min(VIEW_SIEVE_BITS_MAX, self.count.bit_length() + _SIEVE_BITS_MORE)
        self._sieve_table: NDArray[np.bool_] | None = None
        self._blocks: _Recent[tuple[int, int], Bytes] = _Recent(VIEW_BLOCKS_MAX)
        self._id_chunks: _Recent[tuple[int, int], Bytes] = _Recent(VIEW_ID_CHUNKS_MAX)
        self.prefer(vm)

    @property
    def count(self) -> int:
        """How many pages there are, kept here or not."""
        return int(self._starts[-1])

    @property
    def agreed(self) -> list[Agreed]:
        """The segments, in order."""
        pages = np.diff(self._starts).tolist()
        return [Agreed(segment.name, size) for segment, size in zip(self._segments, pages, strict=True)]

    def prefer(self, vm: str | None) -> None:
        """Look for bases in this machine's segments first: the most recent, then the tenant's others."""
        self.vm = vm
        own = [vm is not None and segment.vm == vm for segment in self._segments]
        ages = [-segment.note.created for segment in self._segments]
        self._by_use = sorted(range(len(self._segments)), key=lambda i: (not own[i], ages[i], i))

    def close(self) -> None:
        """Let go of the segments. Pages asked for afterwards are missing."""
        with self._lock:
            self._blocks.clear()
            self._id_chunks.clear()
        for segment in self._segments:
            segment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def find(self, fingerprints: NDArray[np.uint64], raw: memoryview, offsets: NDArray[np.uint32]) -> Ordinals:
        """The ordinals of stored pages equal to these, or -1.

        Fingerprints only propose: the keyed BLAKE3 id decides.

        Args:
            fingerprints: of the pages, u64.
            raw: bytes in which the pages lie.
            offsets: where each begins in ``raw``.
        """
        found = np.full(len(fingerprints), ABSENT, np.int64)
        ids: dict[int, bytes] = {}
        likely = np.flatnonzero(self._sieve()[_sieved(fingerprints, self._sieve_bits)])
        likely = likely[np.argsort(fingerprints[likely])]  # searching in order keeps what it reads in the cache
        for position, segment in enumerate(self._segments):
            open_ = likely[found[likely] == ABSENT]
            if not len(open_):
                break
            with self._noting_damage(position):
                ordinals = segment.propose(fingerprints[open_])
                ordinals[ordinals >= self._starts[position + 1] - self._starts[position]] = ABSENT
                proposed = np.flatnonzero(ordinals != ABSENT)
                stored = self._ids(position, segment.places(ordinals[proposed]))
                for at, ordinal, stored_id in zip(
                    open_[proposed].tolist(), ordinals[proposed].tolist(), stored, strict=True
                ):
                    own = ids.get(at)
                    if own is None:
                        offset = int(offsets[at])
                        own = ids[at] = self._id(raw[offset : offset + PAGE_BYTES])
                    if own == stored_id:
                        found[at] = self._starts[position] + ordinal
        hits = int(np.count_nonzero(found != ABSENT))
        self._counters.add(hits=hits, misses=len(found) - hits)
        return found

    def bases(self, pfns: NDArray[np.uint64]) -> Ordinals:
        """The ordinals of the pages last seen at these PFNs, or -1: guesses, best first the machine's own segments."""
        found = np.full(len(pfns), ABSENT, np.int64)
        for position in self._by_use:
            open_ = np.flatnonzero(found == ABSENT)
            if not len(open_):
                break
            with self._noting_damage(position):
                segments, ordinals = self._segments[position].lookup(pfns[open_])
                found[open_] = self._resolved(position, segments, ordinals)
        return found

    def read(self, ordinals: NDArray[np.int64]) -> Bytes:
        """The stored pages, shape (n, 4096).

        Raises:
            PagesMissing: some were not kept here, or do not open, or are not what was stored.
            FrameMalformed: there are no such ordinals.
        """
        if len(ordinals) and (int(ordinals.min()) < 0 or int(ordinals.max()) >= self.count):
            raise FrameMalformed("a stored page out of range")
        pages = np.empty((len(ordinals), PAGE_BYTES), np.uint8)
        missing = np.zeros(len(ordinals), np.bool_)
        positions = np.searchsorted(self._starts, ordinals, side="right") - 1
        for position in np.unique(positions).tolist():
            rows = np.flatnonzero(positions == position)
            missing[rows] = ~self._read_from(position, ordinals[rows] - self._starts[position], pages, rows)
        lost = np.unique(ordinals[missing]).tolist()
        self._counters.add(pages_read=len(ordinals) - int(missing.sum()), pages_missing=len(lost))
        if lost:
            raise PagesMissing(lost)
        return pages

    def verify(self, ordinal: int, page: bytes | memoryview) -> None:
        """Check a page that the peer gave in place of a stored one.

        A page that this host did not keep, or whose id is unreadable, has nothing here to be held against: the
        digest of the frame alone speaks for it then.

        Raises:
            PageForged: its keyed id is not the stored page's, or it is no page.
            FrameMalformed: there is no such ordinal.
        """
        if not 0 <= ordinal < self.count:
            raise FrameMalformed("a stored page out of range")
        if len(page) != PAGE_BYTES:
            raise PageForged(f"{len(page)} bytes in place of stored page {ordinal}")
        position = int(np.searchsorted(self._starts, ordinal, side="right")) - 1
        own = np.array([ordinal - int(self._starts[position])], np.int64)
        stored: list[bytes] = []
        with self._noting_damage(position):
            places = self._segments[position].places(own)
            stored = self._ids(position, places[places != ABSENT])
        if stored and stored[0] != self._id(page):
            raise PageForged(f"what was given in place of stored page {ordinal} is another page")

    def _sieve(self) -> NDArray[np.bool_]:
        """Which beginnings of fingerprints occur at all: most pages of a guest not seen before go no further."""
        with self._lock:
            if self._sieve_table is None:
                table = np.zeros(1 << self._sieve_bits, np.bool_)
                for position, segment in enumerate(self._segments):
                    with self._noting_damage(position):
                        table[_sieved(segment.fingerprints(), self._sieve_bits)] = True
                self._sieve_table = table
            return self._sieve_table

    def _resolved(self, position: int, segments: NDArray[np.int64], ordinals: Ordinals) -> Ordinals:
        """The session's ordinals of what a segment's page table says; -1 where that is not at hand."""
        names = [self._segments[position].name, *self._segments[position].summary.references]
        found = np.full(len(ordinals), ABSENT, np.int64)
        for number in np.unique(segments[segments != ABSENT]).tolist():
            other = self._positions.get(names[number]) if number < len(names) else None
            if other is None:
                continue
            rows = np.flatnonzero(segments == number)
            rows = rows[ordinals[rows] < self._starts[other + 1] - self._starts[other]]
            with self._noting_damage(other):
                rows = rows[self._segments[other].places(ordinals[rows]) != ABSENT]
                found[rows] = ordinals[rows] + self._starts[other]
        return found

    def _read_from(self, position: int, own: Ordinals, pages: Bytes, rows: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Fill these rows from one segment; says which could be."""
        done = np.zeros(len(own), np.bool_)
        segment = self._segments[position]
        with self._noting_damage(position):
            places = segment.places(own)
            blocks = np.where(places == ABSENT, ABSENT, places // segment.summary.block_pages)
            for number in np.unique(blocks[blocks != ABSENT]).tolist():
                at = np.flatnonzero(blocks == number)
                with self._noting_damage(position):
                    block = self._block(position, number)
                    pages[rows[at]] = block[places[at] - number * segment.summary.block_pages]
                    done[at] = True
            with_page = np.flatnonzero(done)
            stored = self._ids_or_none(position, places[with_page])
            for row, stored_id in zip(with_page.tolist(), stored, strict=True):
                # The seal says that nobody changed the block since; the id, that memory held it right when it was.
                if stored_id is not None and stored_id != self._id(pages[rows[row]].data):
                    done[row] = False
                    self._mark(position)
        return done

    def _block(self, position: int, number: int) -> Bytes:
        key = position, number
        with self._lock:
            block = self._blocks.get(key)
        if block is None:
            block = self._segments[position].block(number)
            with self._lock:
                self._blocks.put(key, block)
        return block

    def _ids(self, position: int, places: Ordinals) -> list[bytes]:
        """The ids of pages at these places of the data."""
        ids = np.empty((len(places), ID_BYTES), np.uint8)
        chunks = places // ID_CHUNK_PAGES
        for number in np.unique(chunks).tolist():
            at = np.flatnonzero(chunks == number)
            key = position, number
            with self._lock:
                chunk = self._id_chunks.get(key)
            if chunk is None:
                chunk = self._segments[position].ids(number)
                with self._lock:
                    self._id_chunks.put(key, chunk)
            ids[at] = chunk[places[at] - number * ID_CHUNK_PAGES]
        return [row.tobytes() for row in ids]

    def _ids_or_none(self, position: int, places: Ordinals) -> Sequence[bytes | None]:
        with self._noting_damage(position):
            return self._ids(position, places)
        return [None] * len(places)

    def _id(self, page: bytes | memoryview) -> bytes:
        return page_id(self._page_key, page)

    def _noting_damage(self, position: int) -> "_NotingDamage":
        return _NotingDamage(lambda: self._mark(position))

    def _mark(self, position: int) -> None:
        """Remember on the disk that a segment is damaged, so that it is never offered again."""
        with self._lock:
            if position in self._damaged:
                return
            self._damaged.add(position)
        self._counters.add(segments_damaged=1)
        segment = self._segments[position]
        with contextlib.suppress(OSError):  # marked already, or removed meanwhile, or a disk that takes nothing
            os.close(self._disk.create(layout.path(segment.folder, segment.name, layout.DAMAGED)))


def page_id(page_key: bytes, page: bytes | memoryview) -> bytes:
    """The id of a page within its tenant's store: keyed BLAKE3, 16 bytes. It never leaves the host."""
    return blake3(page, key=page_key).digest(length=ID_BYTES)


def _sieved(fingerprints: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    return (fingerprints >> np.uint64(64 - bits)).astype(np.int64)


class _NotingDamage:
    """Swallows damage once it has been noted, and a closed segment: what was to be read is then taken as absent."""

    def __init__(self, note: Callable[[], None]) -> None:
        self._note = note

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        if kind is None or not issubclass(kind, SegmentDamaged | SegmentUnknown):
            return False
        if issubclass(kind, SegmentDamaged):
            self._note()
        return True


class _Recent(OrderedDict[_Key, _Value]):
    """The most recently used of something, bounded."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    # dict has overloads for a default of another type; here it is a value's.
    def get(self, key: _Key, default: _Value | None = None) -> _Value | None:  # type: ignore[override]
        value = super().get(key, default)
        if value is not None:
            self.move_to_end(key)
        return value

    def put(self, key: _Key, value: _Value) -> None:
        self[key] = value
        if len(self) > self._size:
            self.popitem(last=False)

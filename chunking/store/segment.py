"""One whole segment, open for reading. Tables are read when they are first wanted: a destination wants few of them."""

import os
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from chunking.errors import SegmentDamaged, SegmentUnknown
from chunking.pages import PAGE_BYTES
from chunking.store import layout
from chunking.store.disk import lock_shared, opened, read_exactly
from chunking.store.keys import SEAL_BYTES, Opener, StoreKeys
from chunking.store.layout import (
    COLUMN_FINGERPRINTS,
    COLUMN_KEPT,
    COLUMN_ORDER,
    COLUMN_RUNS,
    ID_BYTES,
    PART_COLUMNS,
    PART_DATA,
    PART_IDS,
    PART_SUMMARY,
    Note,
    Summary,
)

Bytes = NDArray[np.uint8]
Ordinals = NDArray[np.int64]
ABSENT = -1


class Runs(NamedTuple):
    """A page table: where runs of PFNs begin (ascending), and the segment, first ordinal and length of each."""

    starts: NDArray[np.uint64]
    ordinals: NDArray[np.uint32]
    lengths: NDArray[np.uint32]
    segments: NDArray[np.uint32]


class Head(NamedTuple):
    """What the two small sealed parts of a segment say, and what opens the rest."""

    note: Note
    summary: Summary
    opener: Opener


def read_note(keys: StoreKeys, folder: Path, name: bytes) -> tuple[Opener, Note]:
    """What a segment's key file says.

    Raises:
        SegmentDamaged: it does not open.
        SegmentUnknown: there is none.
    """
    path = layout.path(folder, name, layout.KEY)
    try:
        descriptor = opened(path)
        try:
            content = bytes(read_exactly(descriptor, layout.KEY_FILE_BYTES, 0))
        finally:
            os.close(descriptor)
        opener, note = keys.unwrap(folder.name, name, content)
        return opener, layout.unpack_note(note)
    except FileNotFoundError:
        raise SegmentUnknown(f"segment {name.hex()} is not there") from None
    except (OSError, ValueError) as error:
        raise SegmentDamaged(f"the key of segment {name.hex()} cannot be read: {error}") from None


def read_head(keys: StoreKeys, folder: Path, name: bytes, index: int) -> Head:
    """Key and summary of a segment whose index is open.

    Raises:
        SegmentDamaged: one of them does not open.
        SegmentUnknown: there is no key file.
    """
    opener, note = read_note(keys, folder, name)
    offset, size = layout.summary_place()
    try:
        if read_exactly(index, len(layout.MAGIC), 0) != layout.MAGIC:
            raise ValueError("it is no index")
        plain = bytearray(size - SEAL_BYTES)
        opener.open(PART_SUMMARY, 0, read_exactly(index, size, offset), plain)
        return Head(note, layout.unpack_summary(bytes(plain)), opener)
    except (OSError, ValueError) as error:
        raise SegmentDamaged(f"the index of segment {name.hex()} cannot be read: {error}") from None


class Segment:
    """A whole segment, open, and in use until it is closed: nobody removes what it still reads.

    Args:
        keys: of the store.
        folder: of the tenant.
        name: the segment's.

    Raises:
        SegmentUnknown: no whole segment of that name is there.
        SegmentDamaged: it is marked as damaged, or does not open.
    """

    def __init__(self, keys: StoreKeys, folder: Path, name: bytes) -> None:
        self.name = name
        self.folder = folder
        self._lock = Lock()
        self._reading = Lock()  # apart from closing: a number of a closed file may be another file's by then
        self._columns: dict[int, Any] = {}
        self._descriptors: list[int] = []
        try:
            self._data = self._open(layout.DATA)
            lock_shared(self._data)
            self._index = self._open(layout.INDEX)
            if os.fstat(self._data).st_nlink == 0:
                raise FileNotFoundError
            if os.path.exists(layout.path(folder, name, layout.DAMAGED)):
                raise SegmentDamaged(f"segment {name.hex()} is marked as damaged")
            head = read_head(keys, folder, name, self._index)
            self.note, self.summary, self._opener = head
            self._check_lengths()
        except (FileNotFoundError, BlockingIOError):
            self.close()
            raise SegmentUnknown(f"segment {name.hex()} is not held here") from None
        except OSError as error:
            self.close()
            raise SegmentDamaged(f"segment {name.hex()} cannot be read: {error}") from None
        except BaseException:
            self.close()
            raise

    @property
    def pages(self) -> int:
        """How many ordinals it has, kept or not."""
        return self.summary.pages

    @property
    def vm(self) -> str | None:
        """The machine whose pages these were, where that is known."""
        return self.summary.vm if self.summary.vm is not None else self.note.vm

    @property
    def file_bytes(self) -> int:
        """Bytes on the disk."""
        return layout.data_bytes(self.summary) + layout.index_bytes(self.summary) + layout.KEY_FILE_BYTES

    def close(self) -> None:
        """Let go of the files; what is asked for afterwards is not there."""
        with self._reading:
            descriptors, self._descriptors = self._descriptors, []
            for descriptor in descriptors:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fingerprints(self) -> NDArray[np.uint64]:
        """Of all kept pages, ascending.

        Raises:
            SegmentDamaged: they do not open.
        """
        if not self.summary.kept:
            return np.empty(0, np.uint64)
        known: NDArray[np.uint64] = self._column(COLUMN_FINGERPRINTS)
        return known

    def propose(self, fingerprints: NDArray[np.uint64]) -> Ordinals:
        """Ordinals of pages with these fingerprints, or -1.

        Raises:
            SegmentDamaged: the tables do not open.
        """
        kept = self.summary.kept
        if not kept:
            return np.full(len(fingerprints), ABSENT, np.int64)
        known = self.fingerprints()
        at = np.minimum(np.searchsorted(known, fingerprints), kept - 1)
        order: NDArray[np.uint32] = self._column(COLUMN_ORDER)
        return np.where(known[at] == fingerprints, self._ordinals(order[at]), ABSENT)

    def lookup(self, pfns: NDArray[np.uint64]) -> tuple[NDArray[np.int64], Ordinals]:
        """Which segment (0 is this one, k the k-th of its references) and ordinal the pages at these PFNs had last; -1.

        Raises:
            SegmentDamaged: the table does not open.
        """
        if not self.summary.runs:
            nowhere = np.full(len(pfns), ABSENT, np.int64)
            return nowhere, nowhere
        runs: Runs = self._column(COLUMN_RUNS)
        at = np.maximum(np.searchsorted(runs.starts, pfns, side="right"), 1) - 1
        within = pfns - runs.starts[at]  # wraps where the PFN lies before the first run: beyond any length then
        inside = within < runs.lengths[at]
        ordinals = runs.ordinals[at] + within.astype(np.int64)
        return np.where(inside, runs.segments[at], ABSENT).astype(np.int64), np.where(inside, ordinals, ABSENT)

    def places(self, ordinals: Ordinals) -> Ordinals:
        """Where in the data these pages are, counted in pages, or -1 for those that were not kept.

        Raises:
            SegmentDamaged: the table does not open.
        """
        if not self.summary.kept_bytes:
            return ordinals
        places: Ordinals = self._column(COLUMN_KEPT)
        return places[ordinals]

    def ids(self, chunk: int) -> Bytes:
        """The ids of ``ID_CHUNK_PAGES`` kept pages, shape (n, 16).

        Raises:
            SegmentDamaged: they do not open.
        """
        offset, count = layout.id_chunk_place(self.summary.kept, chunk)
        return self._piece(PART_IDS, chunk, offset, count * ID_BYTES).reshape(count, ID_BYTES)

    def block(self, number: int) -> Bytes:
        """The pages of a block, shape (n, 4096).

        Raises:
            SegmentDamaged: it does not open.
        """
        offset, count = layout.block_place(self.summary, number)
        return self._piece(PART_DATA, number, offset, count * PAGE_BYTES).reshape(count, PAGE_BYTES)

    def _open(self, suffix: str) -> int:
        descriptor = opened(layout.path(self.folder, self.name, suffix))
        self._descriptors.append(descriptor)
        return descriptor

    def _check_lengths(self) -> None:
        lengths = os.fstat(self._data).st_size, os.fstat(self._index).st_size
        if lengths != (layout.data_bytes(self.summary), layout.index_bytes(self.summary)):
            raise SegmentDamaged(f"files of segment {self.name.hex()} have the wrong length")

    def _ordinals(self, places: NDArray[np.uint32]) -> Ordinals:
        if not self.summary.kept_bytes:
            return places.astype(np.int64)
        kept = self._column(COLUMN_KEPT)
        with self._lock:
            ordinals: Ordinals | None = self._columns.get(-1)
            if ordinals is None:
                ordinals = self._columns[-1] = np.flatnonzero(kept >= 0)
        return ordinals[places]

    def _column(self, number: int) -> Any:
        with self._lock:
            column = self._columns.get(number)
        if column is None:
            offset, size = layout.column_places(self.summary)[number]
            plain = self._piece(PART_COLUMNS, number, offset, size)
            column = self._shaped(number, plain)
            with self._lock:
                self._columns[number] = column
        return column

    def _shaped(self, number: int, plain: Bytes) -> Any:
        if number == COLUMN_FINGERPRINTS:
            return plain.view("<u8")
        if number == COLUMN_ORDER:
            return self._checked(plain.view("<u4"), self.summary.kept)
        if number == COLUMN_RUNS:
            runs, size = self.summary.runs, 8 * self.summary.runs
            rest = plain[size:].view("<u4").reshape(3, runs)
            return Runs(plain[:size].view("<u8"), rest[0], rest[1], rest[2])
        bits = np.unpackbits(plain, count=self.summary.pages, bitorder="little")
        if int(bits.sum(dtype=np.int64)) != self.summary.kept:
            raise SegmentDamaged(f"tables of segment {self.name.hex()} disagree")
        return np.where(bits, np.cumsum(bits, dtype=np.int32) - 1, ABSENT)

    def _checked(self, places: NDArray[np.uint32], bound: int) -> NDArray[np.uint32]:
        if len(places) and int(places.max()) >= bound:
            raise SegmentDamaged(f"tables of segment {self.name.hex()} disagree")
        return places

    def _piece(self, part: int, number: int, offset: int, size: int) -> Bytes:
        plain = np.empty(size, np.uint8)
        try:
            with self._reading:
                if not self._descriptors:
                    raise SegmentUnknown(f"segment {self.name.hex()} is closed")
                sealed = read_exactly(self._data if part == PART_DATA else self._index, size + SEAL_BYTES, offset)
            self._opener.open(part, number, sealed, plain.data)
        except (OSError, ValueError) as error:
            raise SegmentDamaged(f"a part of segment {self.name.hex()} cannot be read: {error}") from None
        return plain

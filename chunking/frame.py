"""The body of a PAGES frame: its header and the columns before its literals. docs/wire-format.md draws it. Sans-IO.

Header (big-endian), then ``meta_bytes`` of the chain's meta stream, then the literals: as they are, or the next block
of the chain's literal stream, or a zstd stream of their own. A chain's two streams are zstd, flushed at the end of each
frame; a reset flag starts one anew. The meta stream's bytes of one frame are the columns below, little-endian:
lengths of runs (three columns of bytes, then those of ``LARGE`` and more), other bytes, table words, kinds, locations
of references, of deltas and of copies, slots unless they follow each other, masks, changed words.
"""

import struct
from enum import IntEnum, IntFlag, unique
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chunking.cache import NO_LOCATION
from chunking.errors import FrameMalformed
from chunking.limits import CHAINS_MAX, FRAME_PAGES_MAX, FRAME_RUNS_MAX
from chunking.pages import PAGE_BYTES, WORD_BYTES

HEADER: Final = struct.Struct(">BBBxIIIIHHHHHIII")
LAYOUT: Final = 1  # the first byte: this layout
MASK_BYTES: Final = PAGE_BYTES // WORD_BYTES // 8
LARGE: Final = 255  # in a column of run lengths: the length is in the column of large ones


@unique
class PageKind(IntEnum):
    """How a page is told."""

    ZERO = 0
    REF = 1  # equal to the page in a slot of the cache
    DELTA = 2  # a page of the cache or a stored one, with some words changed
    LITERAL = 3
    COPY = 4  # equal to a stored page, and takes a slot


class Flags(IntFlag):
    """Flags of a frame's header."""

    BIG_ENDIAN = 1  # table words are
    SLOTS = 2  # slots of new pages are a column; without it they follow each other from first_slot on
    META_RESET = 4  # the chain's meta stream starts anew
    LITERALS_ZSTD = 8
    LITERALS_RESET = 16  # the chain's literal stream starts anew
    LITERALS_ALONE = 32  # they are a zstd stream of their own; the chain's is left as it is
    ALL = 63


class Header(NamedTuple):
    """Counts of a frame's body; every size follows from them.

    Args:
        chain: which context chain compressed it.
        flags: ``Flags``.
        runs: runs of the structure (``pages.Spans``).
        large: run lengths of ``LARGE`` and more.
        other: bytes outside of tables and pages.
        words: table words.
        zero, refs, deltas, literals, copies: pages of each kind.
        changed: words that deltas change.
        first_slot: slot of the first new page, if slots are no column.
        meta_bytes: compressed bytes of the columns.
    """

    chain: int
    flags: Flags
    runs: int
    large: int
    other: int
    words: int
    zero: int
    refs: int
    deltas: int
    literals: int
    copies: int
    changed: int
    first_slot: int
    meta_bytes: int

    @property
    def pages(self) -> int:
        """All pages of the frame."""
        return self.zero + self.refs + self.deltas + self.literals + self.copies

    @property
    def new(self) -> int:
        """Pages that take a slot."""
        return self.deltas + self.literals + self.copies

    @property
    def columns_bytes(self) -> int:
        """Bytes of the columns before compression."""
        slots = 4 * self.new if self.flags & Flags.SLOTS else 0
        located = 4 * (self.refs + self.deltas + self.copies)
        runs = 3 * self.runs + 4 * self.large
        deltas = MASK_BYTES * self.deltas + WORD_BYTES * self.changed
        return runs + self.other + WORD_BYTES * self.words + self.pages + located + slots + deltas

    def pack(self) -> bytes:
        """The header's bytes."""
        return HEADER.pack(LAYOUT, *self)

    @classmethod
    def parse(cls, body: memoryview | bytes, raw_bytes: int) -> "Header":
        """Read and bound the header at the start of ``body``.

        Args:
            body: a frame's body.
            raw_bytes: stream bytes that the frame stands for.

        Raises:
            FrameMalformed: too short, another layout, or counts that do not add up to ``raw_bytes``.
        """
        if len(body) < HEADER.size:
            raise FrameMalformed(f"a body of {len(body)} bytes, its header has {HEADER.size}")
        layout, chain, flags, *counts = HEADER.unpack_from(body)
        header = cls(chain, Flags(flags & Flags.ALL), *counts)
        if layout != LAYOUT or chain >= CHAINS_MAX or flags > Flags.ALL:
            raise FrameMalformed(f"layout {layout}, chain {chain}, flags {flags:#x}")
        if header.other + WORD_BYTES * header.words + PAGE_BYTES * header.pages != raw_bytes:
            raise FrameMalformed(
                f"{header.other} bytes, {header.words} words, {header.pages} pages for {raw_bytes} bytes"
            )
        if header.pages > FRAME_PAGES_MAX or header.runs > runs_max(raw_bytes) or header.large > 3 * header.runs:
            raise FrameMalformed(f"{header.pages} pages in {header.runs} runs, {header.large} of them large")
        if header.changed > header.deltas * (PAGE_BYTES // WORD_BYTES):
            raise FrameMalformed(f"{header.changed} changed words in {header.deltas} deltas")
        if header.meta_bytes > len(body) - HEADER.size:
            raise FrameMalformed(f"{header.meta_bytes} bytes of columns in a body of {len(body)}")
        return header


def runs_max(raw_bytes: int) -> int:
    """Runs that a frame of ``raw_bytes`` may have."""
    return min(FRAME_RUNS_MAX, raw_bytes // WORD_BYTES + 1)


class Columns(NamedTuple):
    """The columns of a frame, not yet compressed. n: pages.

    Args:
        runs: shape (r, 3), uint32, as in ``pages.Spans``.
        other: uint8.
        words: uint8: table words as they stand in the stream.
        big_endian: byte order of ``words``.
        kinds: uint8[n], ``PageKind``.
        locations: uint32[n]: REF, DELTA, COPY: location of the page it equals or is based on; else NO_LOCATION.
        slots: uint32[n]: DELTA, LITERAL, COPY: the slot it takes; else NO_LOCATION.
        masks: uint8[64 a delta]: a bit for each word that changes, the lowest first.
        values: uint64: those words XOR the base's.
    """

    runs: NDArray[np.uint32]
    other: NDArray[np.uint8]
    words: NDArray[np.uint8]
    big_endian: bool
    kinds: NDArray[np.uint8]
    locations: NDArray[np.uint32]
    slots: NDArray[np.uint32]
    masks: NDArray[np.uint8]
    values: NDArray[np.uint64]


_LOCATED: Final = (PageKind.REF, PageKind.DELTA, PageKind.COPY)


def pack(columns: Columns, slots_in_cache: int) -> tuple[Header, bytes]:
    """The columns as one piece of bytes, and a header with their counts; chain, meta_bytes and streams are unset.

    Args:
        columns: what a frame holds.
        slots_in_cache: slots follow each other modulo this.
    """
    counts = np.bincount(columns.kinds, minlength=len(PageKind)).tolist()
    short = np.minimum(columns.runs, LARGE).astype(np.uint8)
    large = columns.runs.T[columns.runs.T >= LARGE].astype("<u4")
    slots = columns.slots[columns.kinds >= PageKind.DELTA]
    first = int(slots[0]) if len(slots) else 0
    in_turn = np.array_equal(slots, (first + np.arange(len(slots))) % slots_in_cache)
    flags = Flags.BIG_ENDIAN if columns.big_endian else Flags(0)
    parts = [short.T.tobytes(), large.tobytes(), columns.other.tobytes(), _shuffled_words(columns)]
    parts.append(columns.kinds.tobytes())
    parts += [shuffled(columns.locations[columns.kinds == kind]) for kind in _LOCATED]
    if not in_turn:
        flags |= Flags.SLOTS
        parts.append(shuffled(slots))
    parts += [columns.masks.tobytes(), columns.values.astype("<u8", copy=False).tobytes()]
    header = Header(
        0,
        flags,
        len(columns.runs),
        len(large),
        len(columns.other),
        len(columns.words) // WORD_BYTES,
        counts[PageKind.ZERO],
        counts[PageKind.REF],
        counts[PageKind.DELTA],
        counts[PageKind.LITERAL],
        counts[PageKind.COPY],
        len(columns.values),
        first,
        meta_bytes=0,
    )
    return header, b"".join(parts)


def unpack(header: Header, meta: NDArray[np.uint8], slots_in_cache: int) -> Columns:
    """The columns of a frame out of its decompressed bytes.

    Args:
        header: as ``Header.parse`` returned it.
        meta: ``header.columns_bytes`` bytes.
        slots_in_cache: slots follow each other modulo this.

    Raises:
        FrameMalformed: columns that contradict the header or each other.
    """
    at = 0

    def column(size: int) -> NDArray[np.uint8]:
        nonlocal at
        at += size
        return meta[at - size : at]

    runs = _runs(header, column(3 * header.runs), column(4 * header.large))
    other = column(header.other)
    words = _unshuffled_words(column(WORD_BYTES * header.words), big_endian=bool(header.flags & Flags.BIG_ENDIAN))
    kinds = column(header.pages)
    counts = [header.zero, header.refs, header.deltas, header.literals, header.copies]
    if header.pages and (kinds.max() > PageKind.COPY or np.bincount(kinds, minlength=5).tolist() != counts):
        raise FrameMalformed("kinds of pages that do not add up")
    locations = np.full(header.pages, NO_LOCATION, np.uint32)
    for kind in _LOCATED:
        locations[kinds == kind] = unshuffled(column(4 * counts[kind]))
    slots = np.full(header.pages, NO_LOCATION, np.uint32)
    if header.flags & Flags.SLOTS:
        slots[kinds >= PageKind.DELTA] = unshuffled(column(4 * header.new))
    else:
        slots[kinds >= PageKind.DELTA] = (header.first_slot + np.arange(header.new)) % slots_in_cache
    masks = column(MASK_BYTES * header.deltas)
    values = np.frombuffer(column(WORD_BYTES * header.changed).tobytes(), "<u8").astype(np.uint64, copy=False)
    if int(np.bitwise_count(masks).sum()) != header.changed:
        raise FrameMalformed("changed words that do not add up")
    return Columns(runs, other, words, bool(header.flags & Flags.BIG_ENDIAN), kinds, locations, slots, masks, values)


def shuffled(values: NDArray[np.uint32]) -> bytes:
    """Differences modulo 2^32 to the value before, as four planes of bytes: what counts up becomes zeros."""
    differences = np.diff(values, prepend=np.uint32(0)).astype("<u4", copy=False)
    return differences.view(np.uint8).reshape(-1, 4).T.tobytes()


def unshuffled(planes: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The inverse of ``shuffled``."""
    differences = np.frombuffer(planes.reshape(4, -1).T.tobytes(), "<u4")
    return np.cumsum(differences, dtype=np.uint32)


def _shuffled_words(columns: Columns) -> bytes:
    if not len(columns.words):
        return b""
    order = ">u8" if columns.big_endian else "<u8"
    words = columns.words.view(order).astype(np.uint64)
    differences = np.diff(words, prepend=np.uint64(0)).astype("<u8", copy=False)
    return differences.view(np.uint8).reshape(-1, WORD_BYTES).T.tobytes()


def _unshuffled_words(planes: NDArray[np.uint8], *, big_endian: bool) -> NDArray[np.uint8]:
    differences = np.frombuffer(planes.reshape(WORD_BYTES, -1).T.tobytes(), "<u8")
    words = np.cumsum(differences, dtype=np.uint64)
    return words.astype(">u8" if big_endian else "<u8", copy=False).view(np.uint8)


def _runs(header: Header, short: NDArray[np.uint8], large: NDArray[np.uint8]) -> NDArray[np.uint32]:
    columns = short.astype(np.uint32)
    escaped = short == LARGE
    if int(np.count_nonzero(escaped)) != header.large:
        raise FrameMalformed("lengths of runs that do not add up")
    columns[escaped] = np.frombuffer(large.tobytes(), "<u4")
    runs = np.ascontiguousarray(columns.reshape(3, -1).T)
    totals = runs.sum(axis=0, dtype=np.uint64).tolist()
    if totals != [header.other, header.words, header.pages]:
        raise FrameMalformed("runs that do not add up")
    return runs

"""The page table of a segment in the making: which stored page each PFN of the guest held last."""

from enum import IntEnum, unique
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chunking.limits import TABLE_CHUNKS_FREE, TABLE_PLACES_PER_CHUNK
from chunking.pages import NO_PFN
from chunking.store.segment import Runs

NOWHERE: Final = -1  # zero, or not known
_CHUNK_BITS: Final = 12  # 4096 PFNs, 32 KiB of table
_CHUNK_PAGES: Final = 1 << _CHUNK_BITS
_NO_CHUNK: Final = NO_PFN >> _CHUNK_BITS
_SEGMENT_SHIFT: Final = 32  # above it which segment, 0 for this one; below it the ordinal


@unique
class Kind(IntEnum):
    """How a frame carries a page."""

    ZERO = 0
    REF = 1
    DELTA = 2
    LITERAL = 3
    COPY = 4


class Placement(NamedTuple):
    """The pages of one frame, in the frame's order.

    Args:
        pfns: u64, where in the guest each lies; ``NO_PFN`` for one that lies in none.
        kinds: u8, ``Kind``.
        locations: u32, where each lies now: a slot of the page cache, or slots + ordinal of a stored page (a REF may
            name one). Of no meaning for ZERO.
        copied: u32, slots + ordinal of the stored page of each COPY, in order.
    """

    pfns: NDArray[np.uint64]
    kinds: NDArray[np.uint8]
    locations: NDArray[np.uint32]
    copied: NDArray[np.uint32]


class PageTable:
    """Follows the frames of a session. Eight bytes of memory a PFN, and eight a slot.

    Args:
        slots: of the session's page cache.
        starts: the first ordinal of each stored segment of the session, and the end of the last.
    """

    def __init__(self, slots: int, starts: NDArray[np.int64]) -> None:
        self._slots = np.full(slots, NOWHERE, np.int64)
        self._starts = starts
        self._chunks: dict[int, NDArray[np.int64]] = {}
        self._placed = 0

    def forget_slots(self) -> None:
        """A frame was not followed: what the slots hold now is not known."""
        self._slots.fill(NOWHERE)

    def place(self, frame: Placement, first: int) -> None:
        """Follow a frame whose first DELTA or LITERAL page has ordinal ``first``.

        Raises:
            ValueError: the columns do not fit together or point out of range.
        """
        codes = self._codes(frame, first)
        self._placed += len(codes)
        numbers = frame.pfns >> np.uint64(_CHUNK_BITS)
        within = (frame.pfns & np.uint64(_CHUNK_PAGES - 1)).astype(np.int64)
        for number in np.unique(numbers).tolist():
            if number == _NO_CHUNK:
                continue  # chunks of a disk, or of an unknown stream: they have no place
            rows = np.flatnonzero(numbers == number)
            chunk = self._chunks.get(number)
            if chunk is None:
                if len(self._chunks) >= TABLE_CHUNKS_FREE + self._placed // TABLE_PLACES_PER_CHUNK:
                    continue
                chunk = self._chunks[number] = np.full(_CHUNK_PAGES, NOWHERE, np.int64)
            _last_wins(chunk, within[rows], codes[rows])

    def runs(self, bound: int) -> Runs:
        """The table as runs; own ordinals from ``bound`` on, and what is not known, are left out."""
        pfns, codes = self._entries(bound)
        if not len(pfns):
            none = np.empty(0, np.uint32)
            return Runs(np.empty(0, np.uint64), none, none, none)
        # Segment and ordinal are one number: where both PFN and code rise by one, the run goes on.
        goes_on = (np.diff(pfns) == 1) & (np.diff(codes) == 1)
        begins = np.flatnonzero(np.concatenate(([True], ~goes_on)))
        lengths = np.diff(np.append(begins, len(pfns)))
        return Runs(
            pfns[begins],
            (codes[begins] & ((1 << _SEGMENT_SHIFT) - 1)).astype(np.uint32),
            lengths.astype(np.uint32),
            (codes[begins] >> _SEGMENT_SHIFT).astype(np.uint32),
        )

    def _entries(self, bound: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        pfns, codes = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for number in sorted(self._chunks):
            chunk = self._chunks[number]
            held = np.flatnonzero((chunk != NOWHERE) & ((chunk < bound) | (chunk >> _SEGMENT_SHIFT != 0)))
            pfns.append(held.astype(np.uint64) + np.uint64(number << _CHUNK_BITS))
            codes.append(chunk[held])
        return np.concatenate(pfns), np.concatenate(codes)

    def _codes(self, frame: Placement, first: int) -> NDArray[np.int64]:
        """What each page of the frame is; leaves in the slots what they hold after it."""
        kinds, locations = frame.kinds, frame.locations.astype(np.int64)
        if not len(frame.pfns) == len(kinds) == len(locations):
            raise ValueError("columns of a frame differ in length")
        codes = np.full(len(kinds), NOWHERE, np.int64)
        own = np.flatnonzero((kinds == Kind.DELTA) | (kinds == Kind.LITERAL))
        codes[own] = first + np.arange(len(own))
        codes[kinds == Kind.COPY] = self._stored(frame.copied.astype(np.int64))
        referring = kinds == Kind.REF
        far = np.flatnonzero(referring & (locations >= len(self._slots)))
        codes[far] = self._stored(locations[far])
        fresh = np.flatnonzero((kinds == Kind.DELTA) | (kinds == Kind.LITERAL) | (kinds == Kind.COPY))
        near = np.flatnonzero(referring & (locations < len(self._slots)))
        if len(fresh) and int(locations[fresh].max()) >= len(self._slots):
            raise ValueError("a slot out of range")
        codes[near] = self._slots[locations[near]]
        # A slot may be written and referred to within one frame: the last writing before the reference counts.
        order = fresh[np.argsort(locations[fresh], kind="stable")]
        keys = locations[order] * len(kinds) + order
        at = np.searchsorted(keys, locations[near] * len(kinds) + near) - 1
        before = np.flatnonzero(at >= 0)
        before = before[locations[order[at[before]]] == locations[near[before]]]
        codes[near[before]] = codes[order[at[before]]]
        _last_wins(self._slots, locations[fresh], codes[fresh])
        return codes

    def _stored(self, locations: NDArray[np.int64]) -> NDArray[np.int64]:
        ordinals = locations - len(self._slots)
        if len(ordinals) and (int(ordinals.min()) < 0 or int(ordinals.max()) >= int(self._starts[-1])):
            raise ValueError("a stored page out of range")
        segments = np.searchsorted(self._starts, ordinals, side="right")
        return (segments << _SEGMENT_SHIFT) + ordinals - self._starts[segments - 1]


def _last_wins(table: NDArray[np.int64], at: NDArray[np.int64], values: NDArray[np.int64]) -> None:
    """``table[at] = values`` where, of several values for one place, the last stays."""
    places, last = np.unique(at[::-1], return_index=True)
    table[places] = values[::-1][last]

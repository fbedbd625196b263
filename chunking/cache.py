"""The page cache that both relays hold in step: an arena of slots, and the source's index over it."""

import contextlib
import mmap
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chunking.limits import BUCKET_WAYS, CACHE_SLOTS_MAX
from chunking.pages import PAGE_BYTES

NO_LOCATION: Final = 0xFFFF_FFFF  # in columns of locations and in the index: none
HAND: Final = 0  # fields of PageIndex.state
FILLED: Final = 1


class PageCache:
    """Slots of one page each. Memory is committed as slots are first written.

    Args:
        slots: number of pages it can hold, at least 1.

    Raises:
        ValueError: a number of slots out of range.
    """

    def __init__(self, slots: int) -> None:
        if not 1 <= slots <= CACHE_SLOTS_MAX:
            raise ValueError(f"a page cache of {slots} slots")
        self.slots = slots
        # Anonymous and private: pages never written cost nothing, and nothing of it is ever in a file.
        self._memory = mmap.mmap(-1, slots * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # a fault a page costs more than all else that is done with it
        self.arena: NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8)
        """All slots, one after the other."""
        self.pages: NDArray[np.uint8] = self.arena.reshape(slots, PAGE_BYTES)


class PageIndex:
    """What the source knows of its cache's slots: which page may be where, and which slot goes next.

    Buckets of ``BUCKET_WAYS`` slots, found by a page's fingerprint. An entry is stale once its slot has another
    fingerprint; nobody tidies up. Slots are replaced in a ring; one that was referenced is passed over once.

    Args:
        slots: number of slots of the cache.
    """

    def __init__(self, slots: int) -> None:
        buckets = 1 << max(2, (slots // 2 - 1).bit_length())  # twice as many ways as slots
        self.buckets: NDArray[np.uint32] = np.full(buckets * BUCKET_WAYS, NO_LOCATION, np.uint32)
        self.fingerprints: NDArray[np.uint64] = np.zeros(slots, np.uint64)
        self.referenced: NDArray[np.uint8] = np.zeros(slots, np.uint8)
        self.state: NDArray[np.uint64] = np.zeros(2, np.uint64)
        """HAND: the slot looked at next. FILLED: slots that hold a page."""

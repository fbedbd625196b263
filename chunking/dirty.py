"""What a guest dirties while it moves: rounds of the hypervisor, and pages sent more than once. Sans-IO.

A hypervisor sends all memory once, then, round after round, what was written meanwhile. Streams do not say where a
round begins; a PFN that comes again within one shows it.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chunking.limits import DIRTY_CHUNKS_FREE, DIRTY_CHUNKS_MAX, DIRTY_PAGES_PER_CHUNK, ROUNDS_KEPT_MAX

CHUNK_BITS: Final = 16


@dataclass(frozen=True, slots=True)
class Dirt:
    """What has been seen of a guest's pages so far.

    Args:
        pages: page records, data or not.
        distinct: different PFNs among them.
        again: pages that had been sent before.
        untracked: pages whose PFN lay in no chunk, because there were too many of them.
        rounds: rounds begun.
        round_pages: pages of the last rounds, at most ``ROUNDS_KEPT_MAX``, the current one last.
    """

    pages: int
    distinct: int
    again: int
    untracked: int
    rounds: int
    round_pages: tuple[int, ...]


class DirtyTracker:
    """Counts rounds and pages sent again. 4 bytes a guest page, at most ``DIRTY_CHUNKS_MAX`` chunks of 65536 pages."""

    def __init__(self) -> None:
        self._chunks: dict[int, NDArray[np.uint32]] = {}  # the round in which each page was last seen, 0 for never
        self._pages = self._distinct = self._again = self._untracked = 0
        self._rounds = 0
        self._round_pages: deque[int] = deque(maxlen=ROUNDS_KEPT_MAX)

    @property
    def dirt(self) -> Dirt:
        """Everything counted so far."""
        return Dirt(self._pages, self._distinct, self._again, self._untracked, self._rounds, tuple(self._round_pages))

    def take(self, pfns: NDArray[np.uint64]) -> None:
        """The page frame numbers of a piece, in order; those only marked (zero in QEMU) count as well."""
        if not len(pfns):
            return
        if not self._rounds:
            self._rounds = 1
            self._round_pages.append(0)
        if self._take_ascending(pfns):
            return
        before = _before(pfns)
        chunks = self._by_chunk(pfns)
        seen = np.zeros(len(pfns), np.uint32)
        for chunk, which, within in chunks:
            seen[which] = chunk[within]
        first = before == _NEVER
        before[first & (seen == self._rounds)] = _THIS_ROUND
        tracked = sum(len(within) for _, _, within in chunks)
        self._untracked += len(pfns) - tracked
        again = int(np.count_nonzero(~first | (seen > 0)))
        self._again += again
        self._distinct += max(0, tracked - again)
        begins = _begins(before)
        rounds = self._rounds + np.searchsorted(begins, np.arange(len(pfns)), side="right")
        for chunk, which, within in chunks:
            chunk[within] = rounds[which]  # of a PFN named twice the last counts
        sizes = np.diff([0, *begins.tolist(), len(pfns)]).tolist()
        self._pages += len(pfns)
        self._rounds += len(begins)
        self._round_pages[-1] += sizes[0]
        self._round_pages.extend(sizes[1:])

    def _take_ascending(self, pfns: NDArray[np.uint64]) -> bool:
        """What nearly all pieces are, in a fifth of the time: one PFN behind the other, none of this round yet."""
        first, last, count = int(pfns[0]), int(pfns[-1]), len(pfns)
        if last - first != count - 1 or first >> CHUNK_BITS != last >> CHUNK_BITS:
            return False
        chunk = self._chunks.get(first >> CHUNK_BITS)
        if chunk is None or (count > 1 and not bool((pfns[1:] > pfns[:-1]).all())):
            return False
        start = first & ((1 << CHUNK_BITS) - 1)
        seen = chunk[start : start + count]
        latest = int(seen.max())
        if latest >= self._rounds:
            return False
        again = int(np.count_nonzero(seen)) if latest else 0
        seen.fill(self._rounds)
        self._pages += count
        self._again += again
        self._distinct += count - again
        self._round_pages[-1] += count
        return True

    def _by_chunk(
        self, pfns: NDArray[np.uint64]
    ) -> list[tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.uint64]]]:
        """For each chunk touched: it, which of ``pfns`` lie in it, and where."""
        numbers, within = pfns >> np.uint64(CHUNK_BITS), pfns & np.uint64((1 << CHUNK_BITS) - 1)
        order = np.argsort(numbers, kind="stable")
        cuts = np.flatnonzero(np.diff(numbers[order])) + 1
        parts = []
        for which in np.split(order, cuts):
            number = int(numbers[which[0]])
            chunk = self._chunks.get(number)
            if chunk is None:
                # Scattered page numbers cost no memory: a guest has its pages together.
                easy = DIRTY_CHUNKS_FREE + self._distinct // DIRTY_PAGES_PER_CHUNK
                if len(self._chunks) >= min(easy, DIRTY_CHUNKS_MAX):
                    continue
                chunk = self._chunks[number] = np.zeros(1 << CHUNK_BITS, np.uint32)
            parts.append((chunk, which, within[which]))
        return parts


_NEVER: Final = -2  # not in this piece
_THIS_ROUND: Final = -1  # not in this piece, but in the round that goes on


def _before(pfns: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each PFN where in the piece it came before, or ``_NEVER``."""
    before = np.full(len(pfns), _NEVER, np.int64)
    order = np.argsort(pfns, kind="stable")
    same = pfns[order[1:]] == pfns[order[:-1]]
    before[order[1:][same]] = order[:-1][same]
    return before


def _begins(before: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where rounds begin in the piece: at each page that the round going on has seen."""
    begins, start = [], _THIS_ROUND
    candidates = np.flatnonzero(before >= _THIS_ROUND)
    for place, earlier in zip(candidates.tolist(), before[candidates].tolist(), strict=True):
        if earlier >= start:
            begins.append(place)
            start = place
    return np.array(begins, np.int64)

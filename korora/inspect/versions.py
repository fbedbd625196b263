"""Which pages come again, whether they changed, and where rounds of sending begin."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from korora.inspect.limits import CHUNK_BITS, CHUNKS_MAX, ROUNDS_MAX, ROUNDS_PIECE_MAX


@dataclass(slots=True)
class Round:
    """One pass over memory: it ends where a page comes that it has sent already.

    Args:
        pages: sent in it.
        again: of these, pages that an earlier round had sent.
        unchanged: of these, pages whose content was still the same.
    """

    pages: int = 0
    again: int = 0
    unchanged: int = 0


class Pages(NamedTuple):
    """Pages of a piece.

    Args:
        pfns: uint64, where in the guest each lies.
        prints: uint64, fingerprints of their content, never 0.
    """

    pfns: NDArray[np.uint64]
    prints: NDArray[np.uint64]


class _Chunk(NamedTuple):
    prints: NDArray[np.uint64]  # of the last content, 0: not sent yet
    rounds: NDArray[np.uint32]  # that sent it last, counted from 1


class Versions:
    """The last content of every page, as fingerprints: equal ones are taken for equal content here."""

    def __init__(self) -> None:
        self.rounds = [Round()]
        self.distinct = 0
        """Different pages so far."""
        self.not_followed = 0
        """Pages beyond the memory this keeps."""
        self._chunks: dict[int, _Chunk] = {}

    def add(self, *parts: Pages) -> list[NDArray[np.bool_]]:
        """The next pages of the stream.

        Args:
            parts: pages, each part in the stream's order. How parts lie among each other is not known: none has
                a page of the next round while another still has one of this.

        Returns:
            For each part, which of its pages were sent before.
        """
        again = [np.zeros(len(part.pfns), bool) for part in parts]
        starts = [0] * len(parts)
        for begun in range(ROUNDS_PIECE_MAX + 1):
            for number, part in enumerate(parts):
                start, rest = starts[number], part.pfns[starts[number] :]
                length = self._until_repeat(rest) if begun < ROUNDS_PIECE_MAX and len(rest) else len(rest)
                if length:
                    end = starts[number] = start + length
                    again[number][start:end] = self._take(part.pfns[start:end], part.prints[start:end])
            if all(start == len(part.pfns) for start, part in zip(starts, parts, strict=True)):
                break
            self.rounds.append(Round())
        return again

    def _until_repeat(self, pfns: NDArray[np.uint64]) -> int:
        """How many pages from the first on belong to this round."""
        if len(self.rounds) == ROUNDS_MAX:
            return len(pfns)
        repeated = np.ones(len(pfns), bool)
        repeated[np.unique(pfns, return_index=True)[1]] = False
        now = len(self.rounds)
        for number, which, within in _by_chunk(pfns):
            chunk = self._chunks.get(number)
            if chunk is not None:
                repeated[which] |= chunk.rounds[within] == now
        first = int(np.argmax(repeated))
        return first if repeated[first] else len(pfns)

    def _take(self, pfns: NDArray[np.uint64], prints: NDArray[np.uint64]) -> NDArray[np.bool_]:
        again = np.zeros(len(pfns), bool)
        now = self.rounds[-1]
        now.pages += len(pfns)
        for number, which, within in _by_chunk(pfns):
            chunk = self._chunks.get(number)
            if chunk is None:
                if len(self._chunks) == CHUNKS_MAX:
                    self.not_followed += len(which)
                    continue
                size = 1 << CHUNK_BITS
                chunk = self._chunks[number] = _Chunk(np.zeros(size, np.uint64), np.zeros(size, np.uint32))
            before = chunk.prints[within]
            known = before != 0
            again[which] = known
            now.again += int(np.count_nonzero(known))
            now.unchanged += int(np.count_nonzero(before == prints[which]))
            self.distinct += len(which) - int(np.count_nonzero(known))
            chunk.prints[within] = prints[which]
            chunk.rounds[within] = len(self.rounds)
        return again


def _by_chunk(pfns: NDArray[np.uint64]) -> Iterator[tuple[int, NDArray[np.intp], NDArray[np.uint64]]]:
    """For each chunk touched: its number, which of ``pfns`` lie in it in their order, and where within it."""
    numbers, within = pfns >> np.uint64(CHUNK_BITS), pfns & np.uint64((1 << CHUNK_BITS) - 1)
    order = np.argsort(numbers, kind="stable")
    sorted_ = numbers[order]
    starts = np.flatnonzero(np.r_[True, sorted_[1:] != sorted_[:-1]]) if len(order) else np.empty(0, np.intp)
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        which = order[start:end]
        yield int(sorted_[start]), which, within[which]

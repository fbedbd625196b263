"""Chunks of streams of which nothing is known: disks, unknown hypervisors. Pages without a place in a guest. Sans-IO.

Fixed chunks lie at multiples of 4096 in the stream, as file systems and disk images have their blocks. Content-defined
ones (FastCDC) begin where the content says and are cut into pages from there, so that what moved by any number of bytes
is found again; the rest of each, shorter than a page, goes as other bytes. ADR 11 has what either saves and costs.
"""

from typing import Final, Protocol

import numpy as np
import pyfastcdc
from numpy.typing import NDArray

from chunking.limits import CHUNK_BYTES_AVERAGE, KIB
from chunking.pages import NO_PFN, PAGE_BYTES, WORD_BYTES, Spans

UNIT_BYTES: Final = 64  # zeros are looked for in these
PADDING_UNITS: Final = 4  # so many of them are padding: shorter ones stand within files, too
LOOK_BYTES: Final = 512 * KIB  # of each piece: to look at all of it would cost what hashing it costs
EVIDENCE_MIN: Final = 16  # beginnings of data before anything is concluded from them
EVIDENCE_MAX: Final = 4096
ALIGNED_MIN: Final = 0.5  # of the beginnings; 0.85 in a file system with blocks of 4096, 0.2 and less in all else

_NOTHING: Final = np.empty(0, np.uint64)


class Chunker(Protocol):
    """Says where the chunks of a stream are, as a parser says where its pages are."""

    def feed(self, piece: memoryview, *, final: bool, urgent: bool = False) -> Spans:
        """Describe the stream's next bytes.

        Args:
            piece: the bytes, starting where the last ``used`` ended.
            final: whether the stream ends with this piece; otherwise an incomplete chunk at its end is left out.
            urgent: whether an incomplete chunk must not wait: it is other bytes then.
        """


class FixedChunker:
    """Pages at multiples of 4096 bytes of the stream.

    Args:
        offset: bytes of the stream before the first piece.
    """

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset

    def feed(self, piece: memoryview, *, final: bool, urgent: bool = False) -> Spans:
        """See Chunker."""
        head = min(-self._offset % PAGE_BYTES, len(piece))
        pages, tail = divmod(len(piece) - head, PAGE_BYTES)
        runs = [(head, 0, pages)] if head or pages else []
        used = head + pages * PAGE_BYTES
        if tail and (final or urgent):
            runs.append((tail, 0, 0))
            used += tail
        self._offset += used
        return _spans(used, np.array(runs, np.uint32).reshape(-1, 3))


class ContentChunker:
    """Pages counted from the beginnings of content-defined chunks of ``CHUNK_BYTES_AVERAGE`` on average."""

    def __init__(self) -> None:
        self._cdc = pyfastcdc.FastCDC(CHUNK_BYTES_AVERAGE)

    def feed(self, piece: memoryview, *, final: bool, urgent: bool = False) -> Spans:
        """See Chunker."""
        lengths = np.array([chunk.length for chunk in self._cdc.cut_buf(piece)] if len(piece) else [], np.int64)
        if len(lengths) and not (final or urgent):
            lengths = lengths[:-1]  # the last ends where the piece does, not where the content says
        pages, rest = lengths // PAGE_BYTES, lengths % PAGE_BYTES
        other = np.concatenate([[0], rest])
        runs = np.stack([other, np.zeros_like(other), np.concatenate([pages, [0]])], axis=1).astype(np.uint32)
        return _spans(int(lengths.sum()), runs[runs.any(axis=1)])


class OpaqueChunker:
    """Fixed chunks where data begins at multiples of 4096 bytes, content-defined ones where it clearly does not.

    Blocks and files are padded with zeros, so that the first bytes after such padding show how the content is aligned.
    A stream that shows nothing gets fixed chunks, which cost nothing.

    Args:
        offset: bytes of the stream before the first piece.
    """

    def __init__(self, offset: int = 0) -> None:
        self._content = ContentChunker()
        self._offset = offset
        self._begun = self._aligned = 0

    @property
    def content_defined(self) -> bool:
        """Whether chunks are content-defined now."""
        return self._begun >= EVIDENCE_MIN and self._aligned < self._begun * ALIGNED_MIN

    def feed(self, piece: memoryview, *, final: bool, urgent: bool = False) -> Spans:
        """See Chunker."""
        self._look(piece[:LOOK_BYTES])
        spans = None
        if self.content_defined:
            spans = self._content.feed(piece, final=final, urgent=urgent)
        if spans is None or not spans.used:
            spans = FixedChunker(self._offset).feed(piece, final=final, urgent=urgent)
        self._offset += spans.used
        return spans

    def _look(self, piece: memoryview) -> None:
        """Count where data begins after padding, and how often that is a multiple of 4096."""
        skipped = -self._offset % UNIT_BYTES
        units = (len(piece) - skipped) // UNIT_BYTES
        if units <= PADDING_UNITS:
            return
        words = np.frombuffer(piece, np.uint64, units * UNIT_BYTES // WORD_BYTES, skipped)
        empty = np.logical_not(words.reshape(units, -1).any(axis=1))
        begins = ~empty[PADDING_UNITS:]
        for back in range(PADDING_UNITS):
            begins &= empty[back : back + len(begins)]
        places = (self._offset + skipped) // UNIT_BYTES + PADDING_UNITS + np.flatnonzero(begins)
        self._begun += len(places)
        self._aligned += int(np.count_nonzero(places % (PAGE_BYTES // UNIT_BYTES) == 0))
        if self._begun > EVIDENCE_MAX:  # what a stream was like long ago counts for less
            self._begun, self._aligned = self._begun // 2, self._aligned // 2


def _spans(used: int, runs: NDArray[np.uint32]) -> Spans:
    pages = int(runs[:, 2].sum(dtype=np.int64))
    return Spans(used, runs, np.full(pages, NO_PFN, np.uint64), _NOTHING, big_endian=False)

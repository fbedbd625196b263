"""The bytes of a stream as its parser reads them, and what is said of each: other, table word, page. Sans-IO.

A parser is a generator in a straight line: it takes what it wants to read with ``yield from``, and stands still where
a piece of the stream ends. Every byte it moves over is described, so that nothing a parser does can lose one.
"""

from collections.abc import Generator
from typing import Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from chunking.pages import PAGE_BYTES, WORD_BYTES, Spans
from proxy.limits import PARSER_STEPS_MAX

_T = TypeVar("_T")
Steps: TypeAlias = Generator[None, None, _T]

_NOTHING: Final = np.empty(0, np.uint64)
_NO_BYTES: Final = memoryview(b"")
_SEARCH_BYTES: Final = 64 * 1024  # copied at a time while looking for a mark: a memoryview cannot be searched


class Surprise(Exception):
    """The stream is not what its parser knows: its rest is carried as it is. Never leaves this folder.

    Args:
        reason: a short code; docs/streams.md explains each.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Reader:
    """One stream, piece by piece.

    ``piece``, ``at`` and ``end`` are for parsers that scan for themselves; they say what they passed with ``records``.
    """

    def __init__(self) -> None:
        self.piece = _NO_BYTES
        self.at = 0
        self.end = 0
        self.big_endian = False
        self.pages_read = 0
        self._before = 0  # bytes of the pieces before this one
        self._urgent = False
        self._ahead = b""
        self._steps_left = PARSER_STEPS_MAX
        self._reset()

    def _reset(self) -> None:
        self._other = self._words = self._pages = 0
        self._rows: list[tuple[int, int, int]] = []
        self._runs: list[NDArray[np.uint32]] = []
        self._pfns: list[NDArray[np.uint64]] = []
        self._marked: list[NDArray[np.uint64]] = []

    # ------------------------------------------------------------------ for whoever drives the parser

    def begin(self, piece: memoryview, *, urgent: bool = False) -> None:
        """The next piece, which starts where the last Spans ended; an ``urgent`` one is described to its last byte."""
        self.piece, self.at, self.end = piece, 0, len(piece)
        self._urgent = urgent
        self._steps_left = PARSER_STEPS_MAX

    def rest(self) -> int:
        """Take all that is left of the piece as other bytes, and say how many there were."""
        size = self.end - self.at
        self._pass_other(size)
        return size

    def finish(self) -> Spans:
        """What was said of the piece; nothing of it is kept."""
        self._end_run()
        self._end_rows()
        spans = Spans(
            self.at,
            _joined(self._runs) if self._runs else np.empty((0, 3), np.uint32),
            _joined(self._pfns) if self._pfns else _NOTHING,
            _joined(self._marked) if self._marked else _NOTHING,
            self.big_endian,
        )
        self._before += self.at
        self.piece, self.at, self.end = _NO_BYTES, 0, 0
        self._reset()
        return spans

    # ------------------------------------------------------------------ for parsers

    @property
    def scannable(self) -> bool:
        """Whether the next byte to be parsed is the piece's at ``at``."""
        return not self._ahead

    @property
    def position(self) -> int:
        """Of the next byte to be parsed, in the stream."""
        return self._before + self.at - len(self._ahead)

    def unread(self, data: bytes) -> None:
        """Let ``data``, the last bytes taken, be taken again; what was said of them stays said."""
        self._ahead = data + self._ahead

    def take(self, size: int) -> Steps[bytes]:
        """The next ``size`` bytes of structure, which are other bytes."""
        self._spend()
        if not self._ahead and self.end - self.at >= size:
            start = self.at
            self._pass_other(size)
            return bytes(self.piece[start : start + size])
        held = bytearray(self._ahead[:size])
        self._ahead = self._ahead[size:]
        while len(held) < size:
            while self.at == self.end:
                yield
            step = min(size - len(held), self.end - self.at)
            held += self.piece[self.at : self.at + step]
            self._pass_other(step)
        return bytes(held)

    def skip(self, size: int) -> Steps[None]:
        """Pass ``size`` bytes that are other bytes."""
        self._spend()
        left = size - len(self._ahead)
        self._ahead = self._ahead[size:]
        while left > 0:
            while self.at == self.end:
                yield
            step = min(left, self.end - self.at)
            self._pass_other(step)
            left -= step

    def words(self, count: int, dtype: np.dtype[np.uint64]) -> Steps[NDArray[np.uint64]]:
        """At least one and at most ``count`` words of a table: those that this piece has. A cut one is other bytes.

        The array lies in the piece: it is not kept beyond the next step.
        """
        self._spend()
        while not self._ahead and self.at == self.end:
            yield
        whole = min(count, (self.end - self.at) // WORD_BYTES)
        if whole == 0 or self._ahead:
            return np.frombuffer((yield from self.take(WORD_BYTES)), dtype)
        found = np.frombuffer(self.piece, dtype, whole, self.at)
        self._pass_words(whole)
        return found

    def word(self) -> Steps[bytes]:
        """The next 8 bytes: a table word, or other bytes when the piece cuts them."""
        self._spend()
        while not self._ahead and self.at == self.end:
            yield
        if self._ahead or self.end - self.at < WORD_BYTES:
            return (yield from self.take(WORD_BYTES))
        found = bytes(self.piece[self.at : self.at + WORD_BYTES])
        self._pass_words(1)
        return found

    def pages(self, pfns: NDArray[np.uint64]) -> Steps[None]:
        """The next ``len(pfns)`` pages; an incomplete one is left in the piece until all of it is there, or urgent."""
        done = 0
        while done < len(pfns):
            whole = min(len(pfns) - done, (self.end - self.at) // PAGE_BYTES)
            if whole:
                self._pages += whole
                self.at += whole * PAGE_BYTES
                self.pages_read += whole
                self._pfns.append(pfns[done : done + whole])
                done += whole
            if done < len(pfns) and self._urgent and self.at < self.end:
                # Whoever sends may wait for an answer, in the middle of a page as well: it goes, in two parts.
                part = self.end - self.at
                self._pass_other(part)
                yield from self.skip(PAGE_BYTES - part)
                done += 1
            elif done < len(pfns):
                yield

    def mark(self, pfns: NDArray[np.uint64]) -> None:
        """The stream says something of these pages without carrying them."""
        self._marked.append(pfns)

    def records(
        self, runs: NDArray[np.uint32], trailing: int, pfns: NDArray[np.uint64], marked: NDArray[np.uint64], at: int
    ) -> None:
        """A parser has scanned up to ``at`` for itself.

        Args:
            runs: shape (n, 3), what it met; other bytes that were said before are added to the first.
            trailing: other bytes behind the last run.
            pfns, marked: as in Spans.
            at: position in the piece.
        """
        if self._words or self._pages:
            self._end_run()
        runs[0, 0] += self._other
        self._other = trailing
        self._end_rows()
        self._runs.append(runs)
        self._pfns.append(pfns)
        self._marked.append(marked)
        self.pages_read += len(pfns)
        self.at = at

    def find(self, mark: bytes, behind: int) -> Steps[bytes]:
        """Pass bytes up to the next ``mark`` and the ``behind`` bytes that follow it, and return the latter.

        What was unread before is searched too; it must be shorter than both.
        """
        self._spend()
        whole = len(mark) + behind
        held = self._ahead
        self._ahead = b""
        while True:
            known = len(held)
            block = held + bytes(self.piece[self.at : self.at + _SEARCH_BYTES])
            found = block.find(mark, 0, max(0, len(block) - behind))
            if found >= 0:
                stop = found + whole
                self._pass_other(stop - known)
                return block[stop - behind : stop]
            self._pass_other(len(block) - known)
            held = block[-(whole - 1) :]
            while self.at == self.end:
                yield

    def _spend(self) -> None:
        """Bound the time that one piece may take: real streams read a structure every few KiB."""
        self._steps_left -= 1
        if self._steps_left < 0:
            raise Surprise("too_fine")

    # ------------------------------------------------------------------ runs

    def _pass_other(self, size: int) -> None:
        if self._words or self._pages:
            self._end_run()
        self._other += size
        self.at += size

    def _pass_words(self, count: int) -> None:
        if self._pages:
            self._end_run()
        self._words += count
        self.at += count * WORD_BYTES

    def _end_run(self) -> None:
        if self._other or self._words or self._pages:
            self._rows.append((self._other, self._words, self._pages))
            self._other = self._words = self._pages = 0

    def _end_rows(self) -> None:
        if self._rows:
            self._runs.append(np.array(self._rows, np.uint32))
            self._rows = []


_S = TypeVar("_S", np.uint32, np.uint64)


def _joined(parts: list[NDArray[_S]]) -> NDArray[_S]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

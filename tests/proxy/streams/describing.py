"""Feeds a stream to a parser as the relay does, in any pieces, and holds what it says to what must always be true."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from chunking.pages import PAGE_BYTES, WORD_BYTES, Spans
from proxy.streams.facts import StreamFacts
from proxy.streams.parser import Parser, StreamParser


@dataclass
class Described:
    """What a parser said of a whole stream, however it was cut.

    Args:
        pages: position in the stream and PFN of each page.
        marked: PFNs of pages that came without their bytes.
        words: words of tables that were found whole, and what they are.
    """

    facts: StreamFacts
    pages: list[tuple[int, int]] = field(default_factory=list)
    marked: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    size: int = 0

    def same(self, other: "Described") -> bool:
        """Whether another way of cutting said the same."""
        return (self.facts, self.pages, self.marked, self.size) == (
            other.facts,
            other.pages,
            other.marked,
            other.size,
        )


def check(spans: Spans, piece: memoryview, *, final: bool) -> None:
    """What holds of every Spans."""
    runs = spans.runs
    assert runs.dtype == np.uint32
    assert runs.ndim == 2
    assert runs.shape[1] == 3
    assert spans.pfns.dtype == spans.marked.dtype == np.uint64
    sizes = runs.astype(np.uint64) @ np.array([1, WORD_BYTES, PAGE_BYTES], np.uint64)
    assert int(sizes.sum()) == spans.used <= len(piece)
    assert len(spans.pfns) == int(runs[:, 2].sum())
    assert len(runs) <= max(1, len(piece) // WORD_BYTES + 1)
    assert len(spans.marked) <= len(piece) // WORD_BYTES + 128  # a multifd table that ends here
    assert len(piece) - spans.used < (1 if final else PAGE_BYTES)


def describe(pieces: Iterable[memoryview], parser: Parser | None = None) -> Described:
    """Feed ``pieces``, the last of them as final, each behind what the parser left of those before."""
    parser = StreamParser() if parser is None else parser
    described = Described(parser.facts)
    left = memoryview(b"")
    for piece, final in _with_last(pieces):
        given = memoryview(bytes(left) + bytes(piece)) if left else piece
        spans = parser.feed(given, final=final)
        check(spans, given, final=final)
        _note(described, spans, given)
        left = given[spans.used :]
    described.facts = parser.facts
    assert described.size == parser.facts.stream_bytes
    assert len(described.pages) == parser.facts.pages_data
    assert parser.facts.page_bytes == PAGE_BYTES * parser.facts.pages_data
    return described


def _with_last(pieces: Iterable[memoryview]) -> Iterator[tuple[memoryview, bool]]:
    held: memoryview | None = None
    for piece in pieces:
        if held is not None:
            yield held, False
        held = piece
    yield held if held is not None else memoryview(b""), True


def _note(described: Described, spans: Spans, piece: memoryview) -> None:
    at = 0
    pfns = iter(spans.pfns.tolist())
    order = ">u8" if spans.big_endian else "<u8"
    for other, words, pages in spans.runs.tolist():
        at += other
        described.words += np.frombuffer(piece, order, words, at).tolist()
        at += WORD_BYTES * words
        for _ in range(pages):
            described.pages.append((described.size + at, next(pfns)))
            at += PAGE_BYTES
    assert at == spans.used
    described.marked += spans.marked.tolist()
    described.size += at


def cut(stream: bytes, places: Iterable[int] = ()) -> Iterator[memoryview]:
    """The stream's pieces when it is cut at ``places``, wherever those lie."""
    edges = [0, *sorted(min(place, len(stream)) for place in places), len(stream)]
    view = memoryview(stream)
    for start, stop in pairwise(edges):
        yield view[start:stop]


def pieces_of(stream: bytes, size: int) -> Iterator[memoryview]:
    """The stream's pieces of ``size`` bytes."""
    return cut(stream, range(size, len(stream), size))

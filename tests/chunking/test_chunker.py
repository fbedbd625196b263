"""Chunks of unknown streams: every byte told once, alike for every cut into reads, and what each way finds again."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunking.chunker import Chunker, ContentChunker, FixedChunker, OpaqueChunker
from chunking.encoder import page_offsets
from chunking.limits import CHUNK_BYTES_AVERAGE, FRAME_RAW_BYTES_MAX, KIB, MIB
from chunking.pages import NO_PFN, PAGE_BYTES
from chunking.pfns import PfnMap
from chunking.regime import Regime
from tests.chunking.support import Pair

# Of the stream in test_cut_points_are_frozen: the first runs, and their number.
FROZEN = ([[0, 0, 5], [2100, 0, 6], [598, 0, 16], [0, 0, 4]], 10)
KINDS = [FixedChunker, ContentChunker, OpaqueChunker]


def padded(rng: random.Random, size: int, block: int) -> bytes:
    """Files padded to whole blocks, as in a disk image or an archive."""
    parts, made = [], 0
    while made < size:
        data = rng.randbytes(rng.randrange(100, 20_000))
        parts.append(data + bytes(-len(data) % block + block))
        made += len(parts[-1])
    return b"".join(parts)[:size]


def carry(chunker: Chunker, stream: bytes, piece_bytes: int = FRAME_RAW_BYTES_MAX) -> tuple[int, list[int]]:
    """A stream through chunker, encoder and decoder: pages found again, and where all pages begin."""
    pair, at, again, places = Pair(8192), 0, 0, []
    while at < len(stream):
        piece = memoryview(stream)[at : at + piece_bytes]
        spans = chunker.feed(piece, final=at + len(piece) == len(stream))
        assert 0 < spans.used <= len(piece)
        assert int((spans.runs.astype(np.int64) * [1, 8, PAGE_BYTES]).sum()) == spans.used
        plan, _ = pair.carry(bytes(piece[: spans.used]), spans, Regime.DEDUP)
        again += plan.counts.duplicates
        places += (page_offsets(spans.runs).astype(np.int64) + at).tolist()
        at += spans.used
    return again, places


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_byte_is_described(kind: type[Chunker], data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 99)))
    stream = rng.randbytes(data.draw(st.integers(0, 300_000)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    chunker, left, described = kind(), b"", 0
    for start, end in pairwise([0, *cuts, len(stream)]):
        piece = left + stream[start:end]
        urgent = data.draw(st.booleans())
        spans = chunker.feed(memoryview(piece), final=end == len(stream), urgent=urgent)
        assert int((spans.runs.astype(np.int64) * [1, 8, PAGE_BYTES]).sum()) == spans.used
        assert spans.used == len(piece) or not (urgent or end == len(stream))
        assert len(spans.pfns) == spans.runs[:, 2].sum()
        described += spans.used
        left = piece[spans.used :]
    assert described == len(stream) - len(left)


@pytest.mark.parametrize("kind", [FixedChunker, ContentChunker])
def test_chunks_do_not_depend_on_reads(kind: type[Chunker]) -> None:
    stream = random.Random(1).randbytes(MIB)
    places = [carry(kind(), stream, size)[1] for size in (MIB, 300 * KIB, 130 * KIB)]
    assert places[0] == places[1] == places[2]


def test_what_moved_by_some_bytes_is_found_again() -> None:
    once = random.Random(2).randbytes(2 * MIB)
    stream = once + b"some bytes more" + once
    assert carry(FixedChunker(), stream)[0] == 0
    again, places = carry(ContentChunker(), stream)
    assert again > 0.95 * len(places) / 2


def test_a_disk_gets_fixed_chunks_and_an_archive_content_defined_ones() -> None:
    rng = random.Random(3)
    disk, archive = OpaqueChunker(), OpaqueChunker()
    carry(disk, padded(rng, 8 * MIB, PAGE_BYTES), MIB)
    carry(archive, padded(rng, 8 * MIB, 512), MIB)
    assert not disk.content_defined
    assert archive.content_defined


def test_a_stream_that_shows_nothing_gets_fixed_chunks() -> None:
    chunker = OpaqueChunker()
    _, places = carry(chunker, random.Random(4).randbytes(4 * MIB), MIB)
    assert not chunker.content_defined
    assert places == list(range(0, 4 * MIB, PAGE_BYTES))


def test_cut_points_are_frozen() -> None:
    """Stores hold pages as these cuts laid them: others would find nothing there any more."""
    stream = random.Random(5).randbytes(256 * KIB)
    spans = ContentChunker().feed(memoryview(stream), final=True)
    lengths = [int(run[2]) * PAGE_BYTES for run in spans.runs]
    assert (spans.runs.tolist()[:4], len(lengths)) == FROZEN
    assert len(stream) / CHUNK_BYTES_AVERAGE / 2 < len(lengths) < len(stream) / CHUNK_BYTES_AVERAGE * 2


def test_pages_without_a_guest_are_not_remembered() -> None:
    pfns = PfnMap()
    pfns.put(np.full(3, NO_PFN, np.uint64), np.arange(3, dtype=np.uint32))
    assert not pfns._chunks

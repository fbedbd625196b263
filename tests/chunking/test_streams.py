"""Real streams through encoder and decoder: small whole ones from tests/vectors, and the corpus where it is present.

The corpus is large and not part of the repository: KORORA_SHARED names the directory above its corpus/.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from chunking.limits import FRAME_RAW_BYTES_MAX
from chunking.pages import PAGE_BYTES, Spans
from chunking.regime import Regime
from tests.chunking.support import ENGINE, Pair

parser = pytest.importorskip("proxy.streams.parser", reason="the parsers of streams are not here")

CHECKOUT = Path(__file__).parents[2]
VECTORS = sorted((CHECKOUT / "tests" / "vectors" / "streams").glob("*.zst"))
CORPUS = Path(os.environ.get("KORORA_SHARED", CHECKOUT.parent / "shared")) / "corpus"
needs_corpus = pytest.mark.skipif(not CORPUS.is_dir(), reason="no corpus of whole streams here (KORORA_SHARED)")
CACHE_SLOTS = 131_072  # 512 MiB, of which only what is filled is there

# Wire bytes for each stream byte at most, at BEST: streams that the same relays carried one after the other.
BEST_RATIOS = {
    ("xen417-live-idle-a.xlmig-up",): 0.117,
    ("xen417-live-busy.xlmig-up",): 0.072,
    ("q10_idle_a.qemu",): 0.226,
    ("q10_files.qemu",): 0.190,
    ("xen417-live-idle-a.xlmig-up", "xen417-live-idle-b.xlmig-up"): 0.018,
    ("xen417-live-idle-a.xlmig-up", "xen417-live-busy.xlmig-up"): 0.020,
}
NAMES = sorted(path.name.removesuffix(".zst") for path in CORPUS.glob("*.zst")) if CORPUS.is_dir() else []


def pieces(path: Path, piece_bytes: int = FRAME_RAW_BYTES_MAX) -> Iterator[tuple[memoryview, Spans]]:
    """A compressed stream in pieces as a relay reads them, described by its parser."""
    follow = parser.StreamParser()
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    left = b""
    with path.open("rb") as file, decompressor.stream_reader(file) as stream:
        while True:
            read = stream.read(piece_bytes - len(left))
            piece = memoryview(left + read)
            if not piece:
                return
            final = not read
            spans = follow.feed(piece, final=final)
            if spans.used:
                yield piece[: spans.used], spans
            left = bytes(piece[spans.used :])


def carry(pair: Pair, path: Path, regime: Regime, piece_bytes: int = FRAME_RAW_BYTES_MAX) -> float:
    """A whole stream; wire bytes for each stream byte."""
    stream_bytes = wire_bytes = 0
    for raw, spans in pieces(path, piece_bytes):
        _, body = pair.carry(raw, spans, regime)
        stream_bytes += len(raw)
        wire_bytes += len(raw) if body is None else len(body)
    return wire_bytes / stream_bytes


@pytest.mark.parametrize("regime", ENGINE, ids=lambda regime: regime.name)
@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.name)
def test_small_streams(path: Path, regime: Regime) -> None:
    """In one piece a frame, in small ones, and again through a cache that is far too small."""
    pair = Pair(4096, 2)
    carry(pair, path, regime)
    assert carry(pair, path, regime, 64 * 1024) < 0.5 or path.stat().st_size < 4 * PAGE_BYTES
    carry(Pair(7, 3), path, regime, 10_000)


@needs_corpus
@pytest.mark.parametrize("name", NAMES)
def test_the_corpus(name: str) -> None:
    assert carry(Pair(CACHE_SLOTS, 3), CORPUS / f"{name}.zst", Regime.FAST) < 0.5


@needs_corpus
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("names", BEST_RATIOS, ids=" then ".join)
def test_the_fewest_bytes(names: tuple[str, ...]) -> None:
    pair = Pair(CACHE_SLOTS)
    ratio = [carry(pair, CORPUS / f"{name}.zst", Regime.BEST) for name in names][-1]
    assert ratio <= BEST_RATIOS[names]

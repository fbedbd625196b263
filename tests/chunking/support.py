"""Made guests, a store in memory, and a pair of encoder and decoder that must agree."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from chunking.decoder import Decoder
from chunking.encoder import Encoder, Plan
from chunking.errors import PagesMissing
from chunking.pages import PAGE_BYTES, Spans
from chunking.regime import Regime

COMPRESSING = (Regime.FAST, Regime.LIGHT, Regime.FIRM, Regime.BEST)
ENGINE = (Regime.DEDUP, Regime.DELTA, *COMPRESSING)
NOTHING = np.empty(0, np.uint64)


@dataclass
class Guest:
    """Memory of a made guest, and the pieces of a stream that tell of it."""

    seed: int
    pfns: int = 40
    memory: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.contents = [self.fresh() for _ in range(8)]

    def fresh(self) -> bytes:
        """A page of new content, compressible or not."""
        kind = self.random.randrange(3)
        if kind == 0:
            return self.random.randbytes(PAGE_BYTES)
        if kind == 1:
            return (self.random.randbytes(16) * 256)[:PAGE_BYTES]
        return self.random.randbytes(64).ljust(PAGE_BYTES, b"\x01")

    def write(self, pfn: int) -> bytes:
        """What the page holds when it is sent next: nothing, something known, itself slightly changed, or news."""
        kind, old = self.random.randrange(6), self.memory.get(pfn)
        if kind == 0:
            page = bytes(PAGE_BYTES)
        elif kind == 1:
            page = self.random.choice(self.contents)
        elif kind in {2, 3} and old is not None:
            changed = bytearray(old)
            for _ in range(self.random.choice((0, 1, 3, 255, 256, 300))):
                changed[self.random.randrange(PAGE_BYTES)] ^= 1 + self.random.randrange(255)
            page = bytes(changed)
        elif kind == 4 and old is not None:
            page = old
        else:
            page = self.fresh()
            self.contents[self.random.randrange(8)] = page
        self.memory[pfn] = page
        return page

    def piece(self, runs: int = 4, pages_max: int = 8) -> tuple[bytes, Spans]:
        """Some runs of other bytes, table words and pages."""
        parts, shape, pfns = [], [], []
        for _ in range(runs):
            other = self.random.choice((0, 1, 8, 254, 255, 700))
            words = self.random.choice((0, 1, 5, 255, 300))
            pages = self.random.randrange(pages_max + 1)
            numbers = [self.number() for _ in range(pages)]
            parts += [self.random.randbytes(other), self.random.randbytes(8 * words), *map(self.write, numbers)]
            shape.append((other, words, pages))
            pfns += numbers
        raw = b"".join(parts) or b"."
        shape = shape if len(raw) > 1 else [(1, 0, 0)]
        spans = Spans(
            len(raw),
            np.array(shape, np.uint32),
            np.array(pfns, np.uint64),
            NOTHING,
            bool(self.random.randrange(2)),
        )
        return raw, spans

    def number(self) -> int:
        """A PFN of the guest, some of them far away."""
        pfn = self.random.randrange(self.pfns)
        return pfn + (1 << 40) if pfn % 7 == 0 else pfn


def of_pages(pages: Sequence[bytes], first_pfn: int = 0) -> tuple[bytes, Spans]:
    """A piece that is nothing but pages, with PFNs from ``first_pfn`` on."""
    raw = b"".join(pages)
    pfns = np.arange(first_pfn, first_pfn + len(pages), dtype=np.uint64)
    return raw, Spans(len(raw), np.array([[0, 0, len(pages)]], np.uint32), pfns, NOTHING, big_endian=False)


class MemoryStore:
    """Stored pages in memory; ``lost`` cannot be read."""

    def __init__(self, pages: Sequence[bytes], pfns: Mapping[int, int] | None = None) -> None:
        self.pages = list(pages)
        self.by_content = {page: ordinal for ordinal, page in enumerate(pages)}
        self.by_pfn = dict(pfns or {})
        self.lost: set[int] = set()

    @property
    def count(self) -> int:
        return len(self.pages)

    def find(self, fingerprints: NDArray[np.uint64], raw: memoryview, offsets: NDArray[np.uint32]) -> NDArray[np.int64]:
        pages = [bytes(raw[offset : offset + PAGE_BYTES]) for offset in offsets.tolist()]
        assert len(fingerprints) == len(pages)
        return np.array([self.by_content.get(page, -1) for page in pages], np.int64)

    def bases(self, pfns: NDArray[np.uint64]) -> NDArray[np.int64]:
        return np.array([self.by_pfn.get(pfn, -1) for pfn in pfns.tolist()], np.int64)

    def read(self, ordinals: NDArray[np.int64]) -> NDArray[np.uint8]:
        missing = sorted(self.lost.intersection(ordinals.tolist()))
        if missing:
            raise PagesMissing(missing)
        joined = b"".join(self.pages[ordinal] for ordinal in ordinals.tolist())
        return np.frombuffer(joined, np.uint8).reshape(-1, PAGE_BYTES)


class Pair:
    """An encoder and a decoder that must give back what they take."""

    def __init__(self, slots: int, chains: int = 1, store: MemoryStore | None = None) -> None:
        self.encoder = Encoder(slots * PAGE_BYTES, chains, stored=store)
        self.decoder = Decoder(slots * PAGE_BYTES, stored=store)

    def carry(self, raw: bytes, spans: Spans, regime: Regime) -> tuple[Plan, bytes | None]:
        """One frame from end to end."""
        plan = self.encoder.plan(memoryview(raw), spans, regime)
        body = self.encoder.press(plan)
        if body is None:
            assert not plan.kept
            return plan, None
        assert self.decoder.chain_of(body) == plan.chain
        assert self.take(body, len(raw)) == raw
        return plan, body

    def take(self, body: bytes, raw_bytes: int) -> bytearray:
        """A body at the decoder."""
        out = bytearray(raw_bytes)
        self.decoder.chain_of(body)
        self.decoder.rebuild(self.decoder.unpress(memoryview(body), raw_bytes), memoryview(out))
        return out


def pieces(seed: int, count: int, *, runs: int = 4, pages_max: int = 8) -> Iterator[tuple[bytes, Spans]]:
    """Pieces of one made guest's stream."""
    guest = Guest(seed)
    for _ in range(count):
        yield guest.piece(runs, pages_max)

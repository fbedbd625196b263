"""One suite for both implementations of the kernels: compiled and numpy must give the same bytes."""

import random
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunking import fallback
from chunking.cache import NO_LOCATION, PageCache, PageIndex
from chunking.encoder import page_offsets
from chunking.frame import PageKind
from chunking.limits import DELTA_WORDS_MAX
from chunking.pages import PAGE_BYTES, Spans
from chunking.pfns import PfnMap
from tests.chunking.support import pieces

compiled = pytest.importorskip("chunking._kernels", reason="no compiled kernels here (gcc and Python.h are needed)")
BOTH: list[Any] = [compiled, fallback]
# Stores keep fingerprints on disk.
FROZEN = ["0000000000000001", "bbc752355d9c5c36", "f9d7e9d742f6f2fc"]
U8, U32, U64 = np.uint8, np.uint32, np.uint64


@dataclass
class Side:
    """A source's cache and a destination's, on one implementation."""

    kernels: Any
    slots: int

    def __post_init__(self) -> None:
        self.cache, self.index, self.far = PageCache(self.slots), PageIndex(self.slots), PageCache(self.slots)
        self.pfns = PfnMap()

    def classify(self, raw: bytes, spans: Spans, words_max: int) -> list[Any]:
        """All that classify gives, and the index after it."""
        data, offsets = np.frombuffer(raw, U8), page_offsets(spans.runs)
        n = len(offsets)
        kinds, locations, slots = np.zeros(n, U8), np.zeros(n, U32), np.zeros(n, U32)
        prints, masks = np.zeros(n, U64), np.zeros(64 * (n + 1), U8)
        values, literals = np.zeros(DELTA_WORDS_MAX * (n + 1), U64), np.zeros(PAGE_BYTES * n, U8)
        x = self.index
        deltas, words, literal_count = self.kernels.classify(
            *(data, offsets, self.pfns.look_up(spans.pfns), self.cache.arena),
            *(x.buckets, x.fingerprints, x.referenced, x.state, words_max),
            *(kinds, locations, slots, prints, masks, values, literals),
        )
        self.pfns.put(spans.pfns, np.where(kinds == PageKind.REF, locations, slots))
        masks, values, literals = masks[: 64 * deltas], values[:words], literals[: PAGE_BYTES * literal_count]
        out = np.full(len(raw), 0xEE, U8)
        rows, none = np.full(n, NO_LOCATION, U32), np.empty(0, U8)
        self.kernels.rebuild(
            *(out, offsets, kinds, locations, slots, self.far.arena, none, rows, masks, values, literals)
        )
        other, table = np.zeros(int(spans.runs[:, 0].sum()), U8), np.zeros(8 * int(spans.runs[:, 1].sum()), U8)
        self.kernels.gather_runs(data, spans.runs, other, table)
        self.kernels.scatter_runs(out, spans.runs, other, table)
        assert out.tobytes() == raw
        assert np.array_equal(self.far.arena, self.cache.arena)
        columns = [kinds, locations, slots, prints, masks, values, literals, other, table]
        return [*columns, x.buckets, x.fingerprints, x.referenced, x.state, self.cache.arena]


@given(
    seed=st.integers(0, 2**32),
    slots=st.sampled_from((1, 2, 5, 30, 300)),
    words_max=st.sampled_from((0, 1, DELTA_WORDS_MAX)),
    runs=st.sampled_from((1, 4, 60)),
)
def test_the_same_results(seed: int, slots: int, words_max: int, runs: int) -> None:
    sides = [Side(kernels, slots) for kernels in BOTH]
    for raw, spans in pieces(seed, 4, runs=runs, pages_max=8 if runs < 60 else 1):
        ours, theirs = (side.classify(raw, spans, words_max) for side in sides)
        for column, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert np.array_equal(mine, other), column


def test_fingerprints_are_frozen() -> None:
    """Stores keep them on disk: another hash would find nothing there any more."""
    rng = random.Random(8)
    raw = bytes(PAGE_BYTES) + rng.randbytes(2 * PAGE_BYTES + 1) + bytes(range(256)) * 16
    offsets = np.array([0, PAGE_BYTES + 1, 3 * PAGE_BYTES + 1], U32)
    for kernels in BOTH:
        out = np.zeros(3, U64)
        kernels.fingerprints(np.frombuffer(raw, U8), offsets, out)
        assert [f"{value:016x}" for value in out.tolist()] == FROZEN


@pytest.mark.parametrize("kernels", BOTH, ids=["compiled", "numpy"])
def test_colliding_fingerprints_are_told_apart(kernels: Any) -> None:
    """A guest that makes two pages of one fingerprint gets two pages: bytes decide."""
    page = np.frombuffer(random.Random(9).randbytes(PAGE_BYTES), U64).copy()
    found = np.zeros(1, U64)
    kernels.fingerprints(page.view(U8), np.zeros(1, U32), found)
    # The hash is linear in the folded words: what one multiplier adds another can take away.
    factors = _multipliers(fallback)
    twin = page.copy()
    folded = int(page[0] ^ (page[0] >> U64(32)))
    other = int(page[1] ^ (page[1] >> U64(32)))
    inverse = pow(factors[1], -1, 1 << 64)
    twin[0] = _unfold((folded + 1) % (1 << 64))
    twin[1] = _unfold((other - factors[0] * inverse) % (1 << 64))
    again = np.zeros(1, U64)
    kernels.fingerprints(twin.view(U8), np.zeros(1, U32), again)
    assert found[0] == again[0]
    side = Side(kernels, 8)
    raw = page.tobytes() + twin.tobytes()
    spans = Spans(len(raw), np.array([[0, 0, 2]], U32), np.arange(2, dtype=U64), np.empty(0, U64), big_endian=False)
    kinds = side.classify(raw, spans, 0)[0]
    assert kinds.tolist() == [PageKind.LITERAL, PageKind.LITERAL]


def _multipliers(module: ModuleType) -> list[int]:
    return [int(value) for value in module._MULTIPLIERS]


def _unfold(folded: int) -> int:
    """The word that w ^ (w >> 32) makes this of."""
    return folded ^ (folded >> 32)


REBUILD = ("out", "offsets", "kinds", "locations", "slots", "arena", "stored", "rows", "masks", "values", "literals")


def rebuild_arguments() -> dict[str, Any]:
    """A frame of a reference, a delta, a literal and a copy, all in order."""
    arrays = {
        "out": np.zeros(4 * PAGE_BYTES, U8),
        "offsets": np.arange(4, dtype=U32) * U32(PAGE_BYTES),
        "kinds": np.array([PageKind.REF, PageKind.DELTA, PageKind.LITERAL, PageKind.COPY], U8),
        "locations": np.array([0, 1, NO_LOCATION, 4], U32),
        "slots": np.array([NO_LOCATION, 1, 2, 3], U32),
        "arena": np.ones(4 * PAGE_BYTES, U8),
        "stored": np.full(PAGE_BYTES, 7, U8),
        "rows": np.array([NO_LOCATION, NO_LOCATION, NO_LOCATION, 0], U32),
        "masks": np.array([1, *[0] * 63], U8),
        "values": np.array([5], U64),
        "literals": np.full(PAGE_BYTES, 9, U8),
    }
    assert tuple(arrays) == REBUILD
    return arrays


WRONG = {
    "a slot out of range": {"slots": np.array([NO_LOCATION, 1, 4, 3], U32)},
    "no slot": {"slots": np.array([NO_LOCATION, 1, 2, NO_LOCATION], U32)},
    "a location out of range": {"locations": np.array([4, 1, NO_LOCATION, 4], U32)},
    "a base out of range": {"locations": np.array([0, NO_LOCATION, NO_LOCATION, 4], U32)},
    "a row out of range": {"rows": np.array([NO_LOCATION, NO_LOCATION, NO_LOCATION, 1], U32)},
    "a page outside": {"offsets": np.array([0, 4096, 8192, 12289], U32)},
    "a page far outside": {"offsets": np.array([0, 4096, 8192, 0xFFFFFFFF], U32)},
    "an unknown kind": {"kinds": np.array([1, 2, 3, 5], U8)},
    "more bits than words": {"masks": np.array([3, *[0] * 63], U8)},
    "fewer bits than words": {"values": np.array([5, 6], U64)},
    "no mask": {"masks": np.empty(0, U8), "values": np.empty(0, U64)},
    "too many masks": {"masks": np.array([1, *[0] * 127], U8)},
    "no literals": {"literals": np.empty(0, U8)},
    "too many literals": {"literals": np.zeros(2 * PAGE_BYTES, U8)},
}


@pytest.mark.parametrize("kernels", BOTH, ids=["compiled", "numpy"])
@pytest.mark.parametrize("wrong", WRONG)
def test_rebuild_believes_nothing(kernels: Any, wrong: str) -> None:
    kernels.rebuild(*rebuild_arguments().values())
    with pytest.raises(ValueError, match=r"range|outside|kind|want"):
        kernels.rebuild(*(rebuild_arguments() | WRONG[wrong]).values())


@pytest.mark.parametrize("kernels", BOTH, ids=["compiled", "numpy"])
@pytest.mark.parametrize(
    "runs", [[[5, 0, 0]], [[3, 0, 0]], [[4, 1, 0]], [[0, 0, 1]], [[0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF]], []]
)
def test_runs_must_cover_their_buffers(kernels: Any, runs: list[list[int]]) -> None:
    table = np.array(runs, U32).reshape(-1, 3)
    with pytest.raises(ValueError, match="cover"):
        kernels.gather_runs(np.zeros(4, U8), table, np.zeros(4, U8), np.zeros(0, U8))
    with pytest.raises(ValueError, match="cover"):
        kernels.scatter_runs(np.zeros(4, U8), table, np.zeros(4, U8), np.zeros(0, U8))


def test_compiled_kernels_check_every_buffer() -> None:
    """Each argument a little too short, or read-only where it is written: refused before anything is touched."""
    side, n = Side(compiled, 4), 2
    x = side.index
    arguments: list[Any] = [
        *(np.zeros(n * PAGE_BYTES, U8), np.array([0, PAGE_BYTES], U32), np.zeros(n, U32), side.cache.arena),
        *(x.buckets, x.fingerprints, x.referenced, x.state, DELTA_WORDS_MAX),
        *(np.zeros(n, U8), np.zeros(n, U32), np.zeros(n, U32), np.zeros(n, U64), np.zeros(64 * (n + 1), U8)),
        *(np.zeros(DELTA_WORDS_MAX * (n + 1), U64), np.zeros(n * PAGE_BYTES, U8)),
    ]
    compiled.classify(*arguments)
    for position, argument in enumerate(arguments):
        if isinstance(argument, int):
            continue
        short = [*arguments]
        short[position] = argument[:-1]
        with pytest.raises(ValueError, match=r"fit|outside|impossible"):
            compiled.classify(*short)
        sealed = argument.copy()
        sealed.flags.writeable = False
        if position not in {0, 1, 2}:
            short[position] = sealed
            with pytest.raises((ValueError, BufferError)):
                compiled.classify(*short)
    with pytest.raises(ValueError, match="impossible"):
        compiled.classify(*arguments[:8], 513, *arguments[9:])
    x.state[0] = 4
    with pytest.raises(ValueError, match="fit"):
        compiled.classify(*arguments)
    with pytest.raises(TypeError):
        compiled.classify(*arguments[:-1])
    with pytest.raises(TypeError):
        compiled.rebuild(*([None] * 11))

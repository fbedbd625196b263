"""The source's half of the page engine: what each page of a piece is, and the frame that says so. Sans-IO."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chunking import kernels
from chunking.cache import PageCache, PageIndex
from chunking.chains import LITERAL_EFFORTS, META_EFFORTS, CompressStream
from chunking.errors import PagesMissing
from chunking.frame import HEADER, MASK_BYTES, Columns, Flags, Header, PageKind, pack, runs_max
from chunking.limits import (
    ALONE_BYTES_MIN,
    CHAINS_MAX,
    DELTA_WORDS_MAX,
    FRAME_BODY_SLACK_BYTES,
    FRAME_PAGES_MAX,
    FRAME_RAW_BYTES_MAX,
    LOCATIONS_MAX,
)
from chunking.pages import PAGE_BYTES, WORD_BYTES, Spans
from chunking.pfns import PfnMap
from chunking.regime import Regime
from chunking.stored import StoredPages


class Counts(NamedTuple):
    """Pages of a frame by kind."""

    zero: int
    duplicates: int
    deltas: int
    literals: int
    copies: int


class NewPages(NamedTuple):
    """Pages that a content store may keep: LITERAL and DELTA, in cache order.

    Args:
        offsets: where each begins in the frame's stream bytes.
        slots: the slot each took.
    """

    offsets: NDArray[np.uint32]
    slots: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Plan:
    """A frame as decided, before compression. It holds copies; the stream's bytes need not live on.

    Args:
        raw_bytes: stream bytes it stands for.
        regime: how much work it gets.
        chain: the context chain that compresses it.
        counts: pages by kind.
        delta_bytes: masks and words of deltas, before compression.
        literal_bytes: literals, before compression.
        pfns: uint64, one a page.
        kinds: uint8, ``PageKind``, one a page.
        locations: uint32, one a page: where its content is now (a slot), NO_LOCATION for zero pages.
        new: pages that a store may keep.
        borrowed: the stored pages that the frame refers to, by ordinal, for a destination that cannot read its own.
    """

    raw_bytes: int
    regime: Regime
    chain: int
    counts: Counts
    delta_bytes: int
    literal_bytes: int
    pfns: NDArray[np.uint64]
    kinds: NDArray[np.uint8]
    locations: NDArray[np.uint32]
    new: NewPages
    borrowed: dict[int, bytes]
    header: Header = field(repr=False)
    meta: bytes = field(repr=False)
    literals: NDArray[np.uint8] = field(repr=False)

    @property
    def kept(self) -> bool:
        """Whether a body must be sent. A frame without pages changed nothing, so it may go as it is."""
        return bool(len(self.kinds))


class _Chain:
    def __init__(self) -> None:
        self.meta, self.literals = CompressStream(), CompressStream()


class Encoder:
    """Pages to frames.

    Args:
        cache_bytes: of the page cache, the same at the decoder; at least one page.
        chains: context chains that may compress in parallel, 1 to ``CHAINS_MAX``.
        stored: pages of earlier sessions that both sides hold, if any.

    Raises:
        ValueError: sizes out of range.
    """

    def __init__(self, cache_bytes: int, chains: int, *, stored: StoredPages | None = None) -> None:
        if not 1 <= chains <= CHAINS_MAX:
            raise ValueError(f"{chains} context chains")
        self._cache = PageCache(cache_bytes // PAGE_BYTES)
        if stored is not None and self._cache.slots + stored.count > LOCATIONS_MAX:
            raise ValueError(f"{stored.count} stored pages beside {self._cache.slots} slots")
        self._index = PageIndex(self._cache.slots)
        self._stored = stored if stored is not None and stored.count else None
        self._pfns = PfnMap()
        self._chains = [_Chain() for _ in range(chains)]
        self._turn = 0

    @property
    def slots_filled(self) -> int:
        """Slots of the cache that hold a page."""
        return int(self._index.state[1])

    def plan(self, raw: memoryview, spans: Spans, regime: Regime) -> Plan:
        """Decide what each page is, and take that into the cache. Serial, in cache order.

        Args:
            raw: the stream's bytes, all of which ``spans`` describes; not needed after the call.
            spans: their structure.
            regime: DEDUP or more.

        Raises:
            ValueError: spans that do not cover ``raw``, or a regime that has no frames of pages.
        """
        if regime <= Regime.RAW or spans.used != len(raw) or not 0 < len(raw) <= FRAME_RAW_BYTES_MAX:
            raise ValueError(f"{len(raw)} bytes, {spans.used} described, regime {regime.name}")
        if len(spans.pfns) > FRAME_PAGES_MAX or int(spans.runs[:, 2].sum(dtype=np.int64)) != len(spans.pfns):
            raise ValueError(f"{len(spans.pfns)} page frame numbers for other pages")
        data = np.frombuffer(raw, np.uint8)
        offsets = page_offsets(spans.runs)
        work = _Work(data, offsets, spans.pfns)
        self._classify(work, regime)
        borrowed = self._consult_store(work, regime) if self._stored is not None else {}
        self._pfns.put(work.pfns[work.held], work.here[work.held])
        columns = _structure(data, spans, work)
        header, meta = pack(columns, self._cache.slots)
        if len(meta) + len(work.literals) > len(raw) + FRAME_BODY_SLACK_BYTES // 2:
            # Many short runs can need more than they describe: then tables are bytes like others.
            header, meta = pack(_structure(data, _without_words(spans), work), self._cache.slots)
        counts = Counts(*np.bincount(work.kinds, minlength=len(PageKind)).tolist())
        storable = (work.kinds == PageKind.DELTA) | (work.kinds == PageKind.LITERAL)
        return Plan(
            raw_bytes=len(raw),
            regime=regime,
            chain=self._next_chain(regime),
            counts=counts,
            delta_bytes=len(work.masks) + WORD_BYTES * len(work.values),
            literal_bytes=len(work.literals),
            pfns=work.pfns,
            kinds=work.kinds,
            locations=work.here,
            new=NewPages(offsets[storable], work.slots[storable]),
            borrowed=borrowed,
            header=header,
            meta=meta,
            literals=work.literals,
        )

    def press(self, plan: Plan) -> bytes | None:
        """Compress a planned frame. Parallel between chains; in the order of the plans within one.

        Returns:
            The body, at most ``plan.raw_bytes + FRAME_BODY_SLACK_BYTES``. None if the frame has no pages and the
            body would be no shorter than the stream's bytes: then these are to be sent as they are.
        """
        if not plan.kept and plan.raw_bytes <= HEADER.size:
            return None
        chain, flags = self._chains[plan.chain], plan.header.flags
        parts: list[bytes | memoryview] = [b""]
        *meta, reset = chain.meta.compress(plan.meta, META_EFFORTS[plan.regime])
        flags |= Flags.META_RESET if reset else 0
        meta_bytes = sum(map(len, meta))
        parts += meta
        effort = LITERAL_EFFORTS.get(plan.regime)
        if effort is None or not len(plan.literals):
            parts.append(plan.literals.data)
        elif plan.regime < Regime.BEST and len(plan.literals) >= ALONE_BYTES_MIN:
            parts.append(effort.compressor(content_size=True).compress(plan.literals.data))
            flags |= Flags.LITERALS_ZSTD | Flags.LITERALS_ALONE
        else:
            *literals, reset = chain.literals.compress(plan.literals.data, effort)
            flags |= Flags.LITERALS_ZSTD | (Flags.LITERALS_RESET if reset else 0)
            parts += literals
        parts[0] = plan.header._replace(chain=plan.chain, flags=flags, meta_bytes=meta_bytes).pack()
        return b"".join(parts)

    def _next_chain(self, regime: Regime) -> int:
        if regime == Regime.BEST:
            return 0  # one chain: everything before is context
        self._turn = (self._turn + 1) % len(self._chains)
        return self._turn

    def _classify(self, work: "_Work", regime: Regime) -> None:
        words_max = DELTA_WORDS_MAX if regime >= Regime.DELTA else 0
        deltas, words, literals = kernels.classify(
            work.raw,
            work.offsets,
            self._pfns.look_up(work.pfns),
            self._cache.arena,
            self._index.buckets,
            self._index.fingerprints,
            self._index.referenced,
            self._index.state,
            words_max,
            work.kinds,
            work.locations,
            work.slots,
            work.prints,
            work.masks,
            work.values,
            work.literals,
        )
        work.masks, work.values = work.masks[: deltas * MASK_BYTES], work.values[:words]
        work.literals = work.literals[: literals * PAGE_BYTES]

    def _consult_store(self, work: "_Work", regime: Regime) -> dict[int, bytes]:
        """Make literals that the store knows copies, and those that it has an older version of deltas."""
        stored = self._stored
        which = np.flatnonzero(work.kinds == PageKind.LITERAL)
        if stored is None or not len(which):
            return {}
        borrowed: dict[int, bytes] = {}
        pages = work.literals.reshape(-1, PAGE_BYTES)
        found = stored.find(work.prints[which], work.raw.data, work.offsets[which])
        equal = found >= 0
        work.kinds[which[equal]] = PageKind.COPY
        work.locations[which[equal]] = (self._cache.slots + found[equal]).astype(np.uint32)
        borrowed.update(zip(found[equal].tolist(), map(bytes, pages[equal]), strict=True))
        left = np.flatnonzero(~equal)
        if regime >= Regime.DELTA and len(left):
            ordinals = stored.bases(work.pfns[which[left]])
            left, ordinals = left[ordinals >= 0], ordinals[ordinals >= 0]
            bases, readable = _read(stored, ordinals)
            left, ordinals = left[readable], ordinals[readable]
            changed = pages[left].view(np.uint64) ^ bases.view(np.uint64)
            close = np.count_nonzero(changed, axis=1) <= DELTA_WORDS_MAX
            left, ordinals, changed = left[close], ordinals[close], changed[close]
            borrowed.update(zip(ordinals.tolist(), map(bytes, bases[close]), strict=True))
            work.locations[which[left]] = (self._cache.slots + ordinals).astype(np.uint32)
            work.add_deltas(which[left], changed)
        work.literals = pages[work.kinds[which] == PageKind.LITERAL].reshape(-1)
        return borrowed


class _Work:
    """The columns of a frame in the making."""

    def __init__(self, raw: NDArray[np.uint8], offsets: NDArray[np.uint32], pfns: NDArray[np.uint64]) -> None:
        n = len(offsets)
        self.raw, self.offsets, self.pfns = raw, offsets, pfns
        self.kinds = np.empty(n, np.uint8)
        self.locations, self.slots = np.empty(n, np.uint32), np.empty(n, np.uint32)
        self.prints = np.empty(n, np.uint64)
        self.masks = np.empty(MASK_BYTES * (n + 1), np.uint8)
        self.values = np.empty(DELTA_WORDS_MAX * (n + 1), np.uint64)
        self.literals = np.empty(PAGE_BYTES * n, np.uint8)

    @property
    def here(self) -> NDArray[np.uint32]:
        """Where each page's content is now."""
        return np.where(self.kinds == PageKind.REF, self.locations, self.slots)

    @property
    def held(self) -> NDArray[np.bool_]:
        """Which pages' content is in the cache now."""
        held: NDArray[np.bool_] = self.kinds != PageKind.ZERO
        return held

    def add_deltas(self, which: NDArray[np.int64], changed: NDArray[np.uint64]) -> None:
        """Turn literals into deltas, and put what changed in its place between the others, in page order."""
        old = np.flatnonzero(self.kinds == PageKind.DELTA)
        self.kinds[which] = PageKind.DELTA
        order = np.argsort(np.concatenate([old, which]), kind="stable")
        masks = np.packbits(changed != 0, axis=1, bitorder="little")
        self.masks = np.concatenate([self.masks.reshape(-1, MASK_BYTES), masks])[order].reshape(-1)
        ends = np.cumsum(np.bitwise_count(self.masks.reshape(-1, MASK_BYTES)).sum(axis=1, dtype=np.int64))
        values = np.empty(int(ends[-1]) if len(ends) else 0, np.uint64)
        new = np.zeros(len(values), bool)
        for place in np.flatnonzero(order >= len(old)).tolist():
            new[ends[place - 1] if place else 0 : ends[place]] = True
        values[new], values[~new] = changed[changed != 0], self.values
        self.values = values


def page_offsets(runs: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Where in its piece each page of these runs begins."""
    pages = runs[:, 2].astype(np.int64)
    before = runs[:, 0].astype(np.int64) + WORD_BYTES * runs[:, 1].astype(np.int64)
    starts = np.cumsum(before + PAGE_BYTES * pages) - PAGE_BYTES * pages
    firsts = np.cumsum(pages) - pages
    within = np.arange(int(pages.sum())) - np.repeat(firsts, pages)
    return (np.repeat(starts, pages) + PAGE_BYTES * within).astype(np.uint32)


def _structure(raw: NDArray[np.uint8], spans: Spans, work: _Work) -> Columns:
    runs = np.ascontiguousarray(spans.runs, np.uint32)
    totals = runs.sum(axis=0, dtype=np.int64).tolist()
    if len(runs) > runs_max(len(raw)):
        spans = _without_words(spans)
        runs = spans.runs
        totals = runs.sum(axis=0, dtype=np.int64).tolist()
    other, words = np.empty(totals[0], np.uint8), np.empty(WORD_BYTES * totals[1], np.uint8)
    kernels.gather_runs(raw, runs, other, words)
    return Columns(
        runs, other, words, spans.big_endian, work.kinds, work.locations, work.slots, work.masks, work.values
    )


def _without_words(spans: Spans) -> Spans:
    """The same structure with table words as other bytes, in no more runs than there are pages, and one."""
    other = spans.runs[:, 0].astype(np.int64) + WORD_BYTES * spans.runs[:, 1].astype(np.int64)
    with_pages = np.flatnonzero(spans.runs[:, 2])
    cuts = np.concatenate([[0], np.cumsum(other)[with_pages], [int(other.sum())]])
    pages = np.concatenate([spans.runs[with_pages, 2], [0]])
    runs = np.stack([np.diff(cuts), np.zeros(len(pages), np.int64), pages], axis=1).astype(np.uint32)
    return spans._replace(runs=runs)


def _read(stored: StoredPages, ordinals: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The stored pages that can be read here, and which of ``ordinals`` they are."""
    readable = np.ones(len(ordinals), bool)
    try:
        return stored.read(ordinals), readable
    except PagesMissing as missing:
        readable = ~np.isin(ordinals, np.array(missing.ordinals, np.int64))
    try:
        return stored.read(ordinals[readable]), readable
    except PagesMissing:
        return np.empty((0, PAGE_BYTES), np.uint8), np.zeros(len(ordinals), bool)

"""The kernels in numpy and Python: what runs where chunking/_kernels.c could not be built. Same bytes, only slower.

chunking/_kernels.pyi says what each does; tests/chunking/test_kernels.py holds both to the same results.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from chunking.cache import FILLED, HAND, NO_LOCATION
from chunking.limits import BUCKET_WAYS, RING_SKIPS_MAX
from chunking.pages import PAGE_BYTES, WORD_BYTES

PAGE_WORDS: Final = PAGE_BYTES // WORD_BYTES
MASK_BYTES: Final = PAGE_WORDS // 8
_M64: Final = (1 << 64) - 1
_ZERO, _REF, _DELTA, _LITERAL, _COPY = range(5)
_BLOCK_PAGES: Final = 64  # pages hashed at once: their intermediate values stay in the cache of the processor
_SPARSE_BYTES: Final = 64  # other bytes a run, on average, up to which an index of them all is quicker than slices


def _multipliers() -> NDArray[np.uint64]:
    """512 odd constants from splitmix64."""
    state, out = 0x4B6F726F7261, []
    for _ in range(PAGE_WORDS):
        state = (state + 0x9E3779B97F4A7C15) & _M64
        out.append(_mix(state) | 1)
    return np.array(out, np.uint64)


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _M64
    return value ^ (value >> 31)


_MULTIPLIERS: Final = _multipliers()


def _mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    values[values == 0] = 1  # 0 says that a slot is empty
    return values


def _rows(raw: NDArray[np.uint8], offsets: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """The pages at ``offsets``, as words, shape (n, 512)."""
    if len(offsets) and int(offsets.max()) + PAGE_BYTES > len(raw):
        raise ValueError("a page lies outside of its buffer")
    rows = np.empty((len(offsets), PAGE_BYTES), np.uint8)
    for row, offset in enumerate(offsets.tolist()):
        rows[row] = raw[offset : offset + PAGE_BYTES]
    return rows.view(np.uint64)


def fingerprints(raw: NDArray[np.uint8], offsets: NDArray[np.uint32], out: NDArray[np.uint64]) -> None:
    for start in range(0, len(offsets), _BLOCK_PAGES):
        words = _rows(raw, offsets[start : start + _BLOCK_PAGES])
        words ^= words >> np.uint64(32)
        words *= _MULTIPLIERS
        out[start : start + _BLOCK_PAGES] = _mix_array(words.sum(axis=1, dtype=np.uint64))


def classify(
    raw: NDArray[np.uint8],
    offsets: NDArray[np.uint32],
    bases: NDArray[np.uint32],
    arena: NDArray[np.uint8],
    buckets: NDArray[np.uint32],
    prints: NDArray[np.uint64],
    referenced: NDArray[np.uint8],
    state: NDArray[np.uint64],
    words_max: int,
    kinds: NDArray[np.uint8],
    locations: NDArray[np.uint32],
    slots: NDArray[np.uint32],
    page_prints: NDArray[np.uint64],
    masks: NDArray[np.uint8],
    values: NDArray[np.uint64],
    literals: NDArray[np.uint8],
) -> tuple[int, int, int]:
    index = _Index(buckets, prints, referenced, state)
    pages = arena.reshape(-1, PAGE_BYTES)
    fingerprints(raw, offsets, page_prints)
    deltas = delta_words = literal_count = 0
    for i, (offset, base, found_print) in enumerate(
        zip(offsets.tolist(), bases.tolist(), page_prints.tolist(), strict=True)
    ):
        page = raw[offset : offset + PAGE_BYTES]
        locations[i] = slots[i] = NO_LOCATION
        if not page.any():
            kinds[i], page_prints[i] = _ZERO, 0
            continue
        slot = index.find(found_print, page, pages)
        if slot >= 0:
            kinds[i], locations[i] = _REF, slot
            continue
        kinds[i] = _LITERAL
        if words_max and base < index.slots:
            changed = page.view(np.uint64) ^ pages[base].view(np.uint64)
            mask = changed != 0
            count = int(np.count_nonzero(mask))
            if count == 0:
                kinds[i], locations[i], referenced[base] = _REF, base, 1
                continue
            if count <= words_max:
                kinds[i], locations[i] = _DELTA, base
                masks[deltas * MASK_BYTES : (deltas + 1) * MASK_BYTES] = np.packbits(mask, bitorder="little")
                values[delta_words : delta_words + count] = changed[mask]
                deltas, delta_words = deltas + 1, delta_words + count
        if kinds[i] == _LITERAL:
            literals[literal_count * PAGE_BYTES : (literal_count + 1) * PAGE_BYTES] = page
            literal_count += 1
        slots[i] = slot = index.take()
        pages[slot] = page
        index.insert(slot, found_print)
    return deltas, delta_words, literal_count


class _Index:
    """PageIndex's rules, on memory views: their items cost a third of numpy's."""

    def __init__(
        self,
        buckets: NDArray[np.uint32],
        prints: NDArray[np.uint64],
        referenced: NDArray[np.uint8],
        state: NDArray[np.uint64],
    ) -> None:
        self.buckets, self.prints = buckets.data, prints.data
        self.referenced, self.state = referenced.data, state.data
        self.mask = len(buckets) // BUCKET_WAYS - 1
        self.slots = len(prints)

    def find(self, fingerprint: int, page: NDArray[np.uint8], pages: NDArray[np.uint8]) -> int:
        start = (fingerprint & self.mask) * BUCKET_WAYS
        for slot in self.buckets[start : start + BUCKET_WAYS]:
            if slot < self.slots and self.prints[slot] == fingerprint and np.array_equal(pages[slot], page):
                self.referenced[slot] = 1
                return slot
        return -1

    def take(self) -> int:
        hand, skips = self.state[HAND], 0
        while self.referenced[hand] and skips < RING_SKIPS_MAX:
            self.referenced[hand] = 0
            hand, skips = (hand + 1) % self.slots, skips + 1
        self.referenced[hand] = 0
        self.state[HAND] = (hand + 1) % self.slots
        self.state[FILLED] += not self.prints[hand]
        return hand

    def insert(self, slot: int, fingerprint: int) -> None:
        bucket = fingerprint & self.mask
        self.prints[slot] = fingerprint
        start = bucket * BUCKET_WAYS
        way = fingerprint >> 62
        for candidate in range(BUCKET_WAYS):
            held = self.buckets[start + candidate]
            if held == slot or held >= self.slots or self.prints[held] & self.mask != bucket:
                way = candidate
                break
        self.buckets[start + way] = slot


def rebuild(
    out: NDArray[np.uint8],
    offsets: NDArray[np.uint32],
    kinds: NDArray[np.uint8],
    locations: NDArray[np.uint32],
    slots: NDArray[np.uint32],
    arena: NDArray[np.uint8],
    stored: NDArray[np.uint8],
    rows: NDArray[np.uint32],
    masks: NDArray[np.uint8],
    values: NDArray[np.uint64],
    literals: NDArray[np.uint8],
) -> None:
    pages, stored_pages = arena.reshape(-1, PAGE_BYTES), stored.reshape(-1, PAGE_BYTES)
    literal_pages = literals.reshape(-1, PAGE_BYTES)
    bits = np.unpackbits(masks, bitorder="little").view(bool).reshape(-1, PAGE_WORDS)
    counts = np.count_nonzero(bits, axis=1).tolist()
    delta = literal = word = 0
    for kind, offset, location, slot, row in zip(
        kinds.tolist(), offsets.tolist(), locations.tolist(), slots.tolist(), rows.tolist(), strict=True
    ):
        if offset + PAGE_BYTES > len(out):
            raise ValueError("a page lies outside of the frame")
        page = out[offset : offset + PAGE_BYTES]
        if kind == _ZERO:
            page[:] = 0
            continue
        if kind == _LITERAL:
            page[:] = _row(literal_pages, literal)
            literal += 1
        elif kind in {_REF, _DELTA, _COPY}:
            page[:] = _row(pages, location) if row == NO_LOCATION else _row(stored_pages, row)
        else:
            raise ValueError("an unknown kind of page")
        if kind == _REF:
            continue
        if kind == _DELTA:
            mask = bits[delta] if delta < len(bits) else None
            if mask is None or word + counts[delta] > len(values):
                raise ValueError("fewer changed words than pages want")
            words = page.view(np.uint64)
            words[mask] ^= values[word : word + counts[delta]]
            delta, word = delta + 1, word + counts[delta]
        if slot >= len(pages):
            raise ValueError("a slot out of range")
        pages[slot] = page
    if word != len(values) or delta != len(bits) or literal != len(literal_pages):
        raise ValueError("more changed words or literals than pages want")


def _row(pages: NDArray[np.uint8], row: int) -> NDArray[np.uint8]:
    if row >= len(pages):
        raise ValueError("a location out of range")
    result: NDArray[np.uint8] = pages[row]
    return result


def gather_runs(
    raw: NDArray[np.uint8], runs: NDArray[np.uint32], other: NDArray[np.uint8], words: NDArray[np.uint8]
) -> None:
    _move_runs(raw, runs, other, words, gather=True)


def scatter_runs(
    out: NDArray[np.uint8], runs: NDArray[np.uint32], other: NDArray[np.uint8], words: NDArray[np.uint8]
) -> None:
    _move_runs(out, runs, other, words, gather=False)


def _move_runs(
    whole: NDArray[np.uint8],
    runs: NDArray[np.uint32],
    other: NDArray[np.uint8],
    words: NDArray[np.uint8],
    *,
    gather: bool,
) -> None:
    sizes = runs.reshape(-1, 3).astype(np.int64) * np.array([1, WORD_BYTES, PAGE_BYTES])
    totals = sizes.sum(axis=0)
    if totals.sum() != len(whole) or totals[0] != len(other) or totals[1] != len(words):
        raise ValueError("runs do not cover their buffers")
    ends = np.cumsum(sizes.reshape(-1)).reshape(-1, 3)
    for part, column in ((other, 0), (words, 1)):
        lengths = sizes[:, column]
        some = np.flatnonzero(lengths)
        starts, lengths = (ends - sizes)[some, column], lengths[some]
        if len(some) > 1 and len(part) <= _SPARSE_BYTES * len(some):
            places = np.arange(len(part)) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
            if gather:
                part[:] = whole[places]
            else:
                whole[places] = part
            continue
        at = 0
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            if gather:
                part[at : at + length] = whole[start : start + length]
            else:
                whole[start : start + length] = part[at : at + length]
            at += length

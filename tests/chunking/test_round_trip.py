"""What the encoder takes, the decoder gives back: made guests in every regime, small caches that wrap, real streams."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunking import pages
from chunking.encoder import Encoder
from chunking.frame import PageKind
from chunking.limits import DELTA_WORDS_MAX, FRAME_BODY_SLACK_BYTES, FRAME_RAW_BYTES_MAX
from chunking.pages import PAGE_BYTES, Spans
from chunking.regime import Regime
from tests.chunking.support import COMPRESSING, ENGINE, NOTHING, MemoryStore, Pair, of_pages, pieces


@given(
    seed=st.integers(0, 2**32),
    slots=st.sampled_from((1, 2, 3, 7, 16, 64, 500)),
    chains=st.integers(1, 4),
    regimes=st.lists(st.sampled_from(ENGINE), min_size=1, max_size=8),
)
def test_any_regime_cache_and_number_of_chains(seed: int, slots: int, chains: int, regimes: list[Regime]) -> None:
    """Slots are overwritten while they are bases of, or referenced in, the very same frame; regimes change at will."""
    pair = Pair(slots, chains)
    for (raw, spans), regime in zip(pieces(seed, len(regimes)), regimes, strict=True):
        plan, body = pair.carry(raw, spans, regime)
        assert body is None or len(body) <= len(raw) + FRAME_BODY_SLACK_BYTES
        assert sum(plan.counts) == len(spans.pfns) == len(plan.kinds)
        assert plan.new.offsets.tolist() == sorted(plan.new.offsets.tolist())


@pytest.mark.parametrize("regime", ENGINE, ids=lambda regime: regime.name)
def test_each_kind_of_page_is_found(regime: Regime) -> None:
    pair, rng = Pair(64), random.Random(1)
    first, second = rng.randbytes(PAGE_BYTES), rng.randbytes(PAGE_BYTES)
    changed = b"changed!" + first[8:]
    plan, _ = pair.carry(*of_pages([first, bytes(PAGE_BYTES), second, first]), regime)
    assert plan.counts == (1, 1, 0, 2, 0)
    plan, _ = pair.carry(*of_pages([changed, second]), regime)
    assert plan.counts == ((0, 1, 1, 0, 0) if regime >= Regime.DELTA else (0, 1, 0, 1, 0))


@pytest.mark.parametrize(("changed", "kind"), [(DELTA_WORDS_MAX, "deltas"), (DELTA_WORDS_MAX + 1, "literals")])
def test_a_delta_ends_where_half_the_page_changed(changed: int, kind: str) -> None:
    pair, rng = Pair(8), random.Random(2)
    page = np.frombuffer(rng.randbytes(PAGE_BYTES), np.uint64).copy()
    pair.carry(*of_pages([page.tobytes()]), Regime.FAST)
    page[rng.sample(range(512), changed)] += np.uint64(1)
    plan, _ = pair.carry(*of_pages([page.tobytes()]), Regime.FAST)
    assert getattr(plan.counts, kind) == 1


def test_a_base_may_be_the_slot_that_its_new_version_takes() -> None:
    pair, rng = Pair(1), random.Random(3)
    page = rng.randbytes(PAGE_BYTES)
    for number in range(5):
        page = bytes([number]) + page[1:]
        plan, _ = pair.carry(*of_pages([page]), Regime.DELTA)
        assert plan.locations.tolist() == [0]
    assert plan.counts.deltas == 1


def test_a_page_in_use_outlives_the_ring() -> None:
    """Second chance: what is referenced again and again stays, though the cache has been filled many times since."""
    pair, rng = Pair(16), random.Random(4)
    wanted = rng.randbytes(PAGE_BYTES)
    pair.carry(*of_pages([wanted]), Regime.DEDUP)
    for number in range(10):
        fresh = [rng.randbytes(PAGE_BYTES) for _ in range(12)]
        plan, _ = pair.carry(*of_pages([wanted, *fresh], 100 * number), Regime.DEDUP)
        assert plan.counts.duplicates == 1


@pytest.mark.parametrize("regime", ENGINE, ids=lambda regime: regime.name)
@pytest.mark.parametrize("seed", range(6))
def test_no_body_is_much_longer_than_the_stream(regime: Regime, seed: int) -> None:
    """Full frames that do not shrink: random pages, random bytes, and the shortest runs in a random pattern."""
    rng = np.random.default_rng(seed)
    raw = rng.bytes(FRAME_RAW_BYTES_MAX)
    if seed == 0:
        spans = of_pages([raw])[1]._replace(
            runs=np.array([[0, 0, 1024]], np.uint32), pfns=np.arange(1024, dtype=np.uint64)
        )
    elif seed == 1:
        spans = pages.plain(len(raw))
    else:
        # Runs of a few bytes each, alternating at random: they need more than they describe. Some hold pages.
        other = rng.integers(1, 4 + 100 * (seed - 2), 400_000)
        words = rng.integers(0, 3, len(other))
        held = (rng.integers(0, 1000, len(other)) == 0) * (seed % 2)
        sizes = other + 8 * words + PAGE_BYTES * held
        count = int(np.searchsorted(np.cumsum(sizes), len(raw)))
        runs = np.stack([other, words, held], axis=1)[:count]
        rest = len(raw) - int(sizes[:count].sum())
        runs = np.concatenate([runs, [[rest, 0, 0]]]).astype(np.uint32)
        spans = Spans(len(raw), runs, np.arange(int(runs[:, 2].sum()), dtype=np.uint64), NOTHING, big_endian=True)
    pair = Pair(64)
    _, body = pair.carry(raw, spans, regime)
    assert body is not None
    assert len(body) <= len(raw) + FRAME_BODY_SLACK_BYTES


def test_a_short_frame_without_pages_goes_as_it_is() -> None:
    pair = Pair(4)
    assert pair.carry(b"ready", pages.plain(5), Regime.LIGHT)[1] is None
    assert pair.carry(b"ready" * 1000, pages.plain(5000), Regime.LIGHT)[1] is not None


@pytest.mark.parametrize("regime", COMPRESSING, ids=lambda regime: regime.name)
def test_frames_stand_on_what_came_before(regime: Regime) -> None:
    """Small frames share a chain's context; large ones may be compressed alone, and the chain's stream goes on."""
    pair, rng = Pair(4096), random.Random(5)
    text = [rng.randbytes(40) for _ in range(300)]

    def prose(count: int) -> list[bytes]:
        return [b"".join(rng.choice(text) for _ in range(110))[:PAGE_BYTES] for _ in range(count)]

    sizes = []
    for number, count in enumerate((3, 3, 400, 3, 3)):
        _, body = pair.carry(*of_pages(prose(count), 1000 * number), regime)
        sizes.append(len(body or b""))
    assert sizes[3] < sizes[0] * 0.9


def test_spans_must_cover_the_piece() -> None:
    encoder = Encoder(1 << 20, 1)
    raw, spans = of_pages([b"x" * PAGE_BYTES])
    with pytest.raises(ValueError, match="described"):
        encoder.plan(memoryview(raw), spans._replace(used=5), Regime.FAST)
    with pytest.raises(ValueError, match="page frame numbers"):
        encoder.plan(memoryview(raw), spans._replace(pfns=NOTHING), Regime.FAST)
    with pytest.raises(ValueError, match="regime RAW"):
        encoder.plan(memoryview(raw), spans, Regime.RAW)
    short = spans._replace(runs=np.array([[0, 1, 1]], np.uint32))
    with pytest.raises(ValueError, match=r"outside|cover"):
        encoder.plan(memoryview(raw), short, Regime.FAST)


@given(seed=st.integers(0, 2**32), slots=st.sampled_from((1, 5, 100)), regime=st.sampled_from(ENGINE))
def test_with_a_store(seed: int, slots: int, regime: Regime) -> None:
    rng = random.Random(seed)
    stream = list(pieces(seed, 4))
    seen = [
        raw[offset : offset + PAGE_BYTES]
        for raw, _ in stream
        for offset in range(0, max(0, len(raw) - PAGE_BYTES), PAGE_BYTES)
    ]
    kept = [page for page in seen if any(page)] + [rng.randbytes(PAGE_BYTES) for _ in range(3)]
    store = MemoryStore(kept, {pfn: rng.randrange(len(kept)) for pfn in range(20)})
    pair = Pair(slots, 2, store)
    for raw, spans in stream:
        plan, _ = pair.carry(raw, spans, regime)
        for ordinal, page in plan.borrowed.items():
            assert page == kept[ordinal]


def test_stored_pages_are_copied_and_built_upon() -> None:
    rng = random.Random(6)
    old = [rng.randbytes(PAGE_BYTES) for _ in range(4)]
    store = MemoryStore(old, {0: 0, 1: 1, 2: 2, 3: 3})
    pair = Pair(64, 1, store)
    changed = b"new" + old[1][3:]
    stream = [old[0], changed, rng.randbytes(PAGE_BYTES), old[3], bytes(PAGE_BYTES), old[0]]
    plan, body = pair.carry(*of_pages(stream), Regime.DELTA)
    assert plan.kinds.tolist() == [PageKind.COPY, PageKind.DELTA, PageKind.LITERAL, PageKind.COPY, 0, PageKind.REF]
    assert plan.borrowed == {0: old[0], 1: old[1], 3: old[3]}
    assert plan.new.offsets.tolist() == [PAGE_BYTES, 2 * PAGE_BYTES]
    assert len(body or b"") < 2 * PAGE_BYTES
    # Deltas against the cache and against the store in one frame, in either order.
    stream = [b"a" + stream[0][1:], b"b" + old[1][1:], b"c" + old[2][1:], b"d" + old[3][1:]]
    assert pair.carry(*of_pages(stream), Regime.DELTA)[0].counts.deltas == 4


def test_a_source_that_cannot_read_its_own_store_sends_literals() -> None:
    rng = random.Random(7)
    old = [rng.randbytes(PAGE_BYTES) for _ in range(3)]
    store = MemoryStore(old, {0: 0, 1: 1, 2: 2})
    store.lost = {1}
    encoder = Encoder(1 << 20, 1, stored=store)
    raw, spans = of_pages([b"x" + page[1:] for page in old])
    assert encoder.plan(memoryview(raw), spans, Regime.DELTA).counts == (0, 0, 2, 1, 0)

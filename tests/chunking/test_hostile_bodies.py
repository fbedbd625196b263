"""Bodies of a hostile peer: only documented errors, and never more memory than the frame's own size explains."""

import random
import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from chunking.chains import DecompressStream
from chunking.decoder import Decoder
from chunking.encoder import Encoder
from chunking.errors import FrameMalformed, PagesMissing
from chunking.frame import HEADER, Flags, Header
from chunking.limits import CHAINS_MAX, FRAME_RAW_BYTES_MAX, ZSTD_WINDOW_LOG_MAX
from chunking.pages import PAGE_BYTES
from chunking.regime import Regime
from tests.chunking.support import ENGINE, MemoryStore, Pair, of_pages, pieces

SLOTS = 16


def frames(seed: int, regime: Regime, store: MemoryStore | None = None) -> list[tuple[bytes, int]]:
    """Bodies of a made stream, with the stream bytes each stands for."""
    encoder = Encoder(SLOTS * PAGE_BYTES, 2, stored=store)
    bodies = []
    for raw, spans in pieces(seed, 3):
        body = encoder.press(encoder.plan(memoryview(raw), spans, regime))
        if body is not None:
            bodies.append((body, len(raw)))
    return bodies


def swallow(decoder: Decoder, body: bytes, raw_bytes: int) -> bytes:
    out = bytearray(raw_bytes)
    decoder.chain_of(body)
    decoder.rebuild(decoder.unpress(body, raw_bytes), memoryview(out))
    return bytes(out)


@given(data=st.data(), seed=st.integers(0, 50), regime=st.sampled_from(ENGINE))
def test_mutated_bodies(data: st.DataObject, seed: int, regime: Regime) -> None:
    store = MemoryStore([random.Random(seed).randbytes(PAGE_BYTES) for _ in range(3)], {3: 0, 4: 1, 5: 2})
    decoder = Decoder(SLOTS * PAGE_BYTES, stored=store)
    for body, raw_bytes in frames(seed, regime, store):
        bad = bytearray(body)
        for _ in range(data.draw(st.integers(0, 3))):
            bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
        cut = data.draw(st.integers(0, 2)) == 0
        bad = bad[: data.draw(st.integers(0, len(bad)))] if cut else bad
        try:
            swallow(decoder, bytes(bad), raw_bytes)
        except (FrameMalformed, PagesMissing):
            return


@given(body=st.binary(max_size=300), raw_bytes=st.integers(-1, FRAME_RAW_BYTES_MAX + 1))
def test_random_bodies(body: bytes, raw_bytes: int) -> None:
    decoder = Decoder(SLOTS * PAGE_BYTES)
    try:
        decoder.chain_of(body)
        decoder.unpress(body, raw_bytes)
    except FrameMalformed:
        return
    pytest.fail("random bytes are no frame")


@given(columns=st.data(), seed=st.integers(0, 30))
def test_random_columns_under_an_honest_header(columns: st.DataObject, seed: int) -> None:
    """What survives decompression: the columns themselves, mutated; kinds, locations, slots, masks and run lengths."""
    body, raw_bytes = frames(seed, Regime.DELTA)[0]
    header = Header.parse(body, raw_bytes)
    meta = bytearray(zstandard.ZstdDecompressor().decompressobj().decompress(body[HEADER.size :][: header.meta_bytes]))
    for _ in range(columns.draw(st.integers(1, 6))):
        place = columns.draw(st.integers(0, len(meta) - 1))
        meta[place] = columns.draw(st.sampled_from((0, 1, 2, 3, 4, 5, 127, 254, 255)))
    forged = forge(header, bytes(meta), body[HEADER.size + header.meta_bytes :])
    try:
        swallow(Decoder(SLOTS * PAGE_BYTES), forged, raw_bytes)
    except FrameMalformed:
        return


def forge(header: Header, meta: bytes, rest: bytes, flags: Flags | None = None) -> bytes:
    """A body with these columns, compressed as a stream's first block."""
    packed = zstandard.ZstdCompressor().compress(meta)
    flags = header.flags | Flags.META_RESET if flags is None else flags
    return header._replace(meta_bytes=len(packed), flags=flags).pack() + packed + rest


ONE_LITERAL = Header(0, Flags.META_RESET, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0)
ONE_PAGE = b"\x00\x00\x01\x03"  # one run of no other bytes, no words, one page; a literal

COUNTS: dict[str, Callable[[Header], Header]] = {
    "a chain out of range": lambda header: header._replace(chain=CHAINS_MAX),
    "more pages than raw bytes": lambda header: header._replace(literals=2),
    "fewer pages than raw bytes": lambda header: header._replace(literals=0),
    "another kind": lambda header: header._replace(literals=0, copies=1),
    "absurd runs": lambda header: header._replace(runs=2**32 - 1),
    "more runs than words": lambda header: header._replace(runs=514),
    "absurd large runs": lambda header: header._replace(large=2**32 - 1),
    "large runs that are none": lambda header: header._replace(large=1),
    "absurd other bytes": lambda header: header._replace(other=2**32 - 1),
    "absurd words": lambda header: header._replace(words=2**32 - 1),
    "words for pages": lambda header: header._replace(words=512, literals=0),
    "absurd changes": lambda header: header._replace(changed=2**32 - 1),
    "columns beyond the body": lambda header: header._replace(meta_bytes=2**32 - 1),
    "a slot out of range": lambda header: header._replace(first_slot=2**32 - 1, flags=header.flags | Flags.SLOTS),
    "a stream that never started": lambda header: header._replace(flags=Flags(0)),
    "literals that are no zstd": lambda header: header._replace(flags=header.flags | Flags.LITERALS_ZSTD),
}


@pytest.mark.parametrize("what", COUNTS)
def test_wrong_counts(what: str) -> None:
    page = random.Random(1).randbytes(PAGE_BYTES)
    honest = forge(ONE_LITERAL, ONE_PAGE, page)
    assert swallow(Decoder(SLOTS * PAGE_BYTES), honest, PAGE_BYTES) == page
    packed = honest[HEADER.size : -PAGE_BYTES]
    header = COUNTS[what](ONE_LITERAL._replace(meta_bytes=len(packed)))
    with pytest.raises(FrameMalformed):
        swallow(Decoder(SLOTS * PAGE_BYTES), header.pack() + packed + page, PAGE_BYTES)


def test_unknown_layouts_and_flags_are_refused() -> None:
    honest = bytearray(forge(ONE_LITERAL, ONE_PAGE, bytes(PAGE_BYTES)))
    for place, value in ((0, 2), (2, 64), (2, 128)):
        bad = bytearray(honest)
        bad[place] |= value
        with pytest.raises(FrameMalformed):
            swallow(Decoder(SLOTS * PAGE_BYTES), bytes(bad), PAGE_BYTES)


@pytest.mark.parametrize("kind", [1, 2, 4])
def test_locations_out_of_range(kind: int) -> None:
    """References, bases and copies beyond the cache and the stored pages; a reference to a stored page, too."""
    names = {1: "refs", 2: "deltas", 4: "copies"}
    header = ONE_LITERAL._replace(literals=0, **{names[kind]: 1})
    deltas = bytes(64) if kind == 2 else b""
    store = MemoryStore([b"a" * PAGE_BYTES])
    for location in (SLOTS + 1, 2**32 - 1, 2**31, *((SLOTS,) if kind == 1 else ()), *((3,) if kind == 4 else ())):
        meta = b"\x00\x00\x01" + bytes([kind]) + struct.pack("<I", location) + deltas
        with pytest.raises(FrameMalformed):
            swallow(Decoder(SLOTS * PAGE_BYTES, stored=store), forge(header, meta, b""), PAGE_BYTES)
    # Without a store there are no stored pages at all.
    meta = b"\x00\x00\x01" + bytes([kind]) + struct.pack("<I", SLOTS) + deltas
    with pytest.raises(FrameMalformed):
        swallow(Decoder(SLOTS * PAGE_BYTES), forge(header, meta, b""), PAGE_BYTES)


BOMB_BYTES = 1 << 30


def bomb() -> bytes:
    """A few dozen kilobytes of zstd that become a gibibyte."""
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    parts = [stream.compress(bytes(1 << 24)) for _ in range(BOMB_BYTES >> 24)]
    return b"".join([*parts, stream.flush()])


@pytest.mark.parametrize("where", ["columns", "literals"])
def test_bombs_stay_small(where: str) -> None:
    charge = bomb()
    if where == "columns":
        body = ONE_LITERAL._replace(meta_bytes=len(charge)).pack() + charge + bytes(PAGE_BYTES)
    else:
        body = forge(ONE_LITERAL, ONE_PAGE, charge, Flags.META_RESET | Flags.LITERALS_ZSTD | Flags.LITERALS_RESET)
    decoder = Decoder(SLOTS * PAGE_BYTES)
    tracemalloc.start()
    try:
        with pytest.raises(FrameMalformed, match="more bytes"):
            swallow(decoder, body, PAGE_BYTES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_header_that_promises_a_gibibyte_allocates_nothing() -> None:
    """A content size in the zstd header is the peer's word, too."""
    packed = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 26))
    assert zstandard.get_frame_parameters(packed).content_size == 1 << 26
    tracemalloc.start()
    try:
        with pytest.raises(FrameMalformed):
            DecompressStream().decompress(memoryview(packed), 4, reset=True)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_window_over_the_limit_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=ZSTD_WINDOW_LOG_MAX + 1)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = stream.compress(b"x" * 100) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    with pytest.raises(FrameMalformed, match="zstd"):
        DecompressStream().decompress(memoryview(packed), 100, reset=True)


def test_a_stream_gives_exactly_what_is_asked() -> None:
    data = random.Random(2).randbytes(1000)
    compressor = zstandard.ZstdCompressor().compressobj()
    first = compressor.compress(data) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    second = compressor.compress(data) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    for size in (999, 1001, 0):
        with pytest.raises(FrameMalformed):
            DecompressStream().decompress(memoryview(first), size, reset=True)
    with pytest.raises(FrameMalformed):
        DecompressStream().decompress(memoryview(first + second), 1000, reset=True)
    with pytest.raises(FrameMalformed):
        DecompressStream().decompress(memoryview(first[:-1]), 1000, reset=True)
    with pytest.raises(FrameMalformed):
        DecompressStream().decompress(memoryview(second), 1000, reset=False)
    stream = DecompressStream()
    assert stream.decompress(memoryview(first), 1000, reset=True).tobytes() == data
    assert stream.decompress(memoryview(second), 1000, reset=False).tobytes() == data


def test_missing_pages_change_nothing_and_can_be_given() -> None:
    """A frame refused for want of stored pages is rebuilt, once they are given, as if they had been there."""
    rng = random.Random(3)
    old = [rng.randbytes(PAGE_BYTES) for _ in range(4)]
    stream = [old[2], b"x" + old[0][1:], rng.randbytes(PAGE_BYTES), old[3], b"y" + old[1][1:]]
    raw, spans = of_pages(stream)
    spans = spans._replace(pfns=np.array([9, 0, 8, 7, 1], np.uint64))
    source, whole = MemoryStore(old, {0: 0, 1: 1}), MemoryStore(old)
    damaged = MemoryStore(old)
    damaged.lost = {1, 2}
    pair = Pair(SLOTS, 1, source)
    pair.decoder = Decoder(SLOTS * PAGE_BYTES, stored=damaged)
    twin = Decoder(SLOTS * PAGE_BYTES, stored=whole)
    plan = pair.encoder.plan(memoryview(raw), spans, Regime.FAST)
    body = pair.encoder.press(plan)
    assert body is not None
    out = bytearray(len(raw))
    pair.decoder.chain_of(body)
    unpressed = pair.decoder.unpress(body, len(raw))
    before = pair.decoder._cache.arena.copy()
    with pytest.raises(PagesMissing) as missing:
        pair.decoder.rebuild(unpressed, memoryview(out))
    assert missing.value.ordinals == (1, 2)
    assert out == bytes(len(raw))
    assert np.array_equal(pair.decoder._cache.arena, before)
    given_pages = {ordinal: plan.borrowed[ordinal] for ordinal in missing.value.ordinals}
    rebuilt = pair.decoder.rebuild(unpressed, memoryview(out), given=given_pages)
    assert out == raw
    assert swallow(twin, body, len(raw)) == raw
    assert np.array_equal(pair.decoder._cache.arena, twin._cache.arena)
    assert rebuilt.new.slots.tolist() == plan.new.slots.tolist()
    assert rebuilt.locations.tolist() == plan.locations.tolist()
    with pytest.raises(ValueError, match="4095"):
        pair.decoder.rebuild(unpressed, memoryview(out), given={1: b"", 2: bytes(4095)} | {1: bytes(4095)})


def test_rebuild_wants_its_own_size() -> None:
    body, raw_bytes = frames(1, Regime.FAST)[0]
    decoder = Decoder(SLOTS * PAGE_BYTES)
    decoder.chain_of(body)
    unpressed = decoder.unpress(body, raw_bytes)
    with pytest.raises(ValueError, match="for a frame of"):
        decoder.rebuild(unpressed, memoryview(bytearray(raw_bytes - 1)))

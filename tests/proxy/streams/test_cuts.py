"""However a stream is cut into reads, every byte is described once and the pages are the same ones.

Made streams of every format, the same with bytes changed or missing, random bytes, and real streams in small.
"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.streams.formats import recognise
from proxy.streams.parser import StreamParser, parser_for
from tests.proxy.streams.describing import Described, cut, describe, pieces_of
from tests.proxy.streams.made import STREAMS, vector

VECTORS = [
    "q10-plain.qemu",
    "q10-q35.qemu",
    "q10-bitmap.qemu",
    "q10-postcopy.qemu",
    "q10-ignore-shared.qemu",
    "q10-uuid.qemu",
    "q10-multifd-new-1.multifd",
    "q10-multifd-new-2.multifd",
    "q10-multifd-legacy-1.multifd",
    "q10-multifd-zlib.multifd",
    "xen417-pv.xlmig-up",
    "xen417-pvh.xlmig-up",
    "xen417-pv.xlsave",
]
SMALL = ["q10-multifd-new-1.multifd", "xen417-pv.xlsave"]
CUTS = st.lists(st.integers(0, 20_000), max_size=20)


def alike(one: Described, other: Described) -> bool:
    """The same pages; of a stream that no parser follows the moment of giving up may depend on the reads."""
    if one.facts.opaque_reason is None or other.facts.opaque_reason is None:
        return one.same(other)
    return (one.pages, one.marked, one.size) == (other.pages, other.marked, other.size)


@given(STREAMS, CUTS)
def test_made_streams_are_followed_to_their_end_however_they_are_cut(stream: bytes, cuts: list[int]) -> None:
    whole = describe(cut(stream))
    assert whole.facts.opaque_reason is None
    assert whole.facts.format is recognise(stream)
    assert describe(cut(stream, cuts)).same(whole)
    assert describe(cut(stream, cuts), parser_for(stream[:32])).same(whole)


@given(STREAMS, CUTS, st.integers(0, 20_000))
def test_truncated_streams_are_described_to_their_end(stream: bytes, cuts: list[int], size: int) -> None:
    stream = stream[:size]
    whole = describe(cut(stream))
    assert whole.facts.opaque_reason in (None, "unknown_format")
    assert describe(cut(stream, cuts)).same(whole)


@given(STREAMS, CUTS, st.lists(st.tuples(st.integers(0, 6000), st.integers(1, 255)), min_size=1, max_size=4))
def test_changed_streams_lose_no_byte(stream: bytes, cuts: list[int], changes: list[tuple[int, int]]) -> None:
    changed = bytearray(stream)
    for place, by in changes:
        changed[place % len(changed)] ^= by
    stream = bytes(changed)
    assert alike(describe(cut(stream, cuts)), describe(cut(stream)))


@given(
    st.sampled_from([b"", b"QEVM\0\0\0\3", b"LibxlFmt", b"\xff" * 8 + b"XENF\0\0\0\3", b"\x11\x22\x33\x44"]),
    st.binary(max_size=500),
    CUTS,
)
def test_random_bytes_are_described(head: bytes, data: bytes, cuts: list[int]) -> None:
    stream = head + data
    assert alike(describe(cut(stream, cuts)), describe(cut(stream)))


@given(STREAMS, st.integers(0, 6000), st.binary(max_size=30))
def test_bytes_put_in_between_lose_no_byte(stream: bytes, place: int, data: bytes) -> None:
    place %= len(stream)
    describe(cut(stream[:place] + data + stream[place:], [place, place + 1]))


@pytest.mark.parametrize("name", VECTORS)
def test_real_streams_say_the_same_however_they_are_cut(name: str) -> None:
    stream = vector(name)
    whole = describe(cut(stream))
    assert whole.facts.opaque_reason is None
    assert whole.size == len(stream)
    dice = random.Random(len(stream))
    for cuts in (3, 30, 300, 3000):
        places = [dice.randrange(len(stream)) for _ in range(cuts)]
        assert describe(cut(stream, places)).same(whole)


@pytest.mark.parametrize("name", SMALL)
def test_real_streams_byte_by_byte(name: str) -> None:
    stream = vector(name)
    assert describe(pieces_of(stream, 1)).same(describe(cut(stream)))


@pytest.mark.parametrize("name", VECTORS)
def test_real_streams_with_a_change_lose_no_byte(name: str) -> None:
    """Seeded: mostly within the first 64 KiB, where the structures are."""
    stream = vector(name)
    dice = random.Random(name)
    for _ in range(60):
        changed = bytearray(stream[: dice.choice([3000, 100_000])])
        for _ in range(dice.randrange(1, 4)):
            changed[dice.randrange(min(len(changed), dice.choice([200, 2000, 70_000])))] = dice.randrange(256)
        places = [dice.randrange(len(changed)) for _ in range(5)]
        assert alike(describe(cut(bytes(changed), places)), describe(cut(bytes(changed))))


@pytest.mark.parametrize("head", [b"Q", b"QEV", b"L", b"\xff" * 11, b"X", b"Xen saved domain, xl forma", b""])
def test_a_stream_that_ends_before_it_is_known_is_opaque(head: bytes) -> None:
    said = describe(pieces_of(head, 1))
    assert said.size == len(head)
    assert said.facts.opaque_reason == "unknown_format"


def test_while_the_format_is_not_known_the_bytes_are_counted() -> None:
    parser = StreamParser()
    for size in range(1, 4):
        parser.feed(memoryview(b"Q"), final=False) if size == 1 else None
    assert parser.facts.stream_bytes == 1
    parser.feed(memoryview(b"EVM\0"), final=False)
    assert parser.facts.stream_bytes == 5
    assert parser.facts.opaque_reason is None


def test_what_comes_after_the_end_is_opaque() -> None:
    parser = parser_for(b"QEVM")
    parser.feed(memoryview(b"QEVM\0\0\0\3"), final=True)
    spans = parser.feed(memoryview(b"more"), final=True)
    assert spans.used == 4
    assert (parser.facts.opaque_reason, parser.facts.opaque_bytes) == ("after_end", 4)

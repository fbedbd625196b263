"""Frames and acknowledgements: drawn byte by byte, frozen, and fuzzed."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.keys import Direction
from proxy.errors import ProtocolViolation
from proxy.limits import (
    ACK_ENTRIES_MAX,
    CHANNELS_MAX,
    FRAME_BODY_BYTES_MAX,
    FRAME_BODY_SLACK_BYTES,
    FRAME_BYTES_MAX,
)
from proxy.wire import (
    ACK_ENTRY,
    DIGEST_BYTES,
    FRAME_HEADER_BYTES,
    LANE_FIRST_BYTE,
    LANE_MAGIC,
    LANE_PREFIX_BYTES,
    LANE_TOKEN_BYTES,
    TLS_FIRST_BYTE,
    Ack,
    ChannelId,
    Codec,
    FrameFlags,
    FrameHeader,
    FrameKind,
    pack_acks,
    parse_acks,
)

VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parent.parent / "vectors" / "wire.json").read_text()
)

U64 = st.integers(0, 2**64 - 1)
CHANNELS = st.integers(0, CHANNELS_MAX - 1).map(ChannelId)
SIZES = st.integers(1, FRAME_BYTES_MAX)
DIGESTS = st.binary(min_size=16, max_size=16)

HEADERS = st.one_of(
    st.builds(
        lambda channel, direction, number, order, offset, size, digest: FrameHeader(
            FrameKind.DATA, Codec.OPAQUE, channel, direction, number, order, offset, size, size, digest
        ),
        CHANNELS,
        st.sampled_from(Direction),
        U64,
        U64,
        U64,
        SIZES,
        DIGESTS,
    ),
    st.builds(
        lambda channel, direction, number, order, offset, digest: FrameHeader(
            FrameKind.END, Codec.OPAQUE, channel, direction, number, order, offset, 0, DIGEST_BYTES, digest
        ),
        CHANNELS,
        st.sampled_from(Direction),
        U64,
        U64,
        U64,
        DIGESTS,
    ),
)
ACKS = st.builds(Ack, CHANNELS, st.sampled_from(Direction), U64, U64)

DATA = FrameHeader(FrameKind.DATA, Codec.OPAQUE, ChannelId(5), Direction.BACKWARD, 6, 7, 8, 9, 9, bytes(range(16)))


def pack(header: FrameHeader) -> bytes:
    buffer = bytearray(FRAME_HEADER_BYTES)
    header.pack_into(memoryview(buffer))
    return bytes(buffer)


# ------------------------------------------------------------------ layout


def test_the_frame_header_is_drawn_byte_by_byte() -> None:
    packed = pack(DATA)
    assert len(packed) == FRAME_HEADER_BYTES == 64
    fields = {
        "kind": (0, 1, 1),
        "codec": (1, 1, 0),
        "flags": (2, 2, 0),
        "channel": (4, 2, 5),
        "direction": (6, 1, 1),
        "reserved": (7, 1, 0),
        "number": (8, 8, 6),
        "cache order": (16, 8, 7),
        "offset": (24, 8, 8),
        "raw bytes": (32, 4, 9),
        "body bytes": (36, 4, 9),
        "spare": (56, 8, 0),
    }
    for name, (start, length, value) in fields.items():
        assert int.from_bytes(packed[start : start + length], "big") == value, name
    assert packed[40:56] == bytes(range(16))


def test_the_acknowledgement_is_drawn_byte_by_byte() -> None:
    packed = pack_acks([Ack(ChannelId(2), Direction.BACKWARD, 3, 4)])
    assert packed == struct.pack(">HBBQQ", 2, 1, 0, 3, 4)
    assert len(packed) == ACK_ENTRY.size == 20


def test_the_first_bytes_of_a_connection_tell_its_kind() -> None:
    assert TLS_FIRST_BYTE == 0x16
    assert LANE_FIRST_BYTE == ord("K") == LANE_MAGIC[0]
    assert LANE_MAGIC == b"KRL1"
    assert LANE_PREFIX_BYTES == len(LANE_MAGIC) + LANE_TOKEN_BYTES == 20


def test_values_on_the_wire() -> None:
    assert {kind.name: kind.value for kind in FrameKind} == {"DATA": 1, "END": 2}
    assert {codec.name: codec.value for codec in Codec} == {"OPAQUE": 0, "PAGES": 1}
    assert {flag.name: flag.value for flag in FrameFlags} == {"FIRST": 1, "LAST": 2}


# ------------------------------------------------------------------ frozen vectors


@pytest.mark.parametrize("vector", VECTORS["frames"], ids=lambda vector: vector["name"])
def test_frozen_frame_headers(vector: dict[str, Any]) -> None:
    parsed = FrameHeader.parse(bytes.fromhex(vector["bytes"]))
    fields = {**parsed._asdict(), "digest": parsed.digest.hex()}
    assert fields == vector["fields"]
    assert pack(parsed).hex() == vector["bytes"]


@pytest.mark.parametrize("vector", VECTORS["acks"], ids=lambda vector: vector["name"])
def test_frozen_acknowledgements(vector: dict[str, Any]) -> None:
    parsed = parse_acks(bytes.fromhex(vector["bytes"]))
    assert [ack._asdict() for ack in parsed] == vector["fields"]
    assert pack_acks(parsed).hex() == vector["bytes"]


# ------------------------------------------------------------------ round trip and fuzz


@given(HEADERS, st.binary(max_size=64))
def test_headers_round_trip(header: FrameHeader, behind: bytes) -> None:
    assert FrameHeader.parse(pack(header) + behind) == header
    assert FrameHeader.parse(memoryview(pack(header) + behind)) == header


@given(st.lists(ACKS, min_size=1, max_size=ACK_ENTRIES_MAX))
def test_acknowledgements_round_trip(acks: list[Ack]) -> None:
    assert parse_acks(pack_acks(acks)) == acks
    assert parse_acks(memoryview(pack_acks(acks))) == acks


def check_bounds(header: FrameHeader) -> None:
    """What a receiver may rely on after parsing."""
    assert 0 <= header.channel < CHANNELS_MAX
    assert 0 <= header.raw_bytes <= FRAME_BYTES_MAX
    if header.kind is FrameKind.END:
        assert (header.raw_bytes, header.body_bytes) == (0, DIGEST_BYTES)
    else:
        assert header.raw_bytes > 0
        most = header.raw_bytes + (FRAME_BODY_SLACK_BYTES if header.codec is Codec.PAGES else 0)
        assert 0 < header.body_bytes <= most
        assert header.codec is Codec.PAGES or header.body_bytes == header.raw_bytes


@settings(max_examples=200)
@given(st.binary(max_size=2 * FRAME_HEADER_BYTES))
def test_any_bytes_parse_within_bounds_or_violate_the_protocol(data: bytes) -> None:
    try:
        header = FrameHeader.parse(data)
    except ProtocolViolation:
        return
    check_bounds(header)


@settings(max_examples=200)
@given(HEADERS, st.integers(0, FRAME_HEADER_BYTES * 8 - 1))
def test_a_changed_header_parses_within_bounds_or_violates_the_protocol(header: FrameHeader, bit: int) -> None:
    packed = bytearray(pack(header))
    packed[bit // 8] ^= 1 << bit % 8
    try:
        changed = FrameHeader.parse(packed)
    except ProtocolViolation:
        return
    check_bounds(changed)
    assert changed != header, "no bit of a header is without meaning"
    assert pack(changed) == packed


@settings(max_examples=200)
@given(
    st.one_of(
        st.binary(max_size=100), st.integers(0, 80).flatmap(lambda n: st.binary(min_size=20 * n, max_size=20 * n))
    )
)
def test_any_bytes_are_acknowledgements_or_violate_the_protocol(data: bytes) -> None:
    try:
        acks = parse_acks(data)
    except ProtocolViolation:
        return
    assert 1 <= len(acks) <= ACK_ENTRIES_MAX
    assert all(0 <= ack.channel < CHANNELS_MAX for ack in acks)


# ------------------------------------------------------------------ limits


@pytest.mark.parametrize("length", range(FRAME_HEADER_BYTES))
def test_a_short_frame(length: int) -> None:
    with pytest.raises(ProtocolViolation):
        FrameHeader.parse(pack(DATA)[:length])


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        pytest.param(0, b"\0", id="kind 0"),
        pytest.param(0, b"\3", id="kind 3"),
        pytest.param(1, b"\2", id="codec"),
        pytest.param(2, b"\0\1", id="flags"),
        pytest.param(4, b"\0\x40", id="channel 64"),
        pytest.param(4, b"\xff\xff", id="last channel"),
        pytest.param(6, b"\2", id="direction"),
        pytest.param(7, b"\1", id="reserved byte"),
        pytest.param(32, bytes(4), id="empty data"),
        pytest.param(32, b"\0\0\0\x08", id="raw is not body"),
        pytest.param(36, b"\0\x40\0\1", id="body over the limit"),
        pytest.param(56, bytes(7) + b"\1", id="spare"),
    ],
)
def test_a_field_out_of_its_range(offset: int, value: bytes) -> None:
    packed = bytearray(pack(DATA))
    packed[offset : offset + len(value)] = value
    with pytest.raises(ProtocolViolation):
        FrameHeader.parse(packed)


def test_an_end_is_never_encoded() -> None:
    packed = bytearray(pack(DATA._replace(kind=FrameKind.END, raw_bytes=0, body_bytes=DIGEST_BYTES)))
    FrameHeader.parse(packed)
    packed[1] = 1
    with pytest.raises(ProtocolViolation):
        FrameHeader.parse(packed)


def test_a_frame_of_pages_may_be_shorter_or_a_little_longer_than_what_it_stands_for() -> None:
    paged = DATA._replace(codec=Codec.PAGES, raw_bytes=FRAME_BYTES_MAX)
    for body in (1, FRAME_BYTES_MAX, FRAME_BODY_BYTES_MAX):
        assert FrameHeader.parse(pack(paged._replace(body_bytes=body))).body_bytes == body
    for fields in ({"body_bytes": 0}, {"body_bytes": FRAME_BODY_BYTES_MAX + 1}, {"raw_bytes": 0}):
        with pytest.raises(ProtocolViolation):
            FrameHeader.parse(pack(paged._replace(**fields)))


def test_the_largest_frame_and_one_byte_more() -> None:
    largest = DATA._replace(raw_bytes=FRAME_BYTES_MAX, body_bytes=FRAME_BYTES_MAX)
    assert FrameHeader.parse(pack(largest)) == largest
    with pytest.raises(ProtocolViolation):
        FrameHeader.parse(pack(DATA._replace(raw_bytes=FRAME_BYTES_MAX + 1, body_bytes=FRAME_BYTES_MAX + 1)))


@pytest.mark.parametrize(("raw", "body"), [(1, DIGEST_BYTES), (0, 0), (0, DIGEST_BYTES - 1), (0, DIGEST_BYTES + 1)])
def test_an_end_carries_a_digest_and_nothing_else(raw: int, body: int) -> None:
    with pytest.raises(ProtocolViolation):
        FrameHeader.parse(pack(DATA._replace(kind=FrameKind.END, raw_bytes=raw, body_bytes=body)))


@pytest.mark.parametrize("length", [0, 1, 19, 21, 20 * ACK_ENTRIES_MAX + 20], ids=str)
def test_an_acknowledgement_record_of_a_wrong_length(length: int) -> None:
    with pytest.raises(ProtocolViolation):
        parse_acks(bytes(length))


@pytest.mark.parametrize(("channel", "direction"), [(CHANNELS_MAX, 0), (0, 2), (0xFFFF, 255)])
def test_an_acknowledgement_out_of_range(channel: int, direction: int) -> None:
    with pytest.raises(ProtocolViolation):
        parse_acks(ACK_ENTRY.pack(channel, direction, 0, 0))

"""Control messages: round trip, frozen bytes, limits, and a reader that meets arbitrary bytes in arbitrary pieces."""

import json
import struct
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunking.limits import SEGMENT_PAGES_MAX
from crypto.receipts.limits import HEADS_ASKED_MAX
from proxy.control import (
    Abort,
    Accept,
    Attested,
    Bank,
    Challenge,
    ChannelOpen,
    ChannelOpened,
    ChannelState,
    Countersigned,
    Evidence,
    Facts,
    Finish,
    Finished,
    Heartbeat,
    LaneGrant,
    LaneGranted,
    LaneLost,
    LaneProgress,
    LaneRequest,
    LogHead,
    Message,
    MessageReader,
    Offer,
    PagesGiven,
    PagesWanted,
    Recover,
    Refuse,
    Resume,
    Resumed,
    Shown,
    Standing,
    Statement,
    StoredSegment,
    Survey,
    Surveyed,
    VtpmGiven,
    VtpmProved,
    VtpmWanted,
    Wanted,
    Word,
    encode,
    printable,
)
from proxy.errors import ProtocolViolation
from proxy.limits import (
    CHANNELS_MAX,
    CONTROL_MESSAGE_BYTES_MAX,
    FACTS_TEXT_CHARACTERS_MAX,
    FEATURES_MAX,
    FINDINGS_MAX,
    KIB,
    LANES_MAX,
    PAGES_GIVEN_MAX,
    PAGES_WANTED_MAX,
    REASON_CHARACTERS_MAX,
    SEGMENTS_MAX,
    VTPM_BYTES_MAX,
    VTPM_PART_BYTES,
    VTPM_PROOF_BYTES_MAX,
)
from proxy.preflight import CHECKS, GRADES, Finding, HostFacts

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent.parent / "vectors" / "control.json").read_text())[
    "messages"
]

U16 = st.integers(0, 0xFFFF)
U63 = st.integers(0, 2**63 - 1)
CHANNELS = st.integers(0, CHANNELS_MAX - 1)
IDS = st.binary(min_size=16, max_size=16)
REASONS = st.text(max_size=REASON_CHARACTERS_MAX)
INDICES = st.lists(st.integers(0, 23), min_size=1, max_size=24).map(tuple)
WANTED = st.builds(
    Wanted,
    st.lists(st.builds(Bank, st.sampled_from(["sha1", "sha256"]), INDICES), min_size=1, max_size=4).map(tuple),
    st.booleans(),
    st.booleans(),
)
NUMBERS = st.lists(U16, min_size=1, max_size=16).map(tuple)
GRANTS = st.builds(LaneGrant, U16, IDS)
EGRESSES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)
FLAGS = st.text("edp", max_size=3)
LANES = st.integers(1, LANES_MAX)
PROOFS = st.binary(min_size=32, max_size=32)
STATES = st.lists(st.builds(ChannelState, CHANNELS, U63, U63, opened=st.booleans()), max_size=CHANNELS_MAX).map(tuple)
CHAINS = st.integers(1, 16)
TENANTS = st.from_regex(r"([A-Za-z0-9][A-Za-z0-9._-]{0,62})?", fullmatch=True)
SEGMENTS = st.lists(st.builds(StoredSegment, IDS, st.integers(0, SEGMENT_PAGES_MAX)), max_size=SEGMENTS_MAX).map(tuple)
KINDS = st.sampled_from(["", "xl", "qmp"])
STANDINGS = st.sampled_from(get_args(Standing))
PHASES = st.sampled_from(["open", "finishing", "closed"])

RECEIPTS = st.binary(max_size=2000)
EVIDENCE = st.none() | st.builds(
    Evidence, RECEIPTS, st.binary(max_size=600), st.lists(U63, max_size=HEADS_ASKED_MAX).map(tuple)
)
PATHS = st.lists(st.lists(PROOFS, max_size=20).map(tuple), max_size=HEADS_ASKED_MAX).map(tuple)
HEADS = st.builds(LogHead, st.text(max_size=200), PATHS)
COUNTS = st.integers(-1, 2**63 - 1)
FEATURES = st.lists(st.sampled_from(["sse2", "avx512_vnni", "sha_ni"]), max_size=FEATURES_MAX // 4).map(tuple)
LABELS = st.text(max_size=FACTS_TEXT_CHARACTERS_MAX)
HOSTS = st.builds(
    HostFacts,
    *(LABELS, st.sampled_from(["", "kvm", "none", "xen"]), LABELS, LABELS, LABELS, LABELS, FEATURES, FEATURES),
    *(COUNTS, st.booleans(), COUNTS, st.sampled_from(["", "1.2", "2.0"]), COUNTS),
)
FINDINGS = st.builds(Finding, st.sampled_from(CHECKS), st.sampled_from(GRADES), REASONS, REASONS)

MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Offer,
        *(U16, IDS, NUMBERS, NUMBERS, EGRESSES, LANES, U16, FLAGS, U63, CHAINS, TENANTS, SEGMENTS, KINDS, EVIDENCE),
        vtpm=st.booleans(),
        host=st.none() | HOSTS,
    ),
    st.builds(
        Accept,
        U16,
        U16,
        st.lists(GRANTS, min_size=1, max_size=LANES_MAX).map(tuple),
        U16,
        IDS,
        U63,
        CHAINS,
        SEGMENTS,
        KINDS,
        EVIDENCE,
        st.none() | HEADS,
        st.booleans(),
        st.none() | HOSTS,
    ),
    st.builds(PagesWanted, U63, st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=PAGES_WANTED_MAX).map(tuple)),
    st.builds(
        PagesGiven,
        U63,
        st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=PAGES_GIVEN_MAX).map(tuple),
        st.binary(max_size=5000),
    ),
    st.builds(Refuse, U16, REASONS),
    st.builds(Resume, U16, IDS, PROOFS, U63, STATES),
    st.builds(Resumed, PROOFS, U63, STATES, st.lists(GRANTS, max_size=LANES_MAX).map(tuple), PHASES),
    st.builds(LaneLost, U16),
    st.builds(LaneRequest),
    st.builds(LaneGranted, GRANTS),
    st.builds(ChannelOpen, CHANNELS, U63),
    st.builds(ChannelOpened, CHANNELS, U63),
    st.builds(Heartbeat, U63, st.lists(st.builds(LaneProgress, U16, U63), max_size=LANES_MAX).map(tuple)),
    st.builds(Shown, HEADS),
    st.builds(Facts, RECEIPTS),
    st.builds(Statement, RECEIPTS),
    st.builds(Countersigned, RECEIPTS),
    st.builds(VtpmWanted, st.binary(min_size=1216, max_size=1216)),
    st.builds(VtpmGiven, RECEIPTS, st.integers(0, 63)),
    st.builds(VtpmProved, RECEIPTS),
    st.builds(Finish, RECEIPTS),
    st.builds(Finished, RECEIPTS),
    st.builds(Word, STANDINGS, REASONS),
    st.builds(Challenge, U16, IDS, st.binary(min_size=32, max_size=32), st.none() | WANTED),
    st.builds(Attested, st.binary(max_size=64), st.booleans(), st.binary(max_size=32), st.none() | WANTED),
    st.builds(Recover, U16, IDS, STANDINGS, REASONS),
    st.builds(Survey, U16, EGRESSES, HOSTS, COUNTS),
    st.builds(Surveyed, st.none() | HOSTS, st.lists(FINDINGS, max_size=3).map(tuple)),
    st.builds(Abort, U16, REASONS),
)


def framed(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` cut at those offsets."""
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


# ------------------------------------------------------------------ round trip


@settings(max_examples=150)
@given(st.lists(MESSAGES, max_size=8), st.lists(st.integers(0, 10_000), max_size=12))
def test_messages_survive_any_cuts(messages: list[Message], cuts: list[int]) -> None:
    reader = MessageReader()
    stream = b"".join(encode(message) for message in messages)
    heard: list[Message] = []
    for piece in pieces(stream, cuts):
        heard += reader.feed(piece)
    assert heard == messages
    assert not reader.partial


@given(MESSAGES)
def test_no_message_reaches_the_limit(message: Message) -> None:
    assert len(encode(message)) <= CONTROL_MESSAGE_BYTES_MAX / 8


def test_the_most_pages_in_one_message_stay_below_the_limit() -> None:
    ordinals = tuple(2**32 - 1 - n for n in range(PAGES_GIVEN_MAX))
    assert len(encode(PagesGiven(2**63 - 1, ordinals, bytes(4096 * PAGES_GIVEN_MAX)))) <= CONTROL_MESSAGE_BYTES_MAX


def test_the_most_of_a_vtpm_in_one_message_stays_below_the_limit() -> None:
    assert len(encode(VtpmGiven(bytes(VTPM_PART_BYTES), 63))) <= CONTROL_MESSAGE_BYTES_MAX
    assert len(encode(VtpmProved(bytes(VTPM_PROOF_BYTES_MAX)))) <= CONTROL_MESSAGE_BYTES_MAX
    assert VTPM_BYTES_MAX <= 64 * VTPM_PART_BYTES


def test_a_message_byte_by_byte() -> None:
    reader = MessageReader()
    stream = encode(Heartbeat(1, ()))
    for byte in stream[:-1]:
        assert reader.feed(bytes([byte])) == []
        assert reader.partial
    assert reader.feed(stream[-1:]) == [Heartbeat(1, ())]
    assert not reader.partial


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_frozen_messages(vector: dict[str, Any]) -> None:
    (message,) = MessageReader().feed(bytes.fromhex(vector["bytes"]))
    assert type(message).__name__ == vector["name"]
    assert json.loads(msgspec.json.encode(message)) == vector["fields"]
    assert encode(message).hex() == vector["bytes"]


def test_every_message_is_frozen() -> None:
    assert {vector["name"] for vector in VECTORS} == {kind.__name__ for kind in Message.__args__}  # type: ignore[attr-defined]


# ------------------------------------------------------------------ limits


def refuse(body: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        MessageReader().feed(framed(body))


def altered(message: Message, **fields: object) -> bytes:
    """The message's own encoding with other fields."""
    plain = msgspec.msgpack.decode(encode(message)[4:])
    return msgspec.msgpack.encode({**plain, **fields})


OFFER = Offer(1, bytes(16), (1,), (0,), "default", 1, 30)
ACCEPT = Accept(1, 0, (LaneGrant(0, bytes(16)),), 30, bytes(16))
RECOVER = Recover(1, bytes(16), "voted")
SURVEY = Survey(1, "default", HostFacts())
SURVEYED = Surveyed(None, ())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("session", bytes(15)),
        ("session", bytes(17)),
        ("session", "x" * 16),
        ("suites", []),
        ("suites", [1] * 17),
        ("suites", [65536]),
        ("codecs", []),
        ("lanes", 0),
        ("lanes", LANES_MAX + 1),
        ("lanes", -1),
        ("lanes", 1.5),
        ("version", 65536),
        ("resume_seconds", -1),
        ("egress", ""),
        ("egress", "../../etc"),
        ("egress", "a" * 64),
        ("egress", "name\n"),
        ("egress", "a b"),
        ("egress", "exec:sh"),
        ("cache_bytes", -1),
        ("chains", 0),
        ("chains", 17),
        ("tenant", "../other"),
        ("tenant", "name\n"),
        ("tenant", "t" * 64),
        ("xl_flags", "x"),
        ("xl_flags", "eeee"),
        ("xl_flags", "e\n"),
        ("handover", "libvirt"),
        ("handover", "xl\n"),
        ("handover", None),
        ("unknown", 1),
        ("type", "offer2"),
        ("type", None),
    ],
)
def test_an_offer_out_of_bounds(field: str, value: object) -> None:
    """The egress is a name of the destination's own table: no path, no command, no control character gets that far."""
    assert MessageReader().feed(framed(altered(OFFER))) == [OFFER]
    refuse(altered(OFFER, **{field: value}))


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (ChannelOpen(0, 1), "channel", CHANNELS_MAX),
        (ChannelOpen(0, 1), "channel", -1),
        (ChannelOpened(0, 1), "credit", 2**63),
        (ChannelOpened(0, 1), "credit", -1),
        (Heartbeat(0, ()), "lanes", [{"lane": 0, "sent_bytes": 0}] * (LANES_MAX + 1)),
        (Heartbeat(0, ()), "lanes", [{"lane": 0}]),
        (ACCEPT, "lanes", []),
        (LaneGranted(LaneGrant(0, bytes(16))), "grant", {"lane": 0, "token": bytes(15)}),
        (LaneGranted(LaneGrant(0, bytes(16))), "grant", {"lane": 65536, "token": bytes(16)}),
        (Abort(7, ""), "reason", "x" * (REASON_CHARACTERS_MAX + 1)),
        (ACCEPT, "chains", 0),
        (ACCEPT, "segments", [{"name": bytes(15), "pages": 1}]),
        (ACCEPT, "segments", [{"name": bytes(16), "pages": SEGMENT_PAGES_MAX + 1}]),
        (ACCEPT, "segments", [{"name": bytes(16), "pages": 1}] * (SEGMENTS_MAX + 1)),
        (PagesWanted(0, (1,)), "ordinals", []),
        (PagesWanted(0, (1,)), "ordinals", [1] * (PAGES_WANTED_MAX + 1)),
        (PagesWanted(0, (1,)), "ordinals", [2**32]),
        (PagesGiven(0, (1,), bytes(4096)), "ordinals", []),
        (PagesGiven(0, (1,), bytes(4096)), "ordinals", [1] * (PAGES_GIVEN_MAX + 1)),
        (PagesGiven(0, (1,), bytes(4096)), "pages", bytes(PAGES_GIVEN_MAX * 4096 + 1)),
        (ACCEPT, "handover", "x"),
        (Word("voted"), "state", "undoing"),
        (Word("voted"), "state", ""),
        (Word("voted"), "state", 4),
        (Word("voted"), "why", "x" * (REASON_CHARACTERS_MAX + 1)),
        (Word("voted"), "session", bytes(16)),
        (RECOVER, "state", "undoing"),
        (RECOVER, "session", bytes(15)),
        (RECOVER, "session", "../../../etc/passwd"),
        (RECOVER, "version", 65536),
        (RECOVER, "why", "x" * (REASON_CHARACTERS_MAX + 1)),
        (SURVEY, "version", 65536),
        (SURVEY, "egress", "exec:sh"),
        (SURVEY, "need_bytes", -2),
        (SURVEY, "need_bytes", 2**63),
        (SURVEY, "host", None),
        (SURVEY, "host", {"unknown": 1}),
        (SURVEY, "host", {"relay": "x" * (FACTS_TEXT_CHARACTERS_MAX + 1)}),
        (SURVEY, "host", {"hypervisor": "vmware"}),
        (SURVEY, "host", {"features": ["sse2"] * (FEATURES_MAX + 1)}),
        (SURVEY, "host", {"features": ["x" * 25]}),
        (SURVEY, "host", {"features": ["\x1b[2J"]}),
        (SURVEY, "host", {"features": ["sse2\n"]}),
        (SURVEY, "host", {"virtualisation": "vmx"}),
        (SURVEY, "host", {"memory_free_bytes": -2}),
        (SURVEY, "host", {"room_bytes": 2**63}),
        (SURVEY, "host", {"clock_ms": 1.5}),
        (SURVEY, "host", {"tpm": "3"}),
        (OFFER, "host", {"relay": 7}),
        (ACCEPT, "host", {"cpu": "x" * (FACTS_TEXT_CHARACTERS_MAX + 1)}),
        (SURVEYED, "findings", [{"check": "cpu", "grade": "ok", "says": ""}] * (FINDINGS_MAX + 1)),
        (SURVEYED, "findings", [{"check": "cpu", "grade": "good", "says": ""}]),
        (SURVEYED, "findings", [{"check": "\x1b", "grade": "ok", "says": ""}]),
        (SURVEYED, "findings", [{"check": "cpu", "grade": "ok", "says": "x" * (REASON_CHARACTERS_MAX + 1)}]),
        (Refuse(3, ""), "code", 65536),
        (Refuse(3, ""), "reason", b"bytes"),
    ],
)
def test_a_field_out_of_bounds(message: Message, field: str, value: object) -> None:
    refuse(altered(message, **{field: value}))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc0", id="nil"),
        pytest.param(b"\x80", id="no type"),
        pytest.param(b"\x93\x01\x02\x03", id="array"),
        pytest.param(msgspec.msgpack.encode({"type": "finish"}) + b"\x00", id="trailing byte"),
        pytest.param(msgspec.msgpack.encode({"kind": "finish"}), id="no tag"),
        pytest.param(b"\x81\xa4type\xa6\xff\xff\xff\xff\xff\xff", id="tag is no UTF-8"),
        pytest.param(b"\x91" * 60_000, id="deep arrays"),
        pytest.param(b"\x81\xa4type" * 10_000, id="deep maps"),
        pytest.param(b"\x82\xa4type\xa6finish\xa1x" + b"\x91" * 60_000, id="deep behind a type"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="endless array"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="endless map"),
        pytest.param(b"\xc9\xff\xff\xff\xff\x00", id="endless extension"),
        pytest.param(b"\xd6\xff\x00\x00\x00\x00", id="timestamp"),
        pytest.param(b"\xcf" + b"\xff" * 8, id="integer"),
        pytest.param(b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00", id="not a number"),
    ],
)
def test_a_body_that_is_no_message(body: bytes) -> None:
    refuse(body)


def test_a_length_over_the_limit_is_refused_by_its_four_bytes() -> None:
    for length in (CONTROL_MESSAGE_BYTES_MAX + 1, 2**31, 2**32 - 1):
        reader = MessageReader()
        prefix = struct.pack(">I", length)
        assert reader.feed(prefix[:3]) == []
        with pytest.raises(ProtocolViolation, match=str(length)):
            reader.feed(prefix[3:])


def test_what_came_before_a_violation_is_not_acted_on() -> None:
    reader = MessageReader()
    with pytest.raises(ProtocolViolation):
        reader.feed(encode(Finish()) + framed(b"\xc0"))


# ------------------------------------------------------------------ fuzz


PLAIN = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary(max_size=50)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
TAGS = st.sampled_from([kind.__struct_config__.tag for kind in Message.__args__])  # type: ignore[attr-defined]
TYPED = st.builds(
    lambda tag, body: {"type": tag, **body},
    TAGS,
    st.dictionaries(
        st.sampled_from(
            [
                "version",
                "session",
                "lanes",
                "lane",
                "credit",
                "channel",
                "code",
                "reason",
                "grant",
                "number",
                "state",
                "why",
            ]
        ),
        PLAIN,
        max_size=4,
    ),
)
BODIES = st.one_of(st.binary(max_size=200), st.one_of(PLAIN, TYPED).map(msgspec.msgpack.encode))


@settings(max_examples=200)
@given(st.lists(st.one_of(BODIES.map(framed), st.binary(max_size=20)), max_size=5), st.lists(st.integers(0, 999)))
def test_arbitrary_bytes_are_messages_or_violate_the_protocol(stream: list[bytes], cuts: list[int]) -> None:
    reader = MessageReader()
    try:
        for piece in pieces(b"".join(stream), cuts):
            for message in reader.feed(piece):
                assert isinstance(message, Message.__args__)  # type: ignore[attr-defined]
    except ProtocolViolation:
        return


@settings(max_examples=100)
@given(MESSAGES, st.integers(0, 10**6), st.integers(1, 255))
def test_a_changed_byte_is_another_message_or_violates_the_protocol(message: Message, where: int, mask: int) -> None:
    stream = bytearray(encode(message))
    stream[4 + where % (len(stream) - 4)] ^= mask
    try:
        heard = MessageReader().feed(bytes(stream))
    except ProtocolViolation:
        return
    for other in heard:
        assert MessageReader().feed(encode(other)) == [other]


def test_a_message_that_never_ends_holds_a_bounded_buffer() -> None:
    """The largest length there may be, its body in dribs and drabs, never the last byte."""
    reader = MessageReader()
    tracemalloc.start()
    try:
        reader.feed(struct.pack(">I", CONTROL_MESSAGE_BYTES_MAX))
        for _ in range(CONTROL_MESSAGE_BYTES_MAX // KIB - 1):
            assert reader.feed(bytes(KIB)) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * CONTROL_MESSAGE_BYTES_MAX
    with pytest.raises(ProtocolViolation):
        reader.feed(bytes(KIB))


def test_a_flood_of_messages_leaves_nothing_behind() -> None:
    reader = MessageReader()
    stream = encode(LaneRequest()) * 1000
    for _ in range(20):
        assert len(reader.feed(stream)) == 1000
    assert not reader.partial


# ------------------------------------------------------------------ a peer's words


@given(st.text(max_size=2000))
def test_a_peers_words_are_one_short_printable_line(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) == min(len(text), REASON_CHARACTERS_MAX)
    assert printable(shown) == shown


def test_escape_sequences_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[2Jb\r\nc\u202ed") == "a?[2Jb??c?d"

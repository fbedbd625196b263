"""Sealed records: the layout by hand, frozen vectors, and everything a tamperer may try on one lane."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto import records
from crypto.errors import (
    EpochInvalid,
    IntegrityError,
    KeyExhausted,
    RecordAfterFinal,
    RecordForged,
    RecordGap,
    RecordMalformed,
    RecordOutOfOrder,
    RecordReplayed,
    RecordTooLarge,
)
from crypto.keys import EpochKeys, LaneId, Suite
from crypto.records import (
    EPOCH_BYTES_HARD,
    EPOCH_BYTES_SOFT,
    HEADER_BYTES,
    OVERHEAD_BYTES,
    PAYLOAD_BYTES_MAX,
    TAG_BYTES,
    Opener,
    RecordHeader,
    RecordType,
    Sealer,
)
from tests.crypto import oracle

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent.parent / "vectors" / "records.json").read_text())[
    "lanes"
]
VECTOR_EPOCH_BYTES_SOFT = 200  # small, so that the vectors step through three epochs

SECRET = bytes(range(32))
LANE = LaneId(3)
SUITES = pytest.mark.parametrize("suite", list(Suite), ids=lambda suite: suite.label)
ONE_SHOT = {Suite.AES_256_GCM: AESGCM, Suite.CHACHA20_POLY1305: ChaCha20Poly1305}


def sealer(suite: Suite = Suite.AES_256_GCM, *, soft: int = EPOCH_BYTES_SOFT, epoch: int = 0) -> Sealer:
    return Sealer(EpochKeys(suite, SECRET, epoch), LANE, epoch_bytes_soft=soft)


def opener(suite: Suite = Suite.AES_256_GCM, *, hard: int = EPOCH_BYTES_HARD, epoch: int = 0) -> Opener:
    return Opener(EpochKeys(suite, SECRET, epoch), LANE, epoch_bytes_hard=hard)


def open_record(receiver: Opener, record: bytes | bytearray) -> tuple[RecordHeader, bytes]:
    """What a lane does with a record's bytes: it waits until there are as many as the header says, of whatever kind."""
    header_bytes, body = bytes(record[:HEADER_BYTES]), bytes(record[HEADER_BYTES:])
    header = receiver.parse_header(header_bytes)
    body = body.ljust(header.body_bytes, b"\0")[: header.body_bytes]
    out = bytearray(header.length)
    receiver.open_into(header, header_bytes, memoryview(body), memoryview(out))
    return header, bytes(out)


def flipped(record: bytes | bytearray, bit: int) -> bytes:
    copy = bytearray(record)
    copy[bit // 8] ^= 1 << bit % 8
    return bytes(copy)


# ------------------------------------------------------------------ layout


def test_the_header_is_drawn_byte_by_byte() -> None:
    sender = sealer()
    sender.seal(RecordType.HELLO)
    record = bytes(sender.seal(RecordType.FRAME, b"payload", flags=0x0102))
    assert struct.calcsize(">BBHHHQI") == HEADER_BYTES == 20
    assert record[0:1] == b"\x01"  # version
    assert record[1:2] == b"\x03"  # type: FRAME
    assert record[2:4] == b"\x01\x02"  # flags
    assert record[4:6] == b"\x00\x03"  # lane
    assert record[6:8] == b"\x00\x00"  # epoch
    assert record[8:16] == bytes(7) + b"\x01"  # sequence
    assert record[16:20] == b"\x00\x00\x00\x07"  # ciphertext without its tag
    assert len(record) == HEADER_BYTES + 7 + TAG_BYTES


def test_types_and_limits_are_those_of_the_documents() -> None:
    assert {kind.name: kind.value for kind in RecordType} == {
        "HELLO": 1,
        "LANE_OK": 2,
        "FRAME": 3,
        "ACK": 4,
        "FINAL": 5,
    }
    assert EPOCH_BYTES_SOFT == 64 * 2**30
    assert EPOCH_BYTES_HARD == 256 * 2**30
    assert OVERHEAD_BYTES == HEADER_BYTES + TAG_BYTES == 36


@SUITES
def test_a_record_is_one_aead_call_over_hand_built_parts(suite: Suite) -> None:
    epoch = oracle.epochs(SECRET, 1)[0]
    sender = sealer(suite)
    for sequence, payload in enumerate([b"", b"x", bytes(1000)]):
        record = bytes(sender.seal(RecordType.FRAME, payload, flags=3))
        header = oracle.RECORD_HEADER.pack(1, 3, 3, LANE, 0, sequence, len(payload))
        assert record[:HEADER_BYTES] == header
        nonce = oracle.nonce(epoch.iv, sequence)
        assert record[HEADER_BYTES:] == ONE_SHOT[suite](epoch.key).encrypt(nonce, payload, header)
        assert ONE_SHOT[suite](epoch.key).decrypt(nonce, record[HEADER_BYTES:], header) == payload


# ------------------------------------------------------------------ frozen vectors


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: Suite(vector["suite"]).label)
def test_sealing_gives_the_frozen_records(vector: dict[str, Any]) -> None:
    """Changing one of these breaks every peer of an older version: raise the record's version instead."""
    keys = EpochKeys(Suite(vector["suite"]), bytes.fromhex(vector["secret"]))
    sender = Sealer(keys, LaneId(vector["lane"]), epoch_bytes_soft=VECTOR_EPOCH_BYTES_SOFT)
    for record in vector["records"]:
        sealed = sender.seal(RecordType(record["type"]), bytes.fromhex(record["payload"]), record["flags"])
        assert sealed.hex() == record["record"]
        assert sender.epoch == record["epoch"]
    assert sender.final


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: Suite(vector["suite"]).label)
def test_frozen_records_open(vector: dict[str, Any]) -> None:
    keys = EpochKeys(Suite(vector["suite"]), bytes.fromhex(vector["secret"]))
    receiver = Opener(keys, LaneId(vector["lane"]))
    for number, record in enumerate(vector["records"]):
        header, payload = open_record(receiver, bytes.fromhex(record["record"]))
        assert (int(header.type), header.flags, payload.hex()) == (record["type"], record["flags"], record["payload"])
        assert (header.sequence, receiver.records, receiver.epoch) == (number, number + 1, record["epoch"])
    assert receiver.final


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: Suite(vector["suite"]).label)
def test_frozen_records_open_without_the_product(vector: dict[str, Any]) -> None:
    made = oracle.epochs(bytes.fromhex(vector["secret"]), 3)
    for sequence, record in enumerate(vector["records"]):
        sealed, epoch = bytes.fromhex(record["record"]), made[record["epoch"]]
        header = oracle.RECORD_HEADER.pack(
            1, record["type"], record["flags"], vector["lane"], record["epoch"], sequence, len(record["payload"]) // 2
        )
        aead = ONE_SHOT[Suite(vector["suite"])](epoch.key)
        assert aead.decrypt(oracle.nonce(epoch.iv, sequence), sealed[20:], header).hex() == record["payload"]


# ------------------------------------------------------------------ round trip


@given(
    suite=st.sampled_from(Suite),
    soft=st.integers(1, 400),
    script=st.lists(
        st.tuples(st.sampled_from([RecordType.FRAME, RecordType.ACK]), st.integers(0, 0xFFFF), st.binary(max_size=200)),
        max_size=20,
    ),
)
def test_whatever_is_sealed_opens_in_order(
    suite: Suite, soft: int, script: list[tuple[RecordType, int, bytes]]
) -> None:
    sender, receiver = sealer(suite, soft=soft), opener(suite)
    for kind, flags, payload in script:
        header, opened = open_record(receiver, sender.seal(kind, payload, flags))
        assert (header.type, header.flags, header.lane, opened) == (kind, flags, LANE, payload)
        assert (receiver.epoch, receiver.epoch_bytes, receiver.records) == (
            sender.epoch,
            sender.epoch_bytes,
            sender.records,
        )
    assert not receiver.final
    open_record(receiver, sender.seal(RecordType.FINAL))
    assert receiver.final
    assert sender.final


@SUITES
def test_seal_into_needs_no_more_room_than_it_says(suite: Suite) -> None:
    payload = memoryview(bytes(range(256)))
    out = bytearray(b"\xee" * (len(payload) + OVERHEAD_BYTES + 8))
    total = sealer(suite).seal_into(RecordType.FRAME, 0, payload, memoryview(out))
    assert total == len(payload) + OVERHEAD_BYTES
    assert out[total:] == b"\xee" * 8, "nothing is written behind the record"
    assert open_record(opener(suite), out[:total])[1] == payload


def test_the_largest_payload_passes_and_one_byte_more_does_not() -> None:
    sender, receiver = sealer(), opener()
    largest = bytes(PAYLOAD_BYTES_MAX)
    assert open_record(receiver, sender.seal(RecordType.FRAME, largest))[1] == largest
    with pytest.raises(RecordTooLarge):
        sender.seal(RecordType.FRAME, largest + b"x")
    assert sender.records == 1, "a refused payload uses no number"
    header = oracle.RECORD_HEADER.pack(1, 3, 3, LANE, 0, 1, PAYLOAD_BYTES_MAX + 1)
    with pytest.raises(RecordTooLarge):
        receiver.parse_header(header)


# ------------------------------------------------------------------ order


def test_replay_gap_and_swap_are_errors_of_their_own() -> None:
    sender, receiver = sealer(), opener()
    first, second, third = (bytes(sender.seal(RecordType.FRAME, bytes([n]))) for n in range(3))
    open_record(receiver, first)
    with pytest.raises(RecordReplayed):
        open_record(receiver, first)
    with pytest.raises(RecordGap):
        open_record(receiver, third)
    assert issubclass(RecordReplayed, RecordOutOfOrder)
    assert issubclass(RecordGap, RecordOutOfOrder)
    open_record(receiver, second)
    open_record(receiver, third)


def test_a_number_that_was_rewritten_does_not_authenticate() -> None:
    """The header's number is only a hint; the nonce comes from the receiver's own count, and the header is AAD."""
    sender, receiver = sealer(), opener()
    first = sender.seal(RecordType.FRAME, b"first")
    second = sender.seal(RecordType.FRAME, b"second")
    second[8:16] = first[8:16]
    with pytest.raises(RecordForged):
        open_record(receiver, second)
    open_record(receiver, first)


def test_nothing_follows_final() -> None:
    sender, receiver = sealer(), opener()
    final = sender.seal(RecordType.FINAL)
    with pytest.raises(RecordAfterFinal):
        sender.seal(RecordType.FRAME, b"x")
    open_record(receiver, final)
    other = Sealer(EpochKeys(Suite.AES_256_GCM, SECRET), LANE)
    other.seal(RecordType.FRAME)
    with pytest.raises(RecordAfterFinal):
        open_record(receiver, other.seal(RecordType.FRAME, b"more"))


def test_a_final_that_is_not_authentic_ends_nothing() -> None:
    receiver = opener()
    record = sealer().seal(RecordType.FRAME, b"x")
    record[1] = RecordType.FINAL
    with pytest.raises(RecordForged):
        open_record(receiver, record)
    assert not receiver.final


# ------------------------------------------------------------------ wrong records


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0, 0), (0, 2), (1, 0), (1, 6), (1, 255), (4, 1), (5, 2)],
    ids=["version 0", "version 2", "type 0", "type 6", "type 255", "lane 259", "lane 2"],
)
def test_a_header_that_cannot_be_right(offset: int, value: int) -> None:
    record = sealer().seal(RecordType.FRAME, b"x")
    record[offset] = value
    with pytest.raises(RecordMalformed):
        opener().parse_header(record[:HEADER_BYTES])


def test_a_record_of_another_lane_or_direction_does_not_open() -> None:
    """Splicing: the same lane id in the header, keys of another lane, direction or session."""
    alien = Sealer(EpochKeys(Suite.AES_256_GCM, bytes(32)), LANE)
    with pytest.raises(RecordForged):
        open_record(opener(), alien.seal(RecordType.FRAME, b"alien"))
    with pytest.raises(RecordForged):
        open_record(opener(Suite.CHACHA20_POLY1305), sealer(Suite.AES_256_GCM).seal(RecordType.FRAME, b"x"))


@SUITES
def test_every_bit_of_a_record_counts(suite: Suite) -> None:
    record = sealer(suite).seal(RecordType.FRAME, b"every bit of it", flags=3)
    for bit in range(len(record) * 8):
        receiver = opener(suite)
        damaged = flipped(record, bit)
        with pytest.raises(IntegrityError):
            open_record(receiver, damaged)
        assert (receiver.records, receiver.epoch, receiver.final) == (0, 0, False)
        assert open_record(receiver, record)[1] == b"every bit of it", "a refused record leaves no trace"


@given(
    suite=st.sampled_from(Suite),
    before=st.integers(0, 5),
    payload=st.binary(max_size=300),
    kind=st.sampled_from(RecordType),
    data=st.data(),
)
def test_any_flipped_bit_in_any_record_is_an_integrity_error(
    suite: Suite, before: int, payload: bytes, kind: RecordType, data: st.DataObject
) -> None:
    sender, receiver = sealer(suite), opener(suite)
    for _ in range(before):
        open_record(receiver, sender.seal(RecordType.ACK, b"ack"))
    record = sender.seal(kind, payload)
    bit = data.draw(st.integers(0, len(record) * 8 - 1))
    damaged = flipped(record, bit)
    with pytest.raises(IntegrityError):
        open_record(receiver, damaged)
    assert receiver.records == before


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_any_header_is_refused_by_a_documented_error_or_bounded(header: bytes) -> None:
    try:
        parsed = opener().parse_header(header)
    except (RecordMalformed, RecordTooLarge, RecordOutOfOrder, EpochInvalid, RecordAfterFinal):
        return
    assert parsed.length <= PAYLOAD_BYTES_MAX
    assert (parsed.lane, parsed.sequence) == (LANE, 0)


@given(
    kind=st.integers(0, 7),
    flags=st.integers(0, 0xFFFF),
    lane=st.integers(0, 4),
    epoch=st.integers(0, 3),
    sequence=st.integers(0, 2),
    length=st.integers(0, 64),
    noise=st.binary(min_size=64 + TAG_BYTES, max_size=64 + TAG_BYTES),
)
def test_no_invented_record_opens(
    *, kind: int, flags: int, lane: int, epoch: int, sequence: int, length: int, noise: bytes
) -> None:
    receiver = opener()
    header = oracle.RECORD_HEADER.pack(1, kind, flags, lane, epoch, sequence, length)
    with pytest.raises(IntegrityError):
        open_record(receiver, header + noise[: length + TAG_BYTES])
    assert (receiver.records, receiver.epoch) == (0, 0)


# ------------------------------------------------------------------ epochs and limits


def test_the_soft_limit_begins_an_epoch_and_the_sequence_runs_on() -> None:
    sender, receiver = sealer(soft=2 * OVERHEAD_BYTES), opener()
    epochs = []
    for number in range(7):
        header, _ = open_record(receiver, sender.seal(RecordType.ACK))
        assert header.sequence == number
        epochs.append(header.epoch)
    assert epochs == [0, 0, 1, 1, 2, 2, 3]
    assert receiver.epoch == 3


def test_the_next_epochs_keys_are_installed_only_by_a_record_that_authenticates() -> None:
    sender, receiver = sealer(soft=1), opener()
    open_record(receiver, sender.seal(RecordType.ACK))
    assert sender.epoch == 0
    genuine = bytes(sender.seal(RecordType.ACK, b"epoch 1"))
    with pytest.raises(RecordForged):
        open_record(receiver, flipped(genuine, 8 * HEADER_BYTES))
    assert (receiver.epoch, receiver.records) == (0, 1)
    # A record of the present epoch whose header claims the next one does not get in either.
    steady = sealer()
    steady.seal(RecordType.ACK)
    claimed = steady.seal(RecordType.ACK, b"still epoch 0")
    claimed[6:8] = b"\x00\x01"
    with pytest.raises(RecordForged):
        open_record(receiver, claimed)
    assert receiver.epoch == 0
    assert open_record(receiver, genuine)[1] == b"epoch 1"
    assert receiver.epoch == 1


@pytest.mark.parametrize("claimed", [0, 3, 4, 0xFFFF], ids=["back", "skip one", "skip two", "far"])
def test_no_epoch_is_skipped_and_none_comes_back(claimed: int) -> None:
    receiver = opener(epoch=1)
    header = oracle.RECORD_HEADER.pack(1, RecordType.FRAME, 0, LANE, claimed, 0, 0)
    with pytest.raises(EpochInvalid):
        receiver.parse_header(header)


def test_a_receiver_refuses_more_than_the_hard_limit_under_one_key() -> None:
    sender, receiver = sealer(), opener(hard=200)
    open_record(receiver, sender.seal(RecordType.FRAME, bytes(100)))
    with pytest.raises(KeyExhausted):
        open_record(receiver, sender.seal(RecordType.FRAME, bytes(100)))


def test_a_new_epoch_lifts_the_hard_limit() -> None:
    sender, receiver = sealer(soft=100), opener(hard=150)
    for _ in range(5):
        open_record(receiver, sender.seal(RecordType.FRAME, bytes(100)))
    assert receiver.epoch == 4


def test_the_last_epoch_is_the_last() -> None:
    sender = sealer(soft=1, epoch=0xFFFF)
    sender.seal(RecordType.ACK)
    with pytest.raises(KeyExhausted):
        sender.seal(RecordType.ACK)
    receiver = opener(epoch=0xFFFF)
    header = oracle.RECORD_HEADER.pack(1, RecordType.ACK, 0, LANE, 0, 0, 0)
    with pytest.raises(EpochInvalid):
        receiver.parse_header(header)


# ------------------------------------------------------------------ nonces


class _Listening:
    """Stands where the AEAD stood and writes down under which key each nonce was used."""

    def __init__(self, keys: EpochKeys, used: list[tuple[bytes, bytes]]) -> None:
        self._key, self._used = keys.key, used

    def encrypt_into(self, nonce: bytes, payload: memoryview, header: memoryview, out: memoryview) -> None:
        self._used.append((self._key, nonce))


def test_no_nonce_is_used_twice_under_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(records, "_aead", lambda keys: _Listening(keys, used))
    sender = sealer(soft=1000 * OVERHEAD_BYTES)
    kinds = [RecordType.FRAME, RecordType.ACK]
    for number in range(10_000):
        sender.seal(kinds[number % 2])
        if number % 100 == 0:
            with pytest.raises(RecordTooLarge):  # what is refused must not disturb the count
                sender.seal(RecordType.FRAME, bytes(PAYLOAD_BYTES_MAX + 1))
    assert len(used) == len(set(used)) == 10_000
    assert sender.epoch == 9
    made = oracle.epochs(SECRET, 10)
    assert used == [(made[n // 1000].key, oracle.nonce(made[n // 1000].iv, n)) for n in range(10_000)]


def test_a_seal_that_failed_gives_its_number_to_no_other_payload_under_the_same_key() -> None:
    """Room that is too small fails before anything was encrypted; the number may then serve once, and only once."""
    sender = sealer()
    with pytest.raises((ValueError, struct.error)):
        sender.seal_into(RecordType.FRAME, 0, memoryview(b"x" * 64), memoryview(bytearray(OVERHEAD_BYTES)))
    record = bytes(sender.seal(RecordType.FRAME, b"after"))
    assert open_record(opener(), record)[1] == b"after"


@pytest.mark.parametrize("make", [sealer, opener], ids=["Sealer", "Opener"])
def test_nothing_outside_sets_the_counter(make: Callable[[], Sealer | Opener]) -> None:
    half = make()
    for name, value in (("records", 7), ("epoch", 7), ("final", True)):
        with pytest.raises(AttributeError):
            setattr(half, name, value)
    assert not hasattr(half, "__dict__"), "an object with slots takes no attribute that it does not have"
    public = {name for name in dir(half) if not name.startswith("_")}
    assert public <= {"epoch", "epoch_bytes", "records", "final", "seal", "seal_into", "parse_header", "open_into"}


@settings(max_examples=20)
@given(st.binary(max_size=HEADER_BYTES + 8).filter(lambda data: len(data) != HEADER_BYTES))
def test_a_header_of_another_length_is_a_callers_mistake(data: bytes) -> None:
    with pytest.raises(struct.error):
        opener().parse_header(data)

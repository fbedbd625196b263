"""The key schedule against RFC 5869, against an oracle by hand, and against frozen vectors."""

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from crypto.errors import KeyExhausted, ResumeForged
from crypto.keys import (
    EPOCH_MAX,
    EXPORTER_LABEL,
    IV_BYTES,
    KEY_BYTES,
    LANE_ID_MAX,
    Direction,
    EpochKeys,
    LaneId,
    ResumeSecret,
    SessionId,
    Suite,
    lane_info,
    lane_secret,
    segment_alias,
    segment_name,
)
from tests.crypto import oracle

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent.parent / "vectors" / "keys.json").read_text())["keys"]

# RFC 5869, appendix A.1 to A.3: ikm, salt, info, length, okm
RFC_5869 = [
    (
        "0b" * 22,
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c"
        "59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71"
        "cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        "0b" * 22,
        "",
        "",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]

FINGERPRINTS = st.binary(min_size=32, max_size=32)
LANES = st.integers(0, LANE_ID_MAX).map(LaneId)


@pytest.mark.parametrize(("ikm", "salt", "info", "okm"), RFC_5869, ids=["A.1", "A.2", "A.3"])
def test_the_oracle_and_the_library_agree_with_rfc_5869(ikm: str, salt: str, info: str, okm: str) -> None:
    wanted = bytes.fromhex(okm)
    prk = oracle.hkdf_extract(bytes.fromhex(salt), bytes.fromhex(ikm))
    assert oracle.hkdf_expand(prk, bytes.fromhex(info), len(wanted)) == wanted
    library = HKDF(SHA256(), len(wanted), salt=bytes.fromhex(salt), info=bytes.fromhex(info))
    assert library.derive(bytes.fromhex(ikm)) == wanted


def test_constants_are_those_of_the_documents() -> None:
    assert EXPORTER_LABEL == b"EXPORTER-korora-v1"
    assert (KEY_BYTES, IV_BYTES, EPOCH_MAX, LANE_ID_MAX) == (32, 12, 0xFFFF, 0xFFFF)
    assert {suite.name: suite.value for suite in Suite} == {"AES_256_GCM": 1, "CHACHA20_POLY1305": 2}
    assert {direction.name: direction.value for direction in Direction} == {"FORWARD": 0, "BACKWARD": 1}
    assert Direction.FORWARD.opposite is Direction.BACKWARD
    assert Direction.BACKWARD.opposite is Direction.FORWARD
    assert [direction.label for direction in Direction] == ["forward", "backward"]
    assert [suite.label for suite in Suite] == ["AES-256-GCM", "ChaCha20-Poly1305"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_frozen_vectors(vector: dict[str, Any]) -> None:
    """Changing one of these breaks every peer of an older version: raise the protocol's version instead."""
    source, destination = bytes.fromhex(vector["source_leaf"]), bytes.fromhex(vector["destination_leaf"])
    info = lane_info(
        suite=Suite(vector["suite"]),
        direction=Direction(vector["direction"]),
        lane=LaneId(vector["lane"]),
        source_leaf_sha256=source,
        destination_leaf_sha256=destination,
    )
    assert info.hex() == vector["info"]
    secret = lane_secret(bytes.fromhex(vector["exporter"]), SessionId(bytes.fromhex(vector["session_id"])), info)
    assert secret.hex() == vector["secret"]
    keys = EpochKeys(Suite(vector["suite"]), secret)
    for number, epoch in enumerate(vector["epochs"]):
        assert (keys.epoch, keys.key.hex(), keys.iv.hex()) == (number, epoch["key"], epoch["iv"])
        keys = keys.following()


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_oracle_gives_the_frozen_vectors_too(vector: dict[str, Any]) -> None:
    info = oracle.lane_info(
        vector["suite"],
        vector["direction"],
        vector["lane"],
        bytes.fromhex(vector["source_leaf"]),
        bytes.fromhex(vector["destination_leaf"]),
    )
    assert info.hex() == vector["info"]
    secret = oracle.lane_secret(bytes.fromhex(vector["exporter"]), bytes.fromhex(vector["session_id"]), info)
    assert secret.hex() == vector["secret"]
    made = oracle.epochs(secret, len(vector["epochs"]))
    assert [{"key": epoch.key.hex(), "iv": epoch.iv.hex()} for epoch in made] == vector["epochs"]


@given(
    exporter=st.binary(min_size=32, max_size=32),
    session_id=st.binary(min_size=16, max_size=16),
    suite=st.sampled_from(Suite),
    direction=st.sampled_from(Direction),
    lane=LANES,
    source=FINGERPRINTS,
    destination=FINGERPRINTS,
    steps=st.integers(0, 3),
)
def test_any_derivation_agrees_with_the_oracle(
    *,
    exporter: bytes,
    session_id: bytes,
    suite: Suite,
    direction: Direction,
    lane: LaneId,
    source: bytes,
    destination: bytes,
    steps: int,
) -> None:
    info = lane_info(
        suite=suite,
        direction=direction,
        lane=lane,
        source_leaf_sha256=source,
        destination_leaf_sha256=destination,
    )
    assert info == oracle.lane_info(suite, direction, lane, source, destination)
    secret = lane_secret(exporter, SessionId(session_id), info)
    keys = EpochKeys(suite, secret)
    for _ in range(steps):
        keys = keys.following()
    expected = oracle.epochs(oracle.lane_secret(exporter, session_id, info), steps + 1)[-1]
    assert (keys.key, keys.iv, keys.epoch) == (expected.key, expected.iv, steps)


def test_each_input_separates_the_keys() -> None:
    """No two lanes, directions, suites, sessions or pairs of hosts share a key or an IV."""
    base: dict[str, Any] = {
        "exporter": bytes(32),
        "session": bytes(16),
        "suite": Suite.AES_256_GCM,
        "direction": Direction.FORWARD,
        "lane": 0,
        "source": b"s" * 32,
        "destination": b"d" * 32,
    }
    changes: list[dict[str, Any]] = [
        {},
        {"exporter": bytes(31) + b"\1"},
        {"session": bytes(15) + b"\1"},
        {"suite": Suite.CHACHA20_POLY1305},
        {"direction": Direction.BACKWARD},
        {"lane": 1},
        {"lane": 256},
        {"source": b"S" + b"s" * 31},
        {"destination": b"D" + b"d" * 31},
        {"source": b"d" * 32, "destination": b"s" * 32},
    ]
    seen: set[bytes] = set()
    for change in changes:
        values = base | change
        info = lane_info(
            suite=values["suite"],
            direction=values["direction"],
            lane=values["lane"],
            source_leaf_sha256=values["source"],
            destination_leaf_sha256=values["destination"],
        )
        keys = EpochKeys(values["suite"], lane_secret(values["exporter"], values["session"], info))
        for epoch in (keys, keys.following()):
            seen |= {epoch.key, epoch.iv}
    assert len(seen) == len(changes) * 4


def test_following_leaves_the_current_epoch_as_it_is() -> None:
    keys = EpochKeys(Suite.AES_256_GCM, bytes(range(32)))
    before = (keys.key, keys.iv, keys.epoch)
    assert keys.following().key == keys.following().key
    assert (keys.key, keys.iv, keys.epoch) == before


def test_epochs_end() -> None:
    last = EpochKeys(Suite.AES_256_GCM, bytes(32), EPOCH_MAX)
    with pytest.raises(KeyExhausted):
        last.following()


def test_no_key_in_a_repr_and_no_secret_kept() -> None:
    secret = bytes(range(32))
    keys = EpochKeys(Suite.AES_256_GCM, secret)
    shown = repr(keys)
    assert keys.key.hex() not in shown
    assert repr(keys.key) not in shown
    assert shown == "EpochKeys(suite=AES_256_GCM, epoch=0)"
    kept = [getattr(keys, slot) for slot in EpochKeys.__slots__]
    assert secret not in kept, "the epoch's own secret must be dropped once its keys are made"
    assert not hasattr(keys, "__dict__")


@pytest.mark.parametrize("length", [0, 31, 33])
def test_lengths_are_demanded(length: int) -> None:
    wrong, right = bytes(length), bytes(32)
    for source, destination in ((wrong, right), (right, wrong)):
        with pytest.raises(ValueError, match="32 bytes"):
            lane_info(
                suite=Suite.AES_256_GCM,
                direction=Direction.FORWARD,
                lane=LaneId(0),
                source_leaf_sha256=source,
                destination_leaf_sha256=destination,
            )
    with pytest.raises(ValueError, match="32 bytes"):
        EpochKeys(Suite.AES_256_GCM, wrong)
    with pytest.raises(ValueError, match="exporter"):
        lane_secret(wrong, SessionId(bytes(16)), b"")
    with pytest.raises(ValueError, match="session id"):
        lane_secret(right, SessionId(wrong), b"")


@pytest.mark.parametrize("lane", [-1, LANE_ID_MAX + 1])
def test_lane_ids_fit_their_field(lane: int) -> None:
    with pytest.raises(ValueError, match="two bytes"):
        lane_info(
            suite=Suite.AES_256_GCM,
            direction=Direction.FORWARD,
            lane=LaneId(lane),
            source_leaf_sha256=bytes(32),
            destination_leaf_sha256=bytes(32),
        )


# ---- the proof of a resumption

FIRST, NEW, SESSION = bytes(range(32)), bytes(range(32, 64)), SessionId(bytes(range(64, 80)))
PROOFS = {  # frozen: a relay that is updated must know again the session that its peer began
    Direction.FORWARD: "7e4c558b671ad8b454e20a049dc7d68df3a9f5f5df9cf8365fd54618bee509e7",
    Direction.BACKWARD: "cb5677daaacb08c91a5b3f78afd787859bd3d423c3b0c425e9984b45e22ef10f",
}


def test_a_proof_is_what_the_specification_says() -> None:
    secret = oracle.lane_secret(FIRST, SESSION, b"korora v1 resume")
    for direction, frozen in PROOFS.items():
        said = b"korora v1 resume proof" + bytes([direction]) + NEW
        proof = ResumeSecret(FIRST, SESSION).proof(direction, NEW)
        assert proof == hmac.new(secret, said, hashlib.sha256).digest()
        assert proof.hex() == frozen


SEGMENT = "441dddd1396bc27a08a6e288e8589588"
ALIASES = {
    Direction.FORWARD: "43467dbd3145a4c2acede661c40ec766",
    Direction.BACKWARD: "51090bed38636af994176ccdea4506b8",
}


def test_segments_are_called_what_the_specification_says() -> None:
    """Frozen: what an earlier version has stored must be found again."""
    name = segment_name(FIRST, SESSION)
    assert name == oracle.lane_secret(FIRST, SESSION, b"korora v1 segment")[:16]
    assert name.hex() == SEGMENT
    for direction, frozen in ALIASES.items():
        said = b"korora v1 segment alias" + bytes([direction]) + NEW
        alias = segment_alias(name, direction, NEW)
        assert alias == hmac.new(name, said, hashlib.sha256).digest()[:16]
        assert alias.hex() == frozen
    with pytest.raises(ValueError, match="32 bytes"):
        segment_alias(name, Direction.FORWARD, NEW[:-1])


@pytest.mark.parametrize("direction", Direction)
def test_a_proof_verifies_where_it_belongs(direction: Direction) -> None:
    ResumeSecret(FIRST, SESSION).verify(ResumeSecret(FIRST, SESSION).proof(direction, NEW), direction, NEW)


@pytest.mark.parametrize(
    ("first", "session", "direction", "new"),
    [
        (NEW, SESSION, Direction.FORWARD, NEW),
        (FIRST, SessionId(bytes(16)), Direction.FORWARD, NEW),
        (FIRST, SESSION, Direction.BACKWARD, NEW),
        (FIRST, SESSION, Direction.FORWARD, FIRST),
    ],
    ids=["first connection", "session", "direction", "new connection"],
)
def test_a_proof_of_anything_else_is_refused(
    first: bytes, session: SessionId, direction: Direction, new: bytes
) -> None:
    with pytest.raises(ResumeForged):
        ResumeSecret(FIRST, SESSION).verify(ResumeSecret(first, session).proof(direction, new), Direction.FORWARD, NEW)


def test_a_proof_with_any_bit_turned_is_refused() -> None:
    secret = ResumeSecret(FIRST, SESSION)
    proof = int.from_bytes(secret.proof(Direction.FORWARD, NEW), "big")
    for bit in range(256):
        with pytest.raises(ResumeForged) as refused:
            secret.verify((proof ^ 1 << bit).to_bytes(32, "big"), Direction.FORWARD, NEW)
        assert refused.value.__cause__ is None
    for wrong in (b"", secret.proof(Direction.FORWARD, NEW)[:-1], secret.proof(Direction.FORWARD, NEW) + b"\0"):
        with pytest.raises(ResumeForged):
            secret.verify(wrong, Direction.FORWARD, NEW)


def test_a_proof_tells_nothing_of_its_secret() -> None:
    """No repr shows it, it is no lane's, and a short exporter is a bug here and no proof."""
    secret = ResumeSecret(FIRST, SESSION)
    held = oracle.lane_secret(FIRST, SESSION, b"korora v1 resume")
    assert repr(secret) == "ResumeSecret(…)"
    assert not hasattr(secret, "__dict__")
    lanes = {
        lane_secret(
            FIRST,
            SESSION,
            lane_info(
                suite=suite,
                direction=direction,
                lane=LaneId(0),
                source_leaf_sha256=bytes(32),
                destination_leaf_sha256=bytes(32),
            ),
        )
        for suite in Suite
        for direction in Direction
    }
    assert held not in lanes
    with pytest.raises(ValueError, match="exporter"):
        secret.proof(Direction.FORWARD, NEW[:-1])

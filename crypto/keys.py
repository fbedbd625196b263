"""Key schedule: from one TLS exporter to a key and a static IV for each lane and direction.

Every lane direction owns a chain of epochs. An epoch's secret gives its key and IV, and the next epoch's
secret, after which it is dropped::

    exporter = TLS-Exporter("EXPORTER-korora-v1", session id, 32)                      RFC 8446 section 7.5
    secret_0 = HKDF-SHA256(ikm=exporter, salt=session id, info=lane_info(...), 32)     RFC 5869
    key_n    = HKDF-Expand(secret_n, "korora v1 key", 32)
    iv_n     = HKDF-Expand(secret_n, "korora v1 iv", 12)
    secret_n+1 = HKDF-Expand(secret_n, "korora v1 next epoch", 32)

A session that lost its control connection goes on over a new one (docs/wire-format.md, Resume). Each side then proves
that it held the first one's exporter, bound to the new connection by its exporter, so that no proof serves twice::

    resume = HKDF-SHA256(ikm=exporter, salt=session id, info="korora v1 resume", 32)
    segment = the first 16 bytes of HKDF-SHA256(ikm=exporter, salt=session id, info="korora v1 segment", 32)
    proof  = HMAC-SHA256(resume, "korora v1 resume proof" ‖ direction it is sent in ‖ exporter of the new connection)

Non-guarantee: whoever learns an epoch's secret learns all later ones of that lane direction; only a new
handshake heals that. CPython cannot promise that a dropped secret leaves memory at once.
"""

import struct
from enum import IntEnum, unique
from typing import Final, NewType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from crypto.errors import KeyExhausted, ResumeForged

SessionId = NewType("SessionId", bytes)
LaneId = NewType("LaneId", int)

SEGMENT_NAME_BYTES: Final = 16
EXPORTER_LABEL: Final = b"EXPORTER-korora-v1"
ATTESTATION_LABEL: Final = b"EXPORTER-korora-attest-v1"
SESSION_ID_BYTES: Final = 16
SECRET_BYTES: Final = 32
KEY_BYTES: Final = 32
IV_BYTES: Final = 12
LANE_ID_MAX: Final = 0xFFFF  # two bytes in a record header; a session that burns more has other troubles
EPOCH_MAX: Final = 0xFFFF  # two bytes in a record header

_INFO_PREFIX: Final = b"korora v1"
_INFO_TAIL: Final = struct.Struct(">BBH")  # suite, direction, lane
_FINGERPRINT_BYTES: Final = 32


@unique
class Suite(IntEnum):
    """AEAD of the sealed records; the value stands on the wire and in the key schedule."""

    AES_256_GCM = 1
    CHACHA20_POLY1305 = 2

    @property
    def label(self) -> str:
        """The name reports use."""
        return {Suite.AES_256_GCM: "AES-256-GCM", Suite.CHACHA20_POLY1305: "ChaCha20-Poly1305"}[self]


@unique
class Direction(IntEnum):
    """Which way bytes travel; the value stands on the wire and in the key schedule."""

    FORWARD = 0  # source to destination
    BACKWARD = 1  # destination to source

    @property
    def opposite(self) -> "Direction":
        """The other way."""
        return Direction(1 - self)

    @property
    def label(self) -> str:
        """The name reports use."""
        return self.name.lower()


def lane_info(
    *, suite: Suite, direction: Direction, lane: LaneId, source_leaf_sha256: bytes, destination_leaf_sha256: bytes
) -> bytes:
    """The HKDF info of one lane direction: 77 bytes, every field of fixed length.

    "korora v1" (9), suite (1), direction (1), lane (2, big-endian), SHA-256 of the source's and of the
    destination's leaf certificate in DER (32 each).

    Raises:
        ValueError: a fingerprint is not 32 bytes or the lane does not fit two bytes.
    """
    if len(source_leaf_sha256) != _FINGERPRINT_BYTES or len(destination_leaf_sha256) != _FINGERPRINT_BYTES:
        raise ValueError("a leaf certificate's SHA-256 has 32 bytes")
    if not 0 <= lane <= LANE_ID_MAX:
        raise ValueError(f"lane id {lane} does not fit two bytes")
    return _INFO_PREFIX + _INFO_TAIL.pack(suite, direction, lane) + source_leaf_sha256 + destination_leaf_sha256


def lane_secret(exporter: bytes, session_id: SessionId, info: bytes) -> bytes:
    """The 32-byte secret of epoch 0 (RFC 5869, extract and expand).

    Raises:
        ValueError: the exporter is not 32 bytes or the session id not 16.
    """
    if len(exporter) != SECRET_BYTES or len(session_id) != SESSION_ID_BYTES:
        raise ValueError("the exporter has 32 bytes and a session id 16")
    return HKDF(algorithm=SHA256(), length=SECRET_BYTES, salt=session_id, info=info).derive(exporter)


def _expand(secret: bytes, label: bytes, length: int) -> bytes:
    return HKDFExpand(algorithm=SHA256(), length=length, info=label).derive(secret)


class EpochKeys:
    """Key and IV of the current epoch of one lane direction, and the way to the next.

    Args:
        suite: AEAD these keys are for.
        secret: 32 bytes, the epoch's secret.
        epoch: number of the epoch, 0 to ``EPOCH_MAX``.
    """

    __slots__ = ("_next_secret", "epoch", "iv", "key", "suite")

    def __init__(self, suite: Suite, secret: bytes, epoch: int = 0) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError("an epoch's secret has 32 bytes")
        self.suite = suite
        self.epoch = epoch
        self.key = _expand(secret, b"korora v1 key", KEY_BYTES)
        self.iv = _expand(secret, b"korora v1 iv", IV_BYTES)
        # Only the successor is kept: what sealed this epoch cannot be derived from this object's chain again.
        self._next_secret = _expand(secret, b"korora v1 next epoch", SECRET_BYTES)

    def __repr__(self) -> str:
        return f"EpochKeys(suite={self.suite.name}, epoch={self.epoch})"

    def following(self) -> "EpochKeys":
        """The keys of the next epoch; this object stays as it is.

        Raises:
            KeyExhausted: the epoch number would not fit its two bytes.
        """
        if self.epoch >= EPOCH_MAX:
            raise KeyExhausted(f"lane direction has used all {EPOCH_MAX + 1} epochs")
        return EpochKeys(self.suite, self._next_secret, self.epoch + 1)


def segment_name(exporter: bytes, session_id: SessionId) -> bytes:
    """What the pages that a session leaves behind are called (16 bytes).

    Both ends compute it, and neither can choose it: a name that others hold cannot be given to other pages.

    Args:
        exporter: of the session's first control connection, 32 bytes.
        session_id: the session.
    """
    return lane_secret(exporter, session_id, b"korora v1 segment")[:SEGMENT_NAME_BYTES]


def segment_alias(name: bytes, direction: Direction, exporter: bytes) -> bytes:
    """What a segment is called in ``direction`` on the connection with this exporter (16 bytes).

    Names never leave a host: who says the right alias knows the name, and so was one end of the session that left the
    segment. Others that are offered it learn nothing that they could claim to hold it by.
    """
    if len(exporter) != SECRET_BYTES:
        raise ValueError("the exporter has 32 bytes")
    mac = HMAC(name, SHA256())
    mac.update(b"korora v1 segment alias" + bytes([direction]) + exporter)
    return mac.finalize()[:SEGMENT_NAME_BYTES]


class ResumeSecret:
    """What both ends of a session keep of its first control connection, to know each other again.

    Args:
        exporter: that connection's exporter for the session, 32 bytes.
        session_id: the session.
    """

    __slots__ = ("_secret",)

    def __init__(self, exporter: bytes, session_id: SessionId) -> None:
        self._secret = lane_secret(exporter, session_id, b"korora v1 resume")

    def __repr__(self) -> str:
        return "ResumeSecret(…)"

    def _mac(self, direction: Direction, exporter: bytes) -> HMAC:
        if len(exporter) != SECRET_BYTES:
            raise ValueError("the exporter has 32 bytes")
        mac = HMAC(self._secret, SHA256())
        mac.update(b"korora v1 resume proof" + bytes([direction]) + exporter)
        return mac

    def proof(self, direction: Direction, exporter: bytes) -> bytes:
        """The proof to send in ``direction`` (32 bytes), good on the connection with this exporter only."""
        return self._mac(direction, exporter).finalize()

    def verify(self, proof: bytes, direction: Direction, exporter: bytes) -> None:
        """Check a proof that came in ``direction``.

        Raises:
            ResumeForged: it is not that of this session on this connection.
        """
        try:
            self._mac(direction, exporter).verify(proof)
        except InvalidSignature:
            raise ResumeForged("the peer cannot show that the session it would resume was its own") from None

"""The key schedule a second time, from the documents and the standard library alone.

HKDF is written out from RFC 5869 with hmac and hashlib; layouts are packed here by hand. Nothing of crypto/ is
imported: what the product derives is held against this.
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass

HASH_BYTES = 32

RECORD_HEADER = struct.Struct(">BBHHHQI")
"""version u8, type u8, flags u16, lane u16, epoch u16, sequence u64, length u32: 20 bytes, big-endian."""


def hkdf_extract(salt: bytes, ikm: bytes) -> bytes:
    """RFC 5869 section 2.2 with SHA-256."""
    return hmac.new(salt or bytes(HASH_BYTES), ikm, hashlib.sha256).digest()


def hkdf_expand(prk: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 section 2.3 with SHA-256."""
    okm, block = b"", b""
    for counter in range(1, -(-length // HASH_BYTES) + 1):
        block = hmac.new(prk, block + info + bytes([counter]), hashlib.sha256).digest()
        okm += block
    return okm[:length]


def lane_info(suite: int, direction: int, lane: int, source_leaf: bytes, destination_leaf: bytes) -> bytes:
    """ "korora v1", suite, direction, lane, SHA-256 of the two leaf certificates: 77 bytes."""
    return struct.pack(">9sBBH32s32s", b"korora v1", suite, direction, lane, source_leaf, destination_leaf)


def lane_secret(exporter: bytes, session_id: bytes, info: bytes) -> bytes:
    """The secret of epoch 0."""
    return hkdf_expand(hkdf_extract(session_id, exporter), info, 32)


@dataclass(frozen=True)
class Epoch:
    """One epoch's secret, key and IV."""

    secret: bytes
    key: bytes
    iv: bytes


def epochs(secret: bytes, count: int) -> list[Epoch]:
    """The first epochs of a lane direction."""
    made = []
    for _ in range(count):
        made.append(Epoch(secret, hkdf_expand(secret, b"korora v1 key", 32), hkdf_expand(secret, b"korora v1 iv", 12)))
        secret = hkdf_expand(secret, b"korora v1 next epoch", 32)
    return made


def nonce(iv: bytes, sequence: int) -> bytes:
    """RFC 8446 section 5.3: the sequence, padded on the left to the IV's length, XOR the IV."""
    return bytes(a ^ b for a, b in zip(iv, sequence.to_bytes(len(iv), "big"), strict=True))

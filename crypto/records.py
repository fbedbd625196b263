"""Sealed records: the only thing a lane carries after its token.

A record is a 20-byte header, the ciphertext, and a 16-byte tag. The header is the AAD::

    version u8 | type u8 | flags u16 | lane u16 | epoch u16 | sequence u64 | length u32        big-endian

``length`` counts ciphertext without the tag. The nonce is the epoch's static IV XOR the sequence (RFC 8446
section 5.3). The counter belongs to the sealing object: nothing outside can set it, and it never restarts in
a lane. Receivers demand exactly the next number; a FINAL record, itself authenticated, ends one direction of
one lane (the last-block flag of the STREAM construction, Hoang et al. 2015).
"""

import struct
from enum import IntEnum, unique
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from crypto.errors import (
    EpochInvalid,
    KeyExhausted,
    RecordAfterFinal,
    RecordForged,
    RecordGap,
    RecordMalformed,
    RecordReplayed,
    RecordTooLarge,
)
from crypto.keys import EpochKeys, LaneId, Suite

MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB

RECORD_VERSION: Final = 1
HEADER_BYTES: Final = 20
TAG_BYTES: Final = 16
OVERHEAD_BYTES: Final = HEADER_BYTES + TAG_BYTES
PAYLOAD_BYTES_MAX: Final = MIB + 4096  # one opaque frame and its header; what a receiver must be able to hold
EPOCH_BYTES_SOFT: Final = 64 * GIB  # go on to the next epoch: a fifth of RFC 8446's 362 GiB for AES-GCM
EPOCH_BYTES_HARD: Final = 256 * GIB  # refuse: a peer that seals this much under one key is broken
SEQUENCE_MAX: Final = 2**64 - 1

_HEADER: Final = struct.Struct(">BBHHHQI")


@unique
class RecordType(IntEnum):
    """What a record carries; the value stands in its header."""

    HELLO = 1  # opens a lane (source to destination, sequence 0)
    LANE_OK = 2  # its answer (destination to source, sequence 0)
    FRAME = 3  # a frame, or a part of one
    ACK = 4  # acknowledgements and credit
    FINAL = 5  # the end of this direction of this lane


_TYPES: Final = {int(kind): kind for kind in RecordType}  # a look-up costs a tenth of RecordType(number)


class RecordHeader(NamedTuple):
    """A parsed, not yet authenticated record header; ``length`` in bytes, without the tag."""

    type: RecordType
    flags: int
    lane: LaneId
    epoch: int
    sequence: int
    length: int

    @property
    def body_bytes(self) -> int:
        """Bytes that follow the header on the wire: ciphertext and tag."""
        return self.length + TAG_BYTES


def _aead(keys: EpochKeys) -> AESGCM | ChaCha20Poly1305:
    return AESGCM(keys.key) if keys.suite is Suite.AES_256_GCM else ChaCha20Poly1305(keys.key)


class _Half:
    """What sealing and opening share: keys of the epoch, the AEAD object, the counter."""

    __slots__ = ("_aead", "_final", "_iv", "_keys", "_lane", "_sequence", "epoch_bytes")

    def __init__(self, keys: EpochKeys, lane: LaneId) -> None:
        self._lane = lane
        self._sequence = 0
        self._final = False
        self._install(keys)

    def _install(self, keys: EpochKeys) -> None:
        self._keys = keys
        self._aead = _aead(keys)
        self._iv = int.from_bytes(keys.iv, "big")
        self.epoch_bytes = 0

    @property
    def epoch(self) -> int:
        """Number of the epoch in use."""
        return self._keys.epoch

    @property
    def records(self) -> int:
        """Records sealed or opened so far: also the next sequence number."""
        return self._sequence

    @property
    def final(self) -> bool:
        """Whether the FINAL record of this direction has passed."""
        return self._final

    def _nonce(self) -> bytes:
        return (self._iv ^ self._sequence).to_bytes(12, "big")


class Sealer(_Half):
    """Seals the records of one direction of one lane.

    Args:
        keys: epoch 0's keys.
        lane: the lane's id.
        epoch_bytes_soft: bytes under one key after which the next record begins a new epoch.
    """

    __slots__ = ("_epoch_bytes_soft",)

    def __init__(self, keys: EpochKeys, lane: LaneId, *, epoch_bytes_soft: int = EPOCH_BYTES_SOFT) -> None:
        super().__init__(keys, lane)
        self._epoch_bytes_soft = epoch_bytes_soft

    def seal_into(self, kind: RecordType, flags: int, payload: memoryview, out: memoryview) -> int:
        """Seal ``payload`` into the start of ``out``; return the record's bytes.

        Args:
            kind: the record's type.
            flags: 16 bits of that type's own.
            payload: plaintext, at most ``PAYLOAD_BYTES_MAX`` bytes; must not overlap ``out``.
            out: room for at least ``len(payload) + OVERHEAD_BYTES`` bytes.

        Raises:
            RecordAfterFinal: FINAL was sealed already.
            RecordTooLarge: the payload is over the limit.
            KeyExhausted: epochs or sequence numbers have run out.
        """
        length = len(payload)
        if self._final:
            raise RecordAfterFinal(f"lane {self._lane}: sealing after FINAL")
        if length > PAYLOAD_BYTES_MAX:
            raise RecordTooLarge(f"lane {self._lane}: {length} bytes in one record, {PAYLOAD_BYTES_MAX} allowed")
        if self._sequence >= SEQUENCE_MAX:
            raise KeyExhausted(f"lane {self._lane}: sequence numbers have run out")
        if self.epoch_bytes >= self._epoch_bytes_soft:
            self._install(self._keys.following())
        header = out[:HEADER_BYTES]
        _HEADER.pack_into(header, 0, RECORD_VERSION, kind, flags, self._lane, self._keys.epoch, self._sequence, length)
        total = length + OVERHEAD_BYTES
        self._aead.encrypt_into(self._nonce(), payload, header, out[HEADER_BYTES:total])
        self._sequence += 1
        self.epoch_bytes += total
        self._final = kind is RecordType.FINAL
        return total

    def seal(self, kind: RecordType, payload: bytes = b"", flags: int = 0) -> bytearray:
        """Seal a small payload into a buffer of its own; see ``seal_into``."""
        out = bytearray(len(payload) + OVERHEAD_BYTES)
        self.seal_into(kind, flags, memoryview(payload), memoryview(out))
        return out


class Opener(_Half):
    """Opens the records of one direction of one lane, strictly in order.

    Any error is final: the caller ends the session and hands nothing on.

    Args:
        keys: epoch 0's keys.
        lane: the lane's id.
        epoch_bytes_hard: bytes under one key after which a record is refused.
    """

    __slots__ = ("_epoch_bytes_hard",)

    def __init__(self, keys: EpochKeys, lane: LaneId, *, epoch_bytes_hard: int = EPOCH_BYTES_HARD) -> None:
        super().__init__(keys, lane)
        self._epoch_bytes_hard = epoch_bytes_hard

    def parse_header(self, header: memoryview | bytes) -> RecordHeader:
        """Check a header against what must come next, before its body is read or room for it is made.

        Args:
            header: exactly ``HEADER_BYTES`` bytes.

        Raises:
            RecordMalformed: wrong version, type or lane.
            RecordTooLarge: the length is over ``PAYLOAD_BYTES_MAX``.
            RecordReplayed: a sequence number already seen.
            RecordGap: a sequence number further on than the next.
            EpochInvalid: neither this epoch nor the next.
            RecordAfterFinal: FINAL has passed.
        """
        version, kind, flags, lane, epoch, sequence, length = _HEADER.unpack(header)
        if version != RECORD_VERSION or kind not in _TYPES or lane != self._lane:
            raise RecordMalformed(f"lane {self._lane}: version {version}, type {kind}, lane {lane} in a record header")
        if length > PAYLOAD_BYTES_MAX:
            raise RecordTooLarge(f"lane {self._lane}: a record of {length} bytes, {PAYLOAD_BYTES_MAX} allowed")
        if sequence < self._sequence:
            raise RecordReplayed(f"lane {self._lane}: record {sequence} again, {self._sequence} expected")
        if sequence > self._sequence:
            raise RecordGap(f"lane {self._lane}: record {sequence}, {self._sequence} expected")
        if epoch not in (self._keys.epoch, self._keys.epoch + 1):
            raise EpochInvalid(f"lane {self._lane}: epoch {epoch}, {self._keys.epoch} is current")
        if self._final:
            raise RecordAfterFinal(f"lane {self._lane}: record {sequence} after FINAL")
        return RecordHeader(_TYPES[kind], flags, self._lane, epoch, sequence, length)

    def open_into(
        self, header: RecordHeader, header_bytes: memoryview | bytes, body: memoryview, out: memoryview
    ) -> None:
        """Open the record that ``parse_header`` has just accepted.

        Args:
            header: what ``parse_header`` returned.
            header_bytes: the bytes it was parsed from: the AAD.
            body: ciphertext and tag, exactly ``header.body_bytes``.
            out: plaintext goes here, exactly ``header.length`` bytes; worthless if this raises.

        Raises:
            RecordForged: the record does not authenticate.
            KeyExhausted: the peer sealed more than ``EPOCH_BYTES_HARD`` under one key.
        """
        fresh = None
        aead, iv = self._aead, self._iv
        if header.epoch != self._keys.epoch:
            # The next epoch's keys replace the current ones only once a record has authenticated under them.
            fresh = self._keys.following()
            aead, iv = _aead(fresh), int.from_bytes(fresh.iv, "big")
        elif self.epoch_bytes + header.length > self._epoch_bytes_hard:
            raise KeyExhausted(f"lane {self._lane}: over {self._epoch_bytes_hard} bytes under one key")
        nonce = (iv ^ self._sequence).to_bytes(12, "big")
        try:
            aead.decrypt_into(nonce, body, header_bytes, out)
        except InvalidTag:
            raise RecordForged(f"lane {self._lane}: record {header.sequence} does not authenticate") from None
        if fresh is not None:
            self._install(fresh)
        self._sequence += 1
        self.epoch_bytes += header.length + OVERHEAD_BYTES
        self._final = header.type is RecordType.FINAL

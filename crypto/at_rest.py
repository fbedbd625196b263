"""What is stored is sealed: a random key a segment, wrapped under keys of this host.

    naming      = BLAKE3-derive("korora 2025 store folder names", host key)
    folder      = BLAKE3-keyed(naming, tenant)[:16], in hex                 names of tenants do not stand on the disk
    page key    = BLAKE3-keyed(BLAKE3-derive("korora 2025 store page ids", host key), folder)
    wrapping    = BLAKE3-keyed(BLAKE3-derive("korora 2025 store wrapping", host key), folder)
    key file    = nonce ‖ XChaCha20-Poly1305(wrapping, nonce, segment key ‖ note, AAD = label ‖ folder ‖ segment)
    sealed part = AES-256-GCM(segment key, nonce = part (4 bytes) ‖ number (8 bytes), AAD = label ‖ segment ‖ nonce)

A segment key seals one segment, once: the number counts within the sealing object and nothing else sets it, so no nonce
is used twice (NIST SP 800-38D §8.2.1). XChaCha20's nonce of 24 bytes is random (draft-irtf-cfrg-xchacha-03 §3.1).
"""

import secrets
from typing import Final

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
)
from nacl.exceptions import CryptoError as NaclError

from crypto.errors import SealBroken
from crypto.host_key import HOST_KEY_BYTES

SEAL_BYTES: Final = 16  # an AES-GCM tag
WRAP_BYTES: Final = 24 + 32 + 16  # nonce, segment key, tag: what a key file adds to its note
PARTS_MAX: Final = 0xFFFFFFFF  # four bytes of the nonce

_SEGMENT_KEY_BYTES: Final = 32
_FOLDER_BYTES: Final = 16
_NONCE_BYTES: Final = 24
_NAMING: Final = "korora 2025 store folder names"
_PAGE_IDS: Final = "korora 2025 store page ids"
_WRAPPING: Final = "korora 2025 store wrapping"
_WRAP_LABEL: Final = b"korora v1 segment key"
_PART_LABEL: Final = b"korora v1 segment part"

Buffer = bytes | bytearray | memoryview


class HostKeys:
    """Keys of this host's store, by folder: one folder a tenant.

    Args:
        key: the host key, 32 bytes.

    Raises:
        ValueError: the key has another length.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != HOST_KEY_BYTES:
            raise ValueError(f"a host key has {HOST_KEY_BYTES} bytes, not {len(key)}")
        self._naming = _derived(key, _NAMING)
        self._page_ids = _derived(key, _PAGE_IDS)
        self._wrapping = _derived(key, _WRAPPING)

    def folder(self, tenant: str) -> str:
        """The name of a tenant's folder, 32 hex digits that say nothing to others."""
        return blake3(tenant.encode(), key=self._naming).digest(length=_FOLDER_BYTES).hex()

    def page_key(self, folder: str) -> bytes:
        """The key of the ids of a tenant's pages, 32 bytes; equal pages of two tenants have different ids."""
        return blake3(folder.encode(), key=self._page_ids).digest()

    def make(self, folder: str, segment: bytes, note: bytes) -> tuple["SegmentSealer", bytes]:
        """A new segment's sealer, and the content of its key file with ``note`` sealed in it."""
        key = secrets.token_bytes(_SEGMENT_KEY_BYTES)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        wrapped = crypto_aead_xchacha20poly1305_ietf_encrypt(
            key + note, _wrap_aad(folder, segment), nonce, self._wrapping_key(folder)
        )
        return SegmentSealer(key, segment), nonce + wrapped

    def unwrap(self, folder: str, segment: bytes, content: bytes) -> tuple["SegmentOpener", bytes]:
        """The opener of a segment, and the note, from the content of its key file.

        Raises:
            SealBroken: it is not what ``make`` gave for that folder and segment.
        """
        if len(content) < WRAP_BYTES:
            raise SealBroken("a key file is too short")
        try:
            plain = crypto_aead_xchacha20poly1305_ietf_decrypt(
                content[_NONCE_BYTES:],
                _wrap_aad(folder, segment),
                content[:_NONCE_BYTES],
                self._wrapping_key(folder),
            )
        except NaclError:
            raise SealBroken("a key file does not open") from None
        return SegmentOpener(plain[:_SEGMENT_KEY_BYTES], segment), plain[_SEGMENT_KEY_BYTES:]

    def _wrapping_key(self, folder: str) -> bytes:
        return blake3(folder.encode(), key=self._wrapping).digest()


class SegmentSealer:
    """Seals the parts of one new segment; each part's pieces are numbered from 0 in the order they are sealed."""

    def __init__(self, key: bytes, segment: bytes) -> None:
        self._key = key
        self._cipher = AESGCM(key)
        self._segment = segment
        self._next: dict[int, int] = {}

    def seal(self, part: int, plain: Buffer, out: Buffer) -> None:
        """Seal the next piece of ``part`` into ``out``, which has 16 bytes more."""
        number = self._next.get(part, 0)
        self._next[part] = number + 1  # first: a number is spent even if sealing fails
        nonce, aad = _piece(self._segment, part, number)
        self._cipher.encrypt_into(nonce, plain, aad, out)

    def opener(self) -> "SegmentOpener":
        """What opens the same segment."""
        return SegmentOpener(self._key, self._segment)


class SegmentOpener:
    """Opens the parts of one segment; threads may share it."""

    def __init__(self, key: bytes, segment: bytes) -> None:
        self._cipher = AESGCM(key)
        self._segment = segment

    def open(self, part: int, number: int, sealed: Buffer, out: Buffer) -> None:
        """Open piece ``number`` of ``part`` into ``out``, which has 16 bytes less.

        Raises:
            SealBroken: it is not that piece; what is in ``out`` then must not be used.
        """
        nonce, aad = _piece(self._segment, part, number)
        if len(sealed) < SEAL_BYTES or len(out) != len(sealed) - SEAL_BYTES:
            raise SealBroken("a sealed piece has the wrong length")
        try:
            self._cipher.decrypt_into(nonce, sealed, aad, out)
        except InvalidTag:
            raise SealBroken("a sealed piece does not open") from None


def _derived(key: bytes, context: str) -> bytes:
    return blake3(key, derive_key_context=context).digest()


def _wrap_aad(folder: str, segment: bytes) -> bytes:
    return _WRAP_LABEL + folder.encode() + segment


def _piece(segment: bytes, part: int, number: int) -> tuple[bytes, bytes]:
    nonce = part.to_bytes(4, "big") + number.to_bytes(8, "big")
    return nonce, _PART_LABEL + segment + nonce

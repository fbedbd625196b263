"""What only one session of one host may read: HPKE (RFC 9180) with ML-KEM-768 and X25519 together.

The recipient's key lives as long as a session's hand-over and is not stored; that it is the attested host's, its
quote says (``crypto.attestation.binding``). Where files go between hosts instead of messages, it waits on the disk,
wrapped, until it has opened one thing. The suite is MLKEM768-X25519, HKDF-SHA256, AES-256-GCM, in base mode: who
sent it, the session says. An attacker has to break both key exchanges.
"""

import hashlib
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey, Suite

from crypto.errors import WrapBroken

PUBLIC_BYTES: Final = 1184 + 32  # ML-KEM-768's encapsulation key (FIPS 203 §8), X25519's
WRAP_BYTES: Final = 1088 + 32 + 16  # what wrapping adds: both encapsulations and the tag
PLAIN_BYTES_MAX: Final = 1024 * 1024  # more than two blobs of the most that swtpm takes never is

_MLKEM_BYTES: Final = 1184
_SEED_BYTES: Final = 64  # d ‖ z (FIPS 203 §7.1)
SECRET_BYTES: Final = _SEED_BYTES + 32
_SUITE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class Recipient:
    """Who can read it: a key pair made for one session.

    Args:
        secret: of one that was made before; empty for a new one.

    Raises:
        ValueError: it is none.
    """

    def __init__(self, secret: bytes = b"") -> None:
        if secret and len(secret) != SECRET_BYTES:
            raise ValueError(f"a recipient's secret has {SECRET_BYTES} bytes, not {len(secret)}")
        if secret:
            mlkem = MLKEM768PrivateKey.from_seed_bytes(secret[:_SEED_BYTES])
            x25519 = X25519PrivateKey.from_private_bytes(secret[_SEED_BYTES:])
        else:
            mlkem, x25519 = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()
        self._secret = mlkem, x25519
        self._key = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public: Final = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        """For whoever wraps: ``PUBLIC_BYTES``."""

    @property
    def secret(self) -> bytes:
        """What makes it again, ``SECRET_BYTES``: to be kept wrapped, and for no longer than it is waited for."""
        mlkem, x25519 = self._secret
        return mlkem.private_bytes_raw() + x25519.private_bytes_raw()

    def unwrap(self, wrapped: bytes, info: bytes) -> bytes:
        """What was wrapped for this key, under the same ``info``.

        Raises:
            WrapBroken: it does not open: altered, for another key, or for another use.
        """
        if not WRAP_BYTES <= len(wrapped) <= WRAP_BYTES + PLAIN_BYTES_MAX:
            raise WrapBroken(f"{len(wrapped)} bytes cannot have been wrapped")
        try:
            return _SUITE.decrypt(wrapped, self._key, info)
        except (InvalidTag, ValueError):
            raise WrapBroken("what was wrapped does not open with this session's key") from None


def wrap(plain: bytes, public: bytes, info: bytes) -> bytes:
    """Wrap for the holder of a key.

    Args:
        plain: up to ``PLAIN_BYTES_MAX``.
        public: the recipient's.
        info: what it is for; both sides must say the same.

    Raises:
        WrapBroken: the key is none.
        ValueError: ``plain`` is too long.
    """
    if len(plain) > PLAIN_BYTES_MAX:
        raise ValueError(f"{len(plain)} bytes to wrap, {PLAIN_BYTES_MAX} allowed")
    if len(public) != PUBLIC_BYTES:
        raise WrapBroken(f"a recipient's key of {len(public)} bytes")
    try:
        key = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(public[:_MLKEM_BYTES]),
            X25519PublicKey.from_public_bytes(public[_MLKEM_BYTES:]),
        )
        return _SUITE.encrypt(plain, key, info)
    except ValueError:
        raise WrapBroken("a recipient's key that is none") from None


def fingerprint(public: bytes) -> bytes:
    """SHA-256 of a recipient's key, 32 bytes: what its host's quote certifies."""
    return hashlib.sha256(public).digest()

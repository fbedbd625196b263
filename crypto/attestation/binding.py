"""What ties a quote to one session, one side of it and one key, so that it is worth nothing anywhere else."""

import hashlib
from dataclasses import dataclass, field
from enum import IntEnum, unique
from typing import Final

from crypto.attestation.limits import NONCE_BYTES
from crypto.keys import SESSION_ID_BYTES, SessionId

TAG: Final = b"korora-attest-v1"
EXPORTER_BYTES: Final = 32
KEY_DIGEST_BYTES: Final = 32


@unique
class Side(IntEnum):
    """Whose platform a quote is of."""

    SOURCE = 0
    DESTINATION = 1


@dataclass(frozen=True, slots=True)
class Binding:
    """What both hosts know of the quote that is to come, before it is made.

    Attributes:
        exporter: 32 bytes of the TLS connection, by the label of attestation (``TlsPeer.export_attestation``).
        session: its id, 16 bytes.
        side: whose platform is quoted.
        nonce: the verifier's, 32 random bytes, used once.
        hpke_public: the key that a vTPM's state will be wrapped to; empty where there is none.
    """

    exporter: bytes = field(repr=False)
    session: SessionId
    side: Side
    nonce: bytes
    hpke_public: bytes = b""

    def qualifying(self) -> bytes:
        """The quote's qualifying data, 32 bytes: SHA-256 over fields of fixed lengths.

        ``TAG`` (16), exporter (32), session id (16), side (1), nonce (32), SHA-256 of the HPKE key or zeros (32).

        Raises:
            ValueError: a field is of another length.
        """
        if (len(self.exporter), len(self.session), len(self.nonce)) != (EXPORTER_BYTES, SESSION_ID_BYTES, NONCE_BYTES):
            raise ValueError("a binding's fields have fixed lengths")
        key = hashlib.sha256(self.hpke_public).digest() if self.hpke_public else bytes(KEY_DIGEST_BYTES)
        fields = (TAG, self.exporter, self.session, bytes([self.side]), self.nonce, key)
        return hashlib.sha256(b"".join(fields)).digest()

"""What a real swtpm said once (tests/vectors/attestation.json), and a signer of our own that can say anything."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from crypto.attestation.structures import Alg, Attributes, Curve, Selection, sized

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent.parent / "vectors" / "attestation.json").read_text()
)
QUALIFYING = bytes(range(32))
SELECTION = Selection.of({"sha256": (0, 7, 23)})
AK_ATTRIBUTES = (
    Attributes.FIXED_TPM
    | Attributes.FIXED_PARENT
    | Attributes.SENSITIVE_DATA_ORIGIN
    | Attributes.USER_WITH_AUTH
    | Attributes.RESTRICTED
    | Attributes.SIGN
)


def recorded(name: str) -> bytes:
    return bytes.fromhex(RECORDED[name])


def recorded_pcrs() -> dict[str, dict[int, bytes]]:
    return {
        bank: {int(index): bytes.fromhex(value) for index, value in held.items()}
        for bank, held in RECORDED["pcrs"].items()
    }


class Signer:
    """An attestation key that is in no TPM: it signs whatever a test wants."""

    def __init__(self, attributes: int = AK_ATTRIBUTES) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        point = self.key.public_key().public_numbers()
        self.public = (
            struct.pack(">HHIH", Alg.ECC, Alg.SHA256, int(attributes), 0)
            + struct.pack(">H", Alg.NULL)
            + struct.pack(">HHHH", Alg.ECDSA, Alg.SHA256, Curve.P256, Alg.NULL)
            + sized(point.x.to_bytes(32, "big"))
            + sized(point.y.to_bytes(32, "big"))
        )

    def sign(self, quote: bytes) -> bytes:
        r, s = utils.decode_dss_signature(self.key.sign(quote, ec.ECDSA(hashes.SHA256())))
        return struct.pack(">HH", Alg.ECDSA, Alg.SHA256) + sized(r.to_bytes(32, "big")) + sized(s.to_bytes(32, "big"))


def quote_of(
    pcrs: Mapping[str, Mapping[int, bytes]],
    qualifying: bytes = QUALIFYING,
    *,
    magic: int = 0xFF544347,
    kind: int = 0x8018,
    clock: tuple[int, int, int] = (1000, 3, 0),
    safe: int = 1,
) -> bytes:
    """A quote's bytes, as a TPM lays them out."""
    selection = Selection.of(pcrs)
    return (
        struct.pack(">IH", magic, kind)
        + sized(b"\x00\x0b" + bytes(32))
        + sized(qualifying)
        + struct.pack(">QIIB", *clock, safe)
        + bytes(8)
        + selection.encode()
        + sized(selection.digest(pcrs, "sha256"))
    )

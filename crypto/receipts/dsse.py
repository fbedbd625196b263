"""Envelopes: a payload, its type, and signatures over both (DSSE v1.0.2, github.com/secure-systems-lab/dsse).

What is signed is `PAE(type, payload)`, so that no signature can be taken for one over something else. Signatures are
Ed25519 (RFC 8032). A key is named by the SHA-256 of its SubjectPublicKeyInfo in DER, as in a signing certificate.
"""

import base64
import binascii
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Final

import msgspec
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from crypto.errors import ReceiptMalformed, SignatureInvalid, SignatureMissing
from crypto.receipts.limits import RECEIPT_BYTES_MAX, SIGNATURES_MAX, STATEMENT_BYTES_MAX

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
SIGNATURE_BYTES: Final = 64
_ED25519_SPKI: Final = bytes.fromhex("302a300506032b6570032100")  # RFC 8410 §4: all but the key's 32 bytes


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature.

    Attributes:
        keyid: of the key that made it, 64 hexadecimal digits.
        sig: 64 bytes.
    """

    keyid: str
    sig: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """A payload and who signed it. It says nothing about trust: see ``verify``.

    Attributes:
        payload_type: what the payload is; here always ``PAYLOAD_TYPE``.
        payload: at most ``STATEMENT_BYTES_MAX`` bytes.
        signatures: at least one, at most ``SIGNATURES_MAX``, each of another key.
    """

    payload_type: str
    payload: bytes
    signatures: tuple[Signature, ...]


class _Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keyid: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    sig: Annotated[str, msgspec.Meta(min_length=88, max_length=88)]


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    payload: Annotated[str, msgspec.Meta(max_length=RECEIPT_BYTES_MAX)]
    payloadType: Annotated[str, msgspec.Meta(max_length=128)]  # noqa: N815 - the standard's name
    signatures: Annotated[tuple[_Signature, ...], msgspec.Meta(min_length=1, max_length=SIGNATURES_MAX)]


_DECODER: Final = msgspec.json.Decoder(_Envelope)


def keyid(key: VerifyKey) -> str:
    """What names a key: SHA-256 of its SubjectPublicKeyInfo in DER (RFC 8410 §4), in hexadecimal."""
    return hashlib.sha256(_ED25519_SPKI + bytes(key)).hexdigest()


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed (DSSE protocol, "Signature Definition")."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, key: SigningKey) -> Envelope:
    """An envelope with one signature.

    Raises:
        ReceiptMalformed: the payload is longer than ``STATEMENT_BYTES_MAX``.
    """
    if len(payload) > STATEMENT_BYTES_MAX:
        raise ReceiptMalformed(f"a payload of {len(payload)} bytes, {STATEMENT_BYTES_MAX} allowed")
    return Envelope(PAYLOAD_TYPE, payload, (_signature(PAYLOAD_TYPE, payload, key),))


def countersign(envelope: Envelope, key: SigningKey) -> Envelope:
    """The envelope with one signature more; the same one where that key has signed already.

    It does not look at the other signatures: ``verify`` first.

    Raises:
        SignatureInvalid: another signature stands there in the name of that key.
        ReceiptMalformed: ``SIGNATURES_MAX`` are there already.
    """
    own = _signature(envelope.payload_type, envelope.payload, key)
    for signature in envelope.signatures:
        if signature.keyid == own.keyid:
            if signature != own:  # Ed25519 gives one signature for one message
                raise SignatureInvalid("the envelope holds another signature in the name of our own key")
            return envelope
    if len(envelope.signatures) >= SIGNATURES_MAX:
        raise ReceiptMalformed(f"the envelope has {len(envelope.signatures)} signatures already")
    return replace(envelope, signatures=(*envelope.signatures, own))


def verify(envelope: Envelope, keys: Mapping[str, VerifyKey], *, required: Collection[str] = ()) -> frozenset[str]:
    """Verify every signature of a known key; those of unknown keys count for nothing.

    Args:
        envelope: to verify.
        keys: the known ones, by their ids.
        required: ids of keys that must have signed.

    Returns:
        The ids of the keys whose signatures hold: none of them may be known, so look at it, or name who is required.

    Raises:
        SignatureInvalid: a signature of a known key does not hold.
        SignatureMissing: a key that is required has not signed, or is not known.
    """
    message = pae(envelope.payload_type, envelope.payload)
    holds = set()
    for signature in envelope.signatures:
        key = keys.get(signature.keyid)
        if key is None:
            continue
        try:
            key.verify(message, signature.sig)
        except (BadSignatureError, ValueError):
            raise SignatureInvalid(f"the signature of key {signature.keyid[:16]} does not verify") from None
        holds.add(signature.keyid)
    missing = sorted(set(required) - holds)
    if missing:
        raise SignatureMissing(f"key {missing[0][:16]} has not signed")
    return frozenset(holds)


def encode(envelope: Envelope) -> bytes:
    """An envelope as one line of JSON, always the same bytes for the same envelope.

    Raises:
        ReceiptMalformed: longer than ``RECEIPT_BYTES_MAX``.
    """
    content = msgspec.json.encode(
        _Envelope(
            payload=base64.b64encode(envelope.payload).decode(),
            payloadType=envelope.payload_type,
            signatures=tuple(_Signature(one.keyid, base64.b64encode(one.sig).decode()) for one in envelope.signatures),
        )
    )
    if len(content) > RECEIPT_BYTES_MAX:
        raise ReceiptMalformed(f"an envelope of {len(content)} bytes, {RECEIPT_BYTES_MAX} allowed")
    return content


def decode(content: bytes) -> Envelope:
    """Parse an envelope, however its JSON is spaced and ordered; stricter than DSSE, which lets fields be added.

    Raises:
        ReceiptMalformed: not an envelope of ours, or longer than ``RECEIPT_BYTES_MAX``.
    """
    if len(content) > RECEIPT_BYTES_MAX:
        raise ReceiptMalformed(f"an envelope of {len(content)} bytes, {RECEIPT_BYTES_MAX} allowed")
    try:
        raw = _DECODER.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ReceiptMalformed(f"not a DSSE envelope: {error}") from None
    if raw.payloadType != PAYLOAD_TYPE:
        raise ReceiptMalformed(f"an envelope of type {raw.payloadType[:80]!r}, expected {PAYLOAD_TYPE}")
    payload = _base64(raw.payload)
    if len(payload) > STATEMENT_BYTES_MAX:
        raise ReceiptMalformed(f"a payload of {len(payload)} bytes, {STATEMENT_BYTES_MAX} allowed")
    signatures = tuple(Signature(one.keyid, _base64(one.sig)) for one in raw.signatures)
    if any(len(one.sig) != SIGNATURE_BYTES for one in signatures):
        raise ReceiptMalformed(f"a signature that has not {SIGNATURE_BYTES} bytes")
    if len({one.keyid for one in signatures}) != len(signatures):
        raise ReceiptMalformed("two signatures in the name of one key")
    return Envelope(raw.payloadType, payload, signatures)


def _signature(payload_type: str, payload: bytes, key: SigningKey) -> Signature:
    return Signature(keyid(key.verify_key), key.sign(pae(payload_type, payload)).signature)


def _base64(text: str) -> bytes:
    """Standard base64, and of all spellings of some bytes only the one that an encoder writes."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ReceiptMalformed("a value that is not base64") from None
    if base64.b64encode(content).decode() != text:
        raise ReceiptMalformed("base64 that no encoder writes")
    return content

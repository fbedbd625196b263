"""Envelopes: DSSE as others write and read it, and nothing accepted that is not exactly that."""

import base64
import hashlib
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey
from securesystemslib.dsse import Envelope as TheirEnvelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from crypto.errors import ReceiptMalformed, SignatureInvalid, SignatureMissing
from crypto.receipts.dsse import (
    PAYLOAD_TYPE,
    Envelope,
    Signature,
    countersign,
    decode,
    encode,
    keyid,
    pae,
    sign,
    verify,
)
from crypto.receipts.limits import RECEIPT_BYTES_MAX, SIGNATURES_MAX, STATEMENT_BYTES_MAX
from tests.crypto.receipts.making import ALPHA, BETA, STRANGER, receipt, statement

KEYS = {keyid(key.verify_key): key.verify_key for key in (ALPHA, BETA)}


def test_what_is_signed_is_as_the_specification_shows() -> None:
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_a_key_is_named_by_its_public_key_info() -> None:
    public = Ed25519PublicKey.from_public_bytes(bytes(ALPHA.verify_key))
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert keyid(ALPHA.verify_key) == hashlib.sha256(der).hexdigest()


def test_both_signatures_hold_and_strangers_count_for_nothing() -> None:
    envelope = countersign(receipt(), STRANGER)
    assert verify(envelope, KEYS, required=list(KEYS)) == frozenset(KEYS)
    assert verify(envelope, {}) == frozenset()


def test_who_must_sign_and_has_not_is_missed() -> None:
    envelope = sign(statement(), ALPHA)
    for required in (keyid(BETA.verify_key), keyid(STRANGER.verify_key)):
        with pytest.raises(SignatureMissing, match=required[:16]):
            verify(envelope, KEYS, required=[required])


def test_a_signature_under_another_payload_or_type_does_not_hold() -> None:
    envelope = receipt()
    for altered in (
        replace(envelope, payload=envelope.payload + b" "),
        replace(envelope, payload_type="text/plain"),
        replace(envelope, signatures=(replace(envelope.signatures[0], sig=bytes(64)), envelope.signatures[1])),
        replace(envelope, signatures=(replace(envelope.signatures[0], sig=envelope.signatures[1].sig),)),
    ):
        with pytest.raises(SignatureInvalid):
            verify(altered, KEYS)


def test_signing_twice_changes_nothing_and_a_forged_own_signature_is_seen() -> None:
    envelope = sign(statement(), ALPHA)
    assert countersign(envelope, ALPHA) == envelope
    forged = replace(envelope, signatures=(Signature(keyid(BETA.verify_key), bytes(64)),))
    with pytest.raises(SignatureInvalid, match="our own key"):
        countersign(forged, BETA)


def test_too_many_signatures_and_too_long_payloads_are_refused() -> None:
    envelope = receipt()
    for number in range(SIGNATURES_MAX - 2):
        envelope = countersign(envelope, SigningKey(bytes([100 + number]) * 32))
    with pytest.raises(ReceiptMalformed, match=f"{SIGNATURES_MAX} signatures"):
        countersign(envelope, STRANGER)
    with pytest.raises(ReceiptMalformed, match="allowed"):
        sign(bytes(STATEMENT_BYTES_MAX + 1), ALPHA)


def test_the_longest_envelope_fits_its_limit() -> None:
    envelope = sign(bytes(STATEMENT_BYTES_MAX), ALPHA)
    for number in range(SIGNATURES_MAX - 1):
        envelope = countersign(envelope, SigningKey(bytes([100 + number]) * 32))
    assert decode(encode(envelope)) == envelope


def test_encoding_is_the_same_however_it_was_spelled() -> None:
    envelope = receipt()
    spelled = json.dumps(dict(reversed(json.loads(encode(envelope)).items())), indent=3).encode()
    assert encode(decode(spelled)) == encode(envelope)


def edited(**changes: object) -> bytes:
    return json.dumps({**json.loads(encode(receipt())), **changes}).encode()


SIGNATURE = json.loads(encode(receipt()))["signatures"][0]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not a DSSE envelope"),
        (b"[]", "not a DSSE envelope"),
        (b"\xff\xfe", "not a DSSE envelope"),
        (b" " * (RECEIPT_BYTES_MAX + 1), "allowed"),
        (edited(more=1), "more"),
        (edited(payloadType="text/plain"), "text/plain"),
        (edited(payload="AA=A"), "not base64"),
        (edited(payload="AB=="), "no encoder writes"),
        (edited(payload="AAAA\n"), "base64"),
        (edited(signatures=[]), "signatures"),
        (edited(signatures=[SIGNATURE] * (SIGNATURES_MAX + 1)), "signatures"),
        (edited(signatures=[SIGNATURE, SIGNATURE]), "one key"),
        (edited(signatures=[{**SIGNATURE, "keyid": "00"}]), "keyid"),
        (edited(signatures=[{**SIGNATURE, "sig": "AA=="}]), "sig"),
        (edited(signatures=[{**SIGNATURE, "sig": base64.b64encode(bytes(65)).decode()}]), "64 bytes"),
        (edited(signatures=[{**SIGNATURE, "cert": ""}]), "cert"),
    ],
)
def test_what_is_no_envelope_of_ours_is_refused(content: bytes, match: str) -> None:
    with pytest.raises(ReceiptMalformed, match=match):
        decode(content)


@given(st.data())
def test_no_altered_byte_of_an_envelope_passes(data: st.DataObject) -> None:
    """Either it cannot be read, or it does not verify, or somebody has not signed any more."""
    content = bytearray(encode(receipt()))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises((ReceiptMalformed, SignatureInvalid, SignatureMissing)):
        verify(decode(bytes(content)), KEYS, required=list(KEYS))


# ---- another implementation


def their_key(key: SigningKey) -> SSlibKey:
    public = key.verify_key
    return SSlibKey(keyid(public), "ed25519", "ed25519", {"public": bytes(public).hex()})


def test_securesystemslib_verifies_our_envelopes() -> None:
    theirs = TheirEnvelope.from_dict(json.loads(encode(receipt())))
    assert set(theirs.verify([their_key(ALPHA), their_key(BETA)], threshold=2)) == set(KEYS)
    with pytest.raises(VerificationError):
        theirs.verify([their_key(ALPHA), their_key(STRANGER)], threshold=2)
    theirs.payload += b" "
    with pytest.raises(VerificationError):
        theirs.verify([their_key(ALPHA), their_key(BETA)], threshold=1)


def test_we_verify_envelopes_of_securesystemslib() -> None:
    made = TheirEnvelope(statement(), PAYLOAD_TYPE, {})
    for key in (ALPHA, BETA):
        made.sign(CryptoSigner(signer_private(key), their_key(key)))
    envelope = decode(json.dumps(made.to_dict()).encode())
    assert verify(envelope, KEYS, required=list(KEYS)) == frozenset(KEYS)
    assert envelope == receipt()  # Ed25519: the very same signatures


def signer_private(key: SigningKey) -> object:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(bytes(key))


def test_an_envelope_holds_what_it_was_given() -> None:
    assert receipt() == Envelope(PAYLOAD_TYPE, statement(), receipt().signatures)

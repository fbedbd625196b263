"""How an attestation key is bound to its TPM, once, at enrolment: a secret that only that TPM can open.

TPM2_MakeCredential in Python (TPM 2.0 Library, Part 1 §24, with KDFa and KDFe of §11.4.10). The secret is encrypted to
the endorsement key, and opens only in the TPM that has both that key and the attestation key of the name given. The
endorsement key's certificate, where there is one, leads to the TPM's manufacturer (TCG EK Credential Profile).
"""

import hashlib
import hmac
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from crypto.attestation.limits import CERTIFICATE_BYTES_MAX, CHAIN_MAX, CREDENTIAL_BYTES
from crypto.attestation.quote import check_attestation_key
from crypto.attestation.structures import Attributes, Public, hash_of, sized
from crypto.errors import EnrolmentFailed, QuoteInvalid

ENDORSEMENT_KEY: Final = Attributes.FIXED_TPM | Attributes.FIXED_PARENT | Attributes.RESTRICTED | Attributes.DECRYPT
_ASK_AGAIN: Final = "read what the host shows again: korora attest show"


@dataclass(frozen=True, slots=True)
class Challenge:
    """What the attested host is given, and what it must answer.

    Attributes:
        blob: TPM2B_ID_OBJECT's contents.
        seed: TPM2B_ENCRYPTED_SECRET's contents.
        secret: what comes out of TPM2_ActivateCredential; stays with the verifier.
    """

    blob: bytes
    seed: bytes
    secret: bytes = field(repr=False)


def challenge(endorsement: Public, attestation: Public, random: Callable[[int], bytes] = os.urandom) -> Challenge:
    """A secret for the TPM that holds both keys (TPM2_MakeCredential).

    Args:
        endorsement: its endorsement key.
        attestation: the key to be enrolled.
        random: gives secret bytes.

    Raises:
        EnrolmentFailed: one of the keys is not of that kind.
    """
    if endorsement.attributes & ENDORSEMENT_KEY != ENDORSEMENT_KEY or not endorsement.symmetric_bits:
        raise EnrolmentFailed(f"{endorsement.name.hex()} is no endorsement key", _ASK_AGAIN)
    try:
        check_attestation_key(attestation)
    except QuoteInvalid as error:
        raise EnrolmentFailed(error.told, _ASK_AGAIN) from None
    secret = random(CREDENTIAL_BYTES)
    algorithm = endorsement.name_algorithm
    bits = hashlib.new(algorithm).digest_size * 8
    seed, encrypted = _shared_seed(endorsement, random)
    key = _kdf_a(algorithm, seed, b"STORAGE", attestation.name, endorsement.symmetric_bits)
    encryptor = Cipher(algorithms.AES(key), CFB(bytes(16))).encryptor()
    hidden = encryptor.update(sized(secret)) + encryptor.finalize()
    integrity = _kdf_a(algorithm, seed, b"INTEGRITY", b"", bits)
    outer = hmac.digest(integrity, hidden + attestation.name, algorithm)
    return Challenge(sized(outer) + hidden, encrypted, secret)


def _shared_seed(endorsement: Public, random: Callable[[int], bytes]) -> tuple[bytes, bytes]:
    """A seed, and what tells it to the TPM (Part 1 B.10.3 of RSA, C.6.3 of ECC)."""
    algorithm = endorsement.name_algorithm
    size = hashlib.new(algorithm).digest_size
    match endorsement.key:
        case rsa.RSAPublicKey() as key:
            seed = random(size)
            oaep = padding.OAEP(padding.MGF1(hash_of(algorithm)), hash_of(algorithm), b"IDENTITY\0")
            return seed, key.encrypt(seed, oaep)
        case ec.EllipticCurvePublicKey() as point:
            ephemeral = ec.generate_private_key(point.curve)
            shared = ephemeral.exchange(ec.ECDH(), point)
            width = (point.curve.key_size + 7) // 8
            ours, theirs = ephemeral.public_key().public_numbers(), point.public_numbers()
            x, y = ours.x.to_bytes(width, "big"), ours.y.to_bytes(width, "big")
            seed = _kdf_e(algorithm, shared, b"IDENTITY", x, theirs.x.to_bytes(width, "big"))
            return seed, sized(x) + sized(y)


def _kdf_a(algorithm: str, key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """SP 800-108 in counter mode, with HMAC (Part 1 §11.4.10.2)."""
    out = b""
    counter = 0
    while len(out) * 8 < bits:
        counter += 1
        message = struct.pack(">I", counter) + label + b"\0" + context + struct.pack(">I", bits)
        out += hmac.digest(key, message, algorithm)
    return out[: bits // 8]


def _kdf_e(algorithm: str, shared: bytes, label: bytes, ours: bytes, theirs: bytes) -> bytes:
    """SP 800-56A (Part 1 §11.4.10.3), of one digest's length."""
    return hashlib.new(algorithm, struct.pack(">I", 1) + shared + label + b"\0" + ours + theirs).digest()


def check_answer(secret: bytes, answer: bytes) -> None:
    """The host has opened the challenge.

    Raises:
        EnrolmentFailed: it has not.
    """
    if not hmac.compare_digest(secret, answer):
        raise EnrolmentFailed(
            "the challenge was not answered with its secret: these two keys are not in one TPM",
            "make a new challenge for what that host shows: korora attest enrol",
        )


def check_certificate(
    endorsement: Public, certificate: bytes, roots: Sequence[x509.Certificate], now: datetime
) -> tuple[str, ...]:
    """The endorsement key is certified by a manufacturer that is trusted here.

    Manufacturers' certificates mark a directory name as critical and end in 2049 or never, and their intermediate ones
    are seldom sent: so the chain is walked here, by issuer, over what ``roots`` holds.

    Args:
        endorsement: the key.
        certificate: of it, in DER; some TPMs pad it with zeros or FFs.
        roots: manufacturers' certificates; intermediate ones among them are followed, self-signed ones are trusted.
        now: for their validity.

    Returns:
        The subjects from the key's issuer up to the root.

    Raises:
        EnrolmentFailed: it is not.
    """
    remedy = "name the folder of its manufacturer's certificates by --ek-ca, or compare the key by hand"
    leaf = _certificate(certificate)
    spki = endorsement.key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != spki:
        raise EnrolmentFailed("the endorsement certificate is of another key", _ASK_AGAIN)
    subjects: list[str] = []
    current = leaf
    for _ in range(CHAIN_MAX):
        if not current.not_valid_before_utc <= now <= current.not_valid_after_utc:
            raise EnrolmentFailed(f"{_subject(current)!r} is not valid now", remedy)
        issuer = next((each for each in roots if _issued(each, current)), None)
        if issuer is None:
            raise EnrolmentFailed(f"nobody trusted here has issued {_subject(current)!r}", remedy)
        if not _is_authority(issuer):
            raise EnrolmentFailed(f"{_subject(issuer)!r} may not issue certificates", remedy)
        subjects.append(_subject(issuer))
        if issuer.subject == issuer.issuer:
            if not issuer.not_valid_before_utc <= now <= issuer.not_valid_after_utc:
                raise EnrolmentFailed(f"{_subject(issuer)!r} is not valid now", remedy)
            return tuple(subjects)
        current = issuer
    raise EnrolmentFailed(f"a chain of over {CHAIN_MAX} certificates above the endorsement key", remedy)


def _certificate(data: bytes) -> x509.Certificate:
    """A certificate in DER, without the padding that follows it in a TPM's memory."""
    size = len(data)
    if data[:2] == b"\x30\x82" and len(data) >= 4:
        size = 4 + int.from_bytes(data[2:4], "big")
    try:
        if len(data) > CERTIFICATE_BYTES_MAX or data[size:].strip(b"\0\xff"):
            raise ValueError("bytes too many")
        return x509.load_der_x509_certificate(data[:size])
    except ValueError as error:
        raise EnrolmentFailed(f"the endorsement certificate is none: {error}", _ASK_AGAIN) from None


def _issued(issuer: x509.Certificate, child: x509.Certificate) -> bool:
    try:
        child.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _subject(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string()

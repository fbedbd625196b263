"""Enrolment: the certificate above an endorsement key, and what is no endorsement key."""

import datetime as dt
from collections.abc import Sequence

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from crypto.attestation.endorsement import challenge, check_answer, check_certificate
from crypto.attestation.structures import Public
from crypto.errors import EnrolmentFailed
from tests.crypto.attestation.samples import Signer, recorded

NOW = dt.datetime(2026, 11, 26, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


class Authority:
    def __init__(self, name: str, issuer: "Authority | None" = None, *, ca: bool = True, days: int = 9) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = (issuer or self).certify(self.key.public_key(), self.name, ca=ca, days=days)

    def certify(
        self, key: ec.EllipticCurvePublicKey, name: x509.Name, *, ca: bool = False, days: int = 9
    ) -> x509.Certificate:
        builder = x509.CertificateBuilder(
            self.name, name, key, x509.random_serial_number(), NOW - DAY, NOW + days * DAY
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        return builder.sign(self.key, hashes.SHA256())


ROOT = Authority("maker's root")
MIDDLE = Authority("maker's issuer", ROOT)
ENDORSEMENT = Public.parse(recorded("endorsement"))


def certified(by: Authority, *, days: int = 9) -> bytes:
    key = ENDORSEMENT.key
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return by.certify(key, x509.Name([]), days=days).public_bytes(Encoding.DER)


@pytest.mark.parametrize("padding", [b"", b"\0" * 100, b"\xff" * 9])
def test_a_chain_up_to_a_root(padding: bytes) -> None:
    roots = [ROOT.certificate, MIDDLE.certificate]
    assert check_certificate(ENDORSEMENT, certified(MIDDLE) + padding, roots, NOW) == (
        "CN=maker's issuer",
        "CN=maker's root",
    )


OTHER = Authority("maker's issuer")
NO_CA = Authority("a customer", ROOT, ca=False)
OLD = Authority("maker's old root", days=0)


@pytest.mark.parametrize(
    ("certificate", "roots"),
    [
        (certified(MIDDLE), [MIDDLE.certificate]),
        (certified(MIDDLE), []),
        (certified(OTHER), [ROOT.certificate, MIDDLE.certificate]),
        (certified(NO_CA), [ROOT.certificate, NO_CA.certificate]),
        (certified(ROOT, days=0), [ROOT.certificate]),
        (certified(OLD), [OLD.certificate]),
        (ROOT.certificate.public_bytes(Encoding.DER), [ROOT.certificate]),
        (certified(ROOT)[:-1], [ROOT.certificate]),
        (certified(ROOT) + b"\0x", [ROOT.certificate]),
        (b"", [ROOT.certificate]),
    ],
    ids=[
        "no root",
        "nobody",
        "same name",
        "no authority",
        "expired",
        "root expired",
        "other key",
        "cut",
        "more",
        "none",
    ],
)
def test_no_chain(certificate: bytes, roots: Sequence[x509.Certificate]) -> None:
    with pytest.raises(EnrolmentFailed):
        check_certificate(ENDORSEMENT, certificate, roots, NOW + DAY / 2)


def test_keys_of_the_wrong_kind() -> None:
    attestation = Public.parse(recorded("ak"))
    made = challenge(ENDORSEMENT, attestation)
    check_answer(made.secret, made.secret)
    assert made.secret not in made.blob + made.seed
    assert made.secret.hex() not in repr(made)
    with pytest.raises(EnrolmentFailed):
        challenge(attestation, attestation)
    with pytest.raises(EnrolmentFailed):
        challenge(ENDORSEMENT, ENDORSEMENT)
    with pytest.raises(EnrolmentFailed):
        challenge(ENDORSEMENT, Public.parse(Signer(0).public))
    with pytest.raises(EnrolmentFailed):
        check_answer(made.secret, bytes(32))

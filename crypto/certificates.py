"""The shape of Kororā's certificates: what the CA puts in, and what a reader demands.

    CA            ECDSA P-256, self-signed, CA:TRUE pathlen 0, keyCertSign + cRLSign
    host          ECDSA P-256, SAN URI korora://host/NAME, digitalSignature, EKU serverAuth + clientAuth
    signing       Ed25519, the same SAN URI, digitalSignature, EKU EKU_SIGNING (critical) and nothing else
    CRL           CRL number, authority key identifier

The signing certificate can never open a TLS connection: an EKU that is present and lists neither serverAuth nor
clientAuth forbids it (RFC 5280 §4.2.1.12). P-256 throughout, because X25519 in the handshake and Ed25519 for the
signing key sit at the same strength, and a larger CA key would slow every handshake for nothing.

Profiles follow RFC 5280 closely enough for OpenSSL's X509_STRICT. Nothing here reads a clock or a file.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, unique
from typing import Final

from cryptography import x509
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from crypto.errors import CertificateMalformed, PkiNameInvalid

HOST_URI_PREFIX: Final = "korora://host/"
NAME_CHARS_MAX: Final = 63  # fits a common name (64, RFC 5280 appendix A.1), a file name and a DNS label
CA_NAME_CHARS_MAX: Final = 64  # ub-common-name of RFC 5280 appendix A.1
CA_DAYS: Final = 3650
CERTIFICATE_DAYS: Final = 397  # the longest life public CAs may give: a habit that every tool accepts
CRL_DAYS: Final = 30
DAYS_MAX: Final = 36_500  # a hundred years; keeps dates far below the year 9999, where GeneralizedTime ends
CLOCK_SKEW: Final = timedelta(minutes=5)  # how far a host's clock may lag behind the CA's

# The purpose of the signing certificate. An OID under 2.25 is a UUID (ITU-T X.667) and needs no registration.
EKU_SIGNING: Final = x509.ObjectIdentifier("2.25.79169431186222501197568071082091186832")

MALFORMED_ERRORS: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    InternalError,  # an Ed25519 key of a wrong length gets as far as OpenSSL
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises for bytes that are no certificate, CRL or key, at parsing or when a part is read."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)


@unique
class Usage(Enum):
    """What a certificate of a host is for."""

    HOST = "host"
    SIGNING = "signing"


@dataclass(frozen=True, slots=True)
class Issuer:
    """The CA's certificate and the key that goes with it."""

    certificate: x509.Certificate
    key: EllipticCurvePrivateKey

    def __repr__(self) -> str:
        """Say which CA, and nothing of the key."""
        return f"Issuer({self.certificate.subject.rfc4514_string()!r})"


@dataclass(frozen=True, slots=True)
class Revoked:
    """One entry of a CRL: a serial number and when it was revoked."""

    serial: int
    at: datetime


def check_name(name: str) -> str:
    """Return `name` if a host can have it: ASCII letters, digits, `.`, `_`, `-`, at most 63, no mark in front.

    Raises:
        PkiNameInvalid: any other string.
    """
    if _NAME.fullmatch(name) is None:
        raise PkiNameInvalid(
            f"{name[:80]!r} cannot be a host's name",
            f"use 1 to {NAME_CHARS_MAX} letters, digits, dots, dashes and underscores, a letter or digit first",
        )
    return name


def peer_name(certificate: x509.Certificate) -> str:
    """The host name in a certificate: NAME of its one URI `korora://host/NAME` (RFC 5280 §4.2.1.6).

    Other alternative names are ignored, the subject too. It says nothing about trust: verify the certificate first.

    Raises:
        CertificateMalformed: no such URI, more than one, a NAME that no host can have, or extensions not in order.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    except MALFORMED_ERRORS as error:
        raise CertificateMalformed(f"the certificate's extensions cannot be read: {error}") from None
    ours = [uri for uri in uris if uri.lower().startswith("korora:")]
    if len(ours) != 1:
        raise CertificateMalformed(
            f"the certificate holds {len(ours)} URIs {HOST_URI_PREFIX}NAME, expected exactly one"
        )
    name = ours[0].removeprefix(HOST_URI_PREFIX)
    if name == ours[0] or _NAME.fullmatch(name) is None:
        raise CertificateMalformed(f"{ours[0][:120]!r} is not {HOST_URI_PREFIX}NAME")
    return name


def fits_usage(certificate: x509.Certificate, usage: Usage) -> bool:
    """Whether key type, key usage and extended key usage are exactly what this CA issues for `usage`.

    Raises:
        CertificateMalformed: the extensions cannot be read.
    """
    try:
        extensions = certificate.extensions
        purposes = set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        may_sign = extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
        key = certificate.public_key()
    except x509.ExtensionNotFound:
        return False
    except MALFORMED_ERRORS as error:
        raise CertificateMalformed(f"the certificate cannot be read: {error}") from None
    if usage is Usage.SIGNING:
        return may_sign and isinstance(key, Ed25519PublicKey) and purposes == {EKU_SIGNING}
    wanted = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    return may_sign and isinstance(key, EllipticCurvePublicKey) and wanted <= purposes


def is_ca(certificate: x509.Certificate) -> bool:
    """Whether a certificate is self-signed, and may sign certificates and CRLs (RFC 5280 §4.2.1.9, §4.2.1.3)."""
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except (x509.ExtensionNotFound, *MALFORMED_ERRORS):
        return False
    return constraints.ca and usage.key_cert_sign and usage.crl_sign and issued_by(certificate, certificate)


def issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether the issuer's name is the CA's subject, and the CA's key made the signature (RFC 5280 §6.1.3)."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, *MALFORMED_ERRORS):
        return False
    return True


def crl_signed_by(crl: x509.CertificateRevocationList, ca: x509.Certificate) -> bool:
    """Whether the CRL's issuer is the CA's subject, and the CA's key made the signature (RFC 5280 §6.3.3)."""
    try:
        key = ca.public_key()
        if crl.issuer != ca.subject or not isinstance(key, EllipticCurvePublicKey):
            return False
        return crl.is_signature_valid(key)
    except MALFORMED_ERRORS:
        return False


def build_ca(key: EllipticCurvePrivateKey, common_name: str, *, now: datetime, days: int) -> x509.Certificate:
    """A self-signed CA certificate, valid `days` from `now` (RFC 5280 §4.2.1.9: pathlen 0, no CA below it)."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder(issuer_name=subject, subject_name=subject, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )


def build_certificate(
    issuer: Issuer,
    name: str,
    public_key: EllipticCurvePublicKey | Ed25519PublicKey,
    usage: Usage,
    *,
    now: datetime,
    days: int,
) -> x509.Certificate:
    """A certificate for host `name`, valid from 5 minutes before `now` for `days`, never beyond the CA's own end.

    Raises:
        PkiNameInvalid: no host can have that name.
    """
    uri = HOST_URI_PREFIX + check_name(name)
    not_after = min(now + timedelta(days=days), issuer.certificate.not_valid_after_utc)
    purposes = [EKU_SIGNING]
    if usage is Usage.HOST:
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateBuilder(issuer_name=issuer.certificate.subject, subject_name=subject, public_key=public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=usage is Usage.SIGNING)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(_authority(issuer.certificate), critical=False)
        .sign(issuer.key, hashes.SHA256())
    )


def build_crl(
    issuer: Issuer, revoked: Iterable[Revoked], *, number: int, now: datetime, days: int
) -> x509.CertificateRevocationList:
    """A full CRL (RFC 5280 §5): `number` must exceed that of every earlier one (§5.2.3); next update in `days`."""
    builder = (
        x509.CertificateRevocationListBuilder(issuer_name=issuer.certificate.subject)
        .last_update(now - CLOCK_SKEW)
        .next_update(now + timedelta(days=days))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_authority(issuer.certificate), critical=False)
    )
    for entry in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder(serial_number=entry.serial, revocation_date=entry.at).build()
        )
    return builder.sign(issuer.key, hashes.SHA256())


def crl_number(crl: x509.CertificateRevocationList) -> int:
    """The CRL's number; 0 where there is none that can be read."""
    try:
        return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except (x509.ExtensionNotFound, *MALFORMED_ERRORS):
        return 0


def _authority(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )

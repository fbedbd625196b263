"""Throwaway certificates for the peers that speak TLS; nobody trusts them but the processes of one run."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HOST: Final = "localhost"
VALID_DAYS: Final = 2
CLOCK_SLACK: Final = timedelta(minutes=5)


def _begin(name: str, issuer: str, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> x509.CertificateBuilder:
    """A certificate but for its usages and signature."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """What the key is for: signatures, of certificates or of handshakes."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The key as PEM, unencrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_private(path: Path, content: bytes) -> None:
    """A file nobody else can read."""
    path.touch(mode=0o600)
    path.write_bytes(content)


def make_self_signed(directory: Path) -> Path:
    """One certificate for `localhost`, its key in the same PEM file (0600); both ends of a tunnel use it."""
    path = directory / "tls.pem"
    if path.exists():
        return path
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _begin(HOST, HOST, key, ca=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_private(path, _private(key) + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def make_qemu_credentials(directory: Path) -> Path:
    """A CA, a server's and a client's certificate under the names that QEMU's tls-creds-x509 looks for."""
    folder = directory / "tls"
    if folder.exists():
        return folder
    folder.mkdir(mode=0o700)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    authority = "Korora bench CA"
    ca = (
        _begin(authority, authority, ca_key, ca=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    (folder / "ca-cert.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    purposes = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}
    for role, purpose in purposes.items():
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _begin(HOST, authority, key, ca=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        (folder / f"{role}-cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        _write_private(folder / f"{role}-key.pem", _private(key))
    return folder

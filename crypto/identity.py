"""A host's identity: one directory, read and checked as a whole before anything is done with it.

    host.crt  host.key          the TLS certificate and its key (PEM; key PKCS #8)
    signing.crt  signing.key    the Ed25519 signing certificate and its key
    ca.crt  crl.pem             whom we trust, and whom no longer

What could fail in the middle of a handshake fails here instead, with an error of its own and what to do about it.
"""

import hashlib
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from nacl.signing import SigningKey

from crypto.certificates import MALFORMED_ERRORS, Usage, crl_signed_by, fits_usage, is_ca, issued_by, peer_name
from crypto.errors import (
    CertificateMalformed,
    CrlExpired,
    CrlMalformed,
    CrlMissing,
    IdentityError,
    IdentityExpired,
    IdentityMalformed,
    IdentityMismatch,
    IdentityMissing,
    IdentityPermissions,
    IdentityRevoked,
    IdentityUntrusted,
)
from crypto.files import read_bounded

HOST_CERTIFICATE: Final = "host.crt"
HOST_KEY: Final = "host.key"
SIGNING_CERTIFICATE: Final = "signing.crt"
SIGNING_KEY: Final = "signing.key"
CA_CERTIFICATE: Final = "ca.crt"
CRL: Final = "crl.pem"
IDENTITY_FILES: Final = (HOST_CERTIFICATE, HOST_KEY, SIGNING_CERTIFICATE, SIGNING_KEY, CA_CERTIFICATE, CRL)

PEM_BYTES_MAX: Final = 64 * 1024  # a certificate or key is 1 KiB
CRL_BYTES_MAX: Final = 16 * 1024 * 1024  # some 300 000 revoked certificates
_READABLE_BY_OTHERS: Final = 0o077

_ISSUE_AGAIN: Final = "issue the identity again: korora pki issue DIR NAME --out {directory} --force"
_RENEW_CRL: Final = "renew it with korora pki crl DIR on the CA's machine, and copy its crl.pem to {directory}"

__all__ = ["IDENTITY_FILES", "Identity", "peer_name"]


@dataclass(frozen=True, slots=True)
class Identity:
    """All of one host's certificates and keys, checked. `repr` shows no key.

    Attributes:
        name: NAME of `korora://host/NAME`, the same in both certificates.
        directory: where it was read from.
        certificate: the TLS certificate (ECDSA).
        private_key: its key.
        signing_certificate: the certificate of the signing key (Ed25519; not fit for TLS).
        signing_key: the signing key.
        ca: the CA that issued both.
        crl: that CA's certificate revocation list, valid when it was read.
        spki_sha256: SHA-256 of the TLS certificate's SubjectPublicKeyInfo (32 bytes), what a peer may pin.
    """

    name: str
    directory: Path
    certificate: x509.Certificate
    private_key: EllipticCurvePrivateKey = field(repr=False)
    signing_certificate: x509.Certificate
    signing_key: SigningKey = field(repr=False)
    ca: x509.Certificate
    crl: x509.CertificateRevocationList
    spki_sha256: bytes

    @classmethod
    def load(cls, directory: Path, *, now: datetime) -> "Identity":
        """Read and check an identity (RFC 5280 §6.1 for the path of length one, §6.3 for the CRL).

        Args:
            directory: what `korora pki issue --out` wrote.
            now: an aware datetime; certificates and CRL must be valid at it.

        Raises:
            IdentityMissing: the directory or a file is absent or cannot be read.
            IdentityPermissions: a key can be read by group or others.
            IdentityMalformed: a file does not hold what its name says, or a certificate names no host.
            IdentityMismatch: a key does not fit its certificate, or the two certificates name different hosts.
            IdentityUntrusted: the CA beside it did not issue a certificate, or not for this use.
            IdentityExpired: a certificate is not yet or no longer valid.
            IdentityRevoked: a certificate stands in the CRL.
            CrlMissing, CrlMalformed, CrlExpired: no CRL, not the CA's, or not valid at `now`.
            ValueError: `now` has no time zone.
        """
        if now.tzinfo is None:
            raise ValueError("now must be an aware datetime")
        files = _Files(directory)
        ca = files.certificate(CA_CERTIFICATE)
        if not is_ca(ca):
            raise IdentityUntrusted(f"{files.path(CA_CERTIFICATE)} is not a CA's certificate", files.issue_again)
        files.check_valid(ca, CA_CERTIFICATE, now)
        certificate = files.issued(HOST_CERTIFICATE, Usage.HOST, ca, now)
        signing_certificate = files.issued(SIGNING_CERTIFICATE, Usage.SIGNING, ca, now)
        private_key = files.host_key(certificate)
        signing_key = files.signing_key(signing_certificate)
        name = files.host_name(certificate, HOST_CERTIFICATE)
        if files.host_name(signing_certificate, SIGNING_CERTIFICATE) != name:
            raise IdentityMismatch(
                f"{files.path(HOST_CERTIFICATE)} and {SIGNING_CERTIFICATE} name different hosts", files.issue_again
            )
        crl = files.crl(ca, now)
        for file, own in ((HOST_CERTIFICATE, certificate), (SIGNING_CERTIFICATE, signing_certificate)):
            if crl.get_revoked_certificate_by_serial_number(own.serial_number) is not None:
                raise IdentityRevoked(f"{files.path(file)} has been revoked", files.issue_again)
        spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return cls(
            name=name,
            directory=directory,
            certificate=certificate,
            private_key=private_key,
            signing_certificate=signing_certificate,
            signing_key=signing_key,
            ca=ca,
            crl=crl,
            spki_sha256=hashlib.sha256(spki).digest(),
        )


class _Files:
    """The directory's files, each read once, with errors that name the path and the remedy."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.issue_again = _ISSUE_AGAIN.format(directory=directory)
        self._renew_crl = _RENEW_CRL.format(directory=directory)
        # os.path's question, not Path's: before Python 3.12 that one raises where the way there is not ours.
        if not os.path.isdir(directory):
            raise IdentityMissing(
                f"there is no identity directory {directory}", f"issue one: korora pki issue DIR NAME --out {directory}"
            )

    def path(self, file: str) -> Path:
        return self._directory / file

    def certificate(self, file: str) -> x509.Certificate:
        content, _ = self._read(file, PEM_BYTES_MAX)
        try:
            certificates = x509.load_pem_x509_certificates(content)
        except MALFORMED_ERRORS as error:
            raise self._malformed(file, f"is no PEM certificate: {error}") from None
        if len(certificates) != 1:
            raise self._malformed(file, f"holds {len(certificates)} certificates, expected one")
        return certificates[0]

    def issued(self, file: str, usage: Usage, ca: x509.Certificate, now: datetime) -> x509.Certificate:
        certificate = self.certificate(file)
        if not issued_by(certificate, ca):
            raise IdentityUntrusted(
                f"{self.path(file)} was not issued by the CA in {CA_CERTIFICATE} beside it", self.issue_again
            )
        try:
            fits = fits_usage(certificate, usage)
        except CertificateMalformed as error:
            raise self._malformed(file, str(error)) from None
        if not fits:
            raise IdentityUntrusted(f"{self.path(file)} is not a {usage.value} certificate", self.issue_again)
        self.check_valid(certificate, file, now)
        return certificate

    def check_valid(self, certificate: x509.Certificate, file: str, now: datetime) -> None:
        if now < certificate.not_valid_before_utc:
            raise IdentityExpired(
                f"{self.path(file)} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC",
                "check this machine's clock, or wait",
            )
        if now > certificate.not_valid_after_utc:
            raise IdentityExpired(
                f"{self.path(file)} expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC",
                self.issue_again,
            )

    def host_name(self, certificate: x509.Certificate, file: str) -> str:
        try:
            return peer_name(certificate)
        except CertificateMalformed as error:
            raise self._malformed(file, str(error)) from None

    def host_key(self, certificate: x509.Certificate) -> EllipticCurvePrivateKey:
        key = self._key(HOST_KEY)
        if not isinstance(key, EllipticCurvePrivateKey):
            raise self._malformed(HOST_KEY, "is not an elliptic curve key")
        self._check_pair(key.public_key(), certificate, HOST_KEY, HOST_CERTIFICATE)
        return key

    def signing_key(self, certificate: x509.Certificate) -> SigningKey:
        key = self._key(SIGNING_KEY)
        if not isinstance(key, Ed25519PrivateKey):
            raise self._malformed(SIGNING_KEY, "is not an Ed25519 key")
        self._check_pair(key.public_key(), certificate, SIGNING_KEY, SIGNING_CERTIFICATE)
        return SigningKey(key.private_bytes_raw())

    def crl(self, ca: x509.Certificate, now: datetime) -> x509.CertificateRevocationList:
        if not os.path.exists(self.path(CRL)):
            raise CrlMissing(f"there is no {self.path(CRL)}", self._renew_crl)
        content, _ = self._read(CRL, CRL_BYTES_MAX)
        try:
            crl = x509.load_pem_x509_crl(content)
            starts, ends = crl.last_update_utc, crl.next_update_utc
        except MALFORMED_ERRORS as error:
            raise CrlMalformed(
                f"{self.path(CRL)} is no PEM certificate revocation list: {error}", self._renew_crl
            ) from None
        if not crl_signed_by(crl, ca):
            raise CrlMalformed(f"{self.path(CRL)} was not signed by the CA beside it", self._renew_crl)
        if ends is None:
            raise CrlMalformed(f"{self.path(CRL)} does not say when it ends", self._renew_crl)
        if now < starts:
            raise CrlExpired(
                f"{self.path(CRL)} is not valid before {starts:%Y-%m-%d %H:%M:%S} UTC", "check this machine's clock"
            )
        if now > ends:
            raise CrlExpired(f"{self.path(CRL)} expired at {ends:%Y-%m-%d %H:%M:%S} UTC", self._renew_crl)
        return crl

    def _key(self, file: str) -> PrivateKeyTypes:
        content, mode = self._read(file, PEM_BYTES_MAX)
        if mode & _READABLE_BY_OTHERS:
            raise IdentityPermissions(
                f"{self.path(file)} has mode {mode:04o}: a key must be its owner's alone",
                f"chmod 600 {self.path(file)}, and issue the identity again if somebody may have read it",
            )
        try:
            return load_pem_private_key(content, password=None)
        except MALFORMED_ERRORS:
            # Without the library's words: what it quotes from a key file is not ours to show.
            raise self._malformed(file, "is no unencrypted PEM private key") from None

    def _check_pair(
        self,
        public_key: EllipticCurvePublicKey | Ed25519PublicKey,
        certificate: x509.Certificate,
        key_file: str,
        certificate_file: str,
    ) -> None:
        if certificate.public_key() != public_key:
            raise IdentityMismatch(
                f"{self.path(key_file)} is not the key of {certificate_file} beside it", self.issue_again
            )

    def _read(self, file: str, bytes_max: int) -> tuple[bytes, int]:
        path = self.path(file)
        try:
            return read_bounded(path, bytes_max)
        except FileNotFoundError:
            raise IdentityMissing(f"there is no {path}", self.issue_again) from None
        except OSError as error:
            remedy = f"run as the user who owns {self._directory}, or change its owner"
            raise IdentityMissing(f"{path} cannot be read: {error.strerror}", remedy) from None
        except ValueError as error:
            if file == CRL:
                raise CrlMalformed(f"{path} is {error}", self._renew_crl) from None
            raise self._malformed(file, f"is {error}") from None

    def _malformed(self, file: str, why: str) -> IdentityError:
        return IdentityMalformed(f"{self.path(file)} {why}", self.issue_again)

"""Those who sign: certificates of signing keys, believed only under the CA, and kept so that receipts outlive them.

A certificate counts at the moment at which its host signed: a receipt of last year verifies although its signer's
certificate has expired since. One that was revoked counts for what was signed before.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from nacl.exceptions import CryptoError as NaclError
from nacl.signing import VerifyKey

from crypto.certificates import MALFORMED_ERRORS, Usage, fits_usage, issued_by, peer_name
from crypto.errors import CertificateMalformed, LogUnusable, SignerUntrusted
from crypto.files import make_private_directory, read_bounded, write_private
from crypto.receipts.dsse import keyid
from crypto.receipts.limits import CERTIFICATE_BYTES_MAX, SIGNERS_MAX

SIGNERS: Final = "signers"
_SUFFIX: Final = ".der"
_REMEMBERED: Final = 256  # certificates of a process, 1 KiB each: of hosts met lately; reading one takes 0.1 ms


@dataclass(frozen=True, slots=True)
class Signer:
    """Whose key it is, as far as its certificate says; see ``verified_signer`` for whether that may be believed.

    Attributes:
        name: NAME of ``korora://host/NAME``.
        key: its signing key's public half.
        keyid: what names that key in envelopes.
        certificate: all of it.
    """

    name: str
    key: VerifyKey
    keyid: str
    certificate: x509.Certificate

    @property
    def der(self) -> bytes:
        """The certificate's bytes."""
        return self.certificate.public_bytes(Encoding.DER)


@lru_cache(_REMEMBERED)  # the same bytes say the same; what depends on the moment is not asked here
def read_signer(der: bytes) -> Signer:
    """A signing certificate, of whichever CA.

    Raises:
        SignerUntrusted: it is no signing certificate.
    """
    if len(der) > CERTIFICATE_BYTES_MAX:
        raise SignerUntrusted(f"a signing certificate of {len(der)} bytes, {CERTIFICATE_BYTES_MAX} allowed")
    try:
        certificate = x509.load_der_x509_certificate(der)
        fits, name, key = fits_usage(certificate, Usage.SIGNING), peer_name(certificate), certificate.public_key()
    except (CertificateMalformed, *MALFORMED_ERRORS) as error:
        raise SignerUntrusted(f"not a signing certificate: {error}") from None
    if not fits or not isinstance(key, Ed25519PublicKey):
        raise SignerUntrusted(f"a certificate of {name} that is not for signing")
    try:
        verify_key = VerifyKey(key.public_bytes_raw())
    except NaclError as error:
        raise SignerUntrusted(f"the signing key of {name} is none: {error}") from None
    return Signer(name, verify_key, keyid(verify_key), certificate)


def verified_signer(
    der: bytes, ca: x509.Certificate, crl: x509.CertificateRevocationList | None, now: datetime, name: str
) -> Signer:
    """The host whose signing certificate this is, under a CA, at a moment.

    Args:
        der: the certificate.
        ca: who must have issued it.
        crl: of that CA, verified; None where there is none to be had.
        now: an aware datetime: the present in a session, the moment of the signature afterwards.
        name: the host that it must be of; empty for any.

    Raises:
        SignerUntrusted: it is not, or not at that moment.
    """
    signer = read_signer(der)
    certificate = signer.certificate
    if not _issued_by(certificate, ca):
        raise SignerUntrusted(f"the signing certificate of {signer.name} was not issued by the CA")
    if name and signer.name != name:
        raise SignerUntrusted(f"a signing certificate of {signer.name}, expected {name}")
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise SignerUntrusted(
            f"the signing certificate of {signer.name} is not valid at {now:%Y-%m-%d %H:%M:%S} UTC: "
            f"{certificate.not_valid_before_utc:%Y-%m-%d} to {certificate.not_valid_after_utc:%Y-%m-%d}"
        )
    revoked = None if crl is None else crl.get_revoked_certificate_by_serial_number(certificate.serial_number)
    if revoked is not None and revoked.revocation_date_utc <= now:
        raise SignerUntrusted(
            f"the signing certificate of {signer.name} was revoked at {revoked.revocation_date_utc:%Y-%m-%d %H:%M} UTC"
        )
    return signer


@lru_cache(_REMEMBERED)  # of the same two certificates, byte for byte; times and revocation are looked at each time
def _issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    return issued_by(certificate, ca)


class Trust:
    """Whose keys are believed.

    Args:
        believed: without asking anybody: given by whoever verifies, or verified when they were kept.
        carried: by what is verified: believed only under the CA.
        ca: that CA; None to believe nothing that is carried.
        crl: of that CA, verified; None where there is none to be had.
    """

    def __init__(
        self,
        believed: Iterable[Signer] = (),
        carried: Iterable[Signer] = (),
        ca: x509.Certificate | None = None,
        crl: x509.CertificateRevocationList | None = None,
    ) -> None:
        self._believed = {signer.keyid: signer for signer in believed}
        self._carried = {signer.keyid: signer for signer in carried}
        self._ca, self._crl = ca, crl

    def signer(self, key: str, moment: datetime) -> Signer | None:
        """Whose key that is, by its id; None where nobody is believed to have it.

        Raises:
            SignerUntrusted: its certificate is not good at that moment.
        """
        if key in self._believed:
            return self._believed[key]
        if key not in self._carried or self._ca is None:
            return None
        return verified_signer(self._carried[key].der, self._ca, self._crl, moment, "")

    def keys(self, name: str) -> tuple[VerifyKey, ...]:
        """Every key that a host has, or had: heads of logs do not say when they were signed."""
        found = [signer.key for signer in self._believed.values() if signer.name == name]
        if self._ca is not None:
            carried = (signer for signer in self._carried.values() if signer.name == name)
            found += [signer.key for signer in carried if issued_by(signer.certificate, self._ca)]
        return tuple(found)


class Signers:
    """Certificates of those whose signatures stand in a log, in files named by their keys' ids.

    Args:
        folder: the log's; ``signers`` is made in it when first needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / SIGNERS
        self._kept: dict[str, tuple[bytes, tuple[int, ...]]] = {}
        """By key: what this process has seen in its file, and the file's marks then."""

    def keep(self, der: bytes) -> Signer:
        """Keep a certificate; costs a look at its file's marks where it is kept already. Verify it first.

        Raises:
            SignerUntrusted: it is no signing certificate.
            LogUnusable: the disk refuses, or too many are kept.
        """
        signer = read_signer(der)
        path = self._path(signer.keyid)
        with suppress(OSError, ValueError):  # not there, or not what it should be: then it is written
            marks = _marks(path)
            if self._kept.get(signer.keyid) == (der, marks):
                return signer
            if read_bounded(path, CERTIFICATE_BYTES_MAX)[0] == der:
                self._kept[signer.keyid] = der, marks  # of before it was read: what has changed since shows
                return signer
        try:
            make_private_directory(self.folder)
            if sum(1 for _ in self.folder.glob(f"*{_SUFFIX}")) >= SIGNERS_MAX:
                raise LogUnusable(f"{self.folder} holds {SIGNERS_MAX} certificates", "move those of old hosts away")
            write_private(path, der)
        except OSError as error:
            raise LogUnusable(f"cannot keep {path}: {error.strerror}", "make room on its disk, or repair it") from None
        return signer

    def get(self, key: str) -> Signer | None:
        """Whose key that is; None where it is not kept.

        Raises:
            SignerUntrusted: its file does not hold it.
            LogUnusable: it cannot be read.
        """
        path = self._path(key)
        try:
            signer = read_signer(read_bounded(path, CERTIFICATE_BYTES_MAX)[0])
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LogUnusable(f"cannot read {path}: {error.strerror}", "run as the user who owns it") from None
        except ValueError as error:
            raise SignerUntrusted(f"{path} is {error}") from None
        except SignerUntrusted as error:
            raise SignerUntrusted(f"{path}: {error}", "remove it, and give the certificate by --signer") from None
        if signer.keyid != key:
            raise SignerUntrusted(
                f"{path} holds the key {signer.keyid[:16]}", "remove it, and give the certificate by --signer"
            )
        return signer

    def all(self) -> Iterator[Signer]:
        """All of them.

        Raises:
            SignerUntrusted, LogUnusable: as ``get``.
        """
        for path in sorted(self.folder.glob(f"*{_SUFFIX}"))[:SIGNERS_MAX]:
            signer = self.get(path.name.removesuffix(_SUFFIX))
            if signer is not None:
                yield signer

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"


def _marks(path: Path) -> tuple[int, ...]:
    """What changes with a file: which one it is, how long, and when it was written to last."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

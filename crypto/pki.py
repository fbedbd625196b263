"""A private CA in one directory: it issues identities, revokes them, and keeps the CRL in step.

    DIR/ca.crt  ca.key      the CA; ca.crt is written last, so that a directory with it is a whole CA
    DIR/crl.pem             the newest CRL
    DIR/index.jsonl         what was issued and revoked, one JSON event a line, appended and fsynced
    DIR/lock                flock: one writer at a time
    DIR/hosts/NAME/         identities, unless --out says otherwise

Order makes it crash-safe. A certificate is in the index before any file of it exists, so none can exist that
`revoke` does not know; a revocation is in the index before the CRL is signed, and the CRL is always made from the
whole index, so a repeated `revoke` or `crl` finishes what a crash cut short. A last line without its newline was
never acknowledged and is dropped.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from nacl.signing import SigningKey

from crypto.certificates import (
    CA_DAYS,
    CA_NAME_CHARS_MAX,
    CERTIFICATE_DAYS,
    CRL_DAYS,
    DAYS_MAX,
    MALFORMED_ERRORS,
    Issuer,
    Revoked,
    Usage,
    build_ca,
    build_certificate,
    build_crl,
    check_name,
    crl_number,
    crl_signed_by,
    is_ca,
)
from crypto.errors import PkiCorrupt, PkiExists, PkiExpired, PkiMissing, PkiNameInvalid
from crypto.files import FILE_MODE, make_private_directory, read_bounded, write_private
from crypto.identity import (
    CA_CERTIFICATE,
    CRL,
    CRL_BYTES_MAX,
    HOST_CERTIFICATE,
    HOST_KEY,
    IDENTITY_FILES,
    PEM_BYTES_MAX,
    SIGNING_CERTIFICATE,
    SIGNING_KEY,
)
from crypto.pki_index import CrlEvent, Entry, Event, Index, IssuedEvent, RevokedEvent, Status, append_events

CA_KEY: Final = "ca.key"
INDEX: Final = "index.jsonl"
LOCK: Final = "lock"
HOSTS: Final = "hosts"
INDEX_BYTES_MAX: Final = 256 * 1024 * 1024  # half a million certificates
CA_NAME: Final = "Korora CA"


@dataclass(frozen=True, slots=True)
class Published:
    """A new CRL, and what became of the copies in identities on this machine.

    Attributes:
        number: the CRL's number.
        next_update: until when it is valid; an aware datetime, UTC.
        path: the CA's own copy.
        refreshed: identity directories that have it now.
        failed: identity directories whose copy could not be replaced, each with the reason.
        elsewhere: names of hosts with a valid certificate whose identity does not stand where it was written: their
            copies are refreshed by hand.
    """

    number: int
    next_update: datetime
    path: Path
    refreshed: tuple[Path, ...]
    failed: tuple[tuple[Path, str], ...]
    elsewhere: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Issued:
    """A complete identity, written to `directory`; valid until `not_after` (aware, UTC)."""

    name: str
    directory: Path
    host_serial: int
    signing_serial: int
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Revocation:
    """What a revocation did: the serials revoked just now (none when it only finished an earlier one), and the CRL."""

    name: str
    serials: tuple[int, ...]
    published: Published


class Authority:
    """One CA directory. Methods that write hold its lock for as long as they run, and wait for it.

    Every method may raise OSError when the disk or the permissions refuse.
    """

    def __init__(self, directory: Path, issuer: Issuer) -> None:
        """Use `create` or `open`."""
        self.directory = directory
        self._issuer = issuer

    @classmethod
    def create(cls, directory: Path, *, now: datetime, name: str = CA_NAME, days: int = CA_DAYS) -> "Authority":
        """Make a CA with a first, empty CRL.

        Args:
            directory: made with mode 0700 where it does not exist.
            now: an aware datetime.
            name: the CA's common name, 1 to 64 characters.
            days: 1 to 36 500.

        Raises:
            PkiExists: there is a CA already.
            PkiNameInvalid: the common name is empty, too long or has control characters.
            ValueError: `days` out of range, or `now` without a time zone.
        """
        _check_time(now, days)
        if not 1 <= len(name) <= CA_NAME_CHARS_MAX or not name.isprintable():
            raise PkiNameInvalid(
                f"{name[:80]!r} cannot be a CA's name", f"use 1 to {CA_NAME_CHARS_MAX} printable characters"
            )
        directory = directory.absolute()
        make_private_directory(directory)
        with _locked(directory):
            if (directory / CA_CERTIFICATE).exists():
                raise PkiExists(f"there is a CA in {directory} already", "choose another directory")
            # Without ca.crt, an index that has issued nothing is what an interrupted init left; any other is precious.
            index = directory / INDEX
            if index.exists() and Index.parse(_read(index, INDEX_BYTES_MAX)[0], index).issued:
                raise PkiExists(f"{index} is the index of another CA", "choose another directory")
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = build_ca(key, name, now=now, days=days)
            write_private(directory / CA_KEY, _key_pem(key))
            write_private(directory / INDEX, b"")
            authority = cls(directory, Issuer(certificate, key))
            authority._publish(now, CRL_DAYS)
            write_private(directory / CA_CERTIFICATE, certificate.public_bytes(Encoding.PEM))
        return authority

    @classmethod
    def open(cls, directory: Path) -> "Authority":
        """Open the CA that `create` made.

        Raises:
            PkiMissing: there is none, or it cannot be read.
            PkiCorrupt: its certificate and key cannot be parsed or do not belong together, or others can read the key.
        """
        directory = directory.absolute()
        certificate_pem, _ = _read(directory / CA_CERTIFICATE, PEM_BYTES_MAX)
        key_pem, mode = _read(directory / CA_KEY, PEM_BYTES_MAX)
        if mode & ~FILE_MODE:
            raise PkiCorrupt(
                f"{directory / CA_KEY} has mode {mode:04o}: the CA's key must be its owner's alone",
                f"chmod 600 {directory / CA_KEY}, and make a new CA if somebody may have read it",
            )
        restore = f"restore {directory} from a backup"
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            key = load_pem_private_key(key_pem, password=None)
        except MALFORMED_ERRORS:
            raise PkiCorrupt(f"the CA's certificate or key in {directory} cannot be parsed", restore) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not is_ca(certificate):
            raise PkiCorrupt(f"{directory} holds no CA of this program", restore)
        if key.public_key() != certificate.public_key():
            raise PkiCorrupt(f"{CA_KEY} is not the key of {CA_CERTIFICATE} in {directory}", restore)
        return cls(directory, Issuer(certificate, key))

    @property
    def certificate(self) -> x509.Certificate:
        """The CA's certificate."""
        return self._issuer.certificate

    def issue(
        self,
        name: str,
        *,
        now: datetime,
        out: Path | None = None,
        days: int = CERTIFICATE_DAYS,
        force: bool = False,
    ) -> Issued:
        """Issue a complete identity: two certificates, two fresh keys, the CA's certificate and its CRL.

        A certificate never outlives the CA's own. A CRL that has expired is renewed on the way. Earlier certificates
        of the same name stay valid until they expire or are revoked.

        Args:
            name: what `check_name` accepts.
            now: an aware datetime.
            out: where to; DIR/hosts/NAME by default. Made with mode 0700; the files have mode 0600.
            days: validity, 1 to 36 500.
            force: replace an identity that stands there.

        Raises:
            PkiNameInvalid: no host can have that name.
            PkiExists: files of an identity stand there and `force` is not given.
            PkiExpired: the CA itself has expired.
            PkiCorrupt: the index cannot be read.
            ValueError: `days` out of range, or `now` without a time zone.
        """
        _check_time(now, days)
        check_name(name)
        directory = (out or self.directory / HOSTS / name).absolute()
        with _locked(self.directory):
            self._check_alive(now)
            self._read_index()  # a damaged index is found before anything is written
            present = [file for file in IDENTITY_FILES if os.path.lexists(directory / file)]
            if present and not force:
                raise PkiExists(
                    f"{directory} holds {present[0]} already", "choose another --out, or replace it with --force"
                )
            make_private_directory(directory)
            host_key = ec.generate_private_key(ec.SECP256R1())
            signing_key = Ed25519PrivateKey.from_private_bytes(bytes(SigningKey.generate()))
            host = build_certificate(self._issuer, name, host_key.public_key(), Usage.HOST, now=now, days=days)
            signing = build_certificate(self._issuer, name, signing_key.public_key(), Usage.SIGNING, now=now, days=days)
            self._append(
                *(
                    IssuedEvent(
                        serial=f"{certificate.serial_number:x}",
                        name=name,
                        usage=usage,
                        not_before=certificate.not_valid_before_utc,
                        not_after=certificate.not_valid_after_utc,
                        directory=str(directory),
                    )
                    for usage, certificate in ((Usage.HOST, host), (Usage.SIGNING, signing))
                )
            )
            crl = self._current_crl(now)
            contents = {
                HOST_KEY: _key_pem(host_key),
                SIGNING_KEY: _key_pem(signing_key),
                HOST_CERTIFICATE: host.public_bytes(Encoding.PEM),
                SIGNING_CERTIFICATE: signing.public_bytes(Encoding.PEM),
                CA_CERTIFICATE: self.certificate.public_bytes(Encoding.PEM),
                CRL: crl,
            }
            for file, content in contents.items():
                write_private(directory / file, content)
        return Issued(name, directory, host.serial_number, signing.serial_number, host.not_valid_after_utc)

    def revoke(self, name: str, *, now: datetime, crl_days: int = CRL_DAYS) -> Revocation:
        """Revoke every certificate of `name` that is neither revoked nor expired, and publish a new CRL.

        Repeating it is harmless: it revokes what is left and publishes again.

        Raises:
            PkiNameInvalid: the CA never issued anything to that name.
            PkiExpired: the CA itself has expired.
            PkiCorrupt: the index cannot be read.
            ValueError: `crl_days` out of range, or `now` without a time zone.
        """
        _check_time(now, crl_days)
        with _locked(self.directory):
            self._check_alive(now)
            mine = [entry for entry in self._read_index().entries(now) if entry.name == name]
            if not mine:
                raise PkiNameInvalid(
                    f"this CA has issued nothing to {name[:80]!r}", f"korora pki list {self.directory} shows the names"
                )
            serials = tuple(entry.serial for entry in mine if entry.status is Status.VALID)
            self._append(*(RevokedEvent(serial=f"{serial:x}", at=now.astimezone(UTC)) for serial in serials))
            return Revocation(name, serials, self._publish(now, crl_days))

    def publish_crl(self, *, now: datetime, days: int = CRL_DAYS) -> Published:
        """Sign a new CRL, valid `days` from `now`, and refresh it in every identity directory on this machine.

        Raises:
            PkiExpired: the CA itself has expired.
            PkiCorrupt: the index cannot be read.
            ValueError: `days` out of range, or `now` without a time zone.
        """
        _check_time(now, days)
        with _locked(self.directory):
            self._check_alive(now)
            return self._publish(now, days)

    def entries(self, *, now: datetime) -> tuple[Entry, ...]:
        """All certificates ever issued, in order, with their status at `now`.

        Raises:
            PkiCorrupt: the index cannot be read.
        """
        with _locked(self.directory):
            return tuple(self._read_index().entries(now))

    def _check_alive(self, now: datetime) -> None:
        if now > self.certificate.not_valid_after_utc:
            raise PkiExpired(
                f"the CA in {self.directory} expired at {self.certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC",
                "make a new one with korora pki init and issue every identity again",
            )

    def _current_crl(self, now: datetime) -> bytes:
        """The newest CRL in PEM; a new one where it has expired, so that a fresh identity is never born unusable."""
        crl = self._load_crl()
        if crl is None or crl.next_update_utc is None or crl.next_update_utc <= now:
            self._publish(now, CRL_DAYS)
        content, _ = _read(self.directory / CRL, CRL_BYTES_MAX)
        return content

    def _load_crl(self) -> x509.CertificateRevocationList | None:
        """Our own CRL, or None where it is absent, damaged or another CA's: it can always be made again."""
        try:
            content, _ = read_bounded(self.directory / CRL, CRL_BYTES_MAX)
            crl = x509.load_pem_x509_crl(content)
        except (FileNotFoundError, *MALFORMED_ERRORS):
            return None
        return crl if crl_signed_by(crl, self.certificate) else None

    def _publish(self, now: datetime, days: int) -> Published:
        index = self._read_index()
        old = self._load_crl()
        number = max(index.crl_number, crl_number(old) if old is not None else 0) + 1
        # The number is spent before the CRL exists, so that no two CRLs ever share one (RFC 5280 §5.2.3).
        self._append(CrlEvent(number=number, at=now.astimezone(UTC)))
        revoked = [Revoked(entry.serial, entry.revoked_at) for entry in index.entries(now) if entry.revoked_at]
        crl = build_crl(self._issuer, revoked, number=number, now=now, days=days)
        pem = crl.public_bytes(Encoding.PEM)
        write_private(self.directory / CRL, pem)
        refreshed: list[Path] = []
        failed: list[tuple[Path, str]] = []
        for directory in self._identity_directories(index):
            try:
                if not self._holds_ours(directory):
                    continue
                # A root operator must not take the file away from the user the relay runs as.
                write_private(directory / CRL, pem, owner=directory.stat())
                refreshed.append(directory)
            except OSError as error:
                failed.append((directory, error.strerror or str(error)))
        here = {*refreshed, *(directory for directory, _ in failed)}
        valid = [entry for entry in index.entries(now) if entry.status is Status.VALID]
        return Published(
            number=number,
            next_update=now + timedelta(days=days),
            path=self.directory / CRL,
            refreshed=tuple(refreshed),
            failed=tuple(failed),
            # A CA directory that was moved took hosts/ with it: that name is here, only not where the index says.
            elsewhere=tuple(
                dict.fromkeys(
                    entry.name
                    for entry in valid
                    if entry.directory not in here and self.directory / HOSTS / entry.name not in here
                )
            ),
        )

    def _identity_directories(self, index: Index) -> list[Path]:
        """Where identities may stand on this machine: as recorded, and under hosts/, for the CA may have moved."""
        candidates = dict.fromkeys(Path(event.directory) for event in index.issued.values())
        hosts = self.directory / HOSTS
        if hosts.is_dir():
            candidates |= dict.fromkeys(sorted(hosts.iterdir()))
        return list(candidates)

    def _holds_ours(self, directory: Path) -> bool:
        """Whether an identity of this CA stands there; PermissionError where that cannot be told."""
        try:
            content, _ = read_bounded(directory / CA_CERTIFICATE, PEM_BYTES_MAX)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False
        return content == self.certificate.public_bytes(Encoding.PEM)

    def _read_index(self) -> Index:
        content, _ = _read(self.directory / INDEX, INDEX_BYTES_MAX)
        return Index.parse(content, self.directory / INDEX)

    def _append(self, *events: Event) -> None:
        append_events(self.directory / INDEX, events)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the CA's lock. It is never held for longer than a few signatures and writes, so waiting needs no limit."""
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path, bytes_max: int) -> tuple[bytes, int]:
    try:
        return read_bounded(path, bytes_max)
    except (FileNotFoundError, NotADirectoryError):
        raise PkiMissing(f"there is no {path}", f"make a CA with korora pki init {path.parent}") from None
    except PermissionError:
        raise PkiMissing(f"{path} cannot be read", "run as the user who made the CA") from None
    except ValueError as error:
        raise PkiCorrupt(f"{path} is {error}", f"restore {path.parent} from a backup") from None


def _key_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _check_time(now: datetime, days: int) -> None:
    if now.tzinfo is None:
        raise ValueError("now must be an aware datetime")
    if not 1 <= days <= DAYS_MAX:
        raise ValueError(f"days must be 1 to {DAYS_MAX}, not {days}")

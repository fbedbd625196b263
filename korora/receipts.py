"""Receipts for people: which there are, what they say, who has signed them, and whether that may be believed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from crypto.certificates import MALFORMED_ERRORS, crl_signed_by, is_ca
from crypto.errors import HeadMalformed, LogDamaged, ReceiptError, ReceiptMalformed, SignerUntrusted
from crypto.files import read_bounded
from crypto.identity import CRL_BYTES_MAX, PEM_BYTES_MAX, SIGNING_CERTIFICATE, Identity
from crypto.receipts import bundle as bundles
from crypto.receipts import checkpoint as heads
from crypto.receipts.audit import Audit, audit
from crypto.receipts.bundle import BUNDLE_BYTES_MAX, Verified
from crypto.receipts.dsse import Envelope, decode
from crypto.receipts.limits import RECEIPT_BYTES_MAX
from crypto.receipts.log import FOLDER, ReceiptLog
from crypto.receipts.receipt import Receipt, examine
from crypto.receipts.signers import Signer, Signers, Trust, read_signer
from crypto.receipts.statement import Predicate, parse
from proxy.errors import ConfigurationError

_NOT_BELIEVED: Final = "give the CA's certificate by --ca, or a host's signing certificate by --signer NAME=FILE"


@dataclass(frozen=True, slots=True)
class Logged:
    """A receipt in a log.

    Attributes:
        index: its place.
        envelope: as it was signed.
        predicate: what it says.
        receipt: who has signed it; None where that cannot be told.
        trouble: why not.
    """

    index: int
    envelope: Envelope
    predicate: Predicate
    receipt: Receipt | None
    trouble: str = ""


class Receipts:
    """The log in a state directory.

    Args:
        state: the relay's state directory.
        told: whom to believe besides those whose certificates are kept with the log.

    Attributes:
        said: what a crash had left in the log, in words.
    """

    def __init__(self, state: Path, told: Iterable[Signer] = ()) -> None:
        self.folder = state / FOLDER
        self.said: list[str] = []
        self.log = ReceiptLog(self.folder, self.said.append)
        self._told = tuple(told)

    def signers(self) -> tuple[Signer, ...]:
        """All whose certificates are kept with the log, or were given."""
        return (*Signers(self.folder).all(), *self._told)

    def listed(self, last: int) -> Iterator[Logged]:
        """The last ones, oldest first; all of them for 0."""
        trust = Trust(believed=self.signers())
        start = max(0, self.log.head()[0] - last) if last else 0
        for index, envelope in self.log.entries(start):
            yield self._looked_at(index, envelope, trust)

    def found(self, what: str) -> list[Logged]:
        """Those of a session, by the first digits of its id; or one, by ``#INDEX``.

        Raises:
            ConfigurationError: there is none, or the digits are of several sessions.
        """
        if what.startswith("#"):
            trust = Trust(believed=self.signers())
            return [self._looked_at(self.index(what), self.log.entry(self.index(what)), trust)]
        found = [one for one in self.listed(0) if what and one.predicate.session.startswith(what.lower())]
        sessions = {one.predicate.session for one in found}
        if not found:
            raise ConfigurationError(f"no receipt of session {what!r} is logged here", "see korora receipts list --all")
        if len(sessions) > 1:
            raise ConfigurationError(f"{what!r} means {len(sessions)} sessions", "give more digits of its id")
        return found

    def index(self, text: str) -> int:
        """An entry's index, as ``#7`` or ``7``.

        Raises:
            ConfigurationError: it is none, or the log has not as many entries.
        """
        digits, size = text.removeprefix("#"), self.log.head()[0]
        if not digits.isascii() or not digits.isdigit() or int(digits) >= size:
            raise ConfigurationError(f"the log has {size} entries, and none is {text!r}", "the first one is 0")
        return int(digits)

    def audit(self) -> Audit:
        """Read it through; see ``crypto.receipts.audit``.

        Raises:
            ConfigurationError: nobody knows the key of the host whose log it is.
        """
        signers, name = self.signers(), self._owner()
        if name and name not in {one.name for one in signers}:
            raise ConfigurationError(
                f"no signing certificate of {name} is known, whose log this is",
                "give --identity, or --signer NAME=FILE",
            )
        return audit(self.folder, Trust(believed=signers), name)

    def _owner(self) -> str:
        """Whose log it is, as its last head says; empty if none says so."""
        try:
            text = self.log.last_head()
            return "" if text is None else heads.name_of(heads.parse(text))
        except HeadMalformed:
            return ""

    def export(self, chosen: list[Logged], identity: Identity | None) -> bytes:
        """A bundle of receipts (see ``crypto.receipts.bundle``).

        Args:
            chosen: which.
            identity: signs a head of now; None to use the one that was signed last.

        Raises:
            ConfigurationError: no signed head covers them.
        """
        text = self.log.last_head() if identity is None else self.log.checkpoint(identity.name, identity.signing_key)
        size = 0 if text is None else heads.parse(text).size
        if text is None or any(one.index >= size for one in chosen):
            raise ConfigurationError(
                f"the last signed head covers {size} entries, and not all of these", "give --identity, to sign another"
            )
        entries = [(one.index, one.envelope, self.log.inclusion(one.index, size)) for one in chosen]
        needed = {signature.keyid for one in chosen for signature in one.envelope.signatures}
        owner = heads.name_of(heads.parse(text))
        carried = {one.keyid: one for one in self.signers() if one.keyid in needed or one.name == owner}
        return bundles.make(text, entries, carried.values())

    @staticmethod
    def _looked_at(index: int, envelope: Envelope, trust: Trust) -> Logged:
        try:
            predicate = parse(envelope.payload).predicate
        except ReceiptMalformed as error:
            raise LogDamaged(f"entry {index} is no receipt: {error}", "see korora receipts verify") from None
        try:
            return Logged(index, envelope, predicate, examine(envelope, trust))
        except ReceiptError as error:
            return Logged(index, envelope, predicate, None, str(error))


def verify_file(path: Path, trust: "Given") -> Verified | Receipt:
    """Verify a bundle, or a single envelope.

    Args:
        path: the file.
        trust: whom to believe.

    Raises:
        ConfigurationError: it cannot be read, or nothing says whom to believe.
        ReceiptError: something in it does not hold.
    """
    content = _read(path, BUNDLE_BYTES_MAX)
    if not trust.signers and trust.ca is None:
        raise ConfigurationError("nothing says whose keys are to be believed", _NOT_BELIEVED)
    if len(content) <= RECEIPT_BYTES_MAX:
        try:
            envelope = decode(content)
        except ReceiptMalformed:
            pass  # then it has to be a bundle
        else:
            return examine(envelope, trust.trust(()))
    return bundles.verify(content, trust.trust)


@dataclass(frozen=True, slots=True)
class Given:
    """Whom somebody who verifies believes.

    Attributes:
        signers: hosts' own certificates.
        ca: the certificate under which others are believed.
        crl: of that CA.
    """

    signers: tuple[Signer, ...] = ()
    ca: x509.Certificate | None = None
    crl: x509.CertificateRevocationList | None = None

    @classmethod
    def read(cls, ca: Path | None, crl: Path | None, signers: Iterable[str]) -> "Given":
        """From files.

        Args:
            ca: the CA's certificate, PEM.
            crl: its revocation list, PEM.
            signers: NAME=FILE each, a signing certificate, PEM or DER.

        Raises:
            ConfigurationError: a file is not what it should be.
        """
        authority = None if ca is None else _ca(ca)
        revoked = None
        if crl is not None:
            if authority is None:
                raise ConfigurationError("--crl without --ca", "give the CA's certificate, too")
            revoked = _crl(crl, authority)
        return cls(tuple(_signer(one) for one in signers), authority, revoked)

    def trust(self, carried: Iterable[Signer]) -> Trust:
        """With those whose certificates are carried by what is verified."""
        return Trust(self.signers, carried, self.ca, self.crl)


def own_signer(identity: Path) -> Signer:
    """This host's, from its identity's directory; only the certificate is read.

    Raises:
        ConfigurationError: there is none.
    """
    return _certificate(identity / SIGNING_CERTIFICATE)


def load_identity(identity: Path) -> Identity:
    """All of it, to sign a head with."""
    return Identity.load(identity, now=datetime.now(UTC))


def _signer(text: str) -> Signer:
    name, equals, path = text.partition("=")
    if not equals:
        raise ConfigurationError(f"--signer {text!r} names no file", "write --signer NAME=signing.crt")
    signer = _certificate(Path(path))
    if signer.name != name:
        raise ConfigurationError(f"{path} is the certificate of {signer.name}, not of {name}", "see which is meant")
    return signer


def _certificate(path: Path) -> Signer:
    content = _read(path, PEM_BYTES_MAX)
    try:
        if b"-----BEGIN" in content:
            content = x509.load_pem_x509_certificate(content).public_bytes(Encoding.DER)
        return read_signer(content)
    except (SignerUntrusted, *MALFORMED_ERRORS) as error:
        raise ConfigurationError(f"{path}: {error}", "give a host's signing.crt") from None


def _ca(path: Path) -> x509.Certificate:
    try:
        ca = x509.load_pem_x509_certificate(_read(path, PEM_BYTES_MAX))
        good = is_ca(ca)
    except MALFORMED_ERRORS as error:
        raise ConfigurationError(f"{path} is no PEM certificate: {error}", "give the CA's ca.crt") from None
    if not good:
        raise ConfigurationError(f"{path} is no CA's certificate", "give the CA's ca.crt")
    return ca


def _crl(path: Path, ca: x509.Certificate) -> x509.CertificateRevocationList:
    try:
        crl = x509.load_pem_x509_crl(_read(path, CRL_BYTES_MAX))
    except MALFORMED_ERRORS as error:
        raise ConfigurationError(f"{path} is no PEM revocation list: {error}", "give the CA's crl.pem") from None
    if not crl_signed_by(crl, ca):
        raise ConfigurationError(f"{path} was not signed by the CA that --ca names", "give that CA's crl.pem")
    return crl


def _read(path: Path, bytes_max: int) -> bytes:
    try:
        return read_bounded(path, bytes_max)[0]
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {path}: {error.strerror}", "check the path and its permissions"
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"{path} is {error}", "check the path") from None

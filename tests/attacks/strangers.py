"""Identities that must not be let in, and TLS contexts that must not be talked to."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL, crypto

from crypto.certificates import HOST_URI_PREFIX
from crypto.identity import Identity
from crypto.pki import Authority
from crypto.tls import PeerRules, TlsConfig, TlsRole

DAY = timedelta(days=1)
ANYBODY = PeerRules()


class House:
    """A CA of its own with hosts of every sort; `config` gives any of them a TLS context.

    Args:
        directory: where the CA is made, a week ago, so that a certificate can have expired since.
    """

    def __init__(self, directory: Path) -> None:
        self.now = datetime.now(UTC)
        self.authority = Authority.create(directory, now=self.now - 7 * DAY)
        self._directory = directory

    def issue(self, name: str, *, issued: datetime | None = None, days: int = 30) -> Identity:
        """A complete identity, loaded at the time it was issued at."""
        at = issued or self.now
        directory = self.authority.issue(name, now=at, days=days, out=self._directory / f"{name}-{at:%j}").directory
        return Identity.load(directory, now=at)

    def revoke(self, name: str) -> None:
        """Revoke all of a name; identities that are loaded already keep the CRL they have."""
        self.authority.revoke(name, now=self.now)

    def forged(self, identity: Identity, *uris: str, purposes: tuple[x509.ObjectIdentifier, ...] = ()) -> Identity:
        """An identity whose certificate the CA signed with these URIs and purposes instead of its own."""
        issuer_key = load_pem_private_key((self._directory / "ca.key").read_bytes(), password=None)
        assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
        both = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
        own = identity.certificate
        builder = x509.CertificateBuilder(
            issuer_name=own.issuer, subject_name=own.subject, public_key=identity.private_key.public_key()
        )
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(self.now - DAY).not_valid_after(self.now + DAY)
        kept = (x509.BasicConstraints, x509.KeyUsage, x509.SubjectKeyIdentifier, x509.AuthorityKeyIdentifier)
        for extension in own.extensions:
            if isinstance(extension.value, kept):
                builder = builder.add_extension(extension.value, extension.critical)
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes or both), critical=False)
        if uris:
            names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
            builder = builder.add_extension(names, critical=False)
        return replace(identity, certificate=builder.sign(issuer_key, hashes.SHA256()))


def uri(name: str) -> str:
    """The URI of a host's name."""
    return HOST_URI_PREFIX + name


def config(identity: Identity, role: TlsRole, rules: PeerRules = ANYBODY) -> TlsConfig:
    """A TLS context."""
    return TlsConfig(identity, role, rules)


def bare(identity: Identity, role: TlsRole) -> TlsConfig:
    """One without a certificate of its own, that would believe anybody."""
    made = TlsConfig(identity, role, ANYBODY)
    context = SSL.Context(SSL.TLS_METHOD)
    store = context.get_cert_store()
    assert store is not None
    store.add_cert(crypto.X509.from_cryptography(identity.ca))
    _groups(context, "X25519MLKEM768")
    made.context = context
    return made


def classical(identity: Identity, role: TlsRole) -> TlsConfig:
    """One that knows X25519 and nothing stronger."""
    made = TlsConfig(identity, role, PeerRules(allow_classical=True))
    _groups(made.context, "X25519")
    return made


def outdated(identity: Identity, role: TlsRole) -> TlsConfig:
    """One that speaks TLS 1.2 and nothing newer."""
    made = TlsConfig(identity, role, PeerRules(allow_classical=True))
    made.context.set_min_proto_version(SSL.TLS1_2_VERSION)
    made.context.set_max_proto_version(SSL.TLS1_2_VERSION)
    _groups(made.context, "X25519:P-256")  # TLS 1.2 needs the curve of an ECDSA certificate among them
    return made


def _groups(context: SSL.Context, groups: str) -> None:
    lib = SSL._lib  # type: ignore[attr-defined]
    assert lib.SSL_CTX_set1_curves_list(context._context, groups.encode()) == 1

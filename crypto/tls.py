"""The control connection's TLS 1.3, sans-IO, over the OpenSSL that ``cryptography`` bundles.

Bytes from the socket go in by ``receive``, bytes for the socket come out of ``outgoing``. The stdlib's ``ssl``
will not do: it has neither ML-KEM nor an exporter.

Two properties of TLS 1.3 shape this class (RFC 8446 section 2). The client finishes before the server has judged
its certificate, so every failure up to ``mark_open`` counts as a failed authentication, alerts that arrive later
than the handshake included. And the server could export before the client has authenticated, so ``export`` refuses
until the handshake is over and the peer's certificate, name and group have been checked on this side.
"""

import hashlib
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, unique
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from OpenSSL import SSL, crypto

from crypto.certificates import peer_name
from crypto.errors import (
    AuthenticationError,
    CertificateExpired,
    CertificateRevoked,
    CertificateUntrusted,
    ControlForged,
    CryptoError,
    GroupRefused,
    PeerCertificateMissing,
    PeerNameMismatch,
    TlsFailure,
)
from crypto.identity import Identity
from crypto.keys import ATTESTATION_LABEL, EXPORTER_LABEL, SECRET_BYTES, SessionId

GROUP_REQUIRED: Final = "X25519MLKEM768"
GROUPS_CLASSICAL: Final = "X25519MLKEM768:X25519:P-256"
CIPHERSUITES: Final = b"TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
PRE_AUTHENTICATION_BYTES_MAX: Final = 16 * 1024  # a hybrid ClientHello and a short chain need about 5 KiB
_READ_BYTES: Final = 64 * 1024

# X509_V_ERR_* of openssl/x509_vfy.h
_VERIFY_ERRORS: Final[dict[int, tuple[type[AuthenticationError], str]]] = {
    3: (CertificateRevoked, "no usable CRL for its issuer"),
    9: (CertificateExpired, "it is not valid yet"),
    10: (CertificateExpired, "it has expired"),
    11: (CertificateRevoked, "the CRL is not valid yet"),
    12: (CertificateRevoked, "the CRL here has expired: no certificate can be checked against it"),
    23: (CertificateRevoked, "it has been revoked"),
}


@unique
class TlsRole(Enum):
    """Which end of the handshake; the source of a migration is the client."""

    CLIENT = "client"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class PeerRules:
    """Whom this side is willing to talk to, beyond a valid certificate of its own CA.

    Args:
        names: acceptable host names of ``korora://host/NAME``; empty accepts any name the CA has certified.
        pins: acceptable SHA-256 digests (32 bytes) of the peer's SubjectPublicKeyInfo; empty pins nothing.
        allow_classical: accept a key exchange without ML-KEM.
        pins_by_name: the same as ``pins``, for the host of that name only.
    """

    names: frozenset[str] = frozenset()
    pins: frozenset[bytes] = frozenset()
    allow_classical: bool = False
    pins_by_name: Mapping[str, frozenset[bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """Who answered, as verified: name, leaf certificate's SHA-256 (32 bytes), key-exchange group, TLS cipher.

    ``spki_sha256`` is what rules may pin: SHA-256 of the leaf's SubjectPublicKeyInfo (32 bytes).
    """

    name: str
    leaf_sha256: bytes = field(repr=False)
    group: str
    cipher: str
    spki_sha256: bytes = field(default=bytes(32), repr=False)


class TlsConfig:
    """One identity's OpenSSL context, shared by its connections; a reload makes a new one.

    Args:
        identity: certificate, key, CA and CRL; already checked by ``Identity.load``.
        role: which end of handshakes it serves.
        rules: whom to accept.
    """

    def __init__(self, identity: Identity, role: TlsRole, rules: PeerRules) -> None:
        self.role = role
        self.rules = rules
        self.identity = identity
        self.leaf_sha256 = hashlib.sha256(identity.certificate.public_bytes(Encoding.DER)).digest()
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_max_proto_version(SSL.TLS1_3_VERSION)
        context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_tls13_ciphersuites(CIPHERSUITES)
        _set_groups(context, GROUPS_CLASSICAL if rules.allow_classical else GROUP_REQUIRED)
        context.use_certificate(identity.certificate)
        context.use_privatekey(identity.private_key)
        context.check_privatekey()
        store = context.get_cert_store()
        if store is None:
            raise TlsFailure("OpenSSL gave a context without a certificate store")
        store.add_cert(crypto.X509.from_cryptography(identity.ca))
        store.add_crl(identity.crl)
        store.set_flags(crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.X509_STRICT)
        self.context = context


def _set_groups(context: SSL.Context, groups: str) -> None:
    """Offer and accept only these groups, so that the handshake itself refuses others.

    pyOpenSSL has no call for it; where the binding ever loses it, ``TlsPeer`` still asserts the group afterwards.
    """
    lib = SSL._lib  # type: ignore[attr-defined]  # the binding; its stubs hide it
    if lib.SSL_CTX_set1_curves_list(context._context, groups.encode()) != 1:
        raise TlsFailure(f"this OpenSSL does not know the groups {groups}")


class TlsPeer:
    """One end of one control connection.

    Args:
        config: the identity's context and the rules for peers.
    """

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._connection = SSL.Connection(config.context, None)
        self._failure: AuthenticationError | None = None
        self._leaf: x509.Certificate | None = None
        self._name = ""
        self._peer: PeerInfo | None = None
        self._open = False
        self._received_bytes = 0
        self.closed = False
        """Whether the peer has sent close_notify."""
        # By a weak reference: the connection keeps its callback, and a cycle would keep both until the collector comes.
        judge = weakref.WeakMethod(self._judge)

        def verdict(connection: SSL.Connection, certificate: crypto.X509, error: int, depth: int, ok: int) -> bool:
            method = judge()
            return method is not None and method(connection, certificate, error, depth, ok)

        self._connection.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, verdict)
        if config.role is TlsRole.CLIENT:
            self._connection.set_connect_state()
            self._handshake()
        else:
            self._connection.set_accept_state()

    @property
    def peer(self) -> PeerInfo | None:
        """The verified peer, or None while the handshake is under way."""
        return self._peer

    @property
    def own_leaf_sha256(self) -> bytes:
        """SHA-256 of the certificate this side shows on this connection (32 bytes)."""
        return self._config.leaf_sha256

    def mark_open(self) -> None:
        """The destination's ACCEPT has passed: what fails from now on is the channel's integrity."""
        self._open = True

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the socket, return the plaintext they complete; ``outgoing`` may have grown.

        Raises:
            AuthenticationError: anything that fails before ``mark_open``; send ``outgoing`` (an alert), then close.
            ControlForged: a record that does not authenticate, or the peer's alert, after ``mark_open``.
        """
        if not data:
            return b""
        if self._peer is None:
            self._received_bytes += len(data)
            if self._received_bytes > PRE_AUTHENTICATION_BYTES_MAX:
                raise TlsFailure(f"over {PRE_AUTHENTICATION_BYTES_MAX} bytes before authentication")
        self._connection.bio_write(data)
        if self._peer is None:
            self._handshake()
            if self._peer is None:
                return b""
        return b"".join(self._read())

    def _read(self) -> Iterable[bytes]:
        while True:
            try:
                yield self._connection.recv(_READ_BYTES)
            except SSL.WantReadError:
                return
            except SSL.ZeroReturnError:
                self.closed = True
                return
            except SSL.Error as error:
                raise self._failed(error) from None

    def send(self, plaintext: bytes) -> None:
        """Queue plaintext for the peer; the ciphertext comes out of ``outgoing``.

        Raises:
            TlsFailure: the handshake is not over, or the connection has failed.
        """
        if self._peer is None:
            raise TlsFailure("nothing may be sent before the peer is verified")
        try:
            self._connection.sendall(plaintext)
        except SSL.Error as error:
            raise TlsFailure(f"the control connection has failed: {_reason(error)}") from None

    def outgoing(self) -> bytes:
        """Bytes that wait for the socket."""
        parts: list[bytes] = []
        while True:
            try:
                parts.append(self._connection.bio_read(_READ_BYTES))
            except SSL.WantReadError:
                return b"".join(parts)

    def export(self, session_id: SessionId) -> bytes:
        """The session's exporter (RFC 8446 section 7.5): 32 bytes.

        Raises:
            TlsFailure: the peer has not been verified on this side.
        """
        return self._export(EXPORTER_LABEL, session_id)

    def export_attestation(self, session_id: SessionId) -> bytes:
        """What a quote is bound to this connection by: 32 bytes that tell nothing of the session's keys.

        Raises:
            TlsFailure: the peer has not been verified on this side.
        """
        return self._export(ATTESTATION_LABEL, session_id)

    def _export(self, label: bytes, session_id: SessionId) -> bytes:
        if self._peer is None:
            raise TlsFailure("no key is exported before the peer is verified")
        return self._connection.export_keying_material(label, SECRET_BYTES, session_id)

    def close(self) -> None:
        """Queue close_notify."""
        if self._peer is not None:
            try:
                self._connection.shutdown()
            except SSL.Error:
                return  # the connection has failed already: there is nobody to take leave of

    def _handshake(self) -> None:
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return
        except SSL.Error as error:
            raise self._failed(error) from None
        leaf = self._connection.get_peer_certificate(as_cryptography=True)
        group = self._connection.get_group_name() or "unknown"
        if leaf is None or self._leaf is None:
            raise PeerCertificateMissing("the peer showed no certificate")
        if group != GROUP_REQUIRED and not self._config.rules.allow_classical:
            raise GroupRefused(f"key exchange by {group}; {GROUP_REQUIRED} is required")
        fingerprint = hashlib.sha256(leaf.public_bytes(Encoding.DER)).digest()
        cipher = self._connection.get_cipher_name() or "unknown"
        self._peer = PeerInfo(
            name=self._name,
            leaf_sha256=fingerprint,
            group=group,
            cipher=cipher,
            spki_sha256=hashlib.sha256(_spki(leaf)).digest(),
        )

    def _judge(self, _: SSL.Connection, certificate: crypto.X509, error: int, depth: int, ok: int) -> bool:
        """OpenSSL's verdict on each certificate of the chain, then ours on the leaf's name and key."""
        if not ok:
            kind, why = _VERIFY_ERRORS.get(error, (CertificateUntrusted, "it does not lead to this CA"))
            self._failure = kind(f"the peer's certificate was refused: {why} (X509 error {error} at depth {depth})")
            return False
        if depth > 0:
            return True
        leaf = certificate.to_cryptography()
        try:
            self._name = _admit(leaf, self._config.rules)
        except AuthenticationError as refusal:
            self._failure = refusal
            return False
        self._leaf = leaf
        return True

    def _failed(self, error: SSL.Error) -> CryptoError:
        """The typed error for one of OpenSSL's; a certificate's own reason wins."""
        if self._failure is not None:
            return self._failure
        reason = _reason(error)
        if self._open:
            return ControlForged(f"the control connection failed: {reason}")
        if "no suitable key share" in reason or "no shared group" in reason or "no suitable groups" in reason:
            return GroupRefused(f"no common key exchange; {GROUP_REQUIRED} is required ({reason})")
        if "did not return a certificate" in reason:
            return PeerCertificateMissing("the peer showed no certificate")
        return TlsFailure(f"TLS with the peer failed: {reason}")


def _admit(leaf: x509.Certificate, rules: PeerRules) -> str:
    """The peer's name, if the rules admit its leaf certificate."""
    name = peer_name(leaf)
    if rules.names and name not in rules.names:
        raise PeerNameMismatch(f"the peer is {name!r}, expected {' or '.join(sorted(rules.names))}")
    spki = _spki(leaf)
    for pins in (rules.pins, rules.pins_by_name.get(name)):
        if pins and hashlib.sha256(spki).digest() not in pins:
            raise PeerNameMismatch(f"the key of peer {name!r} is not among the pinned ones")
    return name


def _spki(leaf: x509.Certificate) -> bytes:
    return leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _reason(error: SSL.Error) -> str:
    """OpenSSL's words for an error, without its file and function."""
    entries = error.args[0] if error.args and isinstance(error.args[0], list) else []
    words = [str(entry[-1]) for entry in entries if entry]
    return "; ".join(words) or (" ".join(str(part) for part in error.args) or type(error).__name__)

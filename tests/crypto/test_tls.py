"""Two TLS endpoints in memory, bytes passed by hand: who is let in, what is exported when, and what each failure is."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL

from crypto import tls
from crypto.errors import (
    AuthenticationError,
    CertificateExpired,
    CertificateMalformed,
    CertificateRevoked,
    CertificateUntrusted,
    ControlForged,
    GroupRefused,
    IntegrityError,
    PeerCertificateMissing,
    PeerNameMismatch,
    TlsFailure,
)
from crypto.identity import Identity
from crypto.keys import SessionId
from crypto.pki import Authority
from crypto.tls import (
    GROUP_REQUIRED,
    PRE_AUTHENTICATION_BYTES_MAX,
    PeerRules,
    TlsConfig,
    TlsPeer,
    TlsRole,
)

SESSION = SessionId(bytes(range(16)))
HANDSHAKE_TURNS_MAX = 8
HANDSHAKE_RECORD = b"\x16\x03\x01"


@dataclass
class Hosts:
    """A CA and two of its hosts, as loaded."""

    ca: Authority
    alpha: Identity
    beta: Identity


@pytest.fixture(scope="module")
def hosts(ca_dir: Path, identity_alpha: Path, identity_beta: Path) -> Hosts:
    now = datetime.now(UTC)
    return Hosts(Authority.open(ca_dir), Identity.load(identity_alpha, now=now), Identity.load(identity_beta, now=now))


@pytest.fixture
def own_ca(tmp_path: Path) -> Authority:
    """A CA that the test may revoke under."""
    return Authority.create(tmp_path / "ca", now=datetime.now(UTC))


def issue(ca: Authority, name: str, *, now: datetime | None = None) -> Identity:
    now = now or datetime.now(UTC)
    return Identity.load(ca.issue(name, now=now, force=True).directory, now=now)


def client_config(identity: Identity, rules: PeerRules | None = None) -> TlsConfig:
    return TlsConfig(identity, TlsRole.CLIENT, rules or PeerRules())


def server_config(identity: Identity, rules: PeerRules | None = None) -> TlsConfig:
    return TlsConfig(identity, TlsRole.SERVER, rules or PeerRules())


@dataclass
class Outcome:
    """Two ends after a handshake was tried, and what each of them raised."""

    client: TlsPeer
    server: TlsPeer
    client_error: Exception | None = None
    server_error: Exception | None = None

    @property
    def whole(self) -> bool:
        return self.client.peer is not None and self.server.peer is not None


def shake(client: TlsPeer, server: TlsPeer) -> Outcome:
    """Pass flights to and fro, alerts included, until nothing is left to say or a side has failed."""
    outcome = Outcome(client, server)
    for _ in range(HANDSHAKE_TURNS_MAX):
        flight = client.outgoing()
        if flight and outcome.server_error is None:
            try:
                server.receive(flight)
            except AuthenticationError as error:
                outcome.server_error = error
        answer = server.outgoing()
        if answer and outcome.client_error is None:
            try:
                client.receive(answer)
            except AuthenticationError as error:
                outcome.client_error = error
        if not flight and not answer:
            break
    return outcome


def between(client: TlsConfig, server: TlsConfig) -> Outcome:
    return shake(TlsPeer(client), TlsPeer(server))


@pytest.fixture
def pair(hosts: Hosts) -> Outcome:
    """Two ends that have verified each other."""
    outcome = between(client_config(hosts.alpha), server_config(hosts.beta))
    assert outcome.whole
    return outcome


class RawClient:
    """A client that keeps none of our rules, straight on pyOpenSSL."""

    def __init__(self, context: SSL.Context, session: SSL.Session | None = None) -> None:
        self.connection = SSL.Connection(context, None)
        if session is not None:
            self.connection.set_session(session)
        self.connection.set_connect_state()
        self.error: SSL.Error | None = None

    def turn(self, data: bytes = b"") -> bytes:
        if data:
            self.connection.bio_write(data)
        try:
            self.connection.do_handshake()
            self.connection.recv(1)
        except SSL.WantReadError:
            pass
        except SSL.Error as error:
            self.error = error
        try:
            return self.connection.bio_read(1 << 16)
        except SSL.WantReadError:
            return b""


def raw_context(identity: Identity | None = None, *, version: int = SSL.TLS1_3_VERSION) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(version)
    context.set_max_proto_version(version)
    context.set_verify(SSL.VERIFY_NONE, lambda *_: True)
    if identity is not None:
        context.use_certificate(identity.certificate)
        context.use_privatekey(identity.private_key)
    return context


def raw_against(client: RawClient, server: TlsPeer) -> None:
    """Run a handshake; what the server raises is raised."""
    flight = client.turn()
    for _ in range(HANDSHAKE_TURNS_MAX):
        if not flight:
            return
        server.receive(flight)
        flight = client.turn(server.outgoing())


# ------------------------------------------------------------------ a handshake that works


def test_both_ends_know_each_other(hosts: Hosts, pair: Outcome) -> None:
    assert pair.client.peer is not None
    assert pair.server.peer is not None
    assert (pair.client.peer.name, pair.server.peer.name) == ("beta", "alpha")
    for peer, identity in ((pair.client.peer, hosts.beta), (pair.server.peer, hosts.alpha)):
        assert peer.leaf_sha256 == hashlib.sha256(identity.certificate.public_bytes(Encoding.DER)).digest()
        assert peer.group == GROUP_REQUIRED == "X25519MLKEM768"
        assert peer.cipher in {"TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"}
    assert client_config(hosts.alpha).leaf_sha256 == pair.server.peer.leaf_sha256


def test_plaintext_passes_both_ways_whatever_its_size(pair: Outcome) -> None:
    for size in (1, 16 * 1024 + 1, 300_000):
        message = bytes(size)
        pair.client.send(message)
        assert pair.server.receive(pair.client.outgoing()) == message
        pair.server.send(message)
        assert pair.client.receive(pair.server.outgoing()) == message


def test_a_handshake_byte_by_byte(hosts: Hosts) -> None:
    client, server = TlsPeer(client_config(hosts.alpha)), TlsPeer(server_config(hosts.beta))
    for sender, receiver in ((client, server), (server, client), (client, server), (server, client)):
        for byte in sender.outgoing():
            assert receiver.receive(bytes([byte])) == b""
    assert client.peer is not None
    assert server.peer is not None


def test_what_arrives_with_the_last_flight_is_not_lost(hosts: Hosts) -> None:
    client, server = TlsPeer(client_config(hosts.alpha)), TlsPeer(server_config(hosts.beta))
    server.receive(client.outgoing())
    client.receive(server.outgoing())
    client.send(b"offer")
    assert server.receive(client.outgoing()) == b"offer"


def test_an_empty_read_is_nothing(hosts: Hosts, pair: Outcome) -> None:
    assert pair.client.receive(b"") == b""
    assert TlsPeer(server_config(hosts.beta)).receive(b"") == b""
    assert TlsPeer(client_config(hosts.alpha)).receive(b"") == b""


def test_close_notify_is_told_from_silence(pair: Outcome) -> None:
    pair.client.send(b"last words")
    pair.client.close()
    assert not pair.server.closed
    assert pair.server.receive(pair.client.outgoing()) == b"last words"
    assert pair.server.closed
    assert not pair.client.closed


def test_closing_before_the_handshake_says_nothing(hosts: Hosts) -> None:
    server = TlsPeer(server_config(hosts.beta))
    server.close()
    assert server.outgoing() == b""


# ------------------------------------------------------------------ the exporter


def test_the_exporter_is_equal_on_both_sides_and_the_sessions_own(pair: Outcome) -> None:
    mine, theirs = pair.client.export(SESSION), pair.server.export(SESSION)
    assert mine == theirs
    assert len(mine) == 32
    other = SessionId(bytes(15) + b"\1")
    assert pair.client.export(other) == pair.server.export(other) != mine
    # RFC 8446 section 7.5 with the documented label and context, asked of OpenSSL directly.
    connection = pair.client._connection
    assert connection.export_keying_material(b"EXPORTER-korora-v1", 32, SESSION) == mine
    assert connection.export_keying_material(b"EXPORTER-korora-v1", 32) != mine


def test_two_connections_export_different_keys(hosts: Hosts, pair: Outcome) -> None:
    again = between(client_config(hosts.alpha), server_config(hosts.beta))
    assert again.client.export(SESSION) != pair.client.export(SESSION)


def test_nothing_is_exported_or_sent_before_the_peer_is_verified(hosts: Hosts) -> None:
    """TLS 1.3 would let a server export after its own Finished, when the client has shown nothing yet."""
    client, server = TlsPeer(client_config(hosts.alpha)), TlsPeer(server_config(hosts.beta))
    server.receive(client.outgoing())
    answer = server.outgoing()
    assert answer
    for end in (client, server):
        assert end.peer is None
        with pytest.raises(TlsFailure):
            end.export(SESSION)
        with pytest.raises(TlsFailure):
            end.send(b"early")
    client.receive(answer)
    assert client.peer is not None
    with pytest.raises(TlsFailure):
        server.export(SESSION)


def test_a_refused_peer_gets_no_key_afterwards(hosts: Hosts) -> None:
    server = TlsPeer(server_config(hosts.beta, PeerRules(names=frozenset({"gamma"}))))
    outcome = shake(TlsPeer(client_config(hosts.alpha)), server)
    assert isinstance(outcome.server_error, PeerNameMismatch)
    assert server.peer is None
    with pytest.raises(TlsFailure):
        server.export(SESSION)
    with pytest.raises(AuthenticationError):
        server.receive(b"\x17\x03\x03\x00\x01x")


# ------------------------------------------------------------------ versions, groups, resumption


def test_tls_1_2_is_refused(hosts: Hosts) -> None:
    server = TlsPeer(server_config(hosts.beta))
    client = RawClient(raw_context(hosts.alpha, version=SSL.TLS1_2_VERSION))
    with pytest.raises(TlsFailure):
        raw_against(client, server)
    assert server.peer is None
    client.turn(server.outgoing())
    assert client.error is not None, "the peer is told by an alert"


@pytest.mark.parametrize("group", ["X25519", "P-256", "X448"])
def test_a_classical_group_is_refused(hosts: Hosts, group: str) -> None:
    server = TlsPeer(server_config(hosts.beta))
    context = raw_context(hosts.alpha)
    tls._set_groups(context, group)
    with pytest.raises(GroupRefused, match="X25519MLKEM768"):
        raw_against(RawClient(context), server)
    assert server.peer is None


def test_a_server_that_knows_only_a_classical_group_is_refused(hosts: Hosts) -> None:
    server = server_config(hosts.beta, PeerRules(allow_classical=True))
    tls._set_groups(server.context, "X25519")
    outcome = between(client_config(hosts.alpha), server)
    assert outcome.client.peer is None
    assert isinstance(outcome.client_error, AuthenticationError)
    assert isinstance(outcome.server_error, AuthenticationError)


@pytest.mark.parametrize("group", ["X25519", "P-256"])
def test_a_classical_group_where_it_is_allowed(hosts: Hosts, group: str) -> None:
    rules = PeerRules(allow_classical=True)
    client, server = client_config(hosts.alpha, rules), server_config(hosts.beta, rules)
    tls._set_groups(client.context, group)
    outcome = between(client, server)
    assert outcome.client.peer is not None
    assert outcome.server.peer is not None
    assert outcome.client.peer.group == outcome.server.peer.group != GROUP_REQUIRED


def test_allowing_classical_groups_still_prefers_the_hybrid_one(hosts: Hosts) -> None:
    rules = PeerRules(allow_classical=True)
    for client_rules, server_rules in ((rules, rules), (rules, PeerRules()), (PeerRules(), rules)):
        outcome = between(client_config(hosts.alpha, client_rules), server_config(hosts.beta, server_rules))
        assert outcome.client.peer is not None
        assert outcome.client.peer.group == GROUP_REQUIRED


@pytest.mark.parametrize("strict", [TlsRole.CLIENT, TlsRole.SERVER])
def test_the_group_is_asserted_after_the_handshake_too(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, strict: TlsRole
) -> None:
    """Should OpenSSL one day ignore the list of groups, the side that wants a hybrid one still refuses."""
    real = tls._set_groups
    monkeypatch.setattr(tls, "_set_groups", lambda context, _: real(context, "X25519"))
    allowing = PeerRules(allow_classical=True)
    client = client_config(hosts.alpha, PeerRules() if strict is TlsRole.CLIENT else allowing)
    server = server_config(hosts.beta, PeerRules() if strict is TlsRole.SERVER else allowing)
    outcome = between(client, server)
    error = outcome.client_error if strict is TlsRole.CLIENT else outcome.server_error
    assert isinstance(error, GroupRefused)
    end = outcome.client if strict is TlsRole.CLIENT else outcome.server
    assert end.peer is None
    with pytest.raises(TlsFailure):
        end.export(SESSION)


def test_no_session_is_resumed(hosts: Hosts) -> None:
    """Whatever a client remembers of an earlier connection: it is judged by its certificate again."""
    context = raw_context(hosts.alpha)
    config = server_config(hosts.beta)
    first = RawClient(context)
    raw_against(first, TlsPeer(config))
    remembered = first.connection.get_session()
    assert remembered is not None
    again, server = RawClient(context, remembered), TlsPeer(config)
    raw_against(again, server)
    assert server.peer is not None
    assert SSL._lib.SSL_session_reused(server._connection._ssl) == 0
    assert SSL._lib.SSL_session_reused(again.connection._ssl) == 0
    strict = TlsPeer(server_config(hosts.beta, PeerRules(names=frozenset({"gamma"}))))
    with pytest.raises(PeerNameMismatch):
        raw_against(RawClient(context, remembered), strict)


def test_no_early_data_is_offered(hosts: Hosts) -> None:
    context = raw_context(hosts.alpha)
    client = RawClient(context)
    raw_against(client, TlsPeer(server_config(hosts.beta)))
    session = client.connection.get_session()
    assert session is not None
    assert SSL._lib.SSL_SESSION_get_max_early_data(session._session) == 0


# ------------------------------------------------------------------ who is let in


def test_names(hosts: Hosts) -> None:
    for names in ({"alpha"}, {"alpha", "gamma"}, set()):
        rules = PeerRules(names=frozenset(names))
        assert between(client_config(hosts.alpha), server_config(hosts.beta, rules)).whole
    outcome = between(client_config(hosts.alpha, PeerRules(names=frozenset({"alpha"}))), server_config(hosts.beta))
    assert isinstance(outcome.client_error, PeerNameMismatch)
    assert "'beta'" in str(outcome.client_error)
    assert outcome.server.peer is None


def test_pins(hosts: Hosts) -> None:
    spki = hosts.alpha.certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    pin = hashlib.sha256(spki).digest()
    assert pin == hosts.alpha.spki_sha256
    good = PeerRules(pins=frozenset({pin, bytes(32)}))
    assert between(client_config(hosts.alpha), server_config(hosts.beta, good)).whole
    outcome = between(client_config(hosts.alpha), server_config(hosts.beta, PeerRules(pins=frozenset({bytes(32)}))))
    assert isinstance(outcome.server_error, PeerNameMismatch)
    assert outcome.server.peer is None


def test_pins_of_one_name_bind_only_that_host(hosts: Hosts) -> None:
    wrong = frozenset({bytes(32)})
    for name, whole in (("alpha", False), ("gamma", True)):
        rules = PeerRules(names=frozenset({"alpha", "gamma"}), pins_by_name={name: wrong})
        outcome = between(client_config(hosts.alpha), server_config(hosts.beta, rules))
        assert outcome.whole is whole
        assert whole or isinstance(outcome.server_error, PeerNameMismatch)
    right = PeerRules(pins_by_name={"alpha": frozenset({hosts.alpha.spki_sha256}), "gamma": wrong})
    assert between(client_config(hosts.alpha), server_config(hosts.beta, right)).whole


def test_a_pin_does_not_replace_the_name(hosts: Hosts) -> None:
    rules = PeerRules(names=frozenset({"gamma"}), pins=frozenset({hosts.alpha.spki_sha256}))
    outcome = between(client_config(hosts.alpha), server_config(hosts.beta, rules))
    assert isinstance(outcome.server_error, PeerNameMismatch)


def test_no_certificate(hosts: Hosts) -> None:
    server = TlsPeer(server_config(hosts.beta))
    with pytest.raises(PeerCertificateMissing):
        raw_against(RawClient(raw_context()), server)
    assert server.peer is None


def test_another_ca(hosts: Hosts, own_ca: Authority) -> None:
    stranger = issue(own_ca, "alpha")
    outcome = between(client_config(stranger), server_config(hosts.beta))
    assert isinstance(outcome.client_error, CertificateUntrusted)
    server = TlsPeer(server_config(hosts.beta))
    with pytest.raises(CertificateUntrusted):
        raw_against(RawClient(raw_context(stranger)), server)


def test_revoked(own_ca: Authority) -> None:
    alpha = issue(own_ca, "alpha")
    issue(own_ca, "beta")
    own_ca.revoke("alpha", now=datetime.now(UTC))
    beta = Identity.load(own_ca.directory / "hosts" / "beta", now=datetime.now(UTC))
    outcome = between(client_config(alpha), server_config(beta))
    assert isinstance(outcome.server_error, CertificateRevoked)
    outcome = between(client_config(beta), server_config(alpha))
    assert isinstance(outcome.client_error, CertificateRevoked)


def test_an_identity_that_is_not_valid_yet(own_ca: Authority) -> None:
    """Two hosts whose clocks disagree by days."""
    late = datetime.now(UTC) + timedelta(days=5)
    beta = issue(own_ca, "beta")
    server = TlsPeer(server_config(beta))
    with pytest.raises(CertificateExpired, match="not valid yet"):
        raw_against(RawClient(raw_context(issue(own_ca, "early", now=late))), server)
    assert server.peer is None


# ------------------------------------------------------------------ certificates the CA should never have signed


def forge(
    ca: Authority, *, uris: list[str], usage: list[x509.ObjectIdentifier] | None = None, days: tuple[int, int] = (-1, 1)
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate by the CA's own key with whatever in it."""
    ca_key = load_pem_private_key((ca.directory / "ca.key").read_bytes(), password=None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "forged")])
    authority = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ca.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
    )
    if uris:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        builder = builder.add_extension(names, critical=False)
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
    return builder.sign(ca_key, hashes.SHA256()), key


def raw_with(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> RawClient:
    context = raw_context()
    context.use_certificate(certificate)
    context.use_privatekey(key)
    return RawClient(context)


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["https://example.org/"],
        ["korora://host/"],
        ["korora://host/a", "korora://host/b"],
        ["korora://host/../etc"],
        ["korora://guest/alpha"],
        ["korora://host/" + "a" * 64],
    ],
    ids=["none", "another", "empty", "two", "path", "guest", "long"],
)
def test_a_certificate_without_exactly_one_name(hosts: Hosts, uris: list[str]) -> None:
    server = TlsPeer(server_config(hosts.beta))
    with pytest.raises(CertificateMalformed):
        raw_against(raw_with(*forge(hosts.ca, uris=uris)), server)
    assert server.peer is None


@pytest.mark.parametrize("days", [(-10, -1), (1, 10)], ids=["expired", "not yet"])
def test_a_certificate_out_of_its_time(hosts: Hosts, days: tuple[int, int]) -> None:
    server = TlsPeer(server_config(hosts.beta))
    with pytest.raises(CertificateExpired):
        raw_against(raw_with(*forge(hosts.ca, uris=["korora://host/alpha"], days=days)), server)
    assert server.peer is None


def test_a_server_certificate_is_no_client_certificate(hosts: Hosts) -> None:
    usage = [x509.ExtendedKeyUsageOID.SERVER_AUTH]
    server = TlsPeer(server_config(hosts.beta))
    with pytest.raises(CertificateUntrusted):
        raw_against(raw_with(*forge(hosts.ca, uris=["korora://host/alpha"], usage=usage)), server)


def test_the_signing_certificate_opens_no_connection(hosts: Hosts) -> None:
    context = raw_context()
    key = load_pem_private_key((hosts.alpha.directory / "signing.key").read_bytes(), password=None)
    context.use_certificate(hosts.alpha.signing_certificate)
    assert isinstance(key, Ed25519PrivateKey)
    context.use_privatekey(key)
    server = TlsPeer(server_config(hosts.beta))
    with pytest.raises(CertificateUntrusted):
        raw_against(RawClient(context), server)
    assert server.peer is None


def test_an_expired_crl_lets_nobody_in(own_ca: Authority, tmp_path: Path) -> None:
    """A long-running relay whose CRL has expired since it started cannot tell who was revoked: nobody gets in."""
    past = datetime.now(UTC) - timedelta(days=60)
    ca = Authority.create(tmp_path / "past", now=past)
    alpha = issue(ca, "alpha", now=past)
    directory = ca.issue("beta", now=past).directory
    stale = Identity.load(shutil.copytree(directory, tmp_path / "stale"), now=past)
    ca.publish_crl(now=datetime.now(UTC))
    fresh = Identity.load(directory, now=datetime.now(UTC))
    outcome = between(client_config(alpha), server_config(stale))
    assert isinstance(outcome.client_error, CertificateRevoked), "alpha's own CRL is as old"
    server = TlsPeer(server_config(stale))
    with pytest.raises(CertificateRevoked, match="CRL"):
        raw_against(RawClient(raw_context(alpha)), server)
    server = TlsPeer(server_config(fresh))
    raw_against(RawClient(raw_context(alpha)), server)
    assert server.peer is not None


# ------------------------------------------------------------------ what a failure is, before and after ACCEPT


def test_a_client_finishes_first_and_learns_of_its_refusal_by_an_alert(hosts: Hosts) -> None:
    """Until ACCEPT an alert is a failed authentication, though this side's handshake was over."""
    client = TlsPeer(client_config(hosts.alpha))
    server = TlsPeer(server_config(hosts.beta, PeerRules(names=frozenset({"gamma"}))))
    server.receive(client.outgoing())
    client.receive(server.outgoing())
    assert client.peer is not None, "TLS 1.3 lets the client finish before the server has judged it"
    with pytest.raises(PeerNameMismatch):
        server.receive(client.outgoing())
    with pytest.raises(TlsFailure):
        client.receive(server.outgoing())


def test_the_alert_tells_a_peer_nothing_of_the_reason(hosts: Hosts) -> None:
    """To the peer all refusals of a good certificate look alike: the alerts are of one length, sealed."""
    lengths = set()
    for rules in (PeerRules(names=frozenset({"gamma"})), PeerRules(pins=frozenset({bytes(32)}))):
        client, server = TlsPeer(client_config(hosts.alpha)), TlsPeer(server_config(hosts.beta, rules))
        server.receive(client.outgoing())
        client.receive(server.outgoing())
        with pytest.raises(PeerNameMismatch):
            server.receive(client.outgoing())
        with pytest.raises(TlsFailure) as told:
            client.receive(server.outgoing())
        lengths.add(str(told.value))
    assert len(lengths) == 1


@pytest.mark.parametrize("opened", [False, True], ids=["before ACCEPT", "after ACCEPT"])
@pytest.mark.parametrize("role", list(TlsRole))
def test_a_forged_record(pair: Outcome, role: TlsRole, opened: bool) -> None:
    sender, receiver = (pair.server, pair.client) if role is TlsRole.CLIENT else (pair.client, pair.server)
    if opened:
        receiver.mark_open()
    sender.send(b"message")
    record = bytearray(sender.outgoing())
    record[-1] ^= 1
    with pytest.raises(ControlForged if opened else TlsFailure):
        receiver.receive(bytes(record))
    # The alert that says so reaches the sender, where it is the same kind of failure.
    if opened:
        sender.mark_open()
    with pytest.raises(ControlForged if opened else TlsFailure):
        sender.receive(receiver.outgoing())


def test_the_two_kinds_of_failure_have_nothing_in_common() -> None:
    assert issubclass(ControlForged, IntegrityError)
    assert not issubclass(ControlForged, AuthenticationError)
    assert not issubclass(TlsFailure, IntegrityError)


def test_a_replayed_and_a_dropped_record_do_not_open(hosts: Hosts) -> None:
    for order in ([0, 0], [1]):
        outcome = between(client_config(hosts.alpha), server_config(hosts.beta))
        outcome.server.mark_open()
        flights = []
        for word in (b"first", b"second"):
            outcome.client.send(word)
            flights.append(outcome.client.outgoing())
        assert isinstance(feed(outcome.server, [flights[index] for index in order]), ControlForged)


def test_a_failed_connection_stays_failed(pair: Outcome) -> None:
    pair.server.mark_open()
    with pytest.raises(ControlForged):
        pair.server.receive(b"\x17\x03\x03\x00\x20" + bytes(32))
    pair.client.send(b"good")
    with pytest.raises(ControlForged):
        pair.server.receive(pair.client.outgoing())
    pair.server.close()


# ------------------------------------------------------------------ bounds before authentication


def test_too_much_before_authentication(hosts: Hosts) -> None:
    server = TlsPeer(server_config(hosts.beta))
    # A ClientHello that claims 64 KiB and trickles in: OpenSSL would wait for all of it.
    record = HANDSHAKE_RECORD + (0x3FFC).to_bytes(2, "big") + b"\x01" + (0xFFFF).to_bytes(3, "big") + bytes(0x3FF8)
    pieces = [(record * 2)[start : start + 1000] for start in range(0, 2 * PRE_AUTHENTICATION_BYTES_MAX, 1000)]
    error = feed(server, pieces)
    assert isinstance(error, TlsFailure)
    assert "before authentication" in str(error)
    assert server.peer is None


def test_one_huge_chunk_before_authentication(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL is never handed, and so never buffers, what goes beyond the bound."""
    server = TlsPeer(server_config(hosts.beta))
    handed: list[int] = []
    monkeypatch.setattr(server._connection, "bio_write", lambda data: handed.append(len(data)))
    with pytest.raises(TlsFailure, match="before authentication"):
        server.receive(HANDSHAKE_RECORD + bytes(PRE_AUTHENTICATION_BYTES_MAX))
    assert handed == []


def test_a_handshake_stays_far_below_its_bound(hosts: Hosts) -> None:
    client, server = TlsPeer(client_config(hosts.alpha)), TlsPeer(server_config(hosts.beta))
    hello = client.outgoing()
    server.receive(hello)
    answer = server.outgoing()
    client.receive(answer)
    assert len(hello) + len(client.outgoing()) < PRE_AUTHENTICATION_BYTES_MAX / 4
    assert len(answer) < PRE_AUTHENTICATION_BYTES_MAX / 4


# ------------------------------------------------------------------ arbitrary bytes


def feed(end: TlsPeer, chunks: Iterator[bytes] | list[bytes]) -> Exception | None:
    """Feed until it refuses; only documented errors may leave."""
    for chunk in chunks:
        try:
            end.receive(chunk)
        except (AuthenticationError, ControlForged) as error:
            return error
    return None


ENDS = st.sampled_from(list(TlsRole))
NOISE = st.lists(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=100).map(lambda body: HANDSHAKE_RECORD + len(body).to_bytes(2, "big") + body),
        st.binary(max_size=100).map(
            lambda body: (
                HANDSHAKE_RECORD + (len(body) + 4).to_bytes(2, "big") + b"\x01" + len(body).to_bytes(3, "big") + body
            )
        ),
        st.tuples(st.integers(1, 2), st.integers(0, 255)).map(lambda pair: b"\x15\x03\x03\x00\x02" + bytes(pair)),
    ),
    max_size=6,
)


@settings(max_examples=150)
@given(role=ENDS, chunks=NOISE)
def test_arbitrary_bytes_before_the_handshake(hosts: Hosts, role: TlsRole, chunks: list[bytes]) -> None:
    make: Callable[[Identity], TlsConfig] = server_config if role is TlsRole.SERVER else client_config
    end = TlsPeer(make(hosts.beta))
    error = feed(end, chunks)
    assert error is None or isinstance(error, AuthenticationError)
    assert end.peer is None


@settings(max_examples=200)
@given(
    target=st.integers(0, 2),
    where=st.integers(0, 9999),
    mask=st.integers(1, 255),
    action=st.sampled_from(["flip", "cut", "insert"]),
)
def test_a_damaged_handshake_fails_or_changes_nothing(
    hosts: Hosts, target: int, where: int, mask: int, action: str
) -> None:
    """One flight is damaged. What TLS leaves unauthenticated (a version in a record) may pass: then all is equal."""
    ends = client, server = TlsPeer(client_config(hosts.alpha)), TlsPeer(server_config(hosts.beta))
    for number, (sender, receiver) in enumerate(((client, server), (server, client), (client, server))):
        flight = sender.outgoing()
        if number == target and flight:
            at = where * len(flight) // 10_000
            flip = flight[:at] + bytes([flight[at] ^ mask]) + flight[at + 1 :]
            flight = {"flip": flip, "cut": flight[:at], "insert": flight[:at] + bytes([mask]) + flight[at:]}[action]
        error = feed(receiver, [flight])
        assert error is None or isinstance(error, AuthenticationError)
        if error is not None:
            assert receiver.peer is None
    if all(end.peer is not None for end in ends):
        assert client.export(SESSION) == server.export(SESSION)
        assert action == "flip"
        assert target < 2, "all of the client's last flight is authenticated"


@settings(max_examples=60)
@given(role=ENDS, opened=st.booleans(), chunks=NOISE)
def test_arbitrary_bytes_after_the_handshake(hosts: Hosts, role: TlsRole, opened: bool, chunks: list[bytes]) -> None:
    outcome = between(client_config(hosts.alpha), server_config(hosts.beta))
    end = outcome.server if role is TlsRole.SERVER else outcome.client
    if opened:
        end.mark_open()
    error = feed(end, chunks)
    assert error is None or isinstance(error, ControlForged if opened else AuthenticationError)


def test_a_failed_handshake_names_no_key(hosts: Hosts) -> None:
    outcome = between(client_config(hosts.alpha), server_config(hosts.beta, PeerRules(names=frozenset({"gamma"}))))
    assert outcome.client.peer is not None
    assert outcome.client.peer.leaf_sha256.hex() not in repr(outcome.client.peer)

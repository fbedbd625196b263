"""What a configuration stands for: identities, rules, endpoints, peers."""

from datetime import UTC, datetime
from pathlib import Path

from crypto.identity import Identity
from crypto.tls import PeerRules, TlsConfig, TlsRole
from korora.daemon.config import Config, Ingress, bytes_per_second
from korora.daemon.rates import least
from proxy.endpoints.base import Egress
from proxy.endpoints.spec import parse_address, parse_egress
from proxy.shell import source

REPORTS = "reports"
LOCKS = "locks"


def load_identity(config: Config) -> Identity:
    """The identity and its CRL, checked.

    Raises:
        IdentityError: see ``Identity.load``.
    """
    return Identity.load(Path(config.identity), now=datetime.now(UTC))


def server_tls(config: Config, identity: Identity) -> TlsConfig:
    """How arriving peers are judged: by the table, pins by each one's own."""
    rules = PeerRules(
        names=frozenset(peer.name for peer in config.peer),
        pins_by_name={peer.name: _digests(peer.pins) for peer in config.peer if peer.pins},
        allow_classical=config.allow_classical,
    )
    return TlsConfig(identity, TlsRole.SERVER, rules)


def client_tls(config: Config, identity: Identity, ingress: Ingress) -> TlsConfig:
    """How the peer of an ingress is judged: it must be that one."""
    peer = config.peer_named(ingress.peer)
    rules = PeerRules(names=frozenset({peer.name}), pins=_digests(peer.pins), allow_classical=config.allow_classical)
    return TlsConfig(identity, TlsRole.CLIENT, rules)


def destination_of(config: Config, ingress: Ingress) -> source.Peer:
    """Where the migrations of an ingress go."""
    address = config.peer_named(ingress.peer).address or ""
    host, port = parse_address(address, "the address")
    return source.Peer(
        host,
        port,
        lanes=ingress.lanes,
        resume_seconds=config.limits.resume_timeout,
        egress=ingress.egress,
        # To begin with; the parent's word on its part of the total follows at once.
        rate_limit=least(session_limit(config, ingress.name), bytes_per_second(config.limits.rate_limit)),
    )


def egresses(config: Config) -> dict[str, Egress]:
    """The table of names that sources may ask for."""
    return {egress.name: parse_egress(egress.to) for egress in config.egress}


def session_limit(config: Config, ingress: str) -> float | None:
    """What a session may send at most, in bytes a second; an ingress that has gone has no limit of its own."""
    entry = config.ingress_named(ingress)
    own = None if entry is None else bytes_per_second(entry.rate_limit)
    return least(own, bytes_per_second(config.limits.session_rate_limit))


def _digests(pins: tuple[str, ...]) -> frozenset[bytes]:
    return frozenset(bytes.fromhex(pin.rpartition(":")[2]) for pin in pins)

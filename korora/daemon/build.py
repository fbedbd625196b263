"""What a configuration stands for: identities, rules, endpoints, peers."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from crypto.identity import Identity
from crypto.tls import PeerRules, TlsConfig, TlsRole
from korora import host_store
from korora.daemon.config import Config, Ingress, bytes_per_second
from korora.daemon.rates import least
from proxy.endpoints.base import Egress
from proxy.endpoints.spec import parse_address, parse_egress
from proxy.paging import Encode, PagingTerms, StoreAccess
from proxy.shell import source

REPORTS = "reports"
LOCKS = "locks"


@dataclass(frozen=True, slots=True)
class Credentials:
    """An identity, and how peers are judged by it. A context holds the whole CRL: there is one a peer and no more."""

    identity: Identity
    server: TlsConfig
    """Arriving peers: by the table, pins by each one's own."""
    clients: Mapping[str, TlsConfig]
    """By the name of the peer that an ingress sends to: it must be that one."""

    @classmethod
    def load(cls, config: Config) -> "Credentials":
        """Read and check them; may take a while, so not on an event loop.

        Raises:
            IdentityError: see ``Identity.load``.
        """
        identity = Identity.load(Path(config.identity), now=datetime.now(UTC))
        everybody = PeerRules(
            names=frozenset(peer.name for peer in config.peer),
            pins_by_name={peer.name: _digests(peer.pins) for peer in config.peer if peer.pins},
            allow_classical=config.allow_classical,
        )
        wanted = {ingress.peer for ingress in config.ingress}
        clients = {
            peer.name: TlsConfig(
                identity,
                TlsRole.CLIENT,
                PeerRules(frozenset({peer.name}), _digests(peer.pins), config.allow_classical),
            )
            for peer in config.peer
            if peer.name in wanted
        }
        return cls(identity, TlsConfig(identity, TlsRole.SERVER, everybody), clients)


def destination_of(config: Config, ingress: Ingress, stored: StoreAccess | None = None) -> source.Peer:
    """Where the migrations of an ingress go; ``stored`` is this process's content store."""
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
        paging=_paging(config, Encode(ingress.encode), ingress.tenant, stored),
    )


def egresses(config: Config) -> dict[str, Egress]:
    """The table of names that sources may ask for."""
    return {egress.name: parse_egress(egress.to) for egress in config.egress}


def paging_of(config: Config, stored: StoreAccess | None = None) -> PagingTerms:
    """What is done about pages of arriving sessions, whoever's they are: that their egress says (``tenants``)."""
    return _paging(config, Encode.AUTO, "", stored)


def tenants(config: Config) -> dict[str, str]:
    """Whose stored pages the sessions of each egress use."""
    return {egress.name: egress.tenant for egress in config.egress}


def open_host_store(config: Config) -> host_store.HostStore | None:
    """The content store of a process; None where it is turned off or cannot be used."""
    return host_store.open_host_store(Path(config.state), config.pages.store_bytes)


def session_limit(config: Config, ingress: str) -> float | None:
    """What a session may send at most, in bytes a second; an ingress that has gone has no limit of its own."""
    entry = config.ingress_named(ingress)
    own = None if entry is None else bytes_per_second(entry.rate_limit)
    return least(own, bytes_per_second(config.limits.session_rate_limit))


def _paging(config: Config, encode: Encode, tenant: str, stored: StoreAccess | None) -> PagingTerms:
    pages = config.pages
    return PagingTerms(encode=encode, cache_bytes=pages.cache_bytes, chains=pages.chains, tenant=tenant, store=stored)


def _digests(pins: tuple[str, ...]) -> frozenset[bytes]:
    return frozenset(bytes.fromhex(pin.rpartition(":")[2]) for pin in pins)

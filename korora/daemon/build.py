"""What a configuration stands for: identities, rules, endpoints, peers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from crypto.identity import Identity
from crypto.tls import PeerRules, TlsConfig, TlsRole
from korora import host_store
from korora.daemon.config import XL, Config, Departure, Ingress, Xl, bytes_per_second
from korora.daemon.config import Egress as EgressEntry
from korora.daemon.rates import least
from korora.memory import affordable
from korora.policy.file import PolicyFile
from korora.watched import Watch
from proxy.attestation import Platform
from proxy.endpoints.base import Egress
from proxy.endpoints.spec import parse_address, parse_egress, parse_monitor, parse_xl_flags
from proxy.errors import ConfigurationError, PolicyRefused
from proxy.paging import Encode, PagingTerms, StoreAccess
from proxy.preflight import Surveyor
from proxy.shell import source

REPORTS = "reports"
LOCKS = "locks"
ANY_PEER = ""  # in place of a peer's name: whoever `korora xl` may send to
PORT_DEFAULT = 8010  # where `korora xl` finds a host that was written without


@dataclass(frozen=True, slots=True)
class Credentials:
    """An identity, and how peers are judged by it. A context holds the whole CRL: there is one a peer and no more."""

    identity: Identity
    server: TlsConfig
    """Arriving peers: by the table, pins by each one's own."""
    clients: Mapping[str, TlsConfig]
    """By the name of the peer that an ingress or `korora xl` sends to: it must be that one."""

    @classmethod
    def load(cls, config: Config) -> "Credentials":
        """Read and check them; may take a while, so not on an event loop.

        Raises:
            IdentityError: see ``Identity.load``.
        """
        identity = Identity.load(Path(config.identity), now=datetime.now(UTC))
        everybody = rules_of(config)
        served = config.xl_peers() if config.xl.socket else ()
        wanted = {ingress.peer for ingress in config.ingress} | {peer.name for peer in served}
        clients = {
            peer.name: TlsConfig(
                identity,
                TlsRole.CLIENT,
                PeerRules(frozenset({peer.name}), _digests(peer.pins), config.allow_classical),
            )
            for peer in config.peer
            if peer.name in wanted
        }
        if served and config.xl.any_address:
            any_of_them = PeerRules(
                names=frozenset(peer.name for peer in served),
                pins_by_name={peer.name: _digests(peer.pins) for peer in served if peer.pins},
                allow_classical=config.allow_classical,
            )
            clients[ANY_PEER] = TlsConfig(identity, TlsRole.CLIENT, any_of_them)
        return cls(identity, TlsConfig(identity, TlsRole.SERVER, everybody), clients)


def rules_of(config: Config) -> PeerRules:
    """What is demanded of peers: of each its own pins."""
    return PeerRules(
        names=frozenset(peer.name for peer in config.peer),
        pins_by_name={peer.name: _digests(peer.pins) for peer in config.peer if peer.pins},
        allow_classical=config.allow_classical,
    )


def destination_of(config: Config, ingress: Ingress, stored: StoreAccess | None = None) -> source.Peer:
    """Where the migrations of an ingress go; ``stored`` is this process's content store."""
    host, port = parse_address(config.peer_named(ingress.peer).address or "", "the address")
    where = _destination(config, ingress, (host, port), stored)
    if ingress.xl_flags is None:
        return where
    return replace(where, xl_flags=parse_xl_flags(ingress.xl_flags, "it"), one_channel=True)


def xl_destination(
    config: Config, peer: str, names: Sequence[str], flags: str, stored: StoreAccess | None = None
) -> tuple[str, source.Peer]:
    """Where a migration of `korora xl` goes: a name among ``Credentials.clients``, and where that is.

    Args:
        config: it has a table `[xl]`.
        peer: what the operator wrote: the name of a `[[peer]]`, its address, or another where any is allowed.
        names: whom he accepts; none: all.
        flags: for the receiving xl.
        stored: this process's content store.

    Raises:
        PolicyRefused: the configuration does not let it go there.
        ConfigurationError: there is nothing to be made of what was written.
    """
    allowed = {each.name: each for each in config.xl_peers() if not names or each.name in names}
    if not allowed:
        raise PolicyRefused(f"of the hosts named by --name, the daemon sends to none: {', '.join(names)}")
    text = peer if ":" in peer else f"{peer}:{PORT_DEFAULT}"
    known = allowed.get(peer)
    if known is not None and (known.address is not None or not config.xl.any_address):
        if known.address is None:
            raise PolicyRefused(f"the daemon knows no address of {peer!r}")
        host, port = parse_address(known.address, "the address")
        return known.name, _destination(config, config.xl, (host, port), stored, flags)
    host, port = parse_address(text, "PEER")
    if not host:
        raise ConfigurationError(f"PEER {peer!r} names no host", "give a name or an address")
    for each in allowed.values():
        if each.address is not None and parse_address(each.address, "the address") == (host, port):
            return each.name, _destination(config, config.xl, (host, port), stored, flags)
    if not config.xl.any_address:
        raise PolicyRefused(f"{peer} is no host that the daemon sends to: {', '.join(sorted(allowed))}")
    if names and len(allowed) > 1:
        raise ConfigurationError("of several --name none can be meant at an address of any host", "give one --name")
    client = known.name if known is not None else next(iter(allowed)) if names else ANY_PEER
    return client, _destination(config, config.xl, (host, port), stored, flags)


def _destination(
    config: Config,
    departure: Departure,
    address: tuple[str, int],
    stored: StoreAccess | None,
    xl_flags: str = "",
) -> source.Peer:
    name = departure.name if isinstance(departure, Ingress) else XL
    return source.Peer(
        *address,
        lanes=departure.lanes,
        resume_seconds=config.limits.resume_timeout,
        egress=departure.egress,
        handover="qmp" if monitor_of(departure) else "xl",
        guarded=isinstance(departure, Ingress) and departure.require_guarded,
        xl_flags=xl_flags,
        # To begin with; the parent's word on its part of the total follows at once.
        rate_limit=least(session_limit(config, name), bytes_per_second(config.limits.rate_limit)),
        paging=_paging(config, Encode(departure.encode), departure.tenant, stored),
    )


def egresses(config: Config) -> dict[str, Egress]:
    """The table of names that sources may ask for."""
    return {egress.name: parse_egress(egress.to) for egress in config.egress}


def monitor_of(entry: Departure | EgressEntry) -> str:
    """The path of its QEMU's monitor; empty where it has none."""
    text = None if isinstance(entry, Xl) else entry.qmp
    return "" if text is None else parse_monitor(text)


def monitors(config: Config) -> dict[str, str]:
    """Where the QEMU behind an egress is asked, by the egress's name."""
    return {egress.name: monitor_of(egress) for egress in config.egress if egress.qmp is not None}


def guarded(config: Config) -> frozenset[str]:
    """The egresses that take no session whose hand-over is not guarded."""
    return frozenset(egress.name for egress in config.egress if egress.require_guarded)


def policy_of(config: Config) -> PolicyFile:
    """The policy that answers; of a configuration without one, the one that allows all.

    Raises:
        ConfigurationError: it cannot be read, or something in it is wrong.
    """
    return PolicyFile(Path(config.policy) if config.policy else None)


def platform_of(config: Config, watch: Watch | None = None) -> Platform | None:
    """What this host shows of itself and demands of its peers; None for neither. ``watch`` counts.

    Raises:
        ReferenceInvalid: there is no such folder.
        TpmUnusable: the bindings to TPMs are not installed.
    """
    if not config.attestation and not config.tpm:
        return None
    from korora.platform import open_platform

    references = Path(config.attestation) if config.attestation else None
    return open_platform(config.tpm, references, watch, Path(config.state))


def surveyor_of(config: Config, watch: Watch | None = None) -> Surveyor | None:
    """What knows this host, and judges others; None where preflight is off. ``watch`` counts."""
    if config.preflight == "off":
        return None
    from korora.preflight.agent import open_surveyor

    return open_surveyor(config.preflight, Path(config.state), config.tpm, watch)


def paging_of(config: Config, stored: StoreAccess | None = None) -> PagingTerms:
    """What is done about pages of arriving sessions, whoever's they are: that their egress says (``tenants``)."""
    return _paging(config, Encode.AUTO, "", stored)


def tenants(config: Config) -> dict[str, str]:
    """Whose stored pages the sessions of each egress use."""
    return {egress.name: egress.tenant for egress in config.egress}


def open_host_store(config: Config) -> host_store.HostStore | None:
    """The content store of a process; None where it is turned off or cannot be used."""
    return host_store.open_host_store(Path(config.state), config.pages.store_bytes)


def session_limit(config: Config, way: str) -> float | None:
    """What a session may send at most, in bytes a second; an ingress that has gone has no limit of its own."""
    entry = config.departure_named(way)
    own = None if entry is None else bytes_per_second(entry.rate_limit)
    return least(own, bytes_per_second(config.limits.session_rate_limit))


def _paging(config: Config, encode: Encode, tenant: str, stored: StoreAccess | None) -> PagingTerms:
    pages = config.pages
    cache_bytes = affordable(pages.cache_bytes)
    return PagingTerms(encode=encode, cache_bytes=cache_bytes, chains=pages.chains, tenant=tenant, store=stored)


def _digests(pins: tuple[str, ...]) -> frozenset[bytes]:
    return frozenset(bytes.fromhex(pin.rpartition(":")[2]) for pin in pins)

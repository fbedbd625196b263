"""`korora preflight`: could a machine go to that host?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from korora.cli import options as opt

if TYPE_CHECKING:
    from collections.abc import Callable

    from crypto.tls import PeerRules
    from korora.daemon.config import Config
    from proxy.shell.contact import Contact

IDENTITY_DEFAULT = Path("/etc/korora/identity")

PREFLIGHT_EPILOG = """
Exit codes: 0 nothing has failed; 3 a check has; else as of korora send: 2 configuration, 4 authentication, 6
unreachable.
"""


def preflight(
    peer: Annotated[
        str | None,
        typer.Argument(metavar="HOST:PORT", help="The destination's relay; without one, this host alone."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="The daemon's configuration: identity, peers, what it demands."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="NAME",
            help="With --config: the ingress, or the peer, whose way is checked.",
            show_default=False,
        ),
    ] = None,
    egress: Annotated[
        str | None, typer.Option("--egress", metavar="NAME", help="The name to ask for there [default: default].")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="What the machine needs: 4G.", show_default=False)
    ] = None,
    vm: Annotated[
        str | None,
        typer.Option("--vm", metavar="DOMAIN", help="With Xen: ask xl what that domain needs.", show_default=False),
    ] = None,
    identity: Annotated[
        Path, typer.Option("--identity", envvar="KORORA_IDENTITY", metavar="DIR", help="This host's identity.")
    ] = IDENTITY_DEFAULT,
    name: opt.Names = None,
    pin: opt.Pins = None,
    state: opt.State = None,
    attestation: opt.Attestation = None,
    tpm: opt.Tpm = None,
    allow_classical: opt.AllowClassical = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check whether a machine can go to another host, and say what is in its way; nothing goes."""
    import json
    import sys
    from dataclasses import replace

    from korora.log import LogFormat, LogLevel, configure
    from proxy.errors import ConfigurationError

    configure(LogFormat.CONSOLE, LogLevel.ERROR)  # to standard error: what it would say is on the sheet
    if to is not None and (config is None or peer is not None):
        raise ConfigurationError("--to names somebody of --config", "give --config and no HOST:PORT")
    if memory is not None and vm is not None:
        raise ConfigurationError("--memory and --vm say the same thing", "give one of them")
    digests = opt.digests(pin)
    from korora.preflight import by_hand
    from korora.preflight.agent import HostSurveyor
    from korora.preflight.gather import Gatherer

    need_bytes = by_hand.parse_memory(memory) if memory is not None else by_hand.memory_of(vm) if vm is not None else -1
    daemon = None
    if config is not None:
        from korora.daemon.config import read

        daemon = read(config)
        identity, state = Path(daemon.identity), state or Path(daemon.state)
        attestation, tpm = attestation or (Path(daemon.attestation) if daemon.attestation else None), tpm or daemon.tpm
    surveyor = HostSurveyor(Gatherer(state or identity / "state"), tcti=tpm or "")
    platform, troubles = by_hand.open_platform(tpm or "", attestation)
    if peer is None and to is None:
        sheet = by_hand.look(surveyor, need_bytes, troubles)
    else:
        import asyncio

        contact = _contact(identity, _way(daemon, peer, to, egress), _rules(daemon, to, name, digests, allow_classical))
        contact = replace(contact, where=replace(contact.where, platform=platform))
        progress = _progress(contact.where.address)
        sheet = asyncio.run(by_hand.compare(contact, surveyor, need_bytes, troubles=troubles, progress=progress))
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
    if as_json:
        typer.echo(json.dumps(by_hand.as_dict(sheet)))
    else:
        for line in by_hand.lines(sheet):
            typer.echo(line)
    raise typer.Exit(sheet.code)


def _way(daemon: "Config | None", peer: str | None, to: str | None, egress: str | None) -> tuple[str, str]:
    """HOST:PORT of the destination's relay, and the egress to ask for there."""
    from proxy.errors import ConfigurationError

    if daemon is None or to is None:
        return peer or "", egress or "default"
    ingress = daemon.ingress_named(to)
    name = to if ingress is None else ingress.peer
    address = next((each.address for each in daemon.peer if each.name == name), None)
    if address is None:
        raise ConfigurationError(f"--to {to!r} is no ingress, and no peer with an address", "see the configuration")
    return address, egress or (daemon.xl.egress if ingress is None else ingress.egress)


def _rules(
    daemon: "Config | None", to: str | None, names: list[str] | None, pins: tuple[bytes, ...], classical: bool
) -> "PeerRules":
    """Whom this host accepts: as in a session, and no more than is said here."""
    from dataclasses import replace

    from crypto.tls import PeerRules

    if daemon is None:
        return PeerRules(frozenset(names or ()), frozenset(pins), classical)
    from korora.daemon.build import rules_of

    own = rules_of(daemon)
    only = frozenset(names) if names else own.names
    if to is not None:
        ingress = daemon.ingress_named(to)
        only = frozenset({to if ingress is None else ingress.peer})
    return replace(own, names=only, pins=frozenset(pins), allow_classical=own.allow_classical or classical)


def _contact(identity: Path, way: tuple[str, str], rules: "PeerRules") -> "Contact":
    from datetime import UTC, datetime

    from crypto.identity import Identity
    from crypto.tls import TlsConfig, TlsRole
    from proxy.endpoints.spec import parse_address
    from proxy.shell.contact import Contact, Peer

    host, port = parse_address(way[0], "HOST:PORT")
    tls = TlsConfig(Identity.load(identity, now=datetime.now(UTC)), TlsRole.CLIENT, rules)
    return Contact(tls, Peer(host or "127.0.0.1", port, egress=way[1]))


def _progress(address: str) -> "Callable[[str], None]":
    import sys

    def show(words: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{address}: {words}")
            sys.stderr.flush()

    return show

"""`korora send`, `korora receive`, `korora xl`: arguments in, exit code out.

What was typed is checked before anything large is imported, so that a slip of the pen is answered at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from korora.cli import options as opt
from korora.log import LogFormat, LogLevel, configure

if TYPE_CHECKING:
    from korora.relay import Common

RESUME_SECONDS = 30
RECOVER_SECONDS = 3600
DEFAULT_PORT = 8010
IDENTITY_DEFAULT = Path("/etc/korora/identity")
XL_SOCKET_DEFAULT = "/run/korora/xl.sock"
XL_SOCKET_VARIABLE = "KORORA_XL_SOCKET"
XL_PATIENCE_SECONDS = 60

_EXIT_CODES = """
Exit codes: 0 done; 2 usage or configuration; 3 refused by policy; 4 authentication failed; 5 integrity; 6 unreachable
or lost; 7 a hypervisor failed; 70 a bug; 130 and 143 on signals.
"""
# A paragraph that begins with \b keeps its lines.
RECEIVE_EPILOG = f"""
\b
ENDPOINT is where an arriving migration is handed over:
  tcp:HOST:PORT   connect to a hypervisor that waits there
  unix:PATH       the same, on a unix socket
  exec:COMMAND    give it to a shell command's standard input and output
  xl:[FLAGS]      give it to xl migrate-receive; FLAGS are of -e -d -p
  file:PATH       write PATH.partial, rename it to PATH when it is whole
  stdio:          write it to standard output
{_EXIT_CODES}"""
SEND_EPILOG = f"""
\b
ENDPOINT is where a departing migration comes from:
  tcp:HOST:PORT   listen for the hypervisor there
  unix:PATH       the same, on a unix socket
  exec:COMMAND    take it from a shell command's standard output
  file:PATH       read a file, FIFO or device
  stdio:          read it from standard input
{_EXIT_CODES}"""


def receive(
    listen: Annotated[str, typer.Option("--listen", metavar="HOST:PORT", help="Where relays reach this one.")],
    to: Annotated[str, typer.Option("--to", metavar="ENDPOINT", help="The local hypervisor that takes migrations.")],
    identity: opt.Identity,
    name: opt.Names = None,
    pin: opt.Pins = None,
    once: opt.Once = False,
    report: opt.Report = None,
    qmp: opt.Qmp = None,
    guarded: opt.Guarded = False,
    lanes: opt.Lanes = 1,
    page_cache: opt.PageCache = opt.PAGE_CACHE_BYTES,
    state: opt.State = None,
    policy: opt.Policy = None,
    approvals: opt.Approvals = None,
    attestation: opt.Attestation = None,
    tpm: opt.Tpm = None,
    preflight: opt.PreflightMode = opt.Preflight.ON,
    tenant: opt.Tenant = opt.TENANT,
    store_bytes: opt.StoreBytes = None,
    resume_timeout: opt.ResumeTimeout = RESUME_SECONDS,
    allow_classical: opt.AllowClassical = False,
    log_format: opt.Format = LogFormat.CONSOLE,
    log_level: opt.Level = LogLevel.INFO,
) -> None:
    """Take migrations from other hosts for the local hypervisor."""
    from proxy.endpoints.spec import parse_address, parse_egress, parse_monitor

    address, egress, digests = parse_address(listen, "--listen"), parse_egress(to), opt.digests(pin)
    monitor = parse_monitor(qmp) if qmp is not None else ""
    configure(log_format, log_level)
    from korora import receiving

    common = _common(
        identity,
        name,
        digests,
        once=once,
        report=report,
        resume_seconds=resume_timeout,
        allow_classical=allow_classical,
        state=state,
        office=(policy, approvals),
        attest=(attestation, tpm),
        preflight=preflight,
        store_bytes=store_bytes,
    )
    from proxy.paging import PagingTerms

    options = receiving.ReceiveOptions(
        common=common,
        listen=address,
        listen_text=listen,
        egress=egress,
        lanes=lanes,
        paging=PagingTerms(cache_bytes=page_cache, tenant=_tenant(tenant)),
        monitor=monitor,
        guarded=guarded,
    )
    raise typer.Exit(receiving.receive(options))


def send(
    source: Annotated[str, typer.Option("--from", metavar="ENDPOINT", help="The local hypervisor that migrates away.")],
    peer: Annotated[str, typer.Option("--peer", metavar="HOST:PORT", help="The destination's relay.")],
    identity: opt.Identity,
    name: opt.Names = None,
    pin: opt.Pins = None,
    once: opt.Once = False,
    report: opt.Report = None,
    qmp: opt.Qmp = None,
    guarded: opt.Guarded = False,
    lanes: opt.Lanes = 1,
    encode: opt.Encode = opt.Encoding.AUTO,
    page_cache: opt.PageCache = opt.PAGE_CACHE_BYTES,
    state: opt.State = None,
    policy: opt.Policy = None,
    approvals: opt.Approvals = None,
    attestation: opt.Attestation = None,
    tpm: opt.Tpm = None,
    preflight: opt.PreflightMode = opt.Preflight.ON,
    tenant: opt.Tenant = opt.TENANT,
    store_bytes: opt.StoreBytes = None,
    rate_limit: opt.RateLimit = None,
    xl_flags: opt.XlFlags = None,
    resume_timeout: opt.ResumeTimeout = RESUME_SECONDS,
    allow_classical: opt.AllowClassical = False,
    log_format: opt.Format = LogFormat.CONSOLE,
    log_level: opt.Level = LogLevel.INFO,
) -> None:
    """Carry a migration from the local hypervisor to another host."""
    from proxy.endpoints.spec import parse_address, parse_ingress, parse_monitor, parse_xl_flags

    ingress, (host, port), digests = parse_ingress(source), parse_address(peer, "--peer"), opt.digests(pin)
    flags = None if xl_flags is None else parse_xl_flags(xl_flags, "--xl-flags")
    monitor = parse_monitor(qmp) if qmp is not None else ""
    configure(log_format, log_level)
    from korora import sending
    from proxy.shell.source import Peer

    common = _common(
        identity,
        name,
        digests,
        once=once,
        report=report,
        resume_seconds=resume_timeout,
        allow_classical=allow_classical,
        state=state,
        office=(policy, approvals),
        attest=(attestation, tpm),
        preflight=preflight,
        store_bytes=store_bytes,
    )
    from proxy.paging import Encode, PagingTerms

    where = Peer(
        host or "127.0.0.1",
        port,
        lanes=lanes,
        resume_seconds=resume_timeout,
        rate_limit=rate_limit,
        handover="qmp" if monitor else "xl",
        guarded=guarded,
        xl_flags=flags or "",
        one_channel=flags is not None,
        paging=PagingTerms(encode=Encode(encode), cache_bytes=page_cache, tenant=_tenant(tenant)),
    )
    raise typer.Exit(sending.send(sending.SendOptions(common=common, ingress=ingress, peer=where, monitor=monitor)))


def xl(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="HOST or HOST:PORT of the destination's relay.")],
    e: Annotated[
        bool, typer.Option("-e", help="As xl migrate -e: the receiver does not wait in the background.")
    ] = False,
    d: Annotated[bool, typer.Option("-d", help="As xl migrate -d: print debugging output.")] = False,
    p: Annotated[bool, typer.Option("-p", help="As xl migrate -p: leave the domain paused.")] = False,
    identity: Annotated[
        Path, typer.Option("--identity", envvar="KORORA_IDENTITY", metavar="DIR", help="This host's identity.")
    ] = IDENTITY_DEFAULT,
    name: opt.Names = None,
    report: opt.Report = None,
    state: opt.State = None,
    policy: opt.Policy = None,
    approvals: opt.Approvals = None,
    attestation: opt.Attestation = None,
    tpm: opt.Tpm = None,
    preflight: opt.PreflightMode = opt.Preflight.ON,
    recover_for: Annotated[
        int,
        typer.Option(
            "--recover-for",
            min=0,
            max=86_400,
            metavar="SECONDS",
            help="How long a process left behind tries to finish a hand-over that broke off; 0: none is left.",
        ),
    ] = RECOVER_SECONDS,
    daemon: Annotated[
        str,
        typer.Option(
            "--daemon",
            envvar=XL_SOCKET_VARIABLE,
            metavar="PATH|no",
            help="The daemon's xl socket: it carries the migration if it runs; no: relay in this process.",
        ),
    ] = XL_SOCKET_DEFAULT,
    daemon_timeout: Annotated[
        int,
        typer.Option(
            "--daemon-timeout",
            min=0,
            max=3600,
            metavar="SECONDS",
            help="How long to wait for a daemon that went away while it had the migration.",
        ),
    ] = XL_PATIENCE_SECONDS,
    log_format: opt.Format = LogFormat.CONSOLE,
    log_level: opt.Level = LogLevel.WARNING,
) -> None:
    """Be the transport of `xl migrate -s "" DOMAIN "korora xl PEER"`."""
    configure(log_format, log_level)
    from proxy.endpoints.spec import parse_address

    host, port = parse_address(peer if ":" in peer else f"{peer}:{DEFAULT_PORT}", "PEER")
    flags = "".join(flag for flag, wanted in (("e", e), ("d", d), ("p", p)) if wanted)
    _by_daemon(daemon, peer, flags, name, report, daemon_timeout)
    from korora import sending
    from proxy.endpoints.pipes import StdioEndpoint
    from proxy.shell.source import Peer

    common = _common(
        identity,
        name,
        (),
        once=True,
        report=report,
        resume_seconds=RESUME_SECONDS,
        allow_classical=False,
        state=state,
        office=(policy, approvals),
        attest=(attestation, tpm),
        preflight=preflight,
    )
    from proxy.paging import PagingTerms

    ingress = StdioEndpoint("xl's pipes")
    where = Peer(host, port, xl_flags=flags, handover="xl", paging=PagingTerms(tenant=opt.TENANT))
    raise typer.Exit(
        sending.send(
            sending.SendOptions(common=common, ingress=ingress, peer=where, transport=True, recover_seconds=recover_for)
        )
    )


def _by_daemon(
    daemon: str, peer: str, flags: str, names: list[str] | None, report: Path | None, patience_seconds: int
) -> None:
    """Leave the migration to the daemon, and end as it says; come back where none runs."""
    import structlog

    log = structlog.get_logger("korora")
    if daemon != "no":
        from korora.xl import holder
        from korora.xl.words import VERSION, Carry

        sock = holder.reach(Path(daemon))
        if sock is not None:
            carry = Carry(VERSION, peer, flags, tuple(names or ()))
            raise typer.Exit(holder.hand_over(holder.Order(Path(daemon), carry, report, patience_seconds), sock))
    log.info("no daemon: this process relays", socket=daemon)


def _common(
    identity: Path,
    names: list[str] | None,
    digests: tuple[bytes, ...],
    *,
    once: bool,
    report: Path | None,
    resume_seconds: int,
    allow_classical: bool,
    state: Path | None = None,
    store_bytes: int | None = None,
    office: tuple[Path | None, str | None] = (None, None),
    attest: tuple[Path | None, str | None] = (None, None),
    preflight: opt.Preflight = opt.Preflight.ON,
) -> "Common":
    from chunking.limits import STORE_BYTES_DEFAULT
    from crypto.tls import PeerRules
    from korora.relay import Common

    return Common(
        identity=identity,
        rules=PeerRules(frozenset(names or ()), frozenset(digests), allow_classical),
        once=once,
        report=report,
        resume_seconds=resume_seconds,
        state=state,
        policy=office[0],
        approvals=office[1],
        attestation=attest[0],
        tpm=attest[1] or "",
        preflight=preflight.value,
        store_bytes=STORE_BYTES_DEFAULT if store_bytes is None else store_bytes,
    )


def _tenant(name: str) -> str:
    """A tenant's name, as OFFER takes it."""
    from proxy.errors import ConfigurationError

    if not opt.TENANT_PATTERN.match(name):
        raise ConfigurationError(
            f"--tenant {name!r} is no name", "give up to 63 letters, digits, dots, dashes and underscores"
        )
    return name

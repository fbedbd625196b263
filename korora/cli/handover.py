"""`korora handover`: which host runs a machine, where a migration broke off; and what is left to do about it.

It works on the state directory itself, whether a relay runs or not; what a running relay is at work on is left to it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from korora.cli import options as opt
from korora.cli.options import help_without_command

if TYPE_CHECKING:
    from crypto.tls import PeerRules
    from proxy.handover.record import Record

STATE_DEFAULT: Final = Path("/var/lib/korora")  # the daemon's, as in its configuration
IDENTITY_DEFAULT: Final = Path("/etc/korora/identity")
_COLUMNS: Final = ("SESSION", "VM", "THIS SIDE", "PEER", "STATE", "SINCE", "LEFT TO DO")

app = typer.Typer(
    name="handover",
    help="Hand-overs that broke off.",
    invoke_without_command=True,
    add_completion=False,
)

_State = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help=f"The relay's state directory [default: {STATE_DEFAULT}]."),
]
_Identity = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        metavar="DIR",
        help=f"This host's identity, to ask the other relay [default: {IDENTITY_DEFAULT}];"
        " without --state, its DIR/state is meant.",
    ),
]
_Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="The daemon's configuration: its identity, its state directory, and what it demands of peers.",
        show_default=False,
    ),
]
_Session = Annotated[str, typer.Argument(metavar="SESSION", help="Its id, or the first digits of it.")]
_Side = Annotated[
    str | None,
    typer.Option("--side", metavar="source|destination", help="Which, where a machine migrates within this host."),
]
_AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@app.callback()
def root(context: typer.Context) -> None:
    """Hand-overs that broke off: what is known, what is left to do, and how to do it."""
    from korora.log import LogFormat, LogLevel, configure

    help_without_command(context)
    configure(LogFormat.CONSOLE, LogLevel.WARNING)  # to standard error: the other one may be somebody's JSON


@app.command("list")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Those that are settled, too.")] = False,
    state: _State = None,
    identity: _Identity = None,
    as_json: _AsJson = False,
) -> None:
    """List hand-overs with something left to do; with --all, every one that is kept."""
    import json

    from korora.handovers import open_handovers

    records = open_handovers(_state(state, identity)).journal.records()
    shown = [record for record in records if everything or not record.settled]
    if as_json:
        typer.echo(json.dumps({"handovers": [_as_dict(record) for record in shown]}))
        return
    if not shown:
        typer.echo("nothing is left to do" if records else "no hand-over is on record")
        return
    rows = [_COLUMNS, *(_row(record) for record in shown)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def show(
    session: _Session,
    side: _Side = None,
    state: _State = None,
    identity: _Identity = None,
    config: _Config = None,
    pin: opt.Pins = None,
    allow_classical: opt.AllowClassical = False,
    as_json: _AsJson = False,
) -> None:
    """Show what is known of both sides: the journal, the copy on this host, and what the other relay says."""
    import asyncio
    import json

    from korora.handovers import ask, open_handovers, reach

    state, identity, rules = _settings(config, state, identity, pin, allow_classical=allow_classical)
    handovers = open_handovers(_state(state, identity))
    record = _one(_find(handovers.journal.records(), session), session, side)
    told = asyncio.run(ask(handovers, record, reach(identity or IDENTITY_DEFAULT, rules)))
    if as_json:
        typer.echo(json.dumps(_as_dict(record) | {"copy": told.copy, "peer_says": told.peer, "advice": told.advice}))
        return
    from proxy.control import printable

    typer.echo(f"{printable(record.vm.name) or 'a machine of unknown name'} ({record.vm.uuid or 'no uuid'})")
    typer.echo(f"  session    {record.head.session}")
    typer.echo(f"  this side  {record.head.side}, under {record.head.kind}")
    typer.echo(f"  peer       {printable(record.head.peer)} {record.head.address}".rstrip())
    typer.echo(f"  its copy here   {told.copy}")
    typer.echo(f"  the peer says   {told.peer}")
    typer.echo("  journal")
    for entry in record.entries:
        typer.echo(f"    {entry.at}  {entry.state:<10} {printable(entry.why)}{'  settled' if entry.settled else ''}")
    typer.echo(f"  left to do: {told.advice}")


@app.command()
def recover(
    session: Annotated[str | None, typer.Argument(metavar="SESSION", help="Only this one.")] = None,
    wait: Annotated[
        int, typer.Option("--wait", min=0, max=86_400, metavar="SECONDS", help="How long to try to reach the peer.")
    ] = 0,
    state: _State = None,
    identity: _Identity = None,
    config: _Config = None,
    pin: opt.Pins = None,
    allow_classical: opt.AllowClassical = False,
    as_json: _AsJson = False,
) -> None:
    """Finish what can be finished, as a running relay does by itself: ask the other relay, and act on its answer."""
    import asyncio
    import json

    from korora.custody import custody_beside, on_record
    from korora.handovers import finish, open_handovers, reach

    state, identity, rules = _settings(config, state, identity, pin, allow_classical=allow_classical)
    folder = _state(state, identity)
    custody = custody_beside(folder)
    told = on_record(folder, _signer(state, identity), custody)
    handovers = open_handovers(folder, told, custody)
    records = [record for record in handovers.journal.records() if not record.settled]
    if session is not None:
        records = _find(handovers.journal.records(), session)
    after = asyncio.run(finish(handovers, records, reach(identity or IDENTITY_DEFAULT, rules), wait))
    if as_json:
        typer.echo(json.dumps({"handovers": [_as_dict(record) for record in after]}))
    else:
        _say(after)
    raise typer.Exit(0 if all(record.settled for record in after) else 6)


@app.command()
def resolve(
    session: _Session,
    run_here: Annotated[
        bool, typer.Option("--run-here", help="Run this host's copy: the other one is destroyed, or its host fenced.")
    ] = False,
    give_up: Annotated[
        bool,
        typer.Option(
            "--give-up",
            help="Give this host's copy up: the other one is to run. Of one lost here it says that it never ran.",
        ),
    ] = False,
    certain: Annotated[
        bool, typer.Option("--certain", help="You have looked at both hosts: without it nothing is done.")
    ] = False,
    side: _Side = None,
    state: _State = None,
    identity: _Identity = None,
    as_json: _AsJson = False,
) -> None:
    """Decide for relays that cannot: which copy is to run. Two that run destroy the disks they share."""
    import asyncio
    import json

    from korora.custody import custody_beside, on_record
    from korora.handovers import decide, meaning, open_handovers
    from proxy.errors import ConfigurationError

    if run_here == give_up:
        raise ConfigurationError("nothing says which copy is to run", "give --run-here or --give-up, not both")
    folder = _state(state, identity)
    custody = custody_beside(folder)
    told = on_record(folder, _signer(state, identity), custody)
    handovers = open_handovers(folder, told, custody)
    record = _one(_find(handovers.journal.records(), session), session, side)
    if not certain:
        raise ConfigurationError(
            meaning(record, run_here=run_here), "look at both hosts, and if that is so, say it again with --certain"
        )
    after = asyncio.run(decide(handovers, record, run_here=run_here))
    if as_json:
        typer.echo(json.dumps(_as_dict(after)))
    else:
        _say([after])


def _say(records: "list[Record]") -> None:
    from korora.handovers import advice
    from proxy.control import printable

    for record in records:
        name = printable(record.vm.name) or "a machine of unknown name"
        left = "settled" if record.settled else advice(record)
        typer.echo(f"{record.head.session[:8]}  {name}: {record.state.value}, {left}")
    if not records:
        typer.echo("nothing is left to do")


def _settings(
    config: Path | None, state: Path | None, identity: Path | None, pins: list[str] | None, *, allow_classical: bool
) -> "tuple[Path | None, Path | None, PeerRules]":
    """Where things are kept, and what is demanded of a peer besides its name: as in the session that broke off."""
    from dataclasses import replace

    from crypto.tls import PeerRules

    rules = PeerRules(pins=frozenset(opt.digests(pins)), allow_classical=allow_classical)
    if config is None:
        return state, identity, rules
    from korora.daemon.build import rules_of
    from korora.daemon.config import read

    daemon = read(config)
    own = rules_of(daemon)
    rules = replace(own, pins=rules.pins, allow_classical=own.allow_classical or allow_classical)
    return state or Path(daemon.state), identity or Path(daemon.identity), rules


def _state(state: Path | None, identity: Path | None) -> Path:
    from proxy.errors import ConfigurationError

    directory = state or (identity / "state" if identity is not None else STATE_DEFAULT)
    if not directory.is_dir():
        raise ConfigurationError(f"there is no state directory {directory}", "name it by --state or --identity")
    return directory


def _signer(state: Path | None, identity: Path | None) -> Path | None:
    """Whose relay's state it is; None where it is of some directory, and nothing says whose."""
    return identity or (IDENTITY_DEFAULT if state in (None, STATE_DEFAULT) else None)


def _find(records: "list[Record]", session: str) -> "list[Record]":
    """What is on record of one hand-over: two where a machine migrates within this host, the unsettled ones if any."""
    from proxy.errors import ConfigurationError

    found = [record for record in records if record.head.session.startswith(session.lower())] if session else []
    if not found:
        raise ConfigurationError(f"no hand-over {session!r} is on record here", "see korora handover list --all")
    sessions = {record.head.session for record in found}
    if len(sessions) > 1:
        raise ConfigurationError(f"{session!r} means {len(sessions)} hand-overs", "give more digits of its id")
    return [record for record in found if not record.settled] or found


def _one(records: "list[Record]", session: str, side: str | None) -> "Record":
    from proxy.errors import ConfigurationError

    found = [record for record in records if side in (None, record.head.side)]
    if not found:
        raise ConfigurationError(f"no {side} of {session!r} is on record here", "see korora handover list --all")
    if len(found) > 1:
        raise ConfigurationError(
            f"{session!r} leaves this host and arrives at it", "say which: --side source or --side destination"
        )
    return found[0]


def _row(record: "Record") -> tuple[str, ...]:
    from korora.handovers import advice
    from proxy.control import printable

    since = record.entries[-1].at if record.entries else record.head.began
    left = "nothing" if record.settled else advice(record)
    vm = printable(record.vm.name) or "—"
    return record.head.session[:8], vm, record.head.side, printable(record.head.peer), record.state.value, since, left


def _as_dict(record: "Record") -> dict[str, object]:
    import msgspec

    return {
        **msgspec.to_builtins(record.head),
        "vm": record.vm.name or None,
        "uuid": record.vm.uuid or None,
        "state": record.state.value,
        "settled": record.settled,
        "why": record.why,
        "journal": [msgspec.to_builtins(entry) for entry in record.entries],
    }

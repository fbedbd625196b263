"""`korora vtpm`: whose the machines' virtual TPMs are, as this host knows it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from korora.cli.options import help_without_command

if TYPE_CHECKING:
    from korora.agents.vtpm.carrier import Agent

STATE_DEFAULT: Final = Path("/var/lib/korora")  # the daemon's, as in its configuration
_COLUMNS: Final = ("VM", "EPOCH", "HERE", "PEER", "SINCE", "EMULATOR", "IDENTITY")

app = typer.Typer(name="vtpm", help="Virtual TPMs.", invoke_without_command=True, add_completion=False)

_State = Annotated[
    Path, typer.Option("--state", metavar="DIR", help="The relay's state directory, with its vtpm.toml.")
]
_AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
_Uuid = Annotated[str, typer.Argument(metavar="UUID", help="The machine's.")]


@app.callback()
def root(context: typer.Context) -> None:
    """Virtual TPMs that move with their machines: who has them, and since which epoch."""
    from korora.log import LogFormat, LogLevel, configure

    help_without_command(context)
    configure(LogFormat.CONSOLE, LogLevel.WARNING)


@app.command()
def status(
    uuid: Annotated[str | None, typer.Argument(metavar="UUID", help="Only that machine's.")] = None,
    state: _State = STATE_DEFAULT,
    as_json: _AsJson = False,
) -> None:
    """List the vTPMs that this host has had a part in, and how their emulators stand."""
    import json

    from korora.agents.vtpm.host import open_agent

    agent = open_agent(state)
    found = [_look(agent, one) for one in ([_checked(uuid)] if uuid else agent.ledgers.names())]
    if as_json:
        typer.echo(json.dumps({"vtpms": found}))
        return
    if not found:
        typer.echo("no vTPM has come or gone yet")
        return
    rows = [_COLUMNS, *(tuple(str(value) for value in look.values()) for look in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def epochs(uuid: _Uuid, state: _State = STATE_DEFAULT, as_json: _AsJson = False) -> None:
    """Show the ledger of one vTPM: each time it came, went, or stayed."""
    import json

    import msgspec

    from korora.agents.vtpm.ledger import Ledgers

    ledger = Ledgers(state).read(_checked(uuid))
    if as_json:
        typer.echo(json.dumps({"uuid": uuid, "entries": [msgspec.to_builtins(entry) for entry in ledger.entries]}))
        return
    if not ledger.entries:
        typer.echo("this host has had no part in it")
    for entry in ledger.entries:
        typer.echo(
            f"{entry.at}  epoch {entry.epoch:<4} {entry.holding:<9} {entry.peer:<20} session {entry.session[:8]}  "
            f"state {entry.digest[:16]}"
        )


def _look(agent: "Agent", uuid: str) -> dict[str, object]:
    from proxy.control import printable
    from proxy.errors import VtpmFailed

    ledger = agent.ledgers.read(uuid)
    last = ledger.entries[-1] if ledger.entries else None
    emulator = agent.places.emulator(uuid)
    try:
        stands = "absent" if not emulator.listens else "running" if emulator.running() else "idle"
    except VtpmFailed:
        stands = "busy"  # a QEMU has its control channel
    return {
        "uuid": uuid,
        "epoch": ledger.epoch,
        "holding": ledger.holding.value,
        "peer": printable(last.peer) if last else "",
        "since": last.at if last else "",
        "emulator": stands,
        "identity": ledger.identity[-16:],
    }


def _checked(uuid: str) -> str:
    """A machine's UUID as a file's name.

    Raises:
        ConfigurationError: it is none.
    """
    from uuid import UUID

    from proxy.errors import ConfigurationError

    try:
        return str(UUID(uuid))
    except ValueError:
        raise ConfigurationError(
            f"{uuid!r} is no UUID", "name the machine by its UUID, as xl list -v shows it"
        ) from None

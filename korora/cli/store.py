"""`korora store`: what of earlier sessions lies on this host's disk, and how it is forgotten.

It works on the directory itself, whether a relay runs or not. Results go to standard output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from korora.cli.options import help_without_command

if TYPE_CHECKING:
    from chunking.store import Status, Store

STATE_DEFAULT: Final = Path("/var/lib/korora")  # the daemon's, as in its configuration
UNKNOWN: Final = "—"
_COLUMNS: Final = ("TENANT", "VM", "SEGMENTS", "PAGES", "SIZE", "NEWEST")

app = typer.Typer(
    name="store",
    help="Pages of earlier sessions that this host keeps.",
    invoke_without_command=True,
    add_completion=False,
)

_State = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help=f"The state directory [default: {STATE_DEFAULT}]."),
]
_Identity = Annotated[
    Path | None,
    typer.Option("--identity", metavar="DIR", help="Of ad hoc commands with this identity: its DIR/state."),
]
_AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@app.callback()
def root(context: typer.Context) -> None:
    """Pages of earlier sessions that this host keeps."""
    help_without_command(context)


@app.command()
def status(state: _State = None, identity: _Identity = None, as_json: _AsJson = False) -> None:
    """Show what is stored, by tenant and machine."""
    import json
    import sys

    with _opened(state, identity) as store:
        found = store.status() if store is not None else None
    if as_json:
        typer.echo(json.dumps(_as_dict(found)))
    elif found is None or not found.bytes:
        typer.echo("nothing is stored")
    elif sys.stdout.isatty():
        _show_table(found)
    else:
        rows = [_COLUMNS, *_rows(found)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        typer.echo(_summary(found))


@app.command()
def forget(
    vm: Annotated[str | None, typer.Option("--vm", metavar="NAME", help="Forget this machine.")] = None,
    tenant: Annotated[
        str | None, typer.Option("--tenant", metavar="NAME", help="Forget this tenant; with --vm: of it.")
    ] = None,
    state: _State = None,
    identity: _Identity = None,
    as_json: _AsJson = False,
) -> None:
    """Shred what is stored of a machine or a tenant.

    The keys go first, so that nothing can be read again, then the files. What is being stored
    of a machine not known yet goes too. Sessions that run read on until they end.
    """
    import json

    from proxy.errors import ConfigurationError

    if vm is None and tenant is None:
        raise ConfigurationError("nothing says what to forget", "give --vm NAME or --tenant NAME")
    with _opened(state, identity) as store:
        forgotten = store.forget(vm=vm, tenant=tenant) if store is not None else None
    segments, size, in_use = forgotten if forgotten is not None else (0, 0, 0)
    if as_json:
        typer.echo(json.dumps({"segments": segments, "bytes": size, "in_use": in_use}))
        return
    if not segments:
        typer.echo("nothing is stored of it")
        return
    from korora.daemon.show import size as spelled

    typer.echo(f"forgotten: {_counted(segments, 'segment')}, {spelled(size)}")
    if in_use:
        typer.echo(f"running sessions hold {in_use} of them open, and read on until they end")


@contextmanager
def _opened(state: Path | None, identity: Path | None) -> Iterator["Store | None"]:
    """The store that the options mean; None where there is none, and then none is made."""
    from korora.store import is_there, open_store
    from proxy.errors import ConfigurationError

    if state is not None and identity is not None:
        raise ConfigurationError("--state and --identity name two directories", "give one of them")
    directory = identity / "state" if identity is not None else state or STATE_DEFAULT
    if not directory.is_dir():
        raise ConfigurationError(f"there is no state directory {directory}", "name it by --state or --identity")
    try:
        if not is_there(directory):
            yield None
            return
        with open_store(directory) as store:
            yield store
    except OSError as error:
        message = f"{error.filename or directory}: {error.strerror or error}"
        raise ConfigurationError(message, "check the path, its permissions and the free space") from None


def _rows(found: "Status") -> list[tuple[str, ...]]:
    from datetime import UTC, datetime

    from korora.daemon.show import size
    from proxy.control import printable

    return [
        (
            printable(row.tenant) or UNKNOWN,
            printable(row.vm) if row.vm is not None else UNKNOWN,
            str(row.segments),
            str(row.pages),
            size(row.bytes),
            f"{datetime.fromtimestamp(row.newest, UTC):%Y-%m-%d %H:%M} UTC",
        )
        for row in found.machines
    ]


def _show_table(found: "Status") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in {"SEGMENTS", "PAGES", "SIZE"} else "left")
    for row in _rows(found):
        table.add_row(*(Text(cell) for cell in row))  # Text: a guest's name is no markup
    console = Console()
    console.print(table)
    console.print(Text(_summary(found)))


def _summary(found: "Status") -> str:
    from korora.daemon.show import size

    parts = [f"{_counted(found.segments, 'segment')}, {size(found.bytes)} on the disk"]
    if found.unfinished:
        parts.append(f"{found.unfinished} being written")
    if found.damaged:
        parts.append(f"{found.damaged} damaged")
    return "; ".join(parts)


def _as_dict(found: "Status | None") -> dict[str, object]:
    if found is None:
        return {"bytes": 0, "segments": 0, "unfinished": 0, "damaged": 0, "machines": []}
    return {
        "bytes": found.bytes,
        "segments": found.segments,
        "unfinished": found.unfinished,
        "damaged": found.damaged,
        "machines": [row._asdict() for row in found.machines],
    }


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

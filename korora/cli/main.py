"""The command line's root: sub-commands, and one clear line for every error."""

import os
import sys
from typing import Annotated

import typer

from korora import __version__
from korora.cli import approve, demo, handover, inspect, pki, policy, receipts, relay, serve, store, top
from korora.cli.options import help_without_command

app = typer.Typer(
    name="korora",
    help="Kororā: secure live migration of virtual machines.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(epilog=relay.RECEIVE_EPILOG)(relay.receive)
app.command(epilog=relay.SEND_EPILOG)(relay.send)
app.command()(relay.xl)
app.command(epilog=serve.SERVE_EPILOG)(serve.serve)
app.command(epilog=inspect.INSPECT_EPILOG, short_help=inspect.SHORT)(inspect.inspect)
app.command()(top.top)
app.add_typer(top.ctl, name="ctl")
app.add_typer(pki.app, name="pki")
app.add_typer(store.app, name="store")
app.add_typer(handover.app, name="handover")
app.add_typer(receipts.app, name="receipts")
app.add_typer(policy.app, name="policy")
app.command(epilog=approve.APPROVE_EPILOG)(approve.approve)
app.command(short_help="Watch a real virtual machine migrate through two relays.")(demo.demo)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"korora {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Kororā: secure live migration of virtual machines."""
    help_without_command(context)


def main() -> None:
    """Run a command and exit with its code; no traceback ever reaches the operator."""
    _occupy_standard_streams()
    try:
        code = app(prog_name="korora", standalone_mode=False)
    except typer.TyperException as error:
        context: typer.Context | None = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "korora"
        words = " ".join(error.format_message().split()).rstrip(".")
        sys.stderr.write(f"korora: error: {words}; see {where} --help\n")
        code = 2
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except Exception as error:  # noqa: BLE001 - the last line of defence between an error and the operator
        from korora.errors import complain

        code = complain(error)
    sys.exit(code)


def _occupy_standard_streams() -> None:
    """Put /dev/null where a standard stream is closed, lest a socket take its number and get what is meant for people.

    sys.stdin and sys.stdout stay None then, which is how `stdio:` knows.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives

"""The command line's root: sub-commands, and one clear line for every error."""

import sys
from typing import Annotated

import click
import typer

from korora import __version__
from korora.cli import demo, pki, relay

app = typer.Typer(
    name="korora",
    help="Kororā: secure live migration of virtual machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(pki.app, name="pki")
app.command()(relay.receive)
app.command()(relay.send)
app.command()(relay.xl)
app.command()(demo.demo)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"korora {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Kororā: secure live migration of virtual machines."""


def main() -> None:
    """Run a command and exit with its code; no traceback ever reaches the operator."""
    try:
        code = app(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stderr.write(error.format_message() + "\n")
        code = 2
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "korora"
        words = " ".join(error.format_message().split())
        sys.stderr.write(f"korora: error: {words}; see {where} --help\n")
        code = 2
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except Exception as error:  # noqa: BLE001 - the last line of defence between an error and the operator
        from korora.errors import complain

        code = complain(error)
    sys.exit(code)

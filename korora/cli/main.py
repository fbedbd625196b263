"""The command line's root: sub-commands, and one clear line for every error."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Final

import typer

from korora import __version__
from korora.cli.options import help_without_command


def _relay(app: typer.Typer) -> None:
    from korora.cli import relay

    app.command(epilog=relay.RECEIVE_EPILOG)(relay.receive)
    app.command(epilog=relay.SEND_EPILOG)(relay.send)
    app.command()(relay.xl)


def _serve(app: typer.Typer) -> None:
    from korora.cli import serve

    app.command(epilog=serve.SERVE_EPILOG)(serve.serve)


def _inspect(app: typer.Typer) -> None:
    from korora.cli import inspect

    app.command(epilog=inspect.INSPECT_EPILOG, short_help=inspect.SHORT)(inspect.inspect)


def _top(app: typer.Typer) -> None:
    from korora.cli import top

    app.command()(top.top)
    app.add_typer(top.ctl, name="ctl")


def _approve(app: typer.Typer) -> None:
    from korora.cli import approve

    app.command(epilog=approve.APPROVE_EPILOG)(approve.approve)


def _preflight(app: typer.Typer) -> None:
    from korora.cli import preflight

    app.command(epilog=preflight.PREFLIGHT_EPILOG, short_help="Check whether a machine can go to a host.")(
        preflight.preflight
    )


def _demo(app: typer.Typer) -> None:
    from korora.cli import demo

    app.command(short_help="Watch a real virtual machine migrate through two relays.")(demo.demo)


def _group(name: str) -> "_Adder":
    """A group of commands, whose module has its name."""

    def add(app: typer.Typer) -> None:
        app.add_typer(importlib.import_module(f"korora.cli.{name}").app, name=name)

    return add


_Adder = Callable[[typer.Typer], None]
_COMMANDS: Final[dict[str, _Adder]] = {
    "receive": _relay,
    "send": _relay,
    "xl": _relay,
    "serve": _serve,
    "preflight": _preflight,
    "inspect": _inspect,
    "top": _top,
    "ctl": _top,
    **{name: _group(name) for name in ("pki", "store", "handover", "receipts", "policy", "attest", "vtpm")},
    "approve": _approve,
    "demo": _demo,
}
"""What adds each command, in the order of the help."""


def command_line(words: Sequence[str]) -> typer.Typer:
    """The command line; of its commands only the one that is meant, where ``words`` name one.

    To load all of them would take a sixth of the time in which `korora xl` starts, and a machine is about to migrate.
    """
    app = typer.Typer(
        name="korora",
        help="Kororā: secure live migration of virtual machines.",
        invoke_without_command=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(root)
    meant = _COMMANDS.get(next((word for word in words if not word.startswith("-")), ""))
    for add in (meant,) if meant else dict.fromkeys(_COMMANDS.values()):
        add(app)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"korora {__version__}")
        raise typer.Exit


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
        code = command_line(sys.argv[1:])(prog_name="korora", standalone_mode=False)
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

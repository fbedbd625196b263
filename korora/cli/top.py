"""`korora top` and `korora ctl`: look at a running daemon, and steer it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from korora.cli.options import help_without_command

CONTROL_DEFAULT = Path("/run/korora/control.sock")
Control = Annotated[
    Path, typer.Option("--control", envvar="KORORA_CONTROL", metavar="PATH", help="The daemon's control socket.")
]
AsJson = Annotated[bool, typer.Option("--json", help="The answer as JSON.")]
INTERVAL_SECONDS = 1.0

ctl = typer.Typer(
    help="Steer a daemon: sessions, limits, its configuration, its end.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


def top(
    control: Control = CONTROL_DEFAULT,
    once: Annotated[bool, typer.Option("--once", help="Show it once, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead.")] = False,
    interval: Annotated[
        float, typer.Option("--interval", min=0.2, max=3600, metavar="SECONDS", help="Between two looks.")
    ] = INTERVAL_SECONDS,
) -> None:
    """Show the live sessions of a daemon."""
    import sys
    import time

    from korora.daemon import client
    from korora.daemon.control import Status

    with client.connected(control) as daemon:
        if sys.stdout.isatty() and not once and not as_json:
            _live(daemon, interval)
            return
        while True:
            _show(daemon.ask(Status()), as_json=as_json)
            if once:
                return
            time.sleep(interval)


def _show(status: dict[str, Any], *, as_json: bool) -> None:
    import json
    import sys

    if as_json:
        typer.echo(json.dumps(status))
        return
    from korora.daemon import show

    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(show.table(status))
    else:
        typer.echo("\n".join(show.lines(status)))


def _live(daemon: Any, interval: float) -> None:
    """Draw it over and over until Ctrl-C, which is the way to end it."""
    import time
    from contextlib import suppress

    from rich.live import Live

    from korora.daemon import show
    from korora.daemon.control import Status

    with suppress(KeyboardInterrupt), Live(auto_refresh=False, screen=True) as live:
        while True:
            live.update(show.table(daemon.ask(Status())), refresh=True)
            time.sleep(interval)


@ctl.callback()
def root(context: typer.Context) -> None:
    """Steer a daemon: sessions, limits, its configuration, its end."""
    help_without_command(context)


@ctl.command()
def cancel(
    session: Annotated[str, typer.Argument(metavar="SESSION", help="Its id, or the beginning of it.")],
    control: Control = CONTROL_DEFAULT,
    as_json: AsJson = False,
) -> None:
    """End a session on purpose.

    Both hypervisors see a failed migration, and both ends report code 3.
    """
    from korora.daemon.control import Cancel

    answer = _ask(control, Cancel(session))
    _say(answer, f"session {answer['session_id']} is cancelled", as_json=as_json)


@ctl.command()
def limit(
    session: Annotated[str, typer.Argument(metavar="SESSION", help="Its id or the beginning of it, or all.")],
    rate: Annotated[
        str, typer.Argument(metavar="RATE", help="Bytes a second, or like '200 MiB/s'; none for no limit.")
    ],
    control: Control = CONTROL_DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Limit what a session sends, or all together.

    A session's limit holds until it ends, the one for all until the next reload.
    """
    from korora.daemon.config import bytes_per_second
    from korora.daemon.control import Limit
    from proxy.errors import ConfigurationError

    wanted = None if rate == "none" else int(rate) if rate.isdecimal() else rate
    try:
        bytes_per_second(wanted)
    except ValueError as error:
        raise ConfigurationError(f"RATE: {error}", "write bytes a second, or like '200 MiB/s', or none") from None
    answer = _ask(control, Limit(session, wanted))
    words = "no limit" if answer["rate"] is None else f"{answer['rate']:,.0f} bytes a second at most"
    _say(answer, f"{session}: {words}", as_json=as_json)


@ctl.command()
def lanes(
    session: Annotated[str, typer.Argument(metavar="SESSION", help="Its id, or the beginning of it.")],
    count: Annotated[int, typer.Argument(min=1, max=16, metavar="N", help="How many connections carry it.")],
    control: Control = CONTROL_DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Carry a departing session over more connections, or fewer.

    A session that cannot resume is not given fewer.
    """
    from korora.daemon.control import Lanes

    answer = _ask(control, Lanes(session, count))
    _say(answer, f"session {answer['session_id']}: {count} lanes", as_json=as_json)


@ctl.command()
def reload(control: Control = CONTROL_DEFAULT, as_json: AsJson = False) -> None:
    """Read configuration, certificates and CRL again.

    All of it counts from then on, or, where something in it is bad, nothing.
    """
    from korora.daemon.control import Reload

    answer = _ask(control, Reload())
    keys = ", ".join(answer["restart_needed"])
    _say(answer, "reloaded" + (f"; waits for a restart: {keys}" if keys else ""), as_json=as_json)


@ctl.command()
def drain(control: Control = CONTROL_DEFAULT, as_json: AsJson = False) -> None:
    """Take no new session, and end the daemon with the last one."""
    from korora.daemon.control import Drain

    answer = _ask(control, Drain())
    _say(answer, f"draining: {answer['sessions']} sessions are open", as_json=as_json)


def _ask(control: Path, request: Any) -> dict[str, Any]:
    from korora.daemon import client

    with client.connected(control) as daemon:
        return daemon.ask(request)


def _say(answer: dict[str, Any], words: str, *, as_json: bool) -> None:
    import json

    typer.echo(json.dumps(answer) if as_json else words)

"""`korora serve`: the daemon."""

from pathlib import Path
from typing import Annotated

import typer

from korora.cli import options as opt
from korora.log import LogFormat, LogLevel, configure

SERVE_EPILOG = """
Signals: SIGHUP reloads the file, certificates, CRL and peers, and keeps the old ones where the new are bad; SIGTERM and
SIGINT take no new session and end with the last; a second one ends all.

Exit codes: 0 done, or drained; 2 usage or configuration; 70 a bug; 130 and 143 sessions were cut by a
signal or by drain_timeout.
"""


def serve(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="The configuration, TOML.")],
    check: Annotated[
        bool, typer.Option("--check", help="Only check it and all it names, and say what it does.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: say it as JSON.")] = False,
    log_format: opt.Format = LogFormat.CONSOLE,
    log_level: opt.Level = LogLevel.INFO,
) -> None:
    """Be the daemon: many sessions at once, both ways, by one file."""
    configure(log_format, log_level)
    from korora.daemon import main

    if check:
        raise typer.Exit(main.check_only(config, as_json=as_json))
    raise typer.Exit(main.serve(config, log_format, log_level))

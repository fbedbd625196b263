"""`korora demo`: watch a real virtual machine migrate through two relays on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from korora.cli import options as opt

if TYPE_CHECKING:
    from korora.demo.scenario import Result, Stage

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


def demo(
    as_json: Annotated[
        bool, typer.Option("--json", help="The report as JSON on standard output; the story goes to standard error.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the files: logs, reports, identities.")] = False,
    encode: opt.Encode = opt.Encoding.AUTO,
) -> None:
    """Migrate a real virtual machine through two relays on this machine, and show that it survived.

    Exit codes: 0 the guest went on without a gap; 2 QEMU or the guest's kernel is missing; 7 a hypervisor failed or the
    guest was harmed; a relay's own code when a relay failed.
    """
    import json
    import shutil
    import tempfile
    import time

    from korora.demo.errors import EXIT_HYPERVISOR, DemoError
    from korora.demo.show import Show, console_for

    begun = time.monotonic()
    console = console_for(to_stderr=as_json)
    show = Show(console)
    folder = Path(tempfile.mkdtemp(prefix="korora-demo-"))
    try:
        result = _play(show, folder, encode)
    except DemoError as error:
        typer.echo(f"korora: error: {error}" + (f"; {error.remedy}" if error.remedy else ""), err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("korora demo: interrupted; every process is ended", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        if keep:
            typer.echo(f"korora demo: the files are in {folder}", err=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    show.report(result, time.monotonic() - begun)
    if as_json:
        typer.echo(json.dumps(result.as_json(), indent=2))
    if not result.good:
        typer.echo("korora: error: the guest did NOT survive unharmed; run again with --keep for the logs", err=True)
        raise typer.Exit(EXIT_HYPERVISOR)


def _play(stage: Stage, folder: Path, encode: str) -> Result:
    """Run the scenario; SIGINT and SIGTERM end it in good order, with every process reaped."""
    import asyncio
    import signal

    from korora.demo.scenario import run

    async def play() -> Result:
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await run(stage, folder, encode=encode)

    try:
        return asyncio.run(play())
    except asyncio.CancelledError:
        raise typer.Exit(EXIT_TERMINATED) from None

"""Child processes that never outlive the demo: started with their output in a file, ended with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

TERMINATE_SECONDS = 5.0  # what a process gets to end by itself before it is killed


def guarded(command: Sequence[str | Path]) -> list[str]:
    """`command` such that the kernel kills it when this process dies, however it dies (needs setpriv of util-linux)."""
    setpriv = shutil.which("setpriv")
    prefix = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
    return [*prefix, *map(str, command)]


async def start(
    command: Sequence[str | Path], errors: Path, *, limit_bytes: int = 64 * 1024
) -> asyncio.subprocess.Process:
    """Start `command` with nothing on its standard input, a pipe on its output and `errors` as its error output.

    It gets a session of its own: a Ctrl-C at the terminal reaches us alone, and we end it in good order.
    """
    sink = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return await asyncio.create_subprocess_exec(
            *guarded(command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=sink,
            limit=limit_bytes,
            start_new_session=True,
        )
    finally:
        os.close(sink)


def tell(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send a signal, unless the process has ended.

    Not by `process.send_signal`: that polls, and so takes the exit code away from asyncio's own watcher.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


async def end(process: asyncio.subprocess.Process, grace_seconds: float = TERMINATE_SECONDS) -> int:
    """End `process`: SIGTERM, then SIGKILL after `grace_seconds`; returns its exit code. Cancelling kills at once."""
    try:
        if process.returncode is None:
            tell(process, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_seconds):
                    return await process.wait()
    finally:
        tell(process, signal.SIGKILL)
    return await process.wait()


def last_words(errors: Path) -> str:
    """The last line a process wrote to its error file, without our own commands' `korora: error:`; or nothing."""
    try:
        lines = errors.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].removeprefix("korora: error: ") if lines else ""


def why_ended(code: int, errors: Path) -> str:
    """For people: why a process ended with `code` (negative: by that signal), in its own words where it had time."""
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    return last_words(errors) or f"it ended with exit code {code}"

"""A short command to its end, without a fork of this process.

subprocess starts it by vfork(2), where uvloop copies this process's page tables first. A relay's are large, and under
Xen's PV dom0 each of their entries is the hypervisor's work: `xl list` took a good deal longer by that, at
moments in which the machine stands still.
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Final, NamedTuple

_PIECE_BYTES: Final = 65536


class Said(NamedTuple):
    """How a command ended, and what it has said; None for what was longer than allowed."""

    code: int
    out: str | None
    err: str | None


async def run_command(argv: Sequence[str], *, seconds: float, bytes_max: int) -> Said:
    """Run a command in a session of its own and with no standard input, and read what it says.

    One that says more than ``bytes_max`` on either stream, or is not done in time, is killed with its whole session's
    group. What it has started with groups of their own lives on.

    Raises:
        OSError: it cannot be started.
        TimeoutError: it has not ended in ``seconds``.
    """
    with subprocess.Popen(  # noqa: ASYNC220 - until it is started, for which vfork waits in any case
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            _kill(process)
            raise
        try:
            async with asyncio.timeout(seconds):
                out, err = await asyncio.gather(*(_all_of(end, process, bytes_max) for end in _ends(process)))
                await _ended(process, pidfd)
        finally:
            _kill(process)
            await _ended(process, pidfd)
            os.close(pidfd)
    return Said(process.returncode, out, err)


def _ends(process: "subprocess.Popen[bytes]") -> list[IO[bytes]]:
    return [end for end in (process.stdout, process.stderr) if end is not None]


async def _ended(process: "subprocess.Popen[bytes]", pidfd: int) -> None:
    while process.poll() is None:
        await _readable(pidfd)


async def _readable(fd: int) -> None:
    """Until a read of ``fd`` would not block, or would fail."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def found() -> None:
        loop.remove_reader(fd)  # at once: it would be told again before anybody has read
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, found)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def _all_of(end: IO[bytes], process: "subprocess.Popen[bytes]", bytes_max: int) -> str | None:
    """All that comes; None if that is longer than ``bytes_max``, for which the command is killed."""
    fd, content = end.fileno(), bytearray()
    os.set_blocking(fd, False)
    while True:
        try:
            piece = os.read(fd, _PIECE_BYTES)
        except BlockingIOError:
            await _readable(fd)
            continue
        if not piece:
            break
        content += piece[: bytes_max + 1 - len(content)]
        if len(content) > bytes_max:
            _kill(process)  # and read on, to the end that this brings
    return None if len(content) > bytes_max else content.decode(errors="replace")


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

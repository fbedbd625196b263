"""Real TPMs for measurements and tests: a swtpm each, on loopback, with its state in a folder."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.processes import BenchError

_TRIES: Final = 20
_STARTS: Final = 3
_START_SECONDS_MAX: Final = 10.0


def _ports() -> int:
    """The first of two free ports in a row: the second is the control channel's."""
    for _ in range(_TRIES):
        with closing(socket.socket()) as first, closing(socket.socket()) as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port
    raise BenchError("no two ports in a row are free")


@dataclass(frozen=True, slots=True)
class SoftTpm:
    """A running swtpm."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def tcti(self) -> str:
        """Where it answers."""
        return f"swtpm:host=127.0.0.1,port={self.port}"


@contextmanager
def soft_tpm(folder: Path) -> Iterator[SoftTpm]:
    """A swtpm whose state lives in ``folder``; reaped afterwards.

    Raises:
        BenchError: it does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(_STARTS):  # a port may be taken between finding and binding it
        running = _start(folder)
        try:
            if _answers(running):
                yield running
                return
        finally:
            running.process.terminate()
            try:
                running.process.wait(10)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait(10)
    raise BenchError("swtpm does not start")


def _start(folder: Path) -> SoftTpm:
    port = _ports()
    process = subprocess.Popen(
        [
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}", "--flags", "not-need-init,startup-clear"),
            *("--server", f"type=tcp,port={port},bindaddr=127.0.0.1"),
            *("--ctrl", f"type=tcp,port={port + 1},bindaddr=127.0.0.1"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return SoftTpm(port, process)


def _answers(running: SoftTpm) -> bool:
    """Whether it comes up. The control channel is asked: the data channel serves one client, and we would be it."""
    deadline = time.monotonic() + _START_SECONDS_MAX
    while running.process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", running.port + 1), timeout=1):
            return True
        time.sleep(0.01)
    return False

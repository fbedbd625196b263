"""Real TPMs for tests: a swtpm each, on loopback, with its state in a temporary folder."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_TRIES = 20


@dataclass(frozen=True)
class SoftTpm:
    """A running swtpm."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def tcti(self) -> str:
        return f"swtpm:host=127.0.0.1,port={self.port}"


def _pair() -> int:
    """Two free ports, one above the other: the second is the control channel's."""
    for _ in range(_TRIES):
        with closing(socket.socket()) as first, closing(socket.socket()) as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port
    raise AssertionError("no two ports in a row are free")


def _answers(port: int) -> bool:
    """Whether the control channel takes connections: the data channel serves one client, and this would be it."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port + 1), timeout=1):
        return True
    return False


@contextmanager
def soft_tpm(folder: Path) -> Iterator[SoftTpm]:
    """A swtpm whose state lives in ``folder``; ended and reaped afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(3):  # a port may be taken between finding and binding it
        port = _pair()
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
        try:
            deadline = time.monotonic() + 10
            while process.poll() is None and not _answers(port) and time.monotonic() < deadline:
                time.sleep(0.01)
            if process.poll() is None:
                yield SoftTpm(port, process)
                return
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
    raise AssertionError("swtpm does not start")

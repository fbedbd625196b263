"""The other end of the control socket: what `korora top` and `korora ctl` ask by."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from korora.daemon.control import Request
from proxy.errors import ConfigurationError
from proxy.limits import MIB

ANSWER_SECONDS_MAX: Final = 120.0  # a reload reads an identity in every worker
ANSWER_BYTES_MAX: Final = 8 * MIB  # a thousand sessions of 1 KiB each, and more


class Client:
    """One connection to a daemon's control socket. Use ``connected``."""

    def __init__(self, path: Path, sock: socket.socket) -> None:
        self._path, self._sock = path, sock
        self._stream = sock.makefile("rb")

    def ask(self, request: Request) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            ConfigurationError: the daemon says no, or nothing.
        """
        try:
            self._sock.sendall(msgspec.json.encode(request) + b"\n")
            line = self._stream.readline(ANSWER_BYTES_MAX)
            answer: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
        except (OSError, msgspec.MsgspecError):
            raise ConfigurationError(
                f"the daemon at {self._path} does not answer", "its log says why; it may have ended"
            ) from None
        if not answer.pop("ok", False):
            raise ConfigurationError(str(answer.get("error", "no")), str(answer.get("remedy", "")))
        return answer


@contextmanager
def connected(path: Path) -> Iterator[Client]:
    """A connection to the daemon whose control socket is at ``path``.

    Raises:
        ConfigurationError: nobody listens there, or we may not connect.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(ANSWER_SECONDS_MAX)
        try:
            sock.connect(str(path))
        except OSError as error:
            raise ConfigurationError(
                f"cannot reach a daemon at {path}: {error.strerror or error}",
                "see that korora serve runs, give its control socket by --control, and be its user or root",
            ) from None
        yield Client(path, sock)

"""Pipes that another process of this host has handed over, and holds on to until it is told to let go.

While it holds them, the hypervisor behind them sees no end of a stream, whatever becomes of this process.
"""

import fcntl
import os
import socket
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from proxy.endpoints.pipes import PipeConnection, ends, own_description
from proxy.errors import ConfigurationError, HypervisorFailed

LABEL: Final = "xl's pipes"
_REMEDY: Final = "run korora xl as the command of xl migrate -s, which gives it pipes"

LetGo = Callable[[bool], None]
"""Tells the holder to close its copies: of the output alone (True), or of both."""


def take_over(given: Sequence[int]) -> tuple[int, int]:
    """Descriptors of our own for the streams of two that were handed over; those are closed, whatever happens.

    Args:
        given: what to read, and what to write.

    Raises:
        ConfigurationError: they are not two pipes or stream sockets, the first open for reading, the other for writing.
            Anything else could make a read wait, and all sessions of the process with it.
    """
    try:
        if len(given) != 2:
            raise ConfigurationError(f"{len(given)} descriptors instead of two", _REMEDY)
        for fd, name, wanted in ((given[0], "input", os.O_RDONLY), (given[1], "output", os.O_WRONLY)):
            if not _fits(fd, wanted):
                raise ConfigurationError(f"the {name} is no pipe or stream socket open for it", _REMEDY)
        reader = own_description(given[0], os.O_RDONLY)
        try:
            return reader, own_description(given[1], os.O_WRONLY)
        except OSError:
            os.close(reader)
            raise
    except OSError as error:
        raise ConfigurationError(f"the descriptors cannot be taken over: {error.strerror}", _REMEDY) from None
    finally:
        for fd in given:
            with suppress(OSError):
                os.close(fd)


def _fits(fd: int, wanted: int) -> bool:
    mode, flags = os.fstat(fd).st_mode, fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE not in {wanted, os.O_RDWR}:
        return False
    if stat.S_ISFIFO(mode):
        return True
    if not stat.S_ISSOCK(mode):
        return False
    with socket.socket(fileno=os.dup(fd)) as sock:
        return sock.type == socket.SOCK_STREAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


class HandedPipes(PipeConnection):
    """Two descriptors of ``take_over``; this object owns them from now on.

    Args:
        reader, writer: what to read and to write.
        let_go: called when the hypervisor is to see an end, which it does once the holder's copies are closed, too.
        holder: who holds them, as ``proxy.process`` writes it down.
        user: the holder's uid; None: this process's.
    """

    def __init__(self, reader: int, writer: int, let_go: LetGo, holder: str = "", user: int | None = None) -> None:
        super().__init__(*ends(reader, writer), LABEL, user)
        self._let_go, self.holder = let_go, holder
        self._released = False
        """Whether the holder was told to let go of both."""
        self.left = False
        """Whether they were given back, and will be handed over again."""

    def finish(self) -> None:
        """See ``Connection.finish``."""
        super().finish()
        self._let_go(True)

    async def settle(self) -> None:
        """See ``Connection.settle``."""
        await super().settle()
        self._release()

    async def abort(self) -> None:
        """See ``Connection.abort``: here and at the holder, so that the hypervisor sees it."""
        await super().abort()
        self._release()

    def leave(self) -> None:
        """Close our copies alone: the hypervisor sees nothing, and the holder hands its own over again."""
        self.left = True
        self._close()

    def _release(self) -> None:
        if not (self.left or self._released):
            self._released = True
            self._let_go(False)


class HandedIngress:
    """The ingress of one connection that is there already."""

    single = True
    label = LABEL

    async def open(self) -> None:
        """See ``Ingress.open``."""

    async def accept(self) -> PipeConnection:
        """See ``Ingress.accept``.

        Raises:
            HypervisorFailed: always; there was one, and it has been taken.
        """
        raise HypervisorFailed(f"{self.label} bring one connection")

    async def close(self) -> None:
        """See ``Ingress.close``."""

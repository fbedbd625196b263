"""The parent's end of the xl socket: who comes is identified by the kernel and given to a worker, unread."""

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import structlog

from korora.xl.words import REQUEST_BYTES_MAX, Verdict, encode
from proxy.endpoints.sockets import explain
from proxy.errors import EXIT_POLICY

log = structlog.get_logger("korora.daemon")

GREETED_MAX: Final = 64  # of all workers: asked to, and neither a session yet nor answered; others wait in the backlog
_TURN_CONNECTIONS: Final = 16  # accepted before the loop serves others
_ACCEPT_AGAIN_SECONDS: Final = 0.1  # for descriptors, memory or a worker to become free
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid; unix(7)

Route = Callable[[socket.socket, int, int], None]
"""Gives a connection, its user's id and its process's to a worker, if there is one. We close our copy of it."""


def refuse(sock: socket.socket, verdict: Verdict) -> None:
    """Answer without having read; what the request has brought along is dropped by the kernel."""
    with suppress(OSError):
        sock.recv(REQUEST_BYTES_MAX, socket.MSG_DONTWAIT)  # unread, it would reset the answer away
    with suppress(OSError):
        sock.send(encode(verdict), socket.MSG_DONTWAIT)


class XlDoor:
    """Accepts `korora xl`, of root and of our own user.

    Args:
        listener: bound, listening, non-blocking, SOCK_SEQPACKET; its giver's to close.
        route: where they go.
        greeted: how many are with workers and not sessions yet.
    """

    def __init__(self, listener: socket.socket, route: Route, greeted: Callable[[], int]) -> None:
        self._listener, self._route, self._greeted = listener, route, greeted
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self._closed = False

    def open(self) -> None:
        """Begin to accept; who came before has waited in the backlog."""
        if not self._closed:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Accept no more."""
        self._closed = True
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._listener.fileno())

    def _accept(self) -> None:
        for _ in range(_TURN_CONNECTIONS):
            if self._greeted() >= GREETED_MAX:
                self._pause()
                return
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("cannot accept a connection", reason=explain(error))
                self._pause()
                return
            with sock:
                sock.setblocking(False)
                self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(data)
        if uid not in {0, os.geteuid()}:
            log.warning("somebody else was refused at the xl socket", uid=uid)
            refuse(sock, Verdict(EXIT_POLICY, f"korora: error: user {uid} may not migrate by this daemon; be root"))
        else:
            self._route(sock, uid, pid)  # where no worker is there, its end tells it to come again

    def _pause(self) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._again = self._loop.call_later(_ACCEPT_AGAIN_SECONDS, self.open)

"""The relay port: who knocks is looked at, not read, and handed to the worker that can take it.

A first byte 0x16 is TLS, a new session: the worker with the fewest gets it. `K` is a lane, or a session that goes on:
its token comes after the four letters, and the token's first byte names the worker. The rest is the worker's to judge.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Final

import structlog

from proxy.endpoints.sockets import explain, readable
from proxy.limits import FIRST_BYTE_SECONDS_MAX
from proxy.shell.greeting import HalfOpen
from proxy.wire import LANE_FIRST_BYTE, LANE_MAGIC, TLS_FIRST_BYTE

log = structlog.get_logger("korora.daemon")

_LOOKED_AT: Final = len(LANE_MAGIC) + 1  # up to the token's first byte; a TLS record's header is as long
_TURN_CONNECTIONS: Final = 64  # accepted before the loop serves others
_ACCEPT_AGAIN_SECONDS: Final = 0.1  # for descriptors or memory to become free; newcomers wait in the backlog

Route = Callable[[socket.socket, str, int | None], None]
"""Takes a connection, where it comes from, and the worker it asks for; None for any. We close our copy of it."""


class Door:
    """Accepts connections and routes them.

    Args:
        listener: bound, listening and non-blocking; this object owns it from now on.
        route: where they go.
    """

    def __init__(self, listener: socket.socket, route: Route) -> None:
        self._listener, self._route = listener, route
        self._half_open = HalfOpen()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self._closed = False

    def open(self) -> None:
        """Begin to accept; who came before has waited in the backlog."""
        self._loop.add_reader(self._listener.fileno(), self._accept)

    @property
    def address(self) -> str:
        """HOST:PORT that it listens on."""
        name = self._listener.getsockname()
        return f"[{name[0]}]:{name[1]}" if self._listener.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"

    def _accept(self) -> None:
        for _ in range(_TURN_CONNECTIONS):
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of descriptors or memory: what is open goes on, newcomers wait in the backlog.
                log.warning("cannot accept a connection", reason=explain(error))
                self._loop.remove_reader(self._listener.fileno())
                self._again = self._loop.call_later(_ACCEPT_AGAIN_SECONDS, self._resume)
                return
            sock.setblocking(False)
            where = str(address[0]) if isinstance(address, tuple) else "unix"
            task = self._loop.create_task(self._look(sock, where))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self._half_open.add(task, where)

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    async def _look(self, sock: socket.socket, address: str) -> None:
        with sock:
            try:
                # The kernel wakes us when all of it has come, or nothing more will.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _LOOKED_AT)
                async with asyncio.timeout(FIRST_BYTE_SECONDS_MAX):
                    await readable(sock.fileno())
                head = sock.recv(_LOOKED_AT, socket.MSG_PEEK)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            except (OSError, TimeoutError):
                return
            if len(head) < _LOOKED_AT:
                return
            if head[0] == TLS_FIRST_BYTE:
                self._route(sock, address, None)
            elif head[0] == LANE_FIRST_BYTE:
                self._route(sock, address, head[-1])

    async def close(self) -> None:
        """Stop listening, and drop who has said nothing yet."""
        if self._closed:
            return
        self._closed = True
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

"""Connections that have not authenticated yet: bounded in all and per address, the oldest makes room.

Evicting beats refusing: silent connections, however many, cannot keep an honest peer of the same address out, since
it needs milliseconds and they were there before.
"""

import asyncio
import socket

from proxy.limits import (
    FIRST_BYTE_SECONDS_MAX,
    HALF_OPEN_MAX,
    HALF_OPEN_PER_ADDRESS_MAX,
    LANE_HELLO_SECONDS_MAX,
)
from proxy.wire import LANE_PREFIX_BYTES


class HalfOpen:
    """Tasks of unauthenticated connections, oldest first."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], str] = {}
        self.evicted = 0
        """Connections that had to make room so far."""

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: asyncio.Task[None], address: str) -> None:
        """Count one more connection; the oldest of its address, or of all, is cancelled where there are too many."""
        self._tasks[task] = address
        task.add_done_callback(self.done)
        same = [known for known, where in self._tasks.items() if where == address]
        if len(same) > HALF_OPEN_PER_ADDRESS_MAX:
            self._evict(same[0])
        if len(self._tasks) > HALF_OPEN_MAX:
            self._evict(next(iter(self._tasks)))

    def _evict(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        self.evicted += 1
        task.cancel()

    def done(self, task: "asyncio.Task[None] | None") -> None:
        """A connection has authenticated or gone."""
        if task is not None:
            self._tasks.pop(task, None)


async def read_first(sock: socket.socket) -> bytes:
    """The first byte of a connection; empty where none comes in time, or it broke. The socket stays open."""
    try:
        async with asyncio.timeout(FIRST_BYTE_SECONDS_MAX):
            return await asyncio.get_running_loop().sock_recv(sock, 1)
    except (OSError, TimeoutError):
        return b""
    except asyncio.CancelledError:
        sock.close()
        raise


async def read_prefix(sock: socket.socket, first: bytes) -> bytes:
    """What stands before a lane's hello, or before TLS of a source that comes back; empty where it does not come whole.

    Args:
        sock: stays open.
        first: what has been read of it.
    """
    loop = asyncio.get_running_loop()
    prefix = first
    try:
        async with asyncio.timeout(LANE_HELLO_SECONDS_MAX):
            while len(prefix) < LANE_PREFIX_BYTES:
                more = await loop.sock_recv(sock, LANE_PREFIX_BYTES - len(prefix))
                if not more:
                    return b""
                prefix += more
    except (OSError, TimeoutError):
        return b""
    except asyncio.CancelledError:
        sock.close()
        raise
    return prefix

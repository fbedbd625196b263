"""Connections that have not authenticated yet: bounded in all and per address, the oldest makes room.

Evicting beats refusing: silent connections, however many, cannot keep an honest peer of the same address out, since
it needs milliseconds and they were there before.
"""

import asyncio

from proxy.limits import HALF_OPEN_MAX, HALF_OPEN_PER_ADDRESS_MAX


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

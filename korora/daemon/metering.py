"""The parent's part in the metrics: the directory all processes count into, its own counts, and the listener."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from korora.metrics.family import Side
from korora.metrics.http import MetricsServer, Pages
from korora.metrics.instruments import Instruments, shared_registry
from korora.metrics.observer import Observer
from korora.metrics.sampler import sample_for_ever
from korora.metrics.shared import SharedDirectory

SUPERVISOR = "supervisor"


class Metering:
    """Counts, and gives out what all processes have counted.

    Args:
        state: the daemon's state directory; the service manager's run-time directory is preferred where there is one.

    Raises:
        ConfigurationError: there is no room, or another daemon uses the directory.
    """

    def __init__(self, state: Path) -> None:
        runtime = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        self._directory = SharedDirectory.prepare(Path(runtime) if runtime else state)
        self.observer = Observer(Instruments.shared(self.path, SUPERVISOR), Side.SUPERVISOR, SUPERVISOR)
        self._server: MetricsServer | None = None
        self._sampling: asyncio.Task[None] | None = None

    @property
    def path(self) -> Path:
        """The directory, for the workers."""
        return self._directory.path

    async def start(
        self,
        listener: socket.socket,
        *,
        health: Callable[[], str | None],
        ready: Callable[[], str | None],
        status: Callable[[], Awaitable[object]],
    ) -> None:
        """Serve the pages; see ``Pages``."""
        self._server = MetricsServer(Pages(shared_registry(self.path), health, ready, status))
        await self._server.start(listener)
        self._sampling = asyncio.get_running_loop().create_task(sample_for_ever(self.observer, lambda: ()))

    def forget(self, worker: int) -> None:
        """A worker has been reaped."""
        self._directory.forget(str(worker))

    async def close(self) -> None:
        """Stop; all workers have ended."""
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.gather(self._sampling, return_exceptions=True)
        if self._server is not None:
            await self._server.close()
        self._directory.close()

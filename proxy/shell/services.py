"""The tasks of one session: what runs beside one another, and the first failure that ends them all."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from crypto.errors import CryptoError
from proxy.errors import PeerAborted, PeerLost
from proxy.shell.waiting import Signal


class Services:
    """Runs a session's tasks; ``Runner`` gives them their work."""

    def __init__(self) -> None:
        self.over = False
        """Whether the session has ended: no lane may join it any more, for its hypervisors may be closed."""
        self.progress = Signal()
        self._loop = asyncio.get_running_loop()
        self._failure: BaseException | None = None
        self._services: set[asyncio.Task[None]] = set()
        self._main: asyncio.Task[None] | None = None
        self._concluded = False
        self._listening: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        """For the peer to come back; None while it is here."""

    @property
    def decided(self) -> bool:
        """Whether it is certain how the session ends: nobody can resume it any more."""
        return self.over or self._concluded or self._failure is not None

    @property
    def failure(self) -> BaseException | None:
        """What ended it early; None while it runs and where all is well."""
        return self._failure

    def conclude(self) -> None:
        """Both ends are final: what breaks from here on, breaks behind a finished session."""
        self._concluded = True

    def serve(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a part of the session until it returns; its failure is the session's."""
        task = self._loop.create_task(self._guard(work), name=name)
        self._services.add(task)
        task.add_done_callback(self._services.discard)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step, it would never be awaited
        return task

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - whatever it is, it must end the session and not just its task
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the session; the first reason counts, unless a later one says more."""
        if self._concluded:
            return
        if self._failure is None:
            self._failure = error
            if self._main is not None:
                self._main.cancel()
        elif isinstance(self._failure, PeerLost) and isinstance(error, PeerAborted | CryptoError):
            self._failure = error  # why the peer went says more than that it went

    async def _end_services(self) -> None:
        services = [task for task in self._services if task is not self._listening or self._failure is None]
        for task in services:
            task.cancel()
        await asyncio.gather(*services, return_exceptions=True)

    async def until(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until ``condition`` holds; False if it did not within ``seconds``, time without the peer not counted."""
        while not condition():
            try:
                async with asyncio.timeout(seconds):
                    while not condition():
                        await self.progress.wait()
            except TimeoutError:
                if self._deadline is None:
                    return False
                while self._deadline is not None:
                    await self.progress.wait()
        return True

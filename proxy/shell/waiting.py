"""Waiting for descriptors and for one's own events, without a task each."""

import asyncio


class Gate:
    """One waiter that several causes can wake: a readable descriptor, an acknowledgement, credit.

    A wake-up without a waiter is not kept: whoever waits looks at the state first, and nothing runs in between.
    """

    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Wake the waiter, if there is one."""
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def wait(self) -> None:
        """Until ``wake``."""
        self._future = self._loop.create_future()
        try:
            await self._future
        finally:
            self._future = None

    async def wait_readable(self, fd: int) -> None:
        """Until ``wake`` or until ``fd`` can be read."""
        self._loop.add_reader(fd, self.wake)
        try:
            await self.wait()
        finally:
            self._loop.remove_reader(fd)

    async def wait_writable(self, fd: int) -> None:
        """Until ``wake`` or until ``fd`` can be written."""
        self._loop.add_writer(fd, self.wake)
        try:
            await self.wait()
        finally:
            self._loop.remove_writer(fd)

"""Waiting for descriptors and for one's own events, without a task each."""

import asyncio


class Signal:
    """Something has changed: any number may wait for it, and look again when they are woken. Nothing is kept."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def wake(self) -> None:
        """Wake whoever waits."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self) -> None:
        """Until ``wake``."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)


class Gate:
    """One waiter that several causes can wake: a descriptor that is ready, an acknowledgement, credit.

    A wake-up without a waiter is not kept: whoever waits looks at the state first, and nothing runs in between. A
    descriptor stays registered with the loop between two waits, because registering anew costs more than a read;
    it is taken out when it is ready and nobody waits for it. ``release`` must come before the descriptor is closed.

    Use the descriptor until it would block, then wait, never before: libuv stops watching a descriptor that epoll
    reports an error of, after one last call. Whoever reads once in that call and waits again waits for ever.

    Args:
        fd: the descriptor this gate may wait for; None for one that only waits for events.
    """

    __slots__ = ("_fd", "_future", "_loop", "_reading", "_wants_descriptor", "_writing")

    def __init__(self, fd: int | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] | None = None
        self._fd = fd
        self._reading = self._writing = False
        self._wants_descriptor = False

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

    async def wait_readable(self) -> None:
        """Until ``wake`` or until the descriptor can be read."""
        if self._fd is not None and not self._reading:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)
        self._wants_descriptor = True
        self._future = self._loop.create_future()
        try:
            await self._future
        finally:
            self._future = None
            self._wants_descriptor = False

    async def wait_writable(self) -> None:
        """Until ``wake`` or until the descriptor can be written."""
        if self._fd is not None and not self._writing:
            self._writing = True
            self._loop.add_writer(self._fd, self._writable)
        self._wants_descriptor = True
        try:
            await self.wait()
        finally:
            self._wants_descriptor = False

    def _readable(self) -> None:
        if self._wants_descriptor:
            self.wake()
        else:
            self._stop_reading()

    def _writable(self) -> None:
        if self._wants_descriptor:
            self.wake()
        else:
            self._stop_writing()

    def _stop_reading(self) -> None:
        if self._reading and self._fd is not None:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _stop_writing(self) -> None:
        if self._writing and self._fd is not None:
            self._writing = False
            self._loop.remove_writer(self._fd)

    def release(self) -> None:
        """Take the descriptor out of the loop, for good."""
        self._stop_reading()
        self._stop_writing()
        self._fd = None

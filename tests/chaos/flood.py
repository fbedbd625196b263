"""Strangers at a relay's port: silent, garbling, half-way, with a token of no session, and with genuine handshakes."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

from crypto.errors import CryptoError
from crypto.tls import TlsConfig
from tests.attacks.rogue import Control, Gone

KINDS: Final = 5  # by turns
STRANGERS_ADDRESS: Final = "127.0.0.2"
"""Not the honest peer's: what one address may have half-open, it takes from itself."""
STRANGER_SECONDS_MAX: Final = 2.0  # then it goes by itself, to make room for the next

Manner = Callable[[socket.socket], Awaitable[None]]


class Flood:
    """Strangers, each with its manner.

    Args:
        port: of the relay.
        contexts: whom the genuine ones are.
        strangers: how many come in all.
        at_once: how many of them are there at any time.
        seed: of what they say.
    """

    def __init__(self, port: int, *contexts: TlsConfig, strangers: int, at_once: int, seed: int = 0) -> None:
        self._port, self._contexts, self._strangers = port, contexts, strangers
        self._dice = random.Random(seed)
        self._turns = asyncio.Semaphore(at_once)
        self.came = 0
        self.judged = 0
        """Those whose certificate the relay had to look at."""

    async def run(self) -> None:
        """All of them, some at a time."""
        manners: list[Manner] = [self._silent, self._garbling, self._half_way, self._token, self._genuine]
        async with asyncio.TaskGroup() as group:
            for number in range(self._strangers):
                await self._turns.acquire()
                group.create_task(self._one(manners[number % KINDS]))

    async def _one(self, manner: Manner) -> None:
        try:
            with socket.socket() as sock:
                sock.setblocking(False)
                sock.bind((STRANGERS_ADDRESS, 0))
                await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
                self.came += 1
                with suppress(OSError, Gone, CryptoError):  # a time-out is an OSError
                    async with asyncio.timeout(STRANGER_SECONDS_MAX):
                        await manner(sock)
        finally:
            self._turns.release()

    @staticmethod
    async def _closed(sock: socket.socket) -> None:
        while await asyncio.get_running_loop().sock_recv(sock, 65536):
            pass

    async def _silent(self, sock: socket.socket) -> None:
        await self._closed(sock)

    async def _garbling(self, sock: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(sock, self._dice.randbytes(3000))
        await self._closed(sock)

    async def _half_way(self, sock: socket.socket) -> None:
        """A TLS record that promises more than ever comes."""
        await asyncio.get_running_loop().sock_sendall(sock, b"\x16\x03\x01\x10\x00\x01")
        await self._closed(sock)

    async def _token(self, sock: socket.socket) -> None:
        """A lane of no session."""
        await asyncio.get_running_loop().sock_sendall(sock, b"KRL1" + self._dice.randbytes(16))
        await self._closed(sock)

    async def _genuine(self, sock: socket.socket) -> None:
        """A whole handshake, with an identity of this CA or of another, and then nothing."""
        control = Control(sock, self._dice.choice(self._contexts))
        self.judged += 1
        await control.handshake()
        await self._closed(sock)


@asynccontextmanager
async def flooding(flood: Flood) -> AsyncIterator["asyncio.Task[None]"]:
    """Let them come while the block runs; those that are left when it ends go with it."""
    task = asyncio.ensure_future(flood.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

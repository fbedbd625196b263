"""Hundreds of strangers at the destination's port while a session runs: silent, garbling, half-way and genuine ones.

Why: a handshake costs the server a signature and a key encapsulation, a connection costs it a descriptor, and both
before it knows anything of the peer. Servers that count connections but not those that have not authenticated are
emptied by whoever can reach the port; those that refuse newcomers instead shut the honest ones out.
"""

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from crypto.errors import CryptoError
from crypto.tls import TlsConfig, TlsRole
from proxy.limits import HALF_OPEN_PER_ADDRESS_MAX
from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.attacks.rogue import Control, Gone
from tests.attacks.strangers import House, config
from tests.chaos.load import KIB, MIB, Talk, eventually
from tests.chaos.relays import standing

STRANGERS = 1500  # in all, while sessions run
KINDS = 5  # by turns
SESSIONS_MIN = 2
AT_ONCE = 120  # above what one address may have half-open
SIZE = 48 * MIB
SLOWDOWN_MAX = 30.0  # the strangers' own work shares this machine's cores: it is 3 to 6 of it
STRANGER_SECONDS_MAX = 2.0  # then it goes by itself, to make room for the next
RSS_GROWTH_KIB_MAX = 64 * KIB
DESCRIPTORS_SLACK = 16  # the session's own, and those just being closed

Manner = Callable[[socket.socket], Awaitable[None]]


class Flood:
    """Strangers, each with its manner, until told to end."""

    def __init__(self, port: int, *contexts: TlsConfig) -> None:
        self._port, self._contexts = port, contexts
        self._dice = random.Random(1)
        self._turns = asyncio.Semaphore(AT_ONCE)
        self.came = 0
        self.judged = 0
        """Those whose certificate the relay had to look at."""

    async def run(self) -> None:
        """All of them, some at a time."""
        manners: list[Manner] = [self._silent, self._garbling, self._half_way, self._token, self._genuine]
        async with asyncio.TaskGroup() as group:
            for number in range(STRANGERS):
                await self._turns.acquire()
                group.create_task(self._one(manners[number % KINDS]))

    async def _one(self, manner: Manner) -> None:
        try:
            with socket.socket() as sock:
                sock.setblocking(False)
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
    task = asyncio.ensure_future(flood.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@on_uvloop
async def test_a_session_goes_on_beside_a_flood(hosts: Hosts, tmp_path: Path, client_tls: TlsConfig) -> None:
    loop = asyncio.get_running_loop()
    stranger = config(House(tmp_path / "other").issue("mallory"), TlsRole.CLIENT)
    async with standing(hosts, tmp_path) as pair:
        await pair.session(Talk(1, SIZE, 0))
        began = loop.time()
        ends, codes = await pair.session(Talk(2, SIZE, MIB))
        alone = loop.time() - began
        before = pair.receive.usage
        peak = 0

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, pair.receive.usage.descriptors)
                await asyncio.sleep(0.02)

        flood = Flood(pair.proxy.target[1], client_tls, stranger)
        async with flooding(flood) as flowing:
            watching = asyncio.ensure_future(watch())
            await eventually(lambda: flood.came >= AT_ONCE // 2)
            # A session that began before or amid them, and new ones while they last.
            sessions = 0
            while sessions < SESSIONS_MIN or not flowing.done():
                began = loop.time()
                ends, codes = await pair.session(Talk(10 + sessions, SIZE, MIB))
                elapsed = loop.time() - began
                assert codes == (0, 0), pair.send.lines
                assert ends[0].whole
                assert elapsed < SLOWDOWN_MAX * max(alone, 0.1), f"{elapsed:.2f} s, alone {alone:.2f} s"
                sessions += 1
            await flowing
            watching.cancel()
        assert flood.came == STRANGERS
        assert flood.judged == STRANGERS // KINDS
        assert sessions >= SESSIONS_MIN
        assert peak <= before.descriptors + HALF_OPEN_PER_ADDRESS_MAX + DESCRIPTORS_SLACK
        await pair.receive.level(before)
        assert pair.receive.usage.rss_kib - before.rss_kib < RSS_GROWTH_KIB_MAX
        assert pair.receive.process.returncode is None

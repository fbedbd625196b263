"""A TCP proxy between two relays that behaves as badly as a network can, on orders and from a seed.

    async with ChaosProxy(("127.0.0.1", port), seed=7, plan=lane_resets(at=3 * MIB)) as proxy:
        ...                                     the source's relay is told proxy.port
        proxy.blackout(2.0, silence=True)
        print(proxy.did)

Faults come in two ways. A plan says, for each connection when it is made, what shall happen to its bytes in each
direction: at offsets, which a seed and a plan reproduce exactly, or as weather (splits, delays, a rate). Orders
(`reset`, `stall`, `flip`, ...) hit connections at the moment they are given. proxy_process.py has it in a process of
its own.
"""

import asyncio
import random
import socket
import struct
from collections import deque
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from typing import Any, Final, Self

from tests.attacks.wire import Kind, Way
from tests.chaos.faults import CALM, Chooser, Did, Link, Plan, calm

KIB: Final = 1024
MIB: Final = 1024 * KIB
READ_BYTES: Final = 256 * KIB
DELAYED_BYTES_MAX: Final = 8 * MIB  # what a delayed direction holds before its sender has to wait
RATE_PORTIONS: Final = 50  # a second: how finely a rate is kept
CONNECT_SECONDS_MAX: Final = 10.0
BACKLOG: Final = 512
RESUME_MAGIC: Final = b"KRS1"
LINGER_RESET: Final = struct.pack("ii", 1, 0)


class _Reset(Exception):
    """A plan says that this connection ends here."""


class ChaosProxy:
    """Listens on a port of its own and carries every connection to the target.

    Args:
        target: where the destination's relay listens; may be set later, before the first connection.
        seed: of every choice that is left to chance.
        plan: what happens to each connection.
        host: the address to listen on.
    """

    def __init__(
        self,
        target: tuple[str, int] = ("127.0.0.1", 0),
        *,
        seed: int = 0,
        plan: Chooser = calm,
        host: str = "127.0.0.1",
    ) -> None:
        self.target, self.plan, self.host = target, plan, host
        self.did = Did()
        self.links: list[Link] = []
        """Those that are open now."""
        self._dice = random.Random(seed)
        self._counts: dict[Kind, int] = {}
        # Bound and never listening: the port stays ours, and refuses, while no listener has it.
        self._holder = _bound(host, 0)
        self.port: int = self._holder.getsockname()[1]
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._timers = 0
        self._timer_done = asyncio.Event()
        self._closed = False
        self._lit = asyncio.Event()
        self._lit.set()

    async def __aenter__(self) -> Self:
        """Begin to listen."""
        self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        """End everything."""
        self._closed = True
        await self._close_listener()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._holder.close()

    # ---- orders

    def reset(self, kind: Kind | None = None) -> int:
        """Both relays see a reset of every open connection (of one kind); how many there were."""
        struck = [link for link in self.links if kind in {None, link.kind}]
        for link in struck:
            self._sever(link)
        return len(struck)

    def shut(self, kind: Kind | None = None, ways: tuple[Way, ...] = tuple(Way)) -> None:
        """The receivers see a clean end; what still comes is dropped."""
        for link in self._open(kind):
            for way in ways:
                self._shut(link, way)

    def stall(self, kind: Kind | None = None, ways: tuple[Way, ...] = tuple(Way), *, swallow: bool = True) -> None:
        """Carry nothing more on the open connections (of one kind), until `release`."""
        for link in self._open(kind):
            for way in ways:
                self._stall(link, way, swallow=swallow)

    def stall_behind(self, kind: Kind, way: Way, size: int) -> None:
        """Carry one more piece of at least ``size`` bytes on the open connections of one kind, then nothing more."""
        for link in self._open(kind):
            link.last_piece[way] = size

    def release(self) -> None:
        """Carry on what was stalled."""
        for link in self.links:
            link.stalled.clear()
            link.freed.set()

    def flip(self, kind: Kind, way: Way) -> None:
        """One bit of what passes next."""
        for link in self._open(kind):
            link.flip_next.add(way)

    def calm(self) -> None:
        """Nothing more happens that was ordered; what `blackout` and `refuse` began ends when they said."""
        self.weather(CALM)
        for link in self.links:
            link.flip_next.clear()
        if self._lit.is_set():
            self.release()

    def weather(self, plan: Plan) -> None:
        """The plan of every connection, open or to come."""
        self.plan = lambda _: plan
        for link in self.links:
            link.plan = plan

    async def blackout(self, seconds: float, *, silence: bool) -> None:
        """For so long nothing passes and nobody connects; this returns when that has begun.

        Args:
            seconds: how long.
            silence: hold everything, new connections too, as a network does that loses every packet; otherwise reset
                what is open and refuse what comes, as a host does that restarts.
        """
        self.did.blackouts += 1
        if silence:
            self.stall(swallow=False)
            self._lit.clear()
            self._after(seconds)
        else:
            self.reset()
            await self.refuse(seconds)

    async def refuse(self, seconds: float) -> None:
        """Refuse new connections for so long, from this call's return on; those that are open go on."""
        self.did.refusals += 1
        await self._close_listener()
        self._after(seconds)

    def silence(self, ways: tuple[Way, ...] = tuple(Way)) -> None:
        """From now on nothing passes (in these directions) and nobody connects, and nobody is told: until `heal`."""
        self.did.blackouts += 1
        self.stall(ways=ways, swallow=False)
        self._lit.clear()

    async def sever(self) -> None:
        """Reset what is open and refuse what comes, until `heal`."""
        self.did.blackouts += 1
        self.reset()
        await self._close_listener()

    def heal(self) -> None:
        """The end of `silence` and `sever`: what was held goes on, and who comes is let in."""
        self._light()
        self.release()
        self._listen()

    async def calm_again(self) -> None:
        """Until what `blackout` and `refuse` began is over."""
        while self._timers:
            self._timer_done.clear()
            await self._timer_done.wait()

    def _after(self, seconds: float) -> None:
        def act() -> None:
            self._timers -= 1
            if not self._timers:  # the last one of those that overlap
                self._light()
                self._listen()
            self._timer_done.set()

        self._timers += 1
        asyncio.get_running_loop().call_later(seconds, act)

    # ---- connections

    def _open(self, kind: Kind | None) -> Iterator[Link]:
        return (link for link in self.links if kind in {None, link.kind} and not link.over)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _listen(self) -> None:
        if self._accepting is not None or self._closed:
            return
        listener = _bound(self.host, self.port)
        listener.listen(BACKLOG)
        self._accepting = self._spawn(self._accept(listener))

    async def _close_listener(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._accepting = None

    def _light(self) -> None:
        if not self._lit.is_set():
            self._lit.set()
            self.release()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                client, _ = await loop.sock_accept(listener)
                self._spawn(self._serve(client))

    async def _serve(self, client: socket.socket) -> None:
        server = socket.socket()
        link = None
        _tune(client)
        _tune(server)
        try:
            link = await self._begin(client, server)
            async with asyncio.TaskGroup() as pumps:
                for way in Way:
                    pumps.create_task(_Pump(self, link, way).run())
        except* (OSError, _Reset, TimeoutError):
            # One relay has reset its connection, or a plan says so: the other one is to see the same.
            if link is not None:
                link.over = True
        finally:
            if link is None or link.over:
                for sock in (client, server):
                    with suppress(OSError):
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            client.close()
            server.close()
            if link is not None:
                self.links.remove(link)

    async def _begin(self, client: socket.socket, server: socket.socket) -> Link:
        """Wait until the connection has said what it is, and connect onwards."""
        loop = asyncio.get_running_loop()
        await self._lit.wait()
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                await loop.sock_connect(server, self.target)
        except OSError:
            self.did.unreached += 1
            raise
        await _readable(client)
        kind = _kind_of(client)
        index = self._counts.get(kind, 0)
        self._counts[kind] = index + 1
        link = Link(self.did.links, kind, index, client, server, task=asyncio.current_task())
        self.did.links += 1
        link.plan = self.plan(link)
        self.links.append(link)
        if not self._lit.is_set():
            self._stall(link, Way.FORWARD, swallow=False)
            self._stall(link, Way.BACKWARD, swallow=False)
        return link

    def _sever(self, link: Link) -> None:
        if not link.over:
            link.over = True
            self.did.resets += 1
            if link.task is not None:
                link.task.cancel()

    def _stall(self, link: Link, way: Way, *, swallow: bool) -> None:
        self.did.stalls += 1
        link.stalled[way] = swallow
        link.freed.clear()

    def _shut(self, link: Link, way: Way) -> None:
        if way not in link.shut:
            self.did.shuts += 1
            link.shut.add(way)
            with suppress(OSError):
                link.ends(way)[1].shutdown(socket.SHUT_WR)


class _Pump:
    """Carries one direction of one connection."""

    def __init__(self, proxy: ChaosProxy, link: Link, way: Way) -> None:
        self._proxy, self._link, self._way = proxy, link, way
        self._dice = proxy._dice
        self._did = proxy.did
        self._origin, self._goal = link.ends(way)
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._offset = 0
        self._free_at = 0.0
        self._stalled_once = False
        self._late: deque[tuple[float, bytes]] | None = None
        """What waits for its time, where this direction has ever been delayed."""
        self._late_bytes = 0
        self._moved = asyncio.Event()
        self._ended = False

    async def run(self) -> None:
        """Carry until the end, which is passed on."""
        async with asyncio.TaskGroup() as self._group:
            await self._carry()
            self._ended = True
            self._moved.set()
        if self._way not in self._link.shut:
            self._goal.shutdown(socket.SHUT_WR)

    async def _carry(self) -> None:
        loop = asyncio.get_running_loop()
        link, way = self._link, self._way
        while True:
            while link.stalled.get(way) is False:
                await link.freed.wait()
            self._strike()
            if link.stalled.get(way) is False:
                continue
            count = await loop.sock_recv_into(self._origin, self._buffer[: self._room()])
            if not count:
                while way in link.stalled:  # an end, too, does not arrive
                    await link.freed.wait()
                return
            while link.stalled.get(way) is False:  # stalled while we waited: this, too, is late and not lost
                await link.freed.wait()
            piece = self._buffer[:count]
            if way in link.shut or link.stalled.get(way):
                self._did.swallowed_bytes += count
            else:
                self._flip(piece)
                await self._pass_on(piece)
            if count >= link.last_piece.get(way, count + 1):
                del link.last_piece[way]
                self._proxy._stall(link, way, swallow=False)
            self._offset += count
            link.carried[way] = self._offset

    def _strike(self) -> None:
        """What the plan has for this offset."""
        faults = self._link.plan.of(self._way)
        if faults.reset_at == self._offset:
            self._did.resets += 1
            raise _Reset
        if faults.shut_at == self._offset:
            self._proxy._shut(self._link, self._way)
        if faults.stall_at == self._offset and not self._stalled_once:
            self._stalled_once = True
            self._proxy._stall(self._link, self._way, swallow=faults.swallow)

    def _room(self) -> int:
        """How much may be read, so that a piece ends where the plan has something to do."""
        faults = self._link.plan.of(self._way)
        points = (faults.flip_at, faults.stall_at, faults.reset_at, faults.shut_at)
        ahead = [point - self._offset for point in points if point is not None and point > self._offset]
        return min(READ_BYTES, *ahead) if ahead else READ_BYTES

    def _flip(self, piece: memoryview) -> None:
        faults = self._link.plan.of(self._way)
        if faults.flip_at == self._offset:
            self._turn(piece, 0)
        if self._way in self._link.flip_next:
            self._link.flip_next.discard(self._way)
            self._turn(piece, self._dice.randrange(len(piece)))
        if faults.flip_odds and self._dice.random() < faults.flip_odds:
            self._turn(piece, self._dice.randrange(len(piece)))

    def _turn(self, piece: memoryview, at: int) -> None:
        piece[at] ^= 1 << self._dice.randrange(8)
        self._did.flips += 1

    async def _pass_on(self, piece: memoryview) -> None:
        faults = self._link.plan.of(self._way)
        if self._late is None and not faults.delay_seconds:
            await self._send(piece)
            return
        if self._late is None:
            self._late = deque()
            self._group.create_task(self._deliver())
        due = asyncio.get_running_loop().time() + faults.delay_seconds
        due += faults.jitter_seconds * self._dice.random()
        if self._late:
            due = max(due, self._late[-1][0])
        self._late.append((due, bytes(piece)))
        self._late_bytes += len(piece)
        self._moved.set()
        while self._late_bytes > DELAYED_BYTES_MAX:
            self._moved.clear()
            await self._moved.wait()

    async def _deliver(self) -> None:
        """Send what was delayed, when its time has come."""
        assert self._late is not None
        loop = asyncio.get_running_loop()
        while self._late or not self._ended:
            if not self._late:
                self._moved.clear()
                await self._moved.wait()
                continue
            due, data = self._late[0]
            await asyncio.sleep(max(0.0, due - loop.time()))
            await self._send(memoryview(data))
            self._late.popleft()
            self._late_bytes -= len(data)
            self._moved.set()

    async def _send(self, data: memoryview) -> None:
        loop = asyncio.get_running_loop()
        while data:
            faults = self._link.plan.of(self._way)
            size = len(data)
            if faults.split_bytes:
                size = min(size, self._dice.randint(1, faults.split_bytes))
                self._did.splits += 1
            if faults.bytes_per_second:
                size = min(size, max(1, int(faults.bytes_per_second / RATE_PORTIONS)))
                now = loop.time()
                await asyncio.sleep(max(0.0, self._free_at - now))
                self._free_at = max(now, self._free_at) + size / faults.bytes_per_second
            await loop.sock_sendall(self._goal, data[:size])
            data = data[size:]
            if self._way is Way.FORWARD:
                self._did.forward_bytes += size
            else:
                self._did.backward_bytes += size


def _bound(host: str, port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.setblocking(False)
    return sock


def _tune(sock: socket.socket) -> None:
    """Non-blocking, no Nagle, and no pacing by timer: both ends are on this machine."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


async def _readable(sock: socket.socket) -> None:
    """Until something has come, or the end."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, tell)
    try:
        await ready
    finally:
        loop.remove_reader(sock)


def _kind_of(sock: socket.socket) -> Kind:
    """By its first bytes; a control connection that resumes a session says so before it speaks TLS."""
    first = sock.recv(len(RESUME_MAGIC), socket.MSG_PEEK)
    if first == RESUME_MAGIC:
        return Kind.CONTROL
    return Kind.of(first) if first else Kind.OTHER

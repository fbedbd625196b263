"""An active man in the middle between two relays: every unit of the wire passes his hands.

An attack is a callable that is shown each unit and answers with what to do instead of forwarding it: bytes to send on,
`Cut` the connection, or `Stall` it. Attacks keep their own state; an attack that returns the unit's own data alone
changes nothing.
"""

import asyncio
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from tests.attacks.wire import Kind, Splitter, Unit, Way


@dataclass(frozen=True, slots=True)
class Cut:
    """Close the unit's connection towards both relays, by FIN or by RST; or every connection there is."""

    reset: bool = False
    everything: bool = False


@dataclass(frozen=True, slots=True)
class Stall:
    """Forward nothing more in this way of this connection; or nothing at all any more. What comes is swallowed."""

    everything: bool = False


Action = bytes | Cut | Stall
Attack = Callable[[Unit], Iterable[Action]]


def let_pass(unit: Unit) -> Iterable[Action]:
    """No attack."""
    return (unit.data,)


class _Wire:
    """One connection through the attacker: towards the source's relay, and towards the destination's."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.task = asyncio.current_task()
        self.cut = False
        self.stalled: set[Way] = set()

    def ends(self, way: Way) -> tuple[socket.socket, socket.socket]:
        """Where units of one way come from and go to."""
        return (self.client, self.server) if way is Way.FORWARD else (self.server, self.client)

    def sever(self, *, reset: bool) -> None:
        """End it towards both relays."""
        self.cut = True
        for sock in (self.client, self.server):
            with suppress(OSError):
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    sock.shutdown(socket.SHUT_WR)  # the pumps go on and swallow: unread bytes would make it a reset
        if reset and self.task is not None:
            self.task.cancel()  # which closes both

    def close(self) -> None:
        """Close both sockets."""
        self.client.close()
        self.server.close()


class Mitm:
    """Listens on a port of its own and forwards to a destination's relay.

    Args:
        target: where that relay listens.
        attack: decides over each unit.
    """

    def __init__(self, target: tuple[str, int], attack: Attack = let_pass) -> None:
        self.target, self._attack = target, attack
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.setblocking(False)
        self._wires: list[_Wire] = []
        self._lanes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.port: int = self._listener.getsockname()[1]
        self.seen: list[Unit] = []
        """Every unit as it came from its sender, in the order of arrival."""

    async def __aenter__(self) -> Self:
        """Begin to listen."""
        self._spawn(self._accept())
        return self

    async def __aexit__(self, *_: object) -> None:
        """End everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        self._tasks.add(asyncio.get_running_loop().create_task(work))

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(self._listener)
            self._spawn(self._serve(client))

    async def _serve(self, client: socket.socket) -> None:
        server = socket.socket()
        wire = _Wire(client, server)
        self._wires.append(wire)
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await self._forward(wire)
        except OSError:
            wire.sever(reset=True)
        finally:
            wire.close()

    async def _forward(self, wire: _Wire) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(wire.server, self.target)
        data = await loop.sock_recv(wire.client, 65536)
        if not data:
            return
        kind = Kind.of(data)
        lane = -1
        if kind is Kind.LANE:
            lane, self._lanes = self._lanes, self._lanes + 1
        await asyncio.gather(
            self._pump(wire, Splitter(kind, Way.FORWARD, lane), Way.FORWARD, data),
            self._pump(wire, Splitter(kind, Way.BACKWARD, lane), Way.BACKWARD, b""),
        )

    async def _pump(self, wire: _Wire, splitter: Splitter, way: Way, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        origin, goal = wire.ends(way)
        try:
            data = data or await loop.sock_recv(origin, 65536)
            while data:
                for unit in splitter.feed(data):
                    self.seen.append(unit)
                    for action in self._attack(unit):
                        await self._act(wire, way, goal, action)
                data = await loop.sock_recv(origin, 65536)
            if not wire.cut and way not in wire.stalled:
                if rest := splitter.rest():
                    await loop.sock_sendall(goal, rest)
                goal.shutdown(socket.SHUT_WR)
        except OSError:
            # One relay has reset its connection: the other one is to see the same.
            if not wire.cut and way not in wire.stalled:
                wire.sever(reset=True)

    async def _act(self, wire: _Wire, way: Way, goal: socket.socket, action: Action) -> None:
        match action:
            case Cut(reset, everything):
                for one in self._wires if everything else [wire]:
                    one.sever(reset=reset)
            case Stall(everything):
                if everything:
                    for one in self._wires:
                        one.stalled |= {Way.FORWARD, Way.BACKWARD}
                wire.stalled.add(way)
            case _ if not wire.cut and way not in wire.stalled:
                await asyncio.get_running_loop().sock_sendall(goal, action)

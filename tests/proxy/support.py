"""A pair of relays in one process, on real sockets, with the test standing where the hypervisors stand.

Everything runs on uvloop, as it does in the field. Nothing here sleeps to wait for something.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from crypto.keys import Suite
from crypto.tls import TlsConfig
from proxy.attestation import Platform
from proxy.authority import Authority
from proxy.endpoints.base import Egress, Ingress
from proxy.endpoints.sockets import TcpEgress, TcpIngress, UnixEgress, UnixIngress, listen_tcp
from proxy.paging import Encode, PagingTerms
from proxy.preflight import Surveyor
from proxy.report import SessionReport
from proxy.shell.destination import Destination, DestinationRunner, Terms
from proxy.shell.source import Peer, Source, SourceRunner
from proxy.witness import Notary

T = TypeVar("T")

SECONDS_MAX = 30.0  # no step of these tests takes longer, whatever else the machine does
READ_BYTES = 256 * 1024
LISTEN_BACKLOG = 128
OPAQUE = PagingTerms(encode=Encode.OPAQUE)


def run(work: Coroutine[Any, Any, T], seconds: float = SECONDS_MAX) -> T:
    """Run a coroutine to its end on a uvloop of its own."""

    async def bounded() -> T:
        async with asyncio.timeout(seconds):
            return await work

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


async def together(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """Run all at once and return their results; the first to fail ends the others before its error is raised."""
    tasks: list[asyncio.Task[Any]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks += [group.create_task(part) for part in work]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def until(condition: Callable[[], object]) -> None:
    """Look again and again, for what tells nobody when it happens."""
    while not condition():  # noqa: ASYNC110 - see above
        await asyncio.sleep(0.001)


class Wire:
    """One hypervisor's end of one channel: a non-blocking socket with the few calls that tests need."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def receive(self, bytes_max: int = READ_BYTES) -> bytes:
        """What has arrived; b"" at the clean end. Raises ConnectionResetError."""
        return await self._loop.sock_recv(self.sock, bytes_max)

    async def exactly(self, count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            piece = await self.receive(count - len(got))
            if not piece:
                raise EOFError(f"the stream ended after {len(got)} of {count} bytes")
            got += piece
        return bytes(got)

    async def to_end(self) -> bytes:
        got = bytearray()
        while piece := await self.receive():
            got += piece
        return bytes(got)

    async def broken(self) -> bool:
        """Read to the end of it: whether that was a reset and no clean end."""
        try:
            while await self.receive():
                pass
        except ConnectionResetError:
            return True
        return False

    async def refused(self) -> None:
        """Write until that fails: an end that has been half-closed to us shows a reset only so."""
        with suppress(ConnectionResetError, BrokenPipeError):
            while True:
                await self.send(bytes(4096))
                await asyncio.sleep(0)

    def shut(self) -> None:
        """Half-close."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Close with a reset (TCP)."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()


class Hypervisors:
    """The sockets of the two hypervisors: where the migrating one connects to, where the receiving one listens."""

    def __init__(self, ingress: Ingress, egress: Egress, listener: socket.socket, dial: Callable[[], Any]) -> None:
        self.ingress, self.egress = ingress, egress
        self._listener, self._dial = listener, dial
        self._open: list[Wire] = []

    @property
    def listener(self) -> socket.socket:
        return self._listener

    async def connect(self) -> Wire:
        """The source's hypervisor connects once more."""
        family, address = self._dial()
        wire = Wire(socket.socket(family, socket.SOCK_STREAM))
        self._open.append(wire)
        await asyncio.get_running_loop().sock_connect(wire.sock, address)
        return wire

    async def accept(self) -> Wire:
        """The destination's hypervisor takes a connection."""
        sock, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        wire = Wire(sock)
        self._open.append(wire)
        return wire

    async def channel(self) -> tuple[Wire, Wire]:
        """Both ends of the next channel."""
        near = await self.connect()
        return near, await self.accept()

    def close(self) -> None:
        for wire in self._open:
            wire.close()
        self._listener.close()


class Middle:
    """A network between the relays that can fall silent or be cut, and counts what it carries."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.target = 0
        self.silent = False
        self.refuses = False
        self.lanes_wait = 0.0
        """Seconds before a lane's first bytes go on."""
        self.links: list[tuple[socket.socket, socket.socket]] = []
        self.began: list[bytes] = []
        """The first bytes of each connection: of a lane, or of control."""
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, target: int) -> None:
        self.target = target
        self._tasks.append(asyncio.create_task(self._accept()))

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            near, _ = await loop.sock_accept(self._listener)
            if self.refuses:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.target))
            for sock in (near, far):
                sock.setblocking(False)
            self.links.append((near, far))
            self.began.append(b"")
            which = len(self.links) - 1
            self._tasks += [asyncio.create_task(self._carry(*pair, which)) for pair in ((near, far), (far, near))]

    async def _carry(self, origin: socket.socket, target: socket.socket, which: int) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            while data := await loop.sock_recv(origin, 65_536):
                if origin is self.links[which][0] and not self.began[which]:
                    self.began[which] = data[:4]
                    await asyncio.sleep(self.lanes_wait if data[:4] == b"KRL1" else 0)
                if not self.silent:
                    await loop.sock_sendall(target, data)
            target.shutdown(socket.SHUT_WR)

    def living(self, *, lanes: bool) -> list[int]:
        """The lanes, or the control connections, that have not been cut."""
        return [
            number
            for number, (near, _) in enumerate(self.links)
            if near.fileno() >= 0 and self.began[number] and (self.began[number] == b"KRL1") == lanes
        ]

    async def cut(self, which: int, *, reset: bool) -> None:
        """End one of the connections towards both relays: 0 is control, then come the lanes."""
        if not reset:
            for sock in self.links[which]:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
            return
        carrying = self._tasks[1 + 2 * which : 3 + 2 * which]
        for task in carrying:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)
        for sock in self.links[which]:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for sock in (self._listener, *(sock for pair in self.links for sock in pair)):
            sock.close()


def over_tcp() -> Hypervisors:
    listener = socket.create_server(("127.0.0.1", 0), backlog=LISTEN_BACKLOG)
    listener.setblocking(False)
    port = listener.getsockname()[1]
    ingress = TcpIngress("127.0.0.1", 0, "tcp:127.0.0.1:0")
    egress = TcpEgress("127.0.0.1", port, f"tcp:127.0.0.1:{port}")
    return Hypervisors(
        ingress, egress, listener, lambda: (socket.AF_INET, ("127.0.0.1", int(ingress.label.rpartition(":")[2])))
    )


def over_unix(folder: Path) -> Hypervisors:
    here, there = str(folder / "in.sock"), str(folder / "out.sock")
    Path(there).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(there)
    listener.listen(LISTEN_BACKLOG)
    listener.setblocking(False)
    ingress, egress = UnixIngress(here, f"unix:{here}"), UnixEgress(there, f"unix:{there}")
    return Hypervisors(ingress, egress, listener, lambda: (socket.AF_UNIX, here))


@dataclass
class Ended:
    """How one side's session ended."""

    report: SessionReport
    error: Exception | None = None


@dataclass
class Pair:
    """Two relays: what the test may look at while a session runs, and how it ended on either side."""

    source: Source
    destination: Destination
    port: int
    source_ended: asyncio.Future[Ended]
    destination_ended: asyncio.Future[Ended]
    arriving: list[DestinationRunner] = field(default_factory=list)
    refused: list[Exception] = field(default_factory=list)

    @property
    def departing(self) -> SourceRunner:
        """The source's open session."""
        assert self.source.current is not None
        return self.source.current

    async def channel(self, hypervisors: Hypervisors) -> tuple[Wire, Wire]:
        """Both ends of the next channel; an error where the session has ended instead of opening it."""
        return await self.unless_ended(hypervisors.channel())

    async def unless_ended(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for something that will not come about any more where the session has ended."""
        opening = asyncio.ensure_future(work)
        await asyncio.wait({opening, self.source_ended}, return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():
            opening.cancel()
            raise AssertionError(f"the session ended early: {self.source_ended.result().error!r}")
        return opening.result()

    async def ended(self) -> tuple[Ended, Ended]:
        """Both sides' ends."""
        return await self.source_ended, await self.destination_ended

    async def ended_well(self) -> tuple[SessionReport, SessionReport]:
        """Both reports of a session that must not have failed on either side."""
        source, destination = await self.ended()
        if source.error is not None:
            raise source.error
        if destination.error is not None:
            raise destination.error
        return source.report, destination.report


@asynccontextmanager
async def relays(
    client: TlsConfig,
    server: TlsConfig,
    ingress: Ingress,
    egress: Egress,
    *,
    suites: tuple[Suite, ...] = (Suite.AES_256_GCM, Suite.CHACHA20_POLY1305),
    peer_port: int | None = None,
    xl_flags: str = "",
    resume_seconds: int = 0,
    lanes: int = 1,
    paging: tuple[PagingTerms, PagingTerms] = (OPAQUE, OPAQUE),
    authorities: tuple[Authority | None, Authority | None] = (None, None),
    notaries: tuple[Notary | None, Notary | None] = (None, None),
    surveyors: tuple[Surveyor | None, Surveyor | None] = (None, None),
    platforms: tuple[Platform | None, Platform | None] = (None, None),
) -> AsyncIterator[Pair]:
    """A source and a destination for one session; `peer_port` puts something else between them.

    Bytes go as they are unless `paging` (the source's, the destination's) says otherwise, and whoever has authenticated
    may do everything unless `authorities` do. A loss is final unless
    `resume_seconds` says otherwise: most tests of failures are about what then becomes of it.
    """
    loop = asyncio.get_running_loop()
    listener = listen_tcp("127.0.0.1", 0, "127.0.0.1:0")
    port = listener.getsockname()[1]
    destination_ended: asyncio.Future[Ended] = loop.create_future()

    async def begin(runner: DestinationRunner) -> None:
        pair.arriving.append(runner)
        ended = Ended(runner.report)
        try:
            await runner.run()
        except Exception as error:  # noqa: BLE001 - whatever it is, the test will look at it
            ended.error = error
        if not destination_ended.done():
            destination_ended.set_result(ended)

    async def depart() -> Ended:
        report = pair.source.new_report()
        ended = Ended(report)
        try:
            await pair.source.session(await ingress.accept(), report)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test will look at it
            ended.error = error
        return ended

    def refused(error: Exception) -> None:
        pair.refused.append(error)

    destination = Destination(
        server,
        {"default": egress},
        listener,
        terms=Terms(
            resume_seconds=resume_seconds,
            lanes=lanes,
            paging=paging[1],
            authority=authorities[1],
            notary=notaries[1],
            surveyor=surveyors[1],
            platform=platforms[1],
        ),
        begin=begin,
        failed=refused,
    )
    where = Peer(
        "127.0.0.1",
        port if peer_port is None else peer_port,
        suites=suites,
        xl_flags=xl_flags,
        resume_seconds=resume_seconds,
        lanes=lanes,
        paging=paging[0],
        surveyor=surveyors[0],
        platform=platforms[0],
    )
    await ingress.open()
    serving = loop.create_task(destination.serve())
    pair = Pair(
        Source(client, where, ingress, authority=authorities[0], notary=notaries[0]),
        destination,
        port,
        loop.create_future(),
        destination_ended,
    )
    departing = loop.create_task(depart())
    pair.source_ended = departing
    try:
        yield pair
    finally:
        for task in (departing, serving):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        destination_ended.cancel()
        listener.close()
        await ingress.close()

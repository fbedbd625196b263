"""Relay pairs to attack, in this process through the very classes the commands use, and the hypervisors beside them.

    stub source hypervisor -> Source -> Mitm -> Destination -> stub destination hypervisor

`on_uvloop` makes a test of a coroutine on the loop the commands run on. `shorten` lowers limits wherever their names
are bound, so that what takes 15 s outside takes a fraction of one here.
"""

import asyncio
import functools
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, ParamSpec, Self

import pytest
import uvloop

from crypto.tls import TlsConfig
from proxy.endpoints.base import Egress
from proxy.endpoints.sockets import TcpEgress, TcpIngress, listen_tcp
from proxy.errors import exit_code_of
from proxy.shell.destination import Destination, DestinationRunner, Terms
from proxy.shell.source import Peer, Source
from tests.attacks.mitm import Attack, Mitm, let_pass
from tests.attacks.wire import Unit

BOUND_SECONDS = 20.0  # no session of these tests may take longer, however it is attacked

P = ParamSpec("P")
Script = tuple[tuple[bytes, bytes], ...]
"""Rounds of a conversation: what the source's hypervisor says, what the destination's answers."""


def on_uvloop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a coroutine test on uvloop, as the commands do."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(test(*args, **kwargs))

    return run


def shorten(monkeypatch: pytest.MonkeyPatch, **limits: float) -> None:
    """Lower limits of proxy.limits in every module of the relay that has imported them."""
    for module in [module for name, module in sys.modules.items() if name.startswith("proxy.")]:
        for name, value in limits.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


def noise(size: int, seed: int) -> bytes:
    """Bytes that compress to nothing and look like no known stream."""
    return Random(seed).randbytes(size)


def conversation(rounds: int = 3, size: int = 700) -> Script:
    """A few small messages each way, each waiting for the one before."""
    return tuple((noise(size, 2 * i), noise(size // 2, 2 * i + 1)) for i in range(rounds))


CONVERSATION = conversation()


def bulk(size: int) -> Script:
    """One long stream forward, one byte of answer."""
    return ((noise(size, 77), b"!"),)


class Side:
    """What one hypervisor got, and how that ended: "eof", "reset", or None while it has not."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.ended: str | None = None
        self._moved = asyncio.Event()

    def take(self, data: bytes) -> None:
        """More has come."""
        self.received += data
        self._moved.set()

    def end(self, how: str) -> None:
        """Nothing more will."""
        self.ended = how
        self._moved.set()

    async def told(self) -> None:
        """Until it has ended."""
        while self.ended is None:
            self._moved.clear()
            await self._moved.wait()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until something that depends on this side holds."""
        while not condition():
            self._moved.clear()
            await self._moved.wait()


@dataclass(slots=True)
class Outcome:
    """How a session ended at each place. A code of None: that end noticed no session and no failed peer."""

    script: Script
    here: Side
    there: list[Side]
    source: int | None = None
    destination: int | None = None
    source_error: BaseException | None = None
    destination_error: BaseException | None = None
    seen: list[Unit] = field(default_factory=list)

    @property
    def codes(self) -> tuple[int | None, int | None]:
        """Both ends' exit codes, the source's first."""
        return self.source, self.destination

    @property
    def forward(self) -> bytes:
        """The true stream to the destination."""
        return b"".join(say for say, _ in self.script)

    @property
    def backward(self) -> bytes:
        """The true stream to the source."""
        return b"".join(answer for _, answer in self.script)

    def __str__(self) -> str:
        there = [(len(side.received), side.ended) for side in self.there]
        return (
            f"codes {self.codes}; here {len(self.here.received)} of {len(self.backward)} {self.here.ended}; "
            f"there {there} of {len(self.forward)}; {self.source_error!r}; {self.destination_error!r}"
        )

    def check_safe(self) -> None:
        """What holds whatever the attack: only true bytes arrive, only a whole stream ends cleanly, all are told."""
        assert len(self.there) <= 1, self
        for side, stream in ((self.here, self.backward), *((side, self.forward) for side in self.there)):
            assert stream.startswith(side.received), f"other bytes than were sent: {self}"
            assert side.ended in {"eof", "reset"}, f"a hypervisor was not told: {self}"
            if side.ended == "eof":
                assert side.received == stream, f"a cut stream ended cleanly: {self}"
        if self.source == 0:
            self.check_exact()

    def check_exact(self) -> None:
        """Both streams are whole."""
        assert self.here.ended == "eof", self
        assert self.here.received == self.backward, self
        assert [(bytes(side.received), side.ended) for side in self.there] == [(self.forward, "eof")], self


async def talk(sock: socket.socket, side: Side, turns: list[tuple[bytes, int]]) -> None:
    """A hypervisor's part of a conversation: say, and hear so many bytes; then half-close and hear the end."""
    loop = asyncio.get_running_loop()
    target = 0
    try:
        for say, hear in turns:
            if say:
                await loop.sock_sendall(sock, say)
            target += hear
            while len(side.received) < target:
                data = await loop.sock_recv(sock, 1 << 20)
                if not data:
                    side.end("eof")
                    return
                side.take(data)
        sock.shutdown(socket.SHUT_WR)
        while data := await loop.sock_recv(sock, 1 << 20):
            side.take(data)
        side.end("eof")
    except OSError:
        side.end("reset")


class StubHypervisor:
    """The destination's hypervisor: serves its part of the script on a port, and remembers what it got.

    Args:
        script: the conversation; without one it hears until the end.
        reads: whether it reads at all.
    """

    def __init__(self, script: Script | None = None, *, reads: bool = True) -> None:
        self._reads = reads
        self._turns = [(b"", len(script[0][0])), *_answers(script)] if script else [(b"", sys.maxsize)]
        self._listener = socket.create_server(("127.0.0.1", 0))
        if not reads:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self._listener.setblocking(False)
        self._tasks: set[asyncio.Task[None]] = set()
        self.port: int = self._listener.getsockname()[1]
        self.sides: list[Side] = []

    async def __aenter__(self) -> Self:
        """Begin to listen."""
        self._tasks.add(asyncio.get_running_loop().create_task(self._accept()))
        return self

    async def __aexit__(self, *_: object) -> None:
        """End everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()

    async def settled(self) -> None:
        """Until every connection so far has ended."""
        for side in self.sides:
            await side.told()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._listener)
            sock.setblocking(False)
            side = Side()
            self.sides.append(side)
            self._tasks.add(loop.create_task(self._serve(sock, side)))

    async def _serve(self, sock: socket.socket, side: Side) -> None:
        with sock:
            if not self._reads:
                await asyncio.Event().wait()
            await talk(sock, side, self._turns)


def _answers(script: Script) -> list[tuple[bytes, int]]:
    following = [len(say) for say, _ in script[1:]]
    return [(answer, hear) for (_, answer), hear in zip(script, [*following, 0], strict=True)]


class Receiver:
    """The destination's relay."""

    def __init__(self, tls: TlsConfig, egress: Egress, *, terms: Terms | None = None) -> None:
        self._listener = listen_tcp("127.0.0.1", 0, "--listen")
        self.destination = Destination(
            tls,
            {"default": egress},
            self._listener,
            terms=terms or Terms(resume_seconds=0),
            begin=self._begin,
            failed=self._failed,
        )
        self._task: asyncio.Task[None] | None = None
        self._verdict, self._news = asyncio.Event(), asyncio.Event()
        self.port: int = self._listener.getsockname()[1]
        self.codes: list[int] = []
        """One for each session that ended and each peer that was not let in."""
        self.errors: list[BaseException | None] = []
        self.sessions = 0
        self.runners: list[DestinationRunner] = []

    async def __aenter__(self) -> Self:
        """Begin to serve."""
        self._task = asyncio.get_running_loop().create_task(self.destination.serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        """End everything."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._listener.close()

    async def news(self) -> None:
        """Until one more session has ended or one more peer was not let in."""
        self._news.clear()
        await self._news.wait()

    async def verdict(self, seconds: float) -> int | None:
        """The first code, or None if there is none within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._verdict.wait()
        except TimeoutError:
            return None
        return self.codes[0]

    async def _begin(self, runner: DestinationRunner) -> None:
        self.sessions += 1
        self.runners.append(runner)
        await self._conclude(runner.run())

    def _failed(self, error: Exception) -> None:
        self._note(error)

    async def _conclude(self, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the outcome
            self._note(error)
        else:
            self._note(None)

    def _note(self, error: BaseException | None) -> None:
        self.codes.append(0 if error is None else exit_code_of(error))
        self.errors.append(error)
        self._verdict.set()
        self._news.set()


@dataclass(frozen=True, slots=True)
class Identities:
    """Contexts of a source's and a destination's identity."""

    source: TlsConfig
    destination: TlsConfig


@asynccontextmanager
async def sender(tls: TlsConfig, where: Peer) -> AsyncIterator[tuple[Source, TcpIngress]]:
    """The source's relay, listening for its hypervisor."""
    ingress = TcpIngress("127.0.0.1", 0, "tcp:127.0.0.1:0")
    await ingress.open()
    try:
        yield Source(tls, where, ingress), ingress
    finally:
        await ingress.close()


async def send(
    tls: TlsConfig, where: Peer, script: Script, here: Side | None = None
) -> tuple[int, BaseException | None, Side]:
    """One session of a source's relay and its hypervisor: exit code, error, what the hypervisor got."""
    loop = asyncio.get_running_loop()
    here = here or Side()
    async with sender(tls, where) as (source, ingress):
        port = int(ingress.label.rpartition(":")[2])
        with socket.socket() as hypervisor:
            hypervisor.setblocking(False)
            await loop.sock_connect(hypervisor, ("127.0.0.1", port))
            talking = loop.create_task(talk(hypervisor, here, [(say, len(answer)) for say, answer in script]))
            error: BaseException | None = None
            try:
                await source.session(await ingress.accept(), source.new_report())
            except Exception as reason:  # noqa: BLE001 - whatever it is, it is the outcome
                error = reason
            finally:
                if error is None:
                    await talking
                else:
                    await asyncio.wait({talking}, timeout=5.0)
                    talking.cancel()
    return 0 if error is None else exit_code_of(error), error, here


async def attacked(
    identities: Identities,
    attack: Attack = let_pass,
    script: Script = CONVERSATION,
    *,
    verdict_seconds: float = 3.0,
    prepare: Callable[[Mitm], None] | None = None,
) -> Outcome:
    """One session through the attacker; ends by itself within BOUND_SECONDS or the test fails.

    `prepare` is shown the attacker before the session begins.
    """
    async with (
        asyncio.timeout(BOUND_SECONDS),
        StubHypervisor(script) as hypervisor,
        Receiver(identities.destination, TcpEgress("127.0.0.1", hypervisor.port, "tcp:egress")) as receiver,
        Mitm(("127.0.0.1", receiver.port), attack) as mitm,
    ):
        outcome = Outcome(script, Side(), hypervisor.sides, seen=mitm.seen)
        if prepare is not None:
            prepare(mitm)
        where = Peer("127.0.0.1", mitm.port, resume_seconds=0)
        outcome.source, outcome.source_error, _ = await send(identities.source, where, script, outcome.here)
        outcome.destination = await receiver.verdict(verdict_seconds)
        outcome.destination_error = receiver.errors[0] if receiver.errors else None
        await hypervisor.settled()
        assert len(receiver.codes) <= 1, receiver.codes
    return outcome


async def attacked_all(
    identities: Identities, attacks: list[Attack], script: Script = CONVERSATION, at_once: int = 6, **options: Any
) -> list[Outcome]:
    """A session under each attack, a few of them at once: most time goes into waiting."""
    turn = asyncio.Semaphore(at_once)

    async def one(attack: Attack) -> Outcome:
        async with turn:
            return await attacked(identities, attack, script, **options)

    return await asyncio.gather(*(one(attack) for attack in attacks))

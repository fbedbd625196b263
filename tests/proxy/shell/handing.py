"""Two hosts, one machine, two relays that may be killed at any moment, and the two ends of xl that talk through them.

A relay that is killed goes on for a while as a program, but nothing it does counts any more: its journal takes no line,
its hypervisor hears no command, its connections carry nothing. Then its tasks are cancelled and its locks are free, as
when a process has died. What happens when is said by moments: ``source write voted before``, ``destination start
after``, ``source xl go``; a test lets something happen at one of them.
"""

import asyncio
import errno
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from crypto.tls import TlsConfig
from proxy.endpoints.base import Connection
from proxy.endpoints.sockets import TcpEgress, TcpIngress, listen_tcp
from proxy.errors import HypervisorFailed, JournalError
from proxy.handover.record import Entry, Head, Record
from proxy.handover.table import Side, State
from proxy.handover.xl import BANNER, GO, READY, REPORT
from proxy.hypervisors.base import CopyState, Hypervisor, Vm
from proxy.shell import errand, guard, handovers, party, runner, xl_guard
from proxy.shell.contact import Contact
from proxy.shell.destination import Destination, DestinationRunner, Terms
from proxy.shell.guard import Approval
from proxy.shell.handovers import Handovers
from proxy.shell.journal import Journal, JournalFile
from proxy.shell.source import Peer, Source
from tests.proxy.support import OPAQUE, Ended, Hypervisors, Middle, Wire, over_tcp, until
from tests.standins.xen_host import UUID, guest_stream

VM = Vm("guest", UUID)
STREAM = guest_stream(VM.name, VM.uuid, pages=4)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that give real hypervisors and networks their time are of no use here."""
    for module, name, seconds in (
        (errand, "ERRAND_PAUSE_SECONDS_MIN", 0.005),
        (errand, "ERRAND_PAUSE_SECONDS_MAX", 0.02),
        (guard, "RECOVERY_SECONDS", 0.05),
        (handovers, "ERRAND_SECONDS_MAX", 0.3),
        (party, "HYPERVISOR_PAUSE_SECONDS", 0.001),
        (party, "RESUMED_SECONDS_MAX", 0.02),
        (runner, "ABORT_SECONDS_MAX", 0.1),
        (xl_guard, "HYPERVISOR_PAUSE_SECONDS", 0.001),
        (xl_guard, "_POLL_SECONDS", 0.001),
    ):
        monkeypatch.setattr(module, name, seconds)


class World:
    """Both copies of the machine, and what became of them."""

    def __init__(self) -> None:
        self.copies = {Side.SOURCE: CopyState.RUNNING, Side.DESTINATION: CopyState.ABSENT}
        self.story: list[str] = []
        self.wrong: list[str] = []
        self.at: dict[str, Callable[[], None]] = {}
        """What happens at a moment, once."""

    def moment(self, what: str) -> None:
        self.story.append(what)
        happening = self.at.pop(what, None)
        if happening is not None:
            happening()

    def put(self, side: Side, state: CopyState) -> None:
        self.copies[side] = state
        self.story.append(f"{side.value} is {state.value}")
        if self.running == 2:
            self.wrong.append(" · ".join(self.story))

    @property
    def running(self) -> int:
        return sum(state is CopyState.RUNNING for state in self.copies.values())


@dataclass
class Life:
    """One process of one relay."""

    side: Side
    world: World
    dead: bool = False
    failures: Counter[str] = field(default_factory=Counter)
    """How often what the hypervisor is asked goes wrong, by its name."""
    full: bool = False
    """Whether the journal's disk takes no more."""

    def moment(self, what: str) -> None:
        if not self.dead:
            self.world.moment(f"{self.side.value} {what}")


class Host(Hypervisor):
    """One host's hypervisor, as one relay's process asks it."""

    kind = "xl"

    def __init__(self, life: Life) -> None:
        self._life, self._world = life, life.world

    async def pin(self, vm: Vm, side: Side) -> Vm:
        return vm

    async def arriving(self, vm: Vm) -> CopyState:
        return await self._look("arriving", Side.DESTINATION)

    async def departing(self, vm: Vm) -> CopyState:
        return await self._look("departing", Side.SOURCE)

    async def take(self, vm: Vm) -> None:
        named = (CopyState.PAUSED, CopyState.RUNNING)
        await self._change("take", Side.DESTINATION, {CopyState.INCOMING: CopyState.PAUSED}, *named)

    async def start(self, vm: Vm) -> None:
        await self._change("start", Side.DESTINATION, {CopyState.PAUSED: CopyState.RUNNING}, CopyState.RUNNING)

    async def destroy(self, vm: Vm) -> None:
        gone = {CopyState.INCOMING: CopyState.ABSENT, CopyState.PAUSED: CopyState.ABSENT}
        await self._change("destroy", Side.DESTINATION, gone, CopyState.ABSENT)

    async def revive(self, vm: Vm) -> None:
        await self._change("revive", Side.SOURCE, {CopyState.SUSPENDED: CopyState.RUNNING}, CopyState.RUNNING)

    async def remove(self, vm: Vm) -> None:
        await self._change("remove", Side.SOURCE, {CopyState.SUSPENDED: CopyState.ABSENT}, CopyState.ABSENT)

    async def _asked(self, what: str) -> None:
        self._life.moment(f"{what} before")
        await asyncio.sleep(0)
        if self._life.dead:
            raise HypervisorFailed("there is nobody to ask it")
        if self._life.failures[what] > 0:
            self._life.failures[what] -= 1
            raise HypervisorFailed(f"{what}: it will not")

    async def _look(self, what: str, side: Side) -> CopyState:
        await self._asked(what)
        return self._world.copies[side]

    async def _change(self, what: str, side: Side, moves: dict[CopyState, CopyState], *wanted: CopyState) -> None:
        await self._asked(what)
        state = self._world.copies[side]
        if state in moves:
            self._world.put(side, moves[state])
        elif state not in wanted:
            raise HypervisorFailed(f"{what}: it is {state.value}")
        self._life.moment(f"{what} after")


class MortalJournal(Journal):
    """A journal that takes no line once its process is dead."""

    def __init__(self, state: Path, life: Life) -> None:
        super().__init__(state)
        self._life = life

    def begin(self, head: Head, entry: Entry) -> JournalFile:
        return self._mortal(super().begin(head, entry))

    def open(self, session: str, side: Side) -> JournalFile | None:
        file = super().open(session, side)
        return None if file is None else self._mortal(file)

    def _mortal(self, file: JournalFile) -> JournalFile:
        real, life = file.write, self._life

        def write(state: State, why: str, vm: Vm | None = None, *, settled: bool = False) -> None:
            what = "settled" if settled else state.value
            life.moment(f"write {what} before")
            if life.dead or life.full:
                raise JournalError("no line is taken", "none")
            real(state, why, vm, settled=settled)
            life.moment(f"write {what} after")
            if life.dead:
                raise JournalError("nobody is left to know of it", "none")

        file.write = write  # type: ignore[method-assign]
        return file


class MortalConnection:
    """A hypervisor's connection that hears nothing of a relay that is dead, but that it has ended."""

    def __init__(self, inner: Connection, life: Life) -> None:
        self._inner, self._life = inner, life
        self.label, self.read_fd, self.write_fd = inner.label, inner.read_fd, inner.write_fd

    def read_into(self, buffer: memoryview) -> int | None:
        self._living()
        return self._inner.read_into(buffer)

    def write(self, data: memoryview) -> int:
        self._living()
        return self._inner.write(data)

    def finish(self) -> None:
        self._inner.finish()

    async def settle(self) -> None:
        await self._inner.settle()

    async def abort(self) -> None:
        await self._inner.abort()

    def _living(self) -> None:
        if self._life.dead:
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))


class XlEgress:
    """Where the destination's xl listens."""

    single, exclusive, paused = True, False, False
    handover: Literal["", "xl"] = "xl"

    def __init__(self, inner: TcpEgress, life: Life) -> None:
        self._inner, self._life, self.label = inner, life, inner.label

    async def check(self) -> None:
        await self._inner.check()

    async def connect(self, xl_flags: str) -> MortalConnection:
        return MortalConnection(await self._inner.connect(xl_flags), self._life)


# ------------------------------------------------------------------ xl


class SourceXl:
    """``xl migrate``, from the moment that it has its channel."""

    def __init__(self, world: World, wire: Wire) -> None:
        self._world, self._wire = world, wire
        self.heard = bytearray()
        self.end = ""
        self._given = False

    async def run(self) -> None:
        try:
            await self._run()
        except (EOFError, ConnectionError):
            if self._given:
                self.end = "undefined"
            else:
                self._resume()
        finally:
            self._wire.close()

    async def _run(self) -> None:
        assert await self._hear(len(BANNER)) == BANNER
        self._world.put(Side.SOURCE, CopyState.SUSPENDED)
        await self._wire.send(STREAM)
        self._world.moment("source xl stream")
        if await self._hear(len(READY)) != READY:
            raise EOFError("unexpected data")
        self._given = True
        self._world.moment("source xl ready")
        await self._wire.send(GO)
        self._world.moment("source xl go")
        if await self._hear(len(REPORT)) != REPORT:
            raise EOFError("unexpected data")
        status = await self._hear(1)
        if status == b"\0":
            self._world.moment("source xl report")
            self._world.put(Side.SOURCE, CopyState.ABSENT)
            self.end = "gone"
        elif await self._hear(len(GO)) == GO:
            self._resume()
        else:
            raise EOFError("unexpected data")

    def _resume(self) -> None:
        if self._world.copies[Side.SOURCE] is CopyState.SUSPENDED:
            self._world.put(Side.SOURCE, CopyState.RUNNING)
        self.end = "resumed"

    async def _hear(self, count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            piece = await self._wire.receive(count - len(got))
            if not piece:
                raise EOFError
            got += piece
            self.heard += piece
        return bytes(got)


class DestinationXl:
    """``xl migrate-receive -p``: it never starts what it has received."""

    def __init__(self, world: World, wire: Wire) -> None:
        self._world, self._wire = world, wire
        self.end = ""

    async def run(self) -> None:
        world, wire = self._world, self._wire
        try:
            await wire.send(BANNER)
            await wire.exactly(1)
            world.put(Side.DESTINATION, CopyState.INCOMING)
            await wire.exactly(len(STREAM) - 1)
            await wire.send(READY)
            world.moment("destination xl ready")
            said = await wire.exactly(len(GO))
            world.moment("destination xl go")
            if said != GO or world.copies[Side.DESTINATION] is not CopyState.INCOMING:
                raise EOFError("unexpected data")
            world.put(Side.DESTINATION, CopyState.PAUSED)
            await wire.send(REPORT + b"\0")
            world.moment("destination xl reported")
            self.end = "named"
        except EOFError:
            if world.copies[Side.DESTINATION] is CopyState.INCOMING:
                world.put(Side.DESTINATION, CopyState.ABSENT)
            with suppress(OSError):
                await wire.send(REPORT + b"\1" + GO)
            self.end = "destroyed"
        except ConnectionError:
            self.end = "left"
        finally:
            wire.close()


# ------------------------------------------------------------------ relays


class Hosts:
    """Both relays on one loopback, each with its own journal; ``hosts`` makes one."""

    def __init__(
        self, folder: Path, client: TlsConfig, server: TlsConfig, *, resume_seconds: int = 0, approvals: Any = None
    ) -> None:
        self.world = World()
        self.middle = Middle()
        self.hypervisors: Hypervisors = over_tcp()
        self._folder, self.client, self.server = folder, client, server
        self._resume_seconds = resume_seconds
        self.approvals: dict[Side, list[Approval]] = approvals or {}
        self.lives: dict[Side, Life] = {}
        self.handovers: dict[Side, Handovers] = {}
        self.tasks: dict[Side, list[asyncio.Task[Any]]] = {side: [] for side in Side}
        self.ended: dict[Side, Ended] = {}
        self.arriving: list[DestinationRunner] = []
        self.departing: Source | None = None
        self.killed: set[Side] = set()
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Any] = []
        self.xl: list[asyncio.Task[None]] = []
        self.source_xl: SourceXl | None = None
        self.destination_xl: DestinationXl | None = None

    def begin(self, side: Side) -> Life:
        """A new process of a relay, on the journal that its host has."""
        life = self.lives[side] = Life(side, self.world)
        self.killed.discard(side)
        journal = MortalJournal(self._folder / side.value, life)
        self.handovers[side] = Handovers(journal, lambda kind, monitor: Host(life), self.approvals.get(side, ()))
        if side is Side.DESTINATION:
            self._listen(life)
        return life

    def _listen(self, life: Life) -> None:
        listener = listen_tcp("127.0.0.1", 0, "127.0.0.1:0")
        self._listeners.append(listener)
        port = listener.getsockname()[1]
        if self.middle.target:
            self.middle.target = port
        else:
            self.middle.start(port)
        self.middle.silent = self.middle.refuses = False
        inner = self.hypervisors.egress
        assert isinstance(inner, TcpEgress)

        async def carry(runner: DestinationRunner) -> None:
            self.arriving.append(runner)
            task = asyncio.current_task()
            assert task is not None
            self.tasks[Side.DESTINATION].append(task)
            self.ended[Side.DESTINATION] = await _outcome(runner.run(), runner.report)

        destination = Destination(
            self.server,
            {"default": XlEgress(inner, life)},
            listener,
            terms=Terms(resume_seconds=self._resume_seconds, paging=OPAQUE, handovers=self.handovers[life.side]),
            begin=carry,
            failed=lambda error: None,
        )
        self.tasks[life.side].append(self._loop.create_task(destination.serve()))

    @property
    def peer(self) -> Peer:
        return Peer(
            "127.0.0.1",
            self.middle.port,
            handover="xl",
            resume_seconds=self._resume_seconds,
            paging=OPAQUE,
            one_channel=True,
        )

    async def migrate(self) -> None:
        """Both relays begin, and xl migrates the machine through them."""
        self.begin(Side.DESTINATION)
        life = self.begin(Side.SOURCE)
        ingress = self.hypervisors.ingress
        assert isinstance(ingress, TcpIngress)
        await ingress.open()
        source = self.departing = Source(self.client, self.peer, ingress, handovers=self.handovers[Side.SOURCE])

        async def depart() -> None:
            report = source.new_report()
            first = MortalConnection(await ingress.accept(), life)
            self.ended[Side.SOURCE] = await _outcome(source.session(first, report), report)

        async def receive() -> None:
            self.destination_xl = DestinationXl(self.world, await self.hypervisors.accept())
            await self.destination_xl.run()

        self.tasks[Side.SOURCE].append(self._loop.create_task(depart()))
        self.source_xl = SourceXl(self.world, await self.hypervisors.connect())
        self.xl = [self._loop.create_task(work) for work in (self.source_xl.run(), receive())]

    # ---- what happens to them

    def kill(self, side: Side) -> None:
        """A relay's process is gone: from this moment on, whichever thread it comes in."""
        self.lives[side].dead = True
        self.middle.silent = self.middle.refuses = True
        self.killed.add(side)
        self._loop.call_soon_threadsafe(lambda: self.tasks[side].append(self._loop.create_task(self.cut())))

    async def bury(self, side: Side) -> None:
        """Take what is left of a killed relay out of the loop."""
        tasks, self.tasks[side] = self.tasks[side], []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: not self._locked(side))

    def _locked(self, side: Side) -> bool:
        folder = self._folder / side.value / "handover"
        paths = {str(path) for path in folder.glob("*.journal")}
        open_now = set()
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                open_now.add(os.readlink(f"/proc/self/fd/{number}"))
        return bool(paths & open_now)

    async def cut(self) -> None:
        """Every connection between the relays is lost."""
        self.middle.silent = True
        for number in (*self.middle.living(lanes=False), *self.middle.living(lanes=True)):
            await self.middle.cut(number, reset=True)

    def lose(self) -> None:
        """The network is gone, until ``mend``."""
        self.middle.silent = self.middle.refuses = True
        self._loop.call_soon_threadsafe(lambda: self.tasks[Side.SOURCE].append(self._loop.create_task(self.cut())))

    def mend(self) -> None:
        self.middle.silent = self.middle.refuses = False

    def contact(self, record: Record) -> Contact:
        return Contact(self.client, self.peer)

    async def recover(self, side: Side) -> list[Record]:
        """One round of a relay's recovery; what stays unsettled."""
        await self.handovers[side].recover(self.contact)
        return self.handovers[side].unsettled()

    async def until_left(self) -> None:
        """Until both sessions that live have ended, or wait for what only the other side can tell them."""
        await until(lambda: all(self._left(side) for side in Side if side not in self.killed))

    def _left(self, side: Side) -> bool:
        if side in self.ended:
            return True
        runners = [self.departing.current if self.departing else None] if side is Side.SOURCE else self.arriving
        guards = [one.guard for one in runners if one is not None and one.guard is not None]
        return bool(guards) and all(one.detached for one in guards)

    async def settle(self) -> None:
        """Whoever was killed comes back, and both recover until nothing is left to be done."""
        for side in sorted(self.killed, key=lambda one: one.value):
            await self.bury(side)
            self.begin(side)
        self.mend()
        left: list[Record] = []
        for _ in range(50):
            over = all(side in self.ended or side in self.killed_once for side in Side)
            left = [*await self.recover(Side.SOURCE), *await self.recover(Side.DESTINATION)]
            if over and not left:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"left: {left}; {' · '.join(self.world.story)}")

    killed_once: frozenset[Side] = frozenset()

    def states(self) -> dict[Side, State]:
        """Where each side's journal stands."""
        return {side: record.state for side in Side for record in self.journal(side)}

    def journal(self, side: Side) -> list[Record]:
        return Journal(self._folder / side.value).records()

    async def close(self) -> None:
        for side in Side:
            if side in self.lives:
                self.lives[side].dead = True
        self.middle.silent = self.middle.refuses = True
        await self.cut()
        tasks = [*self.xl, *(task for side in Side for task in self.tasks[side])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.hypervisors.ingress.close()
        await self.middle.close()
        self.hypervisors.close()
        for listener in self._listeners:
            listener.close()


async def _outcome(work: Coroutine[Any, Any, None], report: Any) -> Ended:
    ended = Ended(report)
    try:
        await work
    except Exception as error:  # noqa: BLE001 - whatever it is, the test will look at it
        ended.error = error
    return ended


@asynccontextmanager
async def hosts(folder: Path, client: TlsConfig, server: TlsConfig, **options: Any) -> AsyncIterator[Hosts]:
    """Both hosts, and nothing of them afterwards."""
    made = Hosts(folder, client, server, **options)
    try:
        yield made
    finally:
        await made.close()

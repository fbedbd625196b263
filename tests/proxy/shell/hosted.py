"""What two relays stand between: two copies of one machine, hypervisors, journals, and both ends of xl."""

import asyncio
import errno
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from proxy.endpoints.base import Connection
from proxy.endpoints.sockets import TcpEgress
from proxy.errors import HypervisorFailed, JournalError
from proxy.handover.record import Entry, Head
from proxy.handover.table import Side, State
from proxy.handover.xl import BANNER, GO, READY, REPORT
from proxy.hypervisors.base import CopyState, Fate, Hypervisor, Vm
from proxy.shell.journal import Journal, JournalFile
from tests.proxy.support import Wire
from tests.standins.xen_host import UUID, guest_stream

VM = Vm("guest", UUID)
STREAM = guest_stream(VM.name, VM.uuid, pages=4)


class World:
    """Both copies of the machine, and what became of them."""

    def __init__(self) -> None:
        self.copies = {Side.SOURCE: CopyState.RUNNING, Side.DESTINATION: CopyState.ABSENT}
        self.story: list[str] = []
        self.wrong: list[str] = []
        self.fate = Fate.ENDED
        """Of a copy that is absent."""
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
    connections: list[Connection] = field(default_factory=list)
    """To its hypervisor."""
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

    async def fate(self, vm: Vm) -> Fate:
        await self._asked("fate")
        return self._world.fate

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
        life.connections.append(inner)
        self.label, self.read_fd, self.write_fd = inner.label, inner.read_fd, inner.write_fd
        self.user = inner.user

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

    def leave(self) -> None:
        self._life.moment("leaves")

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

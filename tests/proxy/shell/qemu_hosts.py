"""Two QEMUs of a few lines, whose machine changes hosts through two relays that may be killed at any moment."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from crypto.tls import TlsConfig
from proxy.endpoints.base import Egress
from proxy.endpoints.sockets import TcpEgress
from proxy.errors import HypervisorFailed
from proxy.handover.table import Side
from proxy.hypervisors.base import CopyState
from proxy.hypervisors.monitor import Qmp
from proxy.hypervisors.qmp import QemuMonitor
from proxy.shell.handovers import Toolstack
from tests.proxy.hypervisors.scripted import ScriptedQemu
from tests.proxy.shell.handing import Hosts
from tests.proxy.shell.hosted import Life, MortalConnection, World
from tests.proxy.support import Wire

MEMORY = b"a page of memory that was sent as the machine ran" * 1000
DEVICES = b"the state of its devices"
_OF = {"running": CopyState.RUNNING, "paused": CopyState.PAUSED, "inmigrate": CopyState.INCOMING}


class WatchedQemu(ScriptedQemu):
    """One that tells the world how its copy stands."""

    def __init__(self, path: Path, world: World, side: Side) -> None:
        self.world, self.side = world, side
        super().__init__(path, "running" if side is Side.SOURCE else "inmigrate")
        self.moved, self.loaded = asyncio.Event(), asyncio.Event()
        self.memory, self.devices = MEMORY, DEVICES

    def become(self, status: str | None = None, migration: str | None = None, why: str = "") -> None:
        if self.world.copies[self.side] is CopyState.ABSENT:
            return
        super().become(status, migration, why)
        if status is not None:
            self.world.put(self.side, _OF.get(status, CopyState.SUSPENDED))
        self.moved.set()
        for what in (status, migration):
            if what is not None:
                self.world.moment(f"{self.side.value} qemu {what}")

    def end(self, *, unlink: bool = True) -> None:
        super().end(unlink=unlink)
        self.world.put(self.side, CopyState.ABSENT)

    async def until(self, *migrations: str) -> str:
        while self.migration not in migrations:
            self.moved.clear()
            await self.moved.wait()
        return self.migration

    async def send(self, wire: Wire, loaded: asyncio.Event) -> None:
        """Migrate: memory, a halt once it is ``loaded``, devices, the end."""
        hearing = asyncio.ensure_future(wire.receive())
        loading = asyncio.ensure_future(loaded.wait())
        try:
            await wire.send(self.memory)
            await asyncio.wait({hearing, loading}, return_when=asyncio.FIRST_COMPLETED)
            if hearing.done() and not loading.done():
                raise ConnectionResetError
            if self.migration == "active":
                self.halt()
            if await self.until("device", "cancelled", "completed", "failed") in {"device", "completed"}:
                await wire.send(self.devices)
                wire.shut()
                await asyncio.sleep(0)
                if self.migration == "device":
                    self.become(migration="completed")
                    self.become("postmigrate")
        except OSError:
            if self.migration in {"active", "device"}:
                self.become(self.before, "failed")
        finally:
            for task in (hearing, loading):
                task.cancel()
            await asyncio.gather(hearing, loading, return_exceptions=True)
            wire.close()

    async def receive(self, wire: Wire) -> None:
        """Load what arrives; what does not arrive whole ends it."""
        try:
            await wire.exactly(len(self.memory))
            self.loaded.set()
            await wire.exactly(len(self.devices))
        except (EOFError, OSError):
            self.become(migration="failed")
            self.end()
        else:
            self.arrive()
        finally:
            wire.close()


class MortalMonitor(QemuMonitor):
    """A monitor that hears nothing of a relay that is dead."""

    def __init__(self, path: Path, life: Life) -> None:
        super().__init__(path)
        self._life = life

    async def _connected(self) -> Qmp | None:
        if self._life.dead:
            self.let_go()
            raise HypervisorFailed("there is nobody to ask it")
        return await super()._connected()


class QemuEgress:
    """Where the destination's QEMU listens."""

    single, exclusive, paused = False, False, False
    handover: Literal["", "xl"] = ""

    def __init__(self, inner: TcpEgress, life: Life) -> None:
        self._inner, self._life, self.label = inner, life, inner.label

    async def check(self) -> None:
        await self._inner.check()

    async def connect(self, xl_flags: str) -> MortalConnection:
        return MortalConnection(await self._inner.connect(xl_flags), self._life)


class QemuHosts(Hosts):
    """Both relays and both QEMUs; ``qemu_hosts`` makes one."""

    kind = "qmp"

    def __init__(
        self,
        folder: Path,
        client: TlsConfig,
        server: TlsConfig,
        *,
        monitored: tuple[Side, ...] = tuple(Side),
        required: tuple[Side, ...] = (),
        **options: Any,
    ) -> None:
        super().__init__(folder, client, server, **options)
        self.required = frozenset(required)
        self.qemu = {side: WatchedQemu(folder / f"{side.value}.qmp", self.world, side) for side in Side}
        self.world.put(Side.DESTINATION, CopyState.INCOMING)
        self.monitors = {side: str(self.qemu[side].path) for side in monitored}

    def toolstack(self, life: Life) -> Toolstack:
        return lambda kind, monitor: MortalMonitor(Path(monitor), life)

    def egress(self, inner: TcpEgress, life: Life) -> Egress:
        return QemuEgress(inner, life)

    async def begin_ends(self) -> list[Coroutine[Any, Any, None]]:
        source = self.qemu[Side.SOURCE]
        source.become(migration="active")
        wire = await self.hypervisors.connect()

        async def receive() -> None:
            await self.qemu[Side.DESTINATION].receive(await self.hypervisors.accept())

        return [source.send(wire, self.qemu[Side.DESTINATION].loaded), receive()]


Story = Callable[[QemuHosts], Coroutine[Any, Any, None]]


@asynccontextmanager
async def qemu_hosts(folder: Path, client: TlsConfig, server: TlsConfig, **options: Any) -> AsyncIterator[QemuHosts]:
    """Both hosts, and nothing of them afterwards."""
    made = QemuHosts(folder, client, server, **options)
    for qemu in made.qemu.values():
        await qemu.listen()
    try:
        yield made
    finally:
        await made.close()
        for qemu in made.qemu.values():
            with suppress(OSError):
                qemu.end()

"""One Xen host: a QEMU whose dom0 does as it is told, and what xl says of its guests."""

import asyncio
import contextlib
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.processes import free_ports
from korora.demo import process
from korora.demo.serial import SerialLine
from proxy.hypervisors.monitor import Qmp, QmpError
from tests.e2e.xen.agent import Agent, AgentError, Done

MEMORY_MIB = 1024
DOM0_MIB = 480  # two relays and xl side by side; what is left is for guests
AGENT_PORT = 8000
PORTS = (22, AGENT_PORT, 8002, 8010)  # reached from outside: ssh, the agent, classic relocation, relay
GATEWAY = "10.0.2.2"  # this machine's loopback, as QEMU's user network shows it to a host
START_SECONDS = 90.0  # a cold boot takes 12 s on an idle machine, a saved host 1
XL_SECONDS = 60.0
CONSOLES = "/var/log/xen/console"
POLL_SECONDS = 0.1
# Xen 4.17 does not survive SMAP as QEMU 7.2 emulates it. With XSAVE vector registers do not survive a change of
# domains: bytes went missing in dom0 as soon as a PV guest ran beside it.
CPU = "max,smap=off,smep=off,xsave=off"
XEN_LINE = (
    "console=com1 com1=115200,8n1 loglvl=warning no-real-mode edd=off "
    f"dom0_mem={DOM0_MIB}M,max:{DOM0_MIB}M dom0_max_vcpus=1"
)
DOM0_LINE = "console=hvc0 quiet swiotlb=8192 mitigations=off"  # 16 MiB for the disk and the card, not 64
PVH_LINES = 'tsc_mode="native"\ncpuid="host,rdtscp=0"\n'  # as the emulated processor cannot do more


@dataclass(frozen=True)
class Guest:
    """A guest to create.

    Args:
        kind: "pv" or "pvh"; or "beat", a PV guest that has no kernel, and 4 MiB: fewer Xen does not build.
        memory_mib: from 72 (PV) or 80 (PVH), or the kernel does not start.
        test_mib: how much of it is filled, changed and checked.
        rate: pages changed a second; 0 is an idle guest.
        beat_ms: from one heartbeat to the next.
    """

    name: str = "g1"
    kind: str = "pv"
    memory_mib: int = 80
    test_mib: int = 4
    rate: int = 0
    beat_ms: int = 100

    def config(self) -> str:
        """The guest's xl.cfg(5). It has no disk; one would be `disk=["phy:/dev/loop0,xvda,w"]`."""
        if self.kind == "beat":
            return f'name="{self.name}"\ntype="pv"\nkernel="/guest/beat"\nmemory=4\nvcpus=1\n'
        words = (
            f"console=hvc0 quiet loglevel=0 mitigations=off MIB={self.test_mib} RATE={self.rate} BEAT_MS={self.beat_ms}"
        )
        return (
            f'name="{self.name}"\ntype="{self.kind}"\nkernel="/guest/kernel"\nramdisk="/guest/initrd"\n'
            f'memory={self.memory_mib}\nvcpus=1\nextra="{words}"\non_crash="preserve"\n'
            + (PVH_LINES if self.kind == "pvh" else "")
        )


@dataclass(frozen=True, slots=True)
class Domain:
    """One line of `xl list -v`. `state` is as xl writes it: r b p s c d, or dashes."""

    name: str
    id: int
    memory_mib: int
    state: str
    uuid: str

    @property
    def paused(self) -> bool:
        """Whether somebody has paused it."""
        return "p" in self.state

    @property
    def suspended(self) -> bool:
        """Whether it has shut down, which for a guest in migration means: suspended."""
        return "s" in self.state

    @property
    def runs(self) -> bool:
        """Whether it can run: neither paused, suspended, crashed nor dying."""
        return not set(self.state) & set("pscd")


def parse_list(text: str) -> list[Domain]:
    """What `xl list -v` says, without dom0."""
    domains = []
    for line in text.splitlines()[1:]:
        name, number, memory, _, state, _, uuid = line.split()[:7]
        if number != "0":
            domains.append(Domain(name, int(number), int(memory), state, uuid))
    return domains


class XenHost:
    """A running host; an async context manager that ends it.

    Args:
        name: for its files and messages.
        image: the folder that deploy/rig/fetch-xen made.
        folder: where its sockets and logs go; a unix socket's path has at most 107 bytes.
        saved: a file to load it from; None boots it.
    """

    def __init__(self, name: str, image: Path, folder: Path, saved: Path | None = None) -> None:
        self.name = name
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        """Where on this machine's loopback a host's port is reached."""
        self.serial_log = folder / f"{name}.serial"
        self.errors = folder / f"{name}.err"
        self._monitor = folder / f"{name}.qmp"
        self._command = qemu_command(name, image, self.serial_log, self.ports)
        self._command += ["-qmp", f"unix:{self._monitor},server=on,wait=off"]
        if saved is not None:
            self._command += ["-incoming", f"exec:cat <{saved}"]
        self._process: asyncio.subprocess.Process | None = None
        self._qmp: Qmp | None = None
        self._agent: Agent | None = None

    # ---- the machine

    async def start(self) -> None:
        """Start QEMU and wait until the agent answers and the clock is right."""
        self._process = await process.start(self._command, self.errors)
        try:
            self._qmp = await Qmp.connect(self._monitor)
            async with asyncio.timeout(START_SECONDS):
                # Saved while it stood still, a host arrives so; `cont` before it has arrived would be forgotten.
                while (await self._qmp.execute("query-status"))["status"] == "inmigrate":  # noqa: ASYNC110
                    await asyncio.sleep(POLL_SECONDS / 4)
                await self._qmp.execute("cont")
        except QmpError as error:
            raise AgentError(f"host {self.name}: {process.last_words(self.errors) or error}") from None
        async with asyncio.timeout(START_SECONDS):
            while True:
                with contextlib.suppress(AgentError):
                    self._agent = await Agent.connect(self.ports[AGENT_PORT])
                    break
                await asyncio.sleep(POLL_SECONDS)
        await self._agent.set_clock()

    @property
    def qmp(self) -> Qmp:
        """QEMU's monitor: `stop` freezes the host, `cont` thaws it."""
        assert self._qmp is not None
        return self._qmp

    @property
    def agent(self) -> Agent:
        """The way in."""
        assert self._agent is not None
        return self._agent

    async def freeze(self) -> None:
        """The whole host stands still, and says nothing to anybody."""
        await self.qmp.execute("stop")

    async def thaw(self) -> None:
        """It goes on as if nothing had been."""
        await self.qmp.execute("cont")

    def power_off(self) -> None:
        """The host is gone, with all that it held."""
        assert self._process is not None
        process.tell(self._process, signal.SIGKILL)

    async def save(self, path: Path) -> None:
        """Stop the host and write it to a file, from which any number can be loaded; it is of no use afterwards.

        QEMU says that it is done when the pipe has taken the rest: only who reads from that knows when the file has it,
        and it would be ended with QEMU.
        """
        await self.agent.close()
        await self.qmp.execute("stop")
        await self.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        await self.qmp.execute("migrate-set-parameters", max_bandwidth=16 * 1024**3)
        fresh = path.with_suffix(".new")
        await self.qmp.execute("migrate", uri=f"exec:cat >{fresh} && mv {fresh} {path}")
        ends = {"completed", "failed"}
        end = await self.qmp.wait_event("MIGRATION", START_SECONDS, lambda data: data["status"] in ends)
        assert end.data["status"] == "completed", end
        async with asyncio.timeout(START_SECONDS):
            while not path.exists():  # noqa: ASYNC110, ASYNC240
                await asyncio.sleep(POLL_SECONDS)

    async def stop(self) -> None:
        """End it; may be called at any time and twice."""
        try:
            if self._agent is not None:
                await self._agent.close()
            if self._qmp is not None:
                await self._qmp.close()
        finally:
            if self._process is not None:
                await process.end(self._process, grace_seconds=1.0)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # ---- commands

    async def run(
        self, argv: Sequence[str], timeout_seconds: float = XL_SECONDS, *, env: Mapping[str, str] = {}
    ) -> Done:
        """Run a command to its end, with nothing on its standard input."""
        return await self.agent.run(argv, timeout_seconds, env=env)

    async def check(self, argv: Sequence[str], timeout_seconds: float = XL_SECONDS) -> str:
        """Run a command that has to succeed; what it said on its standard output."""
        done = await self.run(argv, timeout_seconds)
        assert done.rc == 0, (self.name, argv, done)
        return done.out

    async def spawn(self, name: str, argv: Sequence[str], *, env: Mapping[str, str] = {}) -> int:
        """Start a command in the background; its process id."""
        return await self.agent.spawn(name, argv, env=env)

    async def ended(self, name: str, within_seconds: float = XL_SECONDS) -> Done:
        """How a spawned command ended. Raises TimeoutError when it has not."""
        done = await self.agent.state(name, within_seconds)
        if done.rc is None:
            raise TimeoutError(f"{name} on {self.name} has not ended in {within_seconds:g} s: {done}")
        return done

    async def said(self, name: str, text: str, within_seconds: float = XL_SECONDS) -> None:
        """Until a spawned command has said `text`. Raises TimeoutError; AssertionError when it ends without."""
        async with asyncio.timeout(within_seconds):
            while True:
                done = await self.agent.state(name)
                if text in done.out + done.err:
                    return
                assert done.rc is None, (name, done)
                await asyncio.sleep(POLL_SECONDS)

    async def listening(self, port: int, within_seconds: float = XL_SECONDS) -> None:
        """Until somebody listens on a TCP port, which nobody connects to for this. Raises TimeoutError."""
        async with asyncio.timeout(within_seconds):
            while f":{port} " not in (await self.check(["ss", "-Hltn"])):  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)

    async def processes(self, pattern: str) -> list[int]:
        """The process ids whose command line matches a pattern."""
        return [pid for pid, words in await self.agent.processes() if re.search(pattern, words)]

    async def gone(self, pid: int, within_seconds: float = XL_SECONDS) -> None:
        """Until a process has ended. Raises TimeoutError."""
        async with asyncio.timeout(within_seconds):
            while (await self.run(["test", "-e", f"/proc/{pid}"])).rc == 0:  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)

    # ---- guests

    async def xl_list(self) -> list[Domain]:
        """All domains but dom0."""
        return parse_list(await self.check(["xl", "list", "-v"]))

    async def until(self, found: Callable[[list[Domain]], bool], within_seconds: float = XL_SECONDS) -> list[Domain]:
        """Until the list of domains is as `found` wants it; the list. Raises TimeoutError."""
        async with asyncio.timeout(within_seconds):
            while not found(domains := await self.xl_list()):  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)
        return domains

    async def create(self, guest: Guest, *, beats: int = 3) -> None:
        """Create a guest and wait for its first heartbeats."""
        path = f"/run/{guest.name}.cfg"
        await self.agent.put(path, guest.config().encode())
        await self.check(["xl", "create", path])
        await self.wait_beat(guest.name, beats)

    async def destroy_all(self) -> None:
        """No guest is left."""
        for domain in await self.xl_list():
            await self.check(["xl", "destroy", str(domain.id)])

    async def console(self, name: str) -> SerialLine:
        """All that a guest has said here under this name; one that arrives says it under NAME--incoming."""
        line = SerialLine()
        line.feed(await self.agent.get(f"{CONSOLES}/guest-{name}.log") or b"", 0.0)
        return line

    async def counter(self, name: str) -> int:
        """The newest heartbeat of a guest that was created or has arrived here; -1 before the first."""
        lines = [await self.console(name), await self.console(f"{name}--incoming")]
        return max((line.last.number for line in lines if line.last), default=-1)

    async def wait_beat(self, name: str, at_least: int, within_seconds: float = XL_SECONDS) -> int:
        """Until a guest has counted so far. Raises TimeoutError."""
        async with asyncio.timeout(within_seconds):
            while (number := await self.counter(name)) < at_least:  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)
        return number


def qemu_command(name: str, image: Path, serial: Path, ports: Mapping[int, int]) -> list[str | Path]:
    """QEMU's command line but for monitor and where the host comes from: one and the same for all."""
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{here}-:{there}" for there, here in ports.items())
    virtio = "iommu_platform=on,disable-legacy=on"  # a dom0's addresses are not the machine's
    return [
        *(image / "qemu-system-x86_64", "-name", name, "-accel", "tcg,tb-size=256", "-cpu", CPU, "-machine", "pc"),
        *("-m", str(MEMORY_MIB), "-smp", "1", "-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-kernel", image / "xen", "-append", XEN_LINE),
        *("-initrd", f"{image / 'kernel'} {DOM0_LINE},{image / 'initrd'}"),
        *("-drive", f"if=none,id=root,file={image / 'disk'},format=raw,readonly=on"),
        *("-device", f"virtio-blk-pci,drive=root,{virtio}"),
        *("-netdev", f"user,id=net,ipv6=off{forwards}"),
        *("-device", f"virtio-net-pci,netdev=net,romfile=,{virtio}"),
        *("-serial", f"file:{serial}"),
    ]

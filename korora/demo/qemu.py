"""Which QEMU to use and why, and one running QEMU: its serial line, its monitor, its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from korora.demo import process
from korora.demo.errors import EXIT_HYPERVISOR, EXIT_SETUP, DemoError
from korora.demo.guest import GuestSpec
from korora.demo.serial import Heartbeat, SerialLine
from proxy.hypervisors.monitor import Qmp, QmpError

QEMU_NAME = "qemu-system-x86_64"
TCG_VERSION_MIN = 9  # 7.2 reports multi-round migrations completed under TCG while the arriving guest hangs
OLD_QEMU = f"without KVM a QEMU before {TCG_VERSION_MIN} loses guests that migrate in several rounds"
KVM_DEVICE = Path("/dev/kvm")
CPU = {"kvm": "host", "tcg": "max"}
KVM_VERSION_MIN = 6  # older ones were never tried
PROBE_SECONDS = 8.0  # a KVM that works boots the kernel in one
START_SECONDS = 15.0
BOOT_SECONDS = 60.0  # 4 s here under emulation, with the processors to itself
SERIAL_BUFFER_BYTES = 64 * 1024
REMEDY = "`make demo` in the checkout fetches one; or name one in KORORA_QEMU"


@dataclass(frozen=True, slots=True)
class QemuChoice:
    """The QEMU that runs the guests.

    Args:
        path: the program.
        version: as it says itself.
        accel: "kvm" or "tcg".
        why: for people, parts divided by "; ".
    """

    path: Path
    version: str
    accel: str
    why: str


@dataclass(frozen=True, slots=True)
class GuestFiles:
    """The kernel and the busybox the guest is made of."""

    kernel: Path
    kernel_version: str
    busybox: Path


@dataclass(frozen=True, slots=True)
class Machine:
    """A virtual machine as both sides of a migration have to build it: the QEMU, the guest's parts and its size."""

    qemu: QemuChoice
    files: GuestFiles
    spec: GuestSpec
    initrd: Path

    def command(self, name: str) -> list[str | Path]:
        """QEMU's command line, but for the monitor, the serial line and where the guest comes from."""
        accel = f"{self.qemu.accel},tb-size=128" if self.qemu.accel == "tcg" else self.qemu.accel
        command: list[str | Path] = [self.qemu.path, "-name", name, "-accel", accel, "-cpu", CPU[self.qemu.accel]]
        command += ["-machine", "pc", "-smp", "1", "-m", str(self.spec.memory_mib)]
        command += ["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]
        command += ["-kernel", self.files.kernel, "-initrd", self.initrd, "-append", self.spec.kernel_arguments()]
        return command


def rig_directory(env: Mapping[str, str]) -> Path:
    """Where `make system` puts QEMU and kernel: `$KORORA_RIG`, or `.cache/rig` of the checkout this file lies in."""
    named = env.get("KORORA_RIG")
    return Path(named).absolute() if named else Path(__file__).resolve().parents[2] / ".cache" / "rig"


def find_guest_files(env: Mapping[str, str] = os.environ) -> GuestFiles:
    """The guest's parts: KORORA_KERNEL and KORORA_BUSYBOX, else what `make system` fetched. Raises DemoError."""
    rig = rig_directory(env)
    kernel = Path(env.get("KORORA_KERNEL") or rig / "kernel" / "vmlinuz")
    busybox = Path(env.get("KORORA_BUSYBOX") or rig / "busybox")
    for part, path, name in (("kernel", kernel, "KORORA_KERNEL"), ("static busybox", busybox, "KORORA_BUSYBOX")):
        if not path.is_file():
            remedy = f"`make demo` in the checkout fetches one; or name one in {name}"
            raise DemoError(f"no {part} for the guest at {path}", EXIT_SETUP, remedy)
    noted = kernel.with_name("version")
    version = noted.read_text().strip() if noted.is_file() else kernel.name.removeprefix("vmlinuz-")
    return GuestFiles(kernel, version, busybox)


async def find_qemu(kernel: Path, env: Mapping[str, str] = os.environ) -> QemuChoice:
    """Pick a QEMU that carries multi-round migrations: KORORA_QEMU, else the checkout's own, else the system's.

    `kernel` is what KVM is tried with.
    Raises DemoError (exit code 2) when there is none, saying which ones were refused and why.
    """
    named = env.get("KORORA_QEMU")
    fetched = rig_directory(env) / "qemu" / QEMU_NAME
    system = shutil.which(QEMU_NAME, path=env.get("PATH"))
    candidates: list[tuple[Path, str]] = []
    if named:
        candidates = [(Path(named), "named by KORORA_QEMU")]
    else:
        if fetched.is_file():
            candidates.append((fetched, "fetched by `make system`"))
        if system:
            candidates.append((Path(system), "the system's"))
    if not candidates:
        raise DemoError(f"no {QEMU_NAME} was found", EXIT_SETUP, REMEDY)
    refused: list[str] = []
    for path, where in candidates:
        version = await version_of(path)
        if version is None:
            refused.append(f"{path} does not run")
            continue
        major = int(version.split(".")[0])
        accel, reason = await find_accel(path, kernel)
        if major >= (KVM_VERSION_MIN if accel == "kvm" else TCG_VERSION_MIN):
            other = await version_of(Path(system)) if path == fetched and system else None
            older = other is not None and int(other.split(".")[0]) < TCG_VERSION_MIN
            aside = f"; not the system's {other}: {OLD_QEMU}" if older else ""
            return QemuChoice(path, version, accel, f"{where}{aside}; {reason}")
        refused.append(f"{path} is {version}: {OLD_QEMU}")
    raise DemoError("; ".join(refused), EXIT_SETUP, REMEDY)


async def version_of(qemu: Path) -> str | None:
    """The version a QEMU says it has, or None when it does not run."""
    with contextlib.suppress(OSError, TimeoutError):
        code, said = await _run([qemu, "--version"], START_SECONDS)
        match = re.search(rb"version (\d+\.\S+)", said)
        if code == 0 and match:
            return match.group(1).decode()
    return None


async def find_accel(qemu: Path, kernel: Path) -> tuple[str, str]:
    """("kvm" or "tcg", why). KVM has to prove itself by booting the guest's kernel: the device alone means nothing."""
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return "tcg", f"emulated (TCG), as {KVM_DEVICE} is absent or not for us"
    if not has_virtualisation():
        return "tcg", "emulated (TCG), as the processor offers no virtualisation here"
    if await boots(qemu, kernel, "kvm"):
        return "kvm", "with KVM, which booted a kernel on trial"
    return "tcg", f"emulated (TCG), as {KVM_DEVICE} is there but boots no kernel"


def has_virtualisation(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor says that it can run guests (Intel's vmx, AMD's svm)."""
    try:
        return re.search(r"^flags\b.*\b(vmx|svm)\b", cpuinfo.read_text(), re.MULTILINE) is not None
    except OSError:
        return False


async def boots(qemu: Path, kernel: Path, accel: str, timeout_seconds: float = PROBE_SECONDS) -> bool:
    """Whether `kernel`, given no file system at all, gets as far as panicking for the lack of it."""
    machine = ["-accel", accel, "-cpu", CPU[accel], "-machine", "pc", "-m", "128", "-nodefaults", "-display", "none"]
    trial: list[str | Path] = ["-no-reboot", "-serial", "stdio", "-kernel", kernel, "-append", "console=ttyS0 panic=-1"]
    with contextlib.suppress(OSError, TimeoutError):
        _, said = await _run([qemu, *machine, *trial], timeout_seconds)
        return b"Kernel panic" in said
    return False


async def _run(command: Sequence[str | Path], timeout_seconds: float) -> tuple[int, bytes]:
    """Exit code and output of `command`; raises TimeoutError (after killing it) or OSError."""
    child = await asyncio.create_subprocess_exec(
        *process.guarded(command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(timeout_seconds):
            said, _ = await child.communicate()
    finally:
        process.tell(child, signal.SIGKILL)
        await child.wait()
    return child.returncode if child.returncode is not None else -1, said


class QemuVm:
    """One running QEMU with a guest: an async context manager that leaves no process behind.

    Args:
        name: for its files and messages, e.g. "source".
        machine: the same on both sides of a migration.
        folder: where its sockets and logs go; a unix socket's path has at most 107 bytes.
        incoming: None boots the guest; "defer" or a URI waits for one to arrive.
        options: further words of QEMU's command line.
    """

    def __init__(
        self, name: str, machine: Machine, folder: Path, incoming: str | None = None, options: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.errors = folder / f"{name}.err"
        self.serial = SerialLine()
        self._monitor = folder / f"{name}.qmp"
        self._heard = asyncio.Event()
        self._qmp: Qmp | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._command = machine.command(name)
        self._command += ["-qmp", f"unix:{self._monitor},server=on,wait=off"]
        self._command += ["-chardev", "stdio,id=serial,signal=off", "-serial", "chardev:serial"]
        if incoming is not None:
            self._command += ["-incoming", incoming]
        self._command += options

    @property
    def qmp(self) -> Qmp:
        """The monitor. Raises DemoError before the start."""
        if self._qmp is None:
            raise DemoError(f"the {self.name} QEMU is not running")
        return self._qmp

    @property
    def pid(self) -> int:
        """The process id. Raises DemoError before the start."""
        if self._process is None:
            raise DemoError(f"the {self.name} QEMU is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start QEMU and connect to its monitor. Raises DemoError when it ends or stays silent."""
        self._process = await process.start(self._command, self.errors, limit_bytes=SERIAL_BUFFER_BYTES)
        self._listening = asyncio.create_task(self._listen(self._process))
        connecting = asyncio.create_task(Qmp.connect(self._monitor, START_SECONDS))
        ending = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait([connecting, ending], return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done():
                raise self._failed("ended at once")
            self._qmp = connecting.result()
        except QmpError as error:
            raise self._failed(str(error)) from None
        finally:
            for task in (connecting, ending):
                task.cancel()

    async def wait_beat(self, matching: Callable[[Heartbeat], bool], timeout_seconds: float) -> Heartbeat:
        """Wait until the newest heartbeat is `matching` and return it.

        Raises DemoError when QEMU ends first, or the guest has not come so far after `timeout_seconds`.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    last = self.serial.last
                    if last is not None and matching(last):
                        return last
                    if self._listening is None or self._listening.done():
                        raise self._failed("ended while its guest was waited for")
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            noise = f"; it said: {self.serial.noise[-1]}" if self.serial.noise else ""
            raise self._failed(f"its guest was not heard in {timeout_seconds:g} s{noise}") from None

    async def set_capabilities(self, *names: str) -> None:
        """Turn migration capabilities on; `events` is always among them."""
        wanted = [{"capability": name, "state": True} for name in ("events", *names)]
        await self.qmp.execute("migrate-set-capabilities", capabilities=wanted)

    async def migration(self) -> dict[str, Any]:
        """query-migrate's answer, whose `status` is absent before a migration."""
        answer: dict[str, Any] = await self.qmp.execute("query-migrate")
        return answer

    async def wait_migration(self, timeout_seconds: float) -> str:
        """Wait for the first migration's end: "completed", "failed" or "cancelled". Raises TimeoutError, QmpError.

        What happened before `set_capabilities` (such as a guest loaded from a file) does not count.
        """
        event = await self.qmp.wait_event(
            "MIGRATION", timeout_seconds, lambda data: data["status"] in {"completed", "failed", "cancelled"}
        )
        return str(event.data["status"])

    def kill(self) -> None:
        """SIGKILL: what a host that loses its power looks like to the relay."""
        if self._process is not None:
            process.tell(self._process, signal.SIGKILL)

    async def stop(self) -> None:
        """End the process and close everything; may be called at any time and twice."""
        try:
            if self._qmp is not None:
                await self._qmp.close()
        finally:
            if self._process is not None:
                await process.end(self._process)
            if self._listening is not None:
                await self._listening

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _listen(self, child: asyncio.subprocess.Process) -> None:
        """Take down what the serial line says, with the time it was heard, until QEMU ends."""
        clock = asyncio.get_running_loop().time
        try:
            while child.stdout is not None and (data := await child.stdout.read(SERIAL_BUFFER_BYTES)):
                self.serial.feed(data, clock())
                self._heard.set()
        finally:
            self._heard.set()

    def _failed(self, what: str) -> DemoError:
        words = process.last_words(self.errors)
        return DemoError(f"the {self.name} QEMU: {what}" + (f" ({words})" if words else ""), EXIT_HYPERVISOR)

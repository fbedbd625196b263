"""Processes under measurement: start them, find their children, read their CPU time and memory, end them all.

CPU time comes from each process's own clock (clock_gettime on its CPU clock id: nanoseconds, all threads, ended ones
included), plus the time of children it has already waited for (/proc/PID/stat, clock ticks). A tree is walked by parent
id anew at each reading, because relays fork: sshd twice a connection, socat once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

PROC: Final = Path("/proc")
REPOSITORY: Final = Path(__file__).resolve().parent.parent
KiB: Final = 1024
STOP_PATIENCE_S: Final = 2.0  # from SIGTERM to SIGKILL
POLL_S: Final = 0.01  # how often a state in /proc is looked at
LOG_TAIL_BYTES: Final = 2000  # of a failed process's standard error, when its last line is quoted
QUOTE_CHARACTERS_MAX: Final = 160  # of that line
LISTEN_STATE: Final = "0A"  # TCP_LISTEN in /proc/net/tcp
LOCAL_PORT_RANGE: Final = PROC / "sys/net/ipv4/ip_local_port_range"
DEFAULT_LOCAL_PORT_LEAST: Final = 32768  # Linux's own, where that file cannot be read
PORT_LEAST: Final = 10240  # above what daemons are known by
PORT_MOST: Final = 65536
PORT_ATTEMPTS_MAX: Final = 1000
PR_SET_CHILD_SUBREAPER: Final = 36  # prctl(2)


class BenchError(Exception):
    """The bench cannot go on with this peer, or at all; the message says why and what to do, in one line."""


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Peak resident memory of one process."""

    command: str
    peak_kib: int


def adopt_orphans() -> None:
    """Make orphaned grandchildren ours (sshd's outlive their parent), so that they are seen and ended too."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # failing only means that a stray is init's to reap


def free_ports(count: int) -> list[int]:
    """Different loopback ports, free a moment ago, for programs that cannot bind to port 0 and say which they got.

    They lie below the range that the kernel takes ports of outgoing connections from: one of those was often enough
    taken between our look and the program's bind.

    Raises:
        BenchError: there are none.
    """
    try:
        below = int(LOCAL_PORT_RANGE.read_text().split()[0])
    except OSError:
        below = DEFAULT_LOCAL_PORT_LEAST
    candidates = range(PORT_LEAST, below if below > PORT_LEAST + count else PORT_MOST)
    found: list[int] = []
    choose = random.SystemRandom().choice  # processes that were seeded alike would ask for the same ports at once
    for _ in range(PORT_ATTEMPTS_MAX):
        port = choose(candidates)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
        if len(found) == count:
            return found
    raise BenchError(f"no free port from {candidates.start} to {candidates.stop - 1}; end what listens there")


def listening_inodes(port: int) -> set[str]:
    """Inodes of what listens on the TCP port; from /proc, because a probing connection would be a session."""
    suffix = f":{port:04X}"
    inodes: set[str] = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[1].endswith(suffix) and fields[3] == LISTEN_STATE:
                    inodes.add(fields[9])
    return inodes


def holds_socket(pid: int, inodes: set[str]) -> bool:
    """Whether the process has one of these sockets open."""
    names = {f"socket:[{inode}]" for inode in inodes}
    with contextlib.suppress(OSError):
        for link in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                if str(link.readlink()) in names:
                    return True
    return False


def cpu_clock_s(pid: int) -> float:
    """CPU seconds (user and system) that all threads of the process have used; 0.0 if it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED) of linux/posix-timers.h
    except OSError:
        return 0.0


@dataclass(frozen=True, slots=True)
class MachineTime:
    """CPU seconds of the whole machine since it started: used, taken by the hypervisor for others, and in all."""

    busy_s: float
    stolen_s: float
    total_s: float

    @classmethod
    def now(cls) -> MachineTime:
        """Read /proc/stat (proc(5)); its clock ticks are hundredths of a second."""
        fields = [int(word) for word in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, idle, waiting, hard, soft, stolen = (field / os.sysconf("SC_CLK_TCK") for field in fields)
        busy_s = user + nice + system + hard + soft
        return cls(busy_s, stolen, busy_s + idle + waiting + stolen)

    def since(self, earlier: MachineTime) -> MachineTime:
        """What has passed."""
        return MachineTime(
            self.busy_s - earlier.busy_s, self.stolen_s - earlier.stolen_s, self.total_s - earlier.total_s
        )


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state (field 3) on; empty if the process is gone."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def reaped_children_s(pid: int) -> float:
    """CPU seconds of children that the process has waited for."""
    fields = _stat_fields(pid)
    if not fields:
        return 0.0
    cutime, cstime = int(fields[13]), int(fields[14])
    return (cutime + cstime) / os.sysconf("SC_CLK_TCK")


def descendants(roots: Iterable[int]) -> set[int]:
    """The roots and every process below them."""
    parents: dict[int, int] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat_fields(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    found = {root for root in roots if root in parents}
    while True:
        new = {pid for pid, parent in parents.items() if parent in found} - found
        if not new:
            return found
        found |= new


def peak_memory(pid: int) -> ProcessMemory | None:
    """VmHWM of one process; None if it is gone or has no memory of its own."""
    try:
        status = (PROC / str(pid) / "status").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "VmHWM" not in fields:
        return None
    return ProcessMemory(fields["Name"].strip(), int(fields["VmHWM"].split()[0]))


class ProcessTree:
    """The processes that make up one relay or peer, with all their children; a context that leaves none behind."""

    def __init__(self, name: str, log_directory: Path) -> None:
        """`name` is for messages; standard errors go to files in `log_directory`."""
        self._name = name
        self._log_directory = log_directory
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, stdout: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        """Start one program as the leader of a session of its own.

        Raises:
            BenchError: it cannot be executed.
        """
        log = self._log_directory / f"{self._name}-{len(self._processes)}.log"
        try:
            with log.open("wb") as stderr:
                process = subprocess.Popen(
                    argv,
                    env={**os.environ, **(env or {})},
                    cwd=REPOSITORY,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
        except OSError as error:
            raise BenchError(f"{self._name}: cannot start {argv[0]}: {error.strerror}") from error
        self._processes.append(process)
        self._logs.append(log)
        return process

    def await_listening(self, port: int, timeout_s: float) -> None:
        """Wait until a process of the tree listens on `port` (somebody else may have taken it in the meantime).

        Raises:
            BenchError: none did in time, or a process of the tree ended first.
        """
        deadline = time.monotonic() + timeout_s
        while not self._listens(port):
            self.check_alive()
            if time.monotonic() > deadline:
                raise BenchError(
                    f"{self._name} does not listen on port {port} after {timeout_s:.0f} s{self._last_words()}"
                )
            time.sleep(POLL_S)

    def _listens(self, port: int) -> bool:
        """Whether a process of the tree listens on the port."""
        inodes = listening_inodes(port)
        return bool(inodes) and any(holds_socket(pid, inodes) for pid in self.pids())

    def check_alive(self) -> None:
        """Raise BenchError if a process of the tree has ended by itself."""
        for process in self._processes:
            if process.poll() is not None:
                program = Path(_argv0(process)).name
                raise BenchError(f"{self._name}: {program} ended with code {process.returncode}{self._last_words()}")

    def pids(self) -> set[int]:
        """All processes of the tree that live now."""
        return descendants(process.pid for process in self._processes)

    def cpu_s(self) -> float:
        """CPU seconds that the tree has used so far, ended and awaited children included."""
        return sum(cpu_clock_s(pid) + reaped_children_s(pid) for pid in self.pids())

    def memory(self) -> list[ProcessMemory]:
        """Peak memory of each living process of the tree."""
        return [memory for pid in sorted(self.pids()) if (memory := peak_memory(pid)) is not None]

    def stop(self) -> None:
        """End the whole tree: SIGTERM, a little patience, SIGKILL; then reap."""
        family = self.pids()
        _signal_all(family, signal.SIGTERM)
        deadline = time.monotonic() + STOP_PATIENCE_S
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            time.sleep(POLL_S)
        _signal_all(family | self.pids(), signal.SIGKILL)
        for process in self._processes:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        _reap_orphans(family - {process.pid for process in self._processes})
        self._processes.clear()

    def _last_words(self) -> str:
        """The last line of standard error that any process of the tree left, as the tail of a message."""
        for log in reversed(self._logs):
            with contextlib.suppress(OSError):
                lines = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
                if lines:
                    return f": {lines[-1][:QUOTE_CHARACTERS_MAX]}"
        return ""


def _argv0(process: subprocess.Popen[bytes]) -> str:
    """The program a process was started with."""
    return str(process.args[0]) if isinstance(process.args, (list, tuple)) else str(process.args)


def _signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """Signal every process; those that are gone do not matter."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _reap_orphans(pids: Iterable[int]) -> None:
    """Wait for killed grandchildren that became our children; those that did not are somebody else's to reap."""
    deadline = time.monotonic() + STOP_PATIENCE_S
    for pid in pids:
        while time.monotonic() < deadline and (PROC / str(pid)).exists():
            try:
                done, _status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                done = 0
            if done:
                break
            time.sleep(POLL_S)

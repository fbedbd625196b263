"""What the figures were taken on: without it no figure means anything."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from bench.network import congestion_control
from bench.peers import find_program
from bench.processes import REPOSITORY, MachineTime

CPU0: Final = Path("/sys/devices/system/cpu/cpu0")
CPUINFO: Final = Path("/proc/cpuinfo")
VERSION_TIMEOUT_S: Final = 5.0
# A program's own words for its version: arguments, and what to pick from the answer.
VERSION_COMMANDS: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "socat": (("-V",), r"socat version (\S+)"),
    "ssh": (("-V",), r"(OpenSSH_\S+?),"),
    "stunnel4": (("-version",), r"stunnel (\S+) on"),
    "openssl": (("version",), r"OpenSSL (\S+)"),
}
PACKAGES: Final = ("cryptography", "blake3", "uvloop", "pyOpenSSL")


@dataclass(frozen=True, slots=True)
class Machine:
    """Metadata of one run."""

    cpu: str
    cores: int
    caches: str
    memory_mib: int
    virtualisation: str
    governor: str
    kernel: str
    congestion_control: str
    python: str
    tools: dict[str, str]
    revision: str
    date: str
    load_before: str
    load_after: str
    stolen_percent: float


@dataclass(frozen=True, slots=True)
class Start:
    """What is noted before a run, to be told at its end."""

    load: str
    time: MachineTime

    @classmethod
    def now(cls) -> Start:
        """The moment before."""
        return cls(load_average(), MachineTime.now())


def load_average() -> str:
    """The load average over the last minute."""
    return f"{os.getloadavg()[0]:.2f}"


def describe(start: Start) -> Machine:
    """Look at this machine, now (call it at the end of a run: it says when, and the load then)."""
    passed = MachineTime.now().since(start.time)
    return Machine(
        cpu=_cpu_model(),
        cores=os.cpu_count() or 1,
        caches=_caches(),
        memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1024**2,
        virtualisation=_virtualisation(),
        governor=_word(CPU0 / "cpufreq/scaling_governor") or "none",
        kernel=platform.release(),
        congestion_control=congestion_control(),
        python=platform.python_version(),
        tools=_tools(),
        revision=_revision(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        load_before=start.load,
        load_after=load_average(),
        stolen_percent=100 * passed.stolen_s / passed.total_s if passed.total_s else 0.0,
    )


def _cpu_model() -> str:
    """The first CPU's model name with family, model and stepping, because names such as "Xeon Processor" say little."""
    text = _word(CPUINFO)

    def field(name: str) -> str:
        match = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        return match.group(1) if match else ""

    numbers = "/".join(filter(None, map(field, ("cpu family", "model", "stepping"))))
    return f"{field('model name') or platform.machine()}{f' ({numbers})' if numbers else ''}"


def _word(path: Path) -> str:
    """What a file of the kernel's says; empty if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _caches() -> str:
    """The data caches of the first CPU, e.g. "L1 48K, L2 2048K, L3 491520K"."""
    found = {}
    for index in sorted((CPU0 / "cache").glob("index*")):
        if _word(index / "type") in {"Data", "Unified"}:
            found[_word(index / "level")] = _word(index / "size")
    return ", ".join(f"L{level} {size}" for level, size in found.items()) or "caches unknown"


def _virtualisation() -> str:
    """Which hypervisor this runs on and in which container, as systemd names them, e.g. "kvm", "kvm+docker", "none"."""
    said = [_output(["systemd-detect-virt", kind]).strip() for kind in ("--vm", "--container")]
    found = [word for word in said if word != "none" and re.fullmatch(r"[a-z0-9-]{1,20}", word)]
    if found or "none" in said:
        return "+".join(found) or "none"
    return "some" if re.search(r"^flags\b.*\bhypervisor\b", _word(CPUINFO), re.MULTILINE) else "none"


def _output(argv: list[str]) -> str:
    """What a short command says, on either output; empty if it cannot."""
    try:
        done = subprocess.run(
            argv, check=False, capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, cwd=REPOSITORY
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _tools() -> dict[str, str]:
    """Versions of the peers' programs and of the libraries under the relay."""
    tools: dict[str, str] = {}
    for name, (arguments, pattern) in VERSION_COMMANDS.items():
        path = find_program(name)
        match = re.search(pattern, _output([path, *arguments])) if path else None
        if match:
            tools[name] = match.group(1)
    for name in PACKAGES:
        try:
            tools[name] = version(name)
        except PackageNotFoundError:
            continue
    try:
        from cryptography.hazmat.backends.openssl import backend  # noqa: PLC0415 (slow, and only for its version)
    except ImportError:
        return tools
    tools["cryptography's OpenSSL"] = backend.openssl_version_text().removeprefix("OpenSSL ").split(" ")[0]
    return tools


def _revision() -> str:
    """The checkout's commit, with a plus if files differ from it."""
    commit = _output(["git", "rev-parse", "--short=12", "HEAD"]).strip()
    if not re.fullmatch(r"[0-9a-f]{12,40}", commit):
        return "unknown"
    changed = _output(["git", "status", "--porcelain", "--untracked-files=no"]).strip()
    return f"{commit}+" if changed else commit

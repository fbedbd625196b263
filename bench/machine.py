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
from bench.processes import REPOSITORY

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
    memory_mib: int
    kernel: str
    congestion_control: str
    python: str
    tools: dict[str, str]
    revision: str
    date: str
    load_before: str
    load_after: str


def load_average() -> str:
    """The load average over the last minute."""
    return f"{os.getloadavg()[0]:.2f}"


def describe(load_before: str) -> Machine:
    """Look at this machine, now (call it at the end of a run: it says when, and the load then)."""
    return Machine(
        cpu=_cpu_model(),
        cores=os.cpu_count() or 1,
        memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1024**2,
        kernel=platform.release(),
        congestion_control=congestion_control(),
        python=platform.python_version(),
        tools=_tools(),
        revision=_revision(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        load_before=load_before,
        load_after=load_average(),
    )


def _cpu_model() -> str:
    """The model name of the first CPU."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1) if match else platform.machine()


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

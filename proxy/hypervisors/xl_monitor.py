"""Who sees to a domain's end: xl's monitor, and one of our own where that is lost.

``xl create`` and ``xl migrate-receive`` leave a process behind that waits until the domain shuts down, and then
destroys it or makes it anew as its configuration says. That process ends when it sees the domain suspended, although
the domain may be resumed a moment later (handle_domain_death in tools/xl/xl_vmcontrol.c). Without it a guest that
reboots stays dead. xl has no command to start another one, so this module is one::

    python -m proxy.hypervisors.xl_monitor [--xl XL] [--libxl LIBRARY] [--xenstored SOCKET] [--locks FOLDER] DOMID

It returns when the monitor is at work in the background, or says why it is not. The monitor ends with its domain. It
waits on xenstored's @releaseDomain as xl does. What it does not do: hand an ejected CD-ROM on to the device model, keep
a domain under another name (rename-restart) or soft-reset it; these are left as they are, and said.
"""

import argparse
import fcntl
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from proxy.endpoints.scope import scope
from proxy.errors import HypervisorFailed
from proxy.hypervisors.libxl import Libxl, find
from proxy.hypervisors.xl_list import XlDomain, read_list
from proxy.limits import XL_DESTROY_SECONDS_MAX, XL_OUTPUT_BYTES_MAX, XL_SECONDS_MAX

Create = Callable[[dict[str, Any]], int]
Say = Callable[[str], None]

_ACTIONS: Final = {"-": "on_poweroff", "r": "on_reboot", "c": "on_crash", "w": "on_watchdog", "S": "on_soft_reset"}
_DEFAULT_ACTION: Final = "destroy"  # what libxl leaves out of its JSON
_RESTART_PAUSE_SECONDS: Final = 2.0  # "domain re-creation fails sometimes" without it, says xl
_POLL_SECONDS: Final = 5.0  # between looks where xenstored cannot be watched
_LOG_TAIL_BYTES: Final = 64 * 1024
_LOGS: Final = Path("/var/log/xen")
_DUMPS: Final = Path("/var/lib/xen/dump")
# What xl says last: that it waits, or of what it has seen of its domain, after which it ends or waits for another one.
_WAITING: Final = re.compile(rb"Waiting for domain .* \(domid (\d+)\) to die \[pid (\d+)\]|Domain \d+ has shut down, ")


# ---------------------------------------------------------------------- is there one?


def find_monitor(domid: int, proc: Path = Path("/proc")) -> int | None:
    """The process id of a domain's monitor: an xl whose log says last that it waits for that domain, or one of ours."""
    for entry in proc.iterdir():
        if entry.name.isdigit() and domid in {_waits_for(entry), _is_ours(entry)}:
            return int(entry.name)
    return None


def _is_ours(process: Path) -> int | None:
    """Which domain a monitor of ours waits for; None if it is none."""
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return int(words[-2]) if b"proxy.hypervisors.xl_monitor" in words and words[-2].isdigit() else None


def _waits_for(process: Path) -> int | None:
    """Which domain an xl waits for; None if it is no monitor, or gone."""
    try:
        if (process / "comm").read_bytes().strip() != b"xl":
            return None
        output = process / "fd" / "1"
        if not output.readlink().name.startswith("xl-"):
            return None
        with output.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            said = _WAITING.findall(file.read())
    except OSError:
        return None
    return int(said[-1][0]) if said and said[-1][1] == process.name.encode() else None


def _claim(domid: int, folder: Path) -> int | None:
    """What only one monitor of ours can have for a domain: a lock, which goes with its process.

    Raises:
        HypervisorFailed: the folder cannot be used.
    """
    path = folder / f"korora-xl-monitor-{domid}.lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HypervisorFailed(f"cannot make {path}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


class XlMonitors:
    """See ``proxy.hypervisors.xl.Monitors``.

    Args:
        options: of ``main``: which xl, libxl and so on.
        environ: of this process; a monitor outlives it, in a scope of its own under systemd.
        proc: where processes are seen.
    """

    def __init__(
        self, options: Sequence[str] = (), environ: Mapping[str, str] | None = None, proc: Path = Path("/proc")
    ) -> None:
        self._options, self._proc = options, proc
        self._environ = os.environ if environ is None else environ

    def tends(self, domid: int) -> bool:
        """See ``Monitors.tends``."""
        return find_monitor(domid, self._proc) is not None

    def tend(self, domid: int) -> str | None:
        """See ``Monitors.tend``."""
        command = [sys.executable, "-P", "-m", __name__, *self._options, str(domid)]
        try:
            done = subprocess.run(
                [*scope("korora-xl-monitor", self._environ), *command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=XL_SECONDS_MAX,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return _advice(domid, str(error))
        return None if done.returncode == 0 else _advice(domid, (done.stderr.strip().splitlines() or ["?"])[-1])


def _advice(domid: int, why: str) -> str:
    return (
        f"{why}; if the guest of domain {domid} reboots or powers off, it will stay there, dead: then "
        f"xl destroy {domid} and xl create its configuration. A migration within this host, which needs its memory "
        f'twice, gives it a new monitor: xl migrate -s "" {domid} "xl migrate-receive"'
    )


# ---------------------------------------------------------------------- xenstored


class Watch:
    """Waits for domains to end: xenstored's special watch @releaseDomain (docs/misc/xenstore.txt, io/xs_wire.h).

    Args:
        path: xenstored's socket.
        poll_seconds: between looks while it cannot be reached.
    """

    _WATCH, _EVENT = 4, 15
    _HEAD = struct.Struct("=4I")

    def __init__(self, path: str, poll_seconds: float = _POLL_SECONDS) -> None:
        self._path, self._poll_seconds = path, poll_seconds
        self._socket: socket.socket | None = None

    def wait(self) -> None:
        """Return when a domain may have ended. The first time at once, as xenstored tells everybody who begins."""
        try:
            if self._socket is None:
                self._socket = self._connect()
            while self._message() != self._EVENT:
                pass
        except OSError:
            self.close()
            time.sleep(self._poll_seconds)

    def close(self) -> None:
        """Let xenstored go."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.connect(self._path)
            words = b"@releaseDomain\0korora\0"
            made.sendall(self._HEAD.pack(self._WATCH, 0, 0, len(words)) + words)
        except OSError:
            made.close()
            raise
        return made

    def _message(self) -> int:
        """The type of the next message, which is read to its end."""
        kind, _, _, length = self._HEAD.unpack(self._exactly(self._HEAD.size))
        self._exactly(min(int(length), XL_OUTPUT_BYTES_MAX))
        return int(kind)

    def _exactly(self, count: int) -> bytes:
        if self._socket is None:
            raise ConnectionError("closed")
        got = b""
        while len(got) < count:
            piece = self._socket.recv(count - len(got))
            if not piece:
                raise ConnectionError("xenstored has closed the connection")
            got += piece
        return got


# ---------------------------------------------------------------------- the monitor


class Monitor:
    """Waits for one domain's end, again and again if that makes it anew.

    Args:
        domid: the domain's.
        create: makes a domain from its configuration.
        wait: returns when a domain may have ended, and at once the first time.
        say: for the log.
        program: xl.
        pause: waits this many seconds.
    """

    def __init__(
        self,
        domid: int,
        create: Create,
        wait: Callable[[], None],
        say: Say,
        *,
        program: str = "xl",
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._domid, self._create, self._wait, self._say = domid, create, wait, say
        self._program, self._pause = program, pause
        self._uuid = ""
        self._config: dict[str, Any] = {}

    def begin(self) -> XlDomain:
        """Look at the domain and its configuration.

        Raises:
            HypervisorFailed: it is not there, or xl does not tell.
        """
        domain = self._look()
        if domain is None:
            raise HypervisorFailed(f"there is no domain {self._domid}")
        self._uuid = domain.uuid
        self._config = self._configuration()
        return domain

    def run(self) -> None:
        """Until the domain is gone, or must be left to a person."""
        troubled = False
        while True:
            # What could not be done is not told a second time.
            self._pause(_POLL_SECONDS) if troubled else self._wait()
            troubled = False
            try:
                domain = self._look()
                if domain is None or domain.dying:
                    self._say(f"domain {self._domid} is gone")
                    return
                # A suspended one is on its way to another host, and may yet be resumed here.
                if domain.shutdown and not domain.suspended and not self._ended(domain):
                    return
            except HypervisorFailed as error:
                self._say(f"domain {self._domid}: {error}")
                troubled = True

    def _ended(self, domain: XlDomain) -> bool:
        """Do what its configuration says; whether there is something to wait for again."""
        with suppress(HypervisorFailed):
            self._config = self._configuration()  # memory and devices may have changed since
        action = str(self._config.get(_ACTIONS.get(domain.reason, ""), _DEFAULT_ACTION))
        self._say(f"{domain} has ended, reason {domain.reason!r}: {action}")
        if action.startswith("coredump_"):
            dump = _DUMPS / domain.name.replace("/", "_")
            self._xl("dump-core", str(self._domid), str(dump), seconds=XL_DESTROY_SECONDS_MAX)
            action = action.removeprefix("coredump_")
        if action not in {"destroy", "restart"}:
            self._say(f"{domain} is left as it is")
            return False
        self._xl("destroy", str(self._domid), seconds=XL_DESTROY_SECONDS_MAX)
        after = self._look()
        if after is not None and not after.dying:
            raise HypervisorFailed("it cannot be destroyed")
        if action == "destroy":
            return False
        self._pause(_RESTART_PAUSE_SECONDS)
        try:
            self._domid = self._create(self._config)
        except HypervisorFailed as error:
            self._say(f"{domain.name} is gone and could not be made anew: {error}; xl create its configuration")
            return False
        self._say(f"{domain.name} is domain {self._domid} now")
        return True

    def _look(self) -> XlDomain | None:
        code, out = self._xl("list", "-v")
        if code:
            raise HypervisorFailed("xl cannot list the domains")
        return next((now for now in read_list(out) if now.domid == self._domid and self._uuid in ("", now.uuid)), None)

    def _configuration(self) -> dict[str, Any]:
        code, out = self._xl("list", "-l", str(self._domid))
        try:
            config = json.loads(out)[0]["config"]
            if code or not isinstance(config["c_info"], dict):
                raise TypeError
        except (ValueError, LookupError, TypeError):
            raise HypervisorFailed(f"xl list -l {self._domid} shows no configuration") from None
        return dict(config)

    def _xl(self, *words: str, seconds: float = XL_SECONDS_MAX) -> tuple[int, str]:
        try:
            done = subprocess.run(
                [self._program, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise HypervisorFailed(f"xl {words[0]}: {error}") from None
        if len(done.stdout) > XL_OUTPUT_BYTES_MAX:
            raise HypervisorFailed(f"xl {words[0]} says too much")
        return done.returncode, done.stdout


def main(arguments: list[str]) -> int:
    """Start a monitor in the background, unless there is one."""
    parser = argparse.ArgumentParser(prog="xl_monitor", description="Wait for a Xen domain's end, as xl does.")
    parser.add_argument("--xl", default="xl", help="xl, by name or path")
    parser.add_argument("--libxl", default="", help="libxenlight, by name or path")
    parser.add_argument("--xenstored", default="/run/xenstored/socket", help="xenstored's socket")
    parser.add_argument("--locks", default="/run", type=Path, help="a folder of root's")
    parser.add_argument("domid", type=int)
    options = parser.parse_args(arguments)
    watch = Watch(options.xenstored)
    try:
        if _claim(options.domid, options.locks) is None:
            return 0
        libxl = Libxl(options.libxl or find())
        monitor = Monitor(options.domid, libxl.create, watch.wait, _say, program=options.xl)
        domain = monitor.begin()
    except HypervisorFailed as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if os.fork():
        return 0
    _detach(domain.name)
    _say(f"waiting for {domain} to end, process {os.getpid()}")
    monitor.run()
    return 0


def _detach(name: str) -> None:
    """Leave the starter's session and its descriptors; what is said goes to a log beside xl's."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    path = _LOGS / f"korora-monitor-{name.replace('/', '_')}.log"
    try:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    except OSError:
        log = null
    for fd, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, fd)
    for fd in {null, log}:
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)


def _say(words: str) -> None:
    sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {words}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

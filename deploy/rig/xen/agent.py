"""The hand of the tests inside a Xen host: takes orders as lines of JSON on a TCP port, and answers likewise.

    {"id": 7, "do": "run", "argv": ["xl", "list"], "timeout": 10}   →   {"id": 7, "rc": 0, "out": "…", "err": ""}

Orders run beside each other, each in a thread of its own. Networks are cut outside of the host, so this is always
reached. Only the standard library: it runs under the host's own Python.

Orders: hello · run · spawn · state · kill · put · get · files · processes · clock (see the functions of these names).
"""

import base64
import contextlib
import glob
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PORT = 8000
GATE = "10.0.2.15"  # on QEMU's user network, which only this machine's loopback reaches
LOGS = Path("/run/rig")
WORDS_BYTES_MAX = 64 * 1024  # of one command line
KTHREADD = 2
OUTPUT_BYTES_MAX = 4 * 1024 * 1024  # of each stream of a run; what is more stays behind
ENVIRONMENT = {
    "PATH": "/usr/bin:/usr/sbin:/usr/lib/xen-4.17/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
}

spawned: dict[str, subprocess.Popen[bytes]] = {}
kernels: set[int] = set()


def hello(_: dict[str, Any]) -> dict[str, Any]:
    """Says that somebody is here."""
    return {}


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Run `argv` to its end; after `timeout` seconds its whole process group is killed and `rc` is null."""
    child = subprocess.Popen(
        order["argv"],
        stdin=subprocess.PIPE if order.get("stdin") else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT | order.get("env", {}),
        start_new_session=True,
    )
    given = base64.b64decode(order["stdin"]) if order.get("stdin") else None
    rc: int | None
    try:
        out, err = child.communicate(given, timeout=order["timeout"])
        rc = child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, err = child.communicate()
        rc = None
    return {"rc": rc, "out": _text(out), "err": _text(err)}


def spawn(order: dict[str, Any]) -> dict[str, Any]:
    """Start `argv` under a `name`, in a session of its own, with NAME.out and NAME.err in /run/rig."""
    name = order["name"]
    if name in spawned and spawned[name].poll() is None:
        raise ValueError(f"{name} is still running")
    with open(LOGS / f"{name}.out", "wb") as out, open(LOGS / f"{name}.err", "wb") as err:
        child = subprocess.Popen(
            order["argv"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=ENVIRONMENT | order.get("env", {}),
            start_new_session=True,
        )
    spawned[name] = child
    return {"pid": child.pid}


def state(order: dict[str, Any]) -> dict[str, Any]:
    """The exit code of what was spawned as `name`, null while it runs; waits for the end up to `wait` seconds."""
    child = spawned[order["name"]]
    try:
        rc: int | None = child.wait(order.get("wait", 0))
    except subprocess.TimeoutExpired:
        rc = None
    out, err = ((LOGS / f"{order['name']}.{end}").read_bytes() for end in ("out", "err"))
    return {"rc": rc, "out": _text(out), "err": _text(err)}


def kill(order: dict[str, Any]) -> dict[str, Any]:
    """Send `signal` to the process `pid`, or to what was spawned as `name` (with `group`: to all of its session)."""
    pid = order["pid"] if "pid" in order else spawned[order["name"]].pid
    try:
        (os.killpg if order.get("group") else os.kill)(pid, order["signal"])
    except ProcessLookupError:
        return {"sent": False}
    return {"sent": True}


def put(order: dict[str, Any]) -> dict[str, Any]:
    """Write `data` (base64) to `path`, by way of a file beside it."""
    path = Path(order["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.touch(mode=order["mode"])
    fresh.write_bytes(base64.b64decode(order["data"]))
    fresh.rename(path)
    return {}


def get(order: dict[str, Any]) -> dict[str, Any]:
    """The bytes of `path` (base64); null where there is no such file."""
    try:
        return {"data": base64.b64encode(Path(order["path"]).read_bytes()).decode()}
    except FileNotFoundError:
        return {"data": None}


def files(order: dict[str, Any]) -> dict[str, Any]:
    """The texts of the files that `pattern` matches, by their paths: to start a program for that takes far longer."""
    found = {}
    for path in sorted(glob.glob(order["pattern"])):
        with contextlib.suppress(FileNotFoundError):
            found[path] = _text(Path(path).read_bytes())
    return {"files": found}


def processes(_: dict[str, Any]) -> dict[str, Any]:
    """Process ids and command lines of all that has one: neither the kernel's own nor what has ended.

    Tests ask for it hundreds of times: the kernel's, most of them, are not read again while their numbers are in use.
    """
    found, here = [], {int(name) for name in os.listdir("/proc") if name.isdecimal()}
    kernels.intersection_update(here)
    for pid in sorted(here - kernels):
        with contextlib.suppress(OSError):
            descriptor = os.open(f"/proc/{pid}/cmdline", os.O_RDONLY)
            try:
                words = os.read(descriptor, WORDS_BYTES_MAX).rstrip(b"\0")
            finally:
                os.close(descriptor)
            if words:
                found.append({"pid": pid, "args": _text(words.replace(b"\0", b" "))})
            elif _is_kernels(pid):
                kernels.add(pid)
    return {"processes": found}


def clock(order: dict[str, Any]) -> dict[str, Any]:
    """Set the wall clock to `now`, in seconds since 1970: a saved host wakes up in the past."""
    before = time.time()
    time.clock_settime(time.CLOCK_REALTIME, order["now"])
    return {"before": before}


ORDERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    order.__name__: order for order in (hello, run, spawn, state, kill, put, get, files, processes, clock)
}


def _is_kernels(pid: int) -> bool:
    """Whether it is a thread of the kernel, whose parent is kthreadd, or that itself."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return KTHREADD in (pid, parent)


def _text(data: bytes) -> str:
    return data[:OUTPUT_BYTES_MAX].decode(errors="replace")


class Client:
    """One connection: whole lines in, whole lines out."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Take orders until the other end closes."""
        with self._sock, self._sock.makefile("rb") as lines:
            for line in lines:
                threading.Thread(target=self._do, args=(line,), daemon=True).start()

    def _do(self, line: bytes) -> None:
        order = json.loads(line)
        try:
            answer = ORDERS[order["do"]](order)
        except Exception as error:  # noqa: BLE001 - whatever went wrong is the tests' to see
            answer = {"error": f"{type(error).__name__}: {error}"}
        with self._lock, contextlib.suppress(OSError):  # nobody may be left to hear it
            self._sock.sendall(json.dumps({"id": order["id"]} | answer).encode() + b"\n")


def main() -> None:
    """Serve until the host ends."""
    LOGS.mkdir(parents=True, exist_ok=True)
    with socket.create_server((GATE, PORT)) as listener:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=Client(sock).serve, daemon=True).start()


if __name__ == "__main__":
    main()

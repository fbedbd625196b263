"""Daemons as processes of their own on loopback, with the test standing where the hypervisors and operators stand."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crypto.pki import Authority
from tests.proxy.shell.test_processes import free_port
from tests.proxy.support import LISTEN_BACKLOG, Wire

SECONDS_MAX = 40.0  # no step of these tests takes longer, whatever else the machine does
POLL_SECONDS = 0.02
SERVE = (sys.executable, "-m", "korora", "serve", "--log-format", "json")


def until(condition: Callable[[], Any], what: str = "") -> Any:
    """Ask again and again; what is asked for comes from another process."""
    end = time.monotonic() + SECONDS_MAX
    while not (answer := condition()):
        assert time.monotonic() < end, what or "it never came to be"
        time.sleep(POLL_SECONDS)
    return answer


@dataclass
class Host:
    """One host: its daemon, its configuration, the ports of its hypervisors."""

    name: str
    folder: Path
    identity: Path
    port: int = field(default_factory=free_port)
    workers: int = 1
    settings: str = ""
    metrics: str = ""
    tables: list[str] = field(default_factory=list)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def config(self) -> Path:
        return self.folder / f"{self.name}.toml"

    @property
    def control(self) -> Path:
        return self.folder / f"{self.name}.sock"

    @property
    def state(self) -> Path:
        return self.folder / f"{self.name}.state"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def peer(self, name: str, address: str | None = None, more: str = "") -> None:
        where = "" if address is None else f'address = "{address}"\n'
        self.tables.append(f'[[peer]]\nname = "{name}"\n{where}{more}')

    def ingress(self, name: str, peer: str, *, egress: str = "default", port: int | None = None, more: str = "") -> int:
        port = free_port() if port is None else port
        self.tables.append(
            f'[[ingress]]\nname = "{name}"\nfrom = "tcp:127.0.0.1:{port}"\npeer = "{peer}"\negress = "{egress}"\n{more}'
        )
        return port

    def egress(self, name: str, to: str, more: str = "") -> None:
        self.tables.append(f'[[egress]]\nname = "{name}"\nto = "{to}"\n{more}')

    def text(self) -> str:
        head = f'identity = "{self.identity}"\nstate = "{self.state}"\ncontrol = "{self.control}"\n'
        head += f"workers = {self.workers}\n{self.settings}\n"
        head += f'[listen]\naddress = "{self.address}"\n[metrics]\naddress = "{self.metrics}"\n'
        return "\n".join([head, *self.tables]) + "\n"

    def write(self) -> None:
        self.config.write_text(self.text())

    def start(
        self, *, env: Mapping[str, str] | None = None, command: Iterable[str] = SERVE, ready: bool = True
    ) -> None:
        """Start the daemon, and wait until it is ready."""
        self.write()
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | dict(env or {}),
                close_fds=False,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        if ready:
            line = self.process.stdout.readline()
            assert line == b"ready\n", self.log()

    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's lines of one event."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def ask(self, command: str, **fields: Any) -> dict[str, Any]:
        """One request at the control socket, and its answer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(SECONDS_MAX)
            sock.connect(str(self.control))
            sock.sendall(json.dumps({"command": command} | fields).encode() + b"\n")
            with sock.makefile("rb") as stream:
                answer: dict[str, Any] = json.loads(stream.readline())
        return answer

    def status(self) -> dict[str, Any]:
        return self.ask("status")

    def sessions(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.status()["sessions"]
        return found

    def reports(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.state / "reports").glob("*.json"))]

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(SECONDS_MAX)

    def kill(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(2)
                if self.process.poll() is None:
                    self.process.terminate()  # the second one cuts what is left
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(10)
                self.process.kill()
                self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()


class Site:
    """A CA and its hosts, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.create(folder / "ca", now=datetime.now(UTC))
        self.hosts: dict[str, Host] = {}

    def host(self, name: str, **settings: Any) -> Host:
        identity = self.authority.issue(name, out=self.folder / f"{name}.identity", now=datetime.now(UTC)).directory
        made = self.hosts[name] = Host(name, self.folder, identity, **settings)
        return made

    def close(self) -> None:
        for host in self.hosts.values():
            host.kill()


class Machine:
    """The two hypervisors of one virtual machine: connects here, listens there. To be used inside a loop."""

    def __init__(self, port: int, listener: socket.socket) -> None:
        listener.setblocking(False)
        self.port, self.listener = port, listener
        self.near: list[Wire] = []
        self.far: list[Wire] = []

    async def connect(self) -> Wire:
        sock = socket.socket()
        wire = Wire(sock)
        self.near.append(wire)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        return wire

    async def accept(self) -> Wire:
        async with asyncio.timeout(SECONDS_MAX):
            sock, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        wire = Wire(sock)
        self.far.append(wire)
        return wire

    async def channel(self) -> tuple[Wire, Wire]:
        near = await self.connect()
        return near, await self.accept()

    def close(self) -> None:
        for wire in (*self.near, *self.far):
            wire.close()
        self.listener.close()


def waiting_hypervisor() -> tuple[socket.socket, str]:
    """A hypervisor that waits for migrations, and the endpoint it is reached by."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=LISTEN_BACKLOG)
    return listener, f"tcp:127.0.0.1:{listener.getsockname()[1]}"


async def exchange(near: Wire, far: Wire, forward: bytes, backward: bytes) -> None:
    """Send both ways at once, each to its end, and compare every byte."""

    async def one_way(origin: Wire, target: Wire, data: bytes) -> None:
        async def send() -> None:
            await origin.send(data)
            origin.shut()

        sending = asyncio.create_task(send())
        assert await target.to_end() == data
        await sending

    await asyncio.gather(one_way(near, far, forward), one_way(far, near, backward))


async def echo(near: Wire, far: Wire) -> None:
    """One byte each way: the session is alive."""
    for origin, target in ((near, far), (far, near)):
        await origin.send(b"?")
        assert await target.exactly(1) == b"?"


async def in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run what blocks beside the loop."""
    return await asyncio.to_thread(work, *arguments)

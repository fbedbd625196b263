"""Relays as the commands an operator types, in processes of their own, with the attacker between them."""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.attacks.mitm import Attack, Mitm, let_pass
from tests.attacks.relays import Script, Side, talk

KORORA = (sys.executable, "-m", "korora")
READY_SECONDS = 20.0  # half a second, unless the machine is very busy
END_SECONDS = 30.0


class Relay:
    """One `korora receive` or `korora send`; an async context manager that reaps it."""

    def __init__(self, *arguments: str | Path) -> None:
        self._arguments = [*(str(argument) for argument in arguments), "--log-format", "json"]
        self.command: tuple[str, ...] = KORORA
        """What is run, before the arguments."""
        self._reading: list[asyncio.Task[None]] = []
        self._told = asyncio.Event()
        self.process: asyncio.subprocess.Process
        self.events: list[dict[str, Any]] = []
        """What it logged."""
        self.lines: list[str] = []
        """What else it wrote to standard error."""
        self.output = bytearray()
        """What it wrote to standard output."""

    async def __aenter__(self) -> Self:
        """Start it."""
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(
            *self.command, *self._arguments, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
        )
        self._reading = [asyncio.create_task(self._hear()), asyncio.create_task(self._take())]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Make sure that it has ended."""
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        await asyncio.gather(*self._reading)

    async def _hear(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            with suppress(ValueError):
                self.events.append(json.loads(line))
                self._told.set()
                continue
            self.lines.append(line.decode().rstrip("\n"))
        self._told.set()

    async def _take(self) -> None:
        assert self.process.stdout is not None
        while data := await self.process.stdout.read(65536):
            self.output += data

    async def event(self, name: str) -> dict[str, Any]:
        """The first log event of that name."""
        async with asyncio.timeout(READY_SECONDS):
            while True:
                for event in self.events:
                    if event.get("event") == name:
                        return event
                assert self.process.returncode is None, (self.process.returncode, self.lines)
                self._told.clear()
                await self._told.wait()

    async def listening(self) -> int:
        """The port it listens on: `receive` for relays, `send` for its hypervisor."""
        event = await self.event("listening" if self._arguments[0] == "receive" else "taking migrations")
        return int(str(event.get("address") or event["source"]).rpartition(":")[2])

    async def ended(self) -> int:
        """Its exit code."""
        async with asyncio.timeout(END_SECONDS):
            await asyncio.gather(*self._reading)
            return await self.process.wait()

    @property
    def complaint(self) -> str:
        """Its one line for people about what went wrong; "" if nothing did."""
        complaints = [line for line in self.lines if line.startswith("korora: error: ")]
        assert len(complaints) <= 1, self.lines
        assert not any("Traceback" in line for line in self.lines), self.lines
        return complaints[0] if complaints else ""


@dataclass
class Pair:
    """Two relays, the attacker between them, the source's hypervisor."""

    receive: Relay
    send: Relay
    mitm: Mitm
    folder: Path
    here: Side = field(default_factory=Side)

    async def talk(self, script: Script) -> Side:
        """The source's hypervisor connects and speaks, until its connection ends."""
        with socket.socket() as sock:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", await self.send.listening()))
            async with asyncio.timeout(END_SECONDS):
                await talk(sock, self.here, [(say, len(answer)) for say, answer in script])
        return self.here

    async def codes(self) -> tuple[int, int]:
        """Both exit codes, the source's first."""
        source, destination = await asyncio.gather(self.send.ended(), self.receive.ended())
        return source, destination

    def reports(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both reports, the source's first."""
        source, destination = ((self.folder / f"{name}.json").read_text() for name in ("send", "receive"))
        return json.loads(source), json.loads(destination)


@dataclass(frozen=True, slots=True)
class Hosts:
    """The identity folders of the two hosts: alpha sends, beta receives."""

    alpha: Path
    beta: Path


@asynccontextmanager
async def pair(
    hosts: Hosts,
    folder: Path,
    to: str,
    attack: Attack = let_pass,
    *,
    expected: tuple[str, str] = ("beta", "alpha"),
    resume_seconds: int = 0,
) -> AsyncIterator[Pair]:
    """`korora receive --to ...` and `korora send --from tcp:...`, each with --once, with the attacker between them.

    `expected` are the names that the source and the destination expect of each other.
    """
    async with (
        Mitm(("127.0.0.1", 0), attack) as mitm,
        Relay(
            *("receive", "--listen", "127.0.0.1:0", "--to", to, "--identity", hosts.beta, "--name", expected[1]),
            *("--once", "--report", folder / "receive.json", "--resume-timeout", str(resume_seconds)),
        ) as destination,
        Relay(
            *("send", "--from", "tcp:127.0.0.1:0", "--peer", f"127.0.0.1:{mitm.port}", "--identity", hosts.alpha),
            *("--name", expected[0], "--once", "--report", folder / "send.json"),
            *("--resume-timeout", str(resume_seconds)),
        ) as source,
    ):
        mitm.target = ("127.0.0.1", await destination.listening())
        yield Pair(destination, source, mitm, folder)

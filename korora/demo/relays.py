"""The pair of relays between the two QEMUs, as the commands a person would type, and the throw-away PKI they need."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from korora.demo import process
from korora.demo.errors import EXIT_BUG, DemoError

KORORA = (sys.executable, "-m", "korora")
READY_SECONDS = 20.0  # starting Python and its modules takes under a second, unless the machine is very busy
END_SECONDS = 30.0  # after the migration: END frames, receipts, report
VALID_DAYS = 1  # nothing of the demo outlives its day


@dataclass(frozen=True, slots=True)
class Identities:
    """The identity folders of the two hosts, which one throw-away CA has signed."""

    source: Path
    destination: Path


def issue_identities(folder: Path) -> Identities:
    """Make a CA in `folder` and complete identities for the hosts "source" and "destination"."""
    from crypto.pki import Authority

    now = datetime.now(UTC)
    authority = Authority.create(folder / "ca", now=now, name="Korora demo CA", days=VALID_DAYS)
    hosts = Identities(folder / "host-source", folder / "host-destination")
    authority.issue("source", now=now, out=hosts.source, days=VALID_DAYS)
    authority.issue("destination", now=now, out=hosts.destination, days=VALID_DAYS)
    return hosts


class Relay:
    """One `korora send` or `korora receive` in a process of its own; an async context manager that reaps it.

    Args:
        name: for its files and messages: "send" or "receive".
        arguments: the command line after `korora`.
        folder: where its report and log go.
    """

    def __init__(self, name: str, arguments: Sequence[str | Path], folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.report_file = folder / f"{name}-report.json"
        self._command = [*KORORA, *arguments, "--report", self.report_file]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The process id of the running relay."""
        return self._child.pid

    @property
    def _child(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise DemoError(f"korora {self.name} is not running", EXIT_BUG)
        return self._process

    async def start(self) -> None:
        """Start it and wait for its `ready`. Raises DemoError, with its exit code and words, when it ends."""
        self._process = await process.start(self._command, self.log)
        line = b""
        if self._process.stdout is not None:
            try:
                async with asyncio.timeout(READY_SECONDS):
                    line = await self._process.stdout.readline()
            except TimeoutError:
                raise DemoError(f"korora {self.name} was not ready after {READY_SECONDS:g} s", EXIT_BUG) from None
        if line.strip() != b"ready":
            code = await process.end(self._process)
            why = process.why_ended(code, self.log) if code else f"it said {line!r} where `ready` was expected"
            raise DemoError(f"korora {self.name}: {why}", code if code > 0 else EXIT_BUG)

    async def wait(self, timeout_seconds: float = END_SECONDS) -> int:
        """Its exit code once it has ended by itself. Raises TimeoutError."""
        async with asyncio.timeout(timeout_seconds):
            return await self._child.wait()

    def report(self) -> dict[str, Any]:
        """The report it wrote at its end. Raises DemoError when there is none."""
        try:
            report: dict[str, Any] = json.loads(self.report_file.read_text())
        except (OSError, ValueError) as error:
            raise DemoError(f"korora {self.name} left no report: {error}", EXIT_BUG) from None
        return report

    async def stop(self) -> None:
        """End it, by SIGTERM and then SIGKILL."""
        if self._process is not None:
            await process.end(self._process)


class RelayPair:
    """`korora receive` and `korora send` side by side on this machine.

    Args:
        identities: who they are to each other.
        folder: for reports and logs.
        ingress: the ENDPOINT the source's hypervisor connects to.
        egress: the ENDPOINT of the destination's hypervisor, which has to listen by the time a session opens.
        send_options, receive_options: further words for the two command lines.
        through: where the source finds its peer, if not at the peer itself: what stands there carries to ``address``.
    """

    def __init__(
        self,
        identities: Identities,
        folder: Path,
        *,
        ingress: str,
        egress: str,
        send_options: Sequence[str] = (),
        receive_options: Sequence[str] = (),
        through: str | None = None,
    ) -> None:
        address = f"127.0.0.1:{free_port()}"
        self.address = address
        """Where the destination's relay listens."""
        receive: list[str | Path] = [
            "receive",
            "--listen",
            address,
            "--to",
            egress,
            "--identity",
            identities.destination,
        ]
        receive += ["--name", "source", "--once", *receive_options]
        send: list[str | Path] = ["send", "--from", ingress, "--peer", through or address]
        send += ["--identity", identities.source, "--name", "destination", "--once", *send_options]
        self.receive = Relay("receive", receive, folder)
        self.send = Relay("send", send, folder)

    async def wait(self, timeout_seconds: float = END_SECONDS) -> tuple[int, int]:
        """The exit codes of `send` and `receive` once both have ended by themselves. Raises TimeoutError."""
        async with asyncio.timeout(timeout_seconds):
            return await self.send.wait(timeout_seconds), await self.receive.wait(timeout_seconds)

    async def __aenter__(self) -> Self:
        try:
            # Both need a second to start; the sender connects to the receiver only when a migration comes in.
            async with asyncio.TaskGroup() as group:
                group.create_task(self.receive.start())
                group.create_task(self.send.start())
        except BaseException as error:
            await self._stop()
            if isinstance(error, BaseExceptionGroup) and isinstance(error.exceptions[0], DemoError):
                raise error.exceptions[0] from None
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        await asyncio.gather(self.send.stop(), self.receive.stop())


def free_port() -> int:
    """A TCP port on the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port

"""Orders to the agent inside a Xen host (deploy/rig/xen/agent.py)."""

import asyncio
import base64
import contextlib
import itertools
import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

LINE_BYTES_MAX = 64 * 1024 * 1024  # the largest answer is a file in base64
ANSWER_SECONDS = 30.0  # beyond the order's own time-out; two emulated hosts share few processors
HELLO_SECONDS = 2.0


class AgentError(Exception):
    """The agent could not do what it was told, gave no answer, or is gone."""


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended; `rc` is None when it had to be killed at its time-out."""

    rc: int | None
    out: str
    err: str


class Agent:
    """The connection to one host's agent. `Agent.connect` makes one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._gone = False
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, port: int) -> Self:
        """Connect to where a host's agent is reached on this machine. Raises AgentError when it does not answer."""
        agent = None
        try:
            agent = cls(*await asyncio.open_connection("127.0.0.1", port, limit=LINE_BYTES_MAX))
            await agent.order("hello", HELLO_SECONDS)  # QEMU takes connections before there is an agent
        except (OSError, AgentError) as error:
            if agent is not None:
                await agent.close()
            raise AgentError(f"there is no agent at port {port}: {error}") from None
        return agent

    async def order(self, do: str, seconds: float = ANSWER_SECONDS, **what: Any) -> dict[str, Any]:
        """Give one order and return its answer. Raises AgentError when it failed or there is none in `seconds`."""
        if self._gone:
            raise AgentError(f"{do}: the host is gone")
        number = next(self._ids)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        line = json.dumps({"id": number, "do": do} | what).encode()
        try:
            self._writer.write(line + b"\n")
            async with asyncio.timeout(seconds):
                await self._writer.drain()
                given = await answer
        except (TimeoutError, OSError) as error:
            raise AgentError(f"no answer to {do} in {seconds:g} s ({error!r})") from None
        finally:
            self._waiting.pop(number, None)
        if "error" in given:
            raise AgentError(f"{do}: {given['error']}")
        return given

    async def run(
        self, argv: Sequence[str], timeout_seconds: float = 30.0, *, stdin: bytes = b"", env: Mapping[str, str] = {}
    ) -> Done:
        """Run a command to its end; without `stdin` it has none."""
        given = await self.order(
            "run",
            timeout_seconds + ANSWER_SECONDS,
            argv=list(argv),
            timeout=timeout_seconds,
            stdin=base64.b64encode(stdin).decode(),
            env=dict(env),
        )
        return Done(given["rc"], given["out"], given["err"])

    async def spawn(self, name: str, argv: Sequence[str], *, env: Mapping[str, str] = {}) -> int:
        """Start a command in the background under a name; its process id."""
        return int((await self.order("spawn", name=name, argv=list(argv), env=dict(env)))["pid"])

    async def state(self, name: str, wait_seconds: float = 0.0) -> Done:
        """How a spawned command stands, after waiting for its end for so long: `rc` is None while it runs."""
        given = await self.order("state", wait_seconds + ANSWER_SECONDS, name=name, wait=wait_seconds)
        return Done(given["rc"], given["out"], given["err"])

    async def kill(self, target: str | int, number: signal.Signals = signal.SIGKILL, *, group: bool = False) -> bool:
        """Send a signal to a spawned command or a process id (`group`: to its session); whether there was one."""
        whom: dict[str, Any] = {"name" if isinstance(target, str) else "pid": target}
        return bool((await self.order("kill", **whom, signal=int(number), group=group))["sent"])

    async def put(self, path: str, data: bytes, mode: int = 0o600) -> None:
        """Write a file, with the folders above it."""
        await self.order("put", path=path, data=base64.b64encode(data).decode(), mode=mode)

    async def get(self, path: str) -> bytes | None:
        """Read a file; None where there is none."""
        data = (await self.order("get", path=path))["data"]
        return None if data is None else base64.b64decode(data)

    async def files(self, pattern: str) -> dict[str, str]:
        """The texts of the files that a pattern matches, by their paths."""
        found: dict[str, str] = (await self.order("files", pattern=pattern))["files"]
        return found

    async def processes(self) -> list[tuple[int, str]]:
        """Process ids and command lines of all that runs."""
        return [(one["pid"], one["args"]) for one in (await self.order("processes"))["processes"]]

    async def set_clock(self) -> None:
        """Give the host this machine's time of day."""
        await self.order("clock", now=time.time())

    async def close(self) -> None:
        """Close the connection; the agent stays."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                given = json.loads(line)
                waiting = self._waiting.get(given["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(given)
        except OSError:
            pass
        finally:
            self._gone = True
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_result({"error": "the host is gone"})

"""A small QMP client: commands with time-outs, events kept in order (qemu docs/interop/qmp-spec.rst)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

KIB = 1024
LINE_BYTES_MAX = 1024 * KIB  # one answer; the longest in use here is a few KiB
EVENTS_MAX = 10_000  # kept events; a migration sends one a pass
COMMAND_TIMEOUT_SECONDS = 15.0  # QEMU answers at once unless its main loop is stuck
CONNECT_POLL_SECONDS = 0.02


class QmpError(Exception):
    """QEMU refused a command (`error_class` as in the specification), or the connection is gone (`Gone`)."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{command}: {description}")
        self.command = command
        self.error_class = error_class
        self.description = description


@dataclass(frozen=True, slots=True)
class Event:
    """An event of QEMU: its name, its data, and the event loop's time of its arrival in seconds."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    at: float = 0.0


class Qmp:
    """One QMP connection. `Qmp.connect` makes one; use it as an async context manager or call `close`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._changed = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self.events: list[Event] = []
        self.gone = False

    @classmethod
    async def connect(cls, path: Path, timeout_seconds: float = COMMAND_TIMEOUT_SECONDS) -> Self:
        """Connect to the unix socket `path`, waiting for QEMU to open it, and leave negotiation mode.

        Raises QmpError when nobody answers within `timeout_seconds`.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                        reader, writer = await asyncio.open_unix_connection(path, limit=LINE_BYTES_MAX)
                        break
                    await asyncio.sleep(CONNECT_POLL_SECONDS)
                client = cls(reader, writer)
                greeting = await reader.readline()
        except TimeoutError:
            raise QmpError("connect", "Gone", f"no QMP greeting at {path} in {timeout_seconds:g} s") from None
        if b'"QMP"' not in greeting:
            writer.close()
            raise QmpError("connect", "Gone", f"{path} does not speak QMP")
        client._reading = asyncio.create_task(client._read())
        await client.execute("qmp_capabilities")
        return client

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run `command` and return its answer; an underscore in an argument's name stands for a hyphen.

        Raises QmpError when QEMU says no, closes the connection, or is silent for COMMAND_TIMEOUT_SECONDS.
        """
        if self.gone:
            raise QmpError(command, "Gone", "QEMU has closed the connection")
        number = next(self._ids)
        request: dict[str, Any] = {"execute": command, "id": number}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._writer.write(json.dumps(request).encode() + b"\n")
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
                message = await answer
        except TimeoutError:
            raise QmpError(command, "Gone", f"no answer in {COMMAND_TIMEOUT_SECONDS:g} s") from None
        finally:
            self._waiting.pop(number, None)
        if "error" in message:
            error = message["error"]
            raise QmpError(command, str(error.get("class")), str(error.get("desc")))
        return message.get("return")

    async def wait_event(
        self,
        name: str,
        timeout_seconds: float,
        matching: Callable[[dict[str, Any]], bool] = lambda _: True,
        *,
        since: int = 0,
    ) -> Event:
        """The first event `name` whose data are `matching`, whether it has come already or is to come.

        `since` is the length that `events` had: older ones are left out.

        Raises QmpError when QEMU goes away first, TimeoutError after `timeout_seconds`.
        """
        looked_at = since
        async with asyncio.timeout(timeout_seconds):
            while True:
                for event in self.events[looked_at:]:
                    if event.name == name and matching(event.data):
                        return event
                looked_at = len(self.events)
                if self.gone:
                    raise QmpError(f"waiting for {name}", "Gone", "QEMU has closed the connection")
                self._changed.clear()
                await self._changed.wait()

    async def close(self) -> None:
        """Close the connection; QEMU itself runs on."""
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _read(self) -> None:
        """Hand answers to those who wait and keep events, until QEMU closes or sends what is no QMP."""
        clock = asyncio.get_running_loop().time
        try:
            while line := await self._reader.readline():
                message = json.loads(line)
                if "event" in message:
                    if len(self.events) < EVENTS_MAX:
                        self.events.append(Event(message["event"], message.get("data") or {}, clock()))
                    self._changed.set()
                    continue
                waiting = self._waiting.get(message.get("id"))
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
        except (OSError, ValueError):  # reset; or a line too long or not JSON
            pass
        finally:
            self.gone = True
            self._changed.set()
            gone = {"error": {"class": "Gone", "desc": "QEMU has closed the connection"}}
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_result(gone)

"""A QMP client: one connection to one QEMU, commands with time-outs, events in order (qemu docs/interop/qmp-spec.rst).

Not qemu.qmp of PyPI (0.0.6), which was tried and does work under uvloop. It keeps every event it ever heard, so that a
guest that makes its QEMU talk makes the relay grow (20000 events sent, 20000 kept); a QEMU that is silent holds its
caller for ever; a connection that broke has to be taken down by a second call, which raises. What would be left of it
behind a bound, a time-out and our errors is the pairing of answers with commands: a dictionary, against a dependency.
"""

import asyncio
import contextlib
import errno
import itertools
import json
import os
import socket
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from proxy.limits import QMP_ANSWER_SECONDS_MAX, QMP_EVENTS_MAX, QMP_LINE_BYTES_MAX

GONE: Final = "Gone"  # our own error classes beside QEMU's: the connection ended,
SILENT: Final = "Silent"  # there was no answer in time,
ABSENT: Final = "Absent"  # nobody listens: no QEMU, or it is not as far yet
CONNECT_POLL_SECONDS: Final = 0.02
# A unix socket whose queue (QEMU's has two places) is full says EAGAIN; asyncio's own loop makes another error of it.
FULL: Final = frozenset({errno.EAGAIN, errno.EINVAL, errno.ENOTCONN})
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred, unix(7): pid, uid, gid


class QmpError(Exception):
    """QEMU refused a command (``error_class`` as in the specification), or cannot be asked (GONE, SILENT, ABSENT)."""

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
    """One QMP connection. ``Qmp.connect`` makes one; use it as an async context manager or call ``close``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wanted: Collection[str]) -> None:
        self._reader = reader
        self._writer = writer
        self._wanted = frozenset(wanted)
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._changed = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self.events: list[Event] = []
        """The first QMP_EVENTS_MAX of them; later ones are counted only."""
        self.heard = 0
        """How many events there were, those included that are not kept."""
        self.gone = False

    @classmethod
    async def connect(
        cls,
        path: Path,
        timeout_seconds: float | None = None,
        *,
        patient: bool = True,
        wanted: Collection[str] = (),
    ) -> Self:
        """Connect to the unix socket ``path`` and leave negotiation mode.

        Args:
            path: what QEMU's ``-qmp unix:PATH,server=on,wait=off`` names.
            timeout_seconds: until the greeting has to be there; None for QMP_ANSWER_SECONDS_MAX.
            patient: wait until QEMU has opened its socket.
            wanted: names of events to keep and to wake for; empty for all.

        Raises:
            QmpError: ABSENT at once if nobody listens and nobody is ``patient``; SILENT after ``timeout_seconds``;
                GONE for any other reason.
        """
        seconds = QMP_ANSWER_SECONDS_MAX if timeout_seconds is None else timeout_seconds
        writer: asyncio.StreamWriter | None = None
        client: Self | None = None
        try:
            async with asyncio.timeout(seconds):
                reader, writer, greeting = await _greeted(path, patient=patient)
            if b'"QMP"' not in greeting:
                raise QmpError("connect", GONE, f"{path} does not speak QMP")
            client = cls(reader, writer, wanted)
            client._reading = asyncio.create_task(client._read())
            await client.execute("qmp_capabilities")
        except TimeoutError:
            raise QmpError("connect", SILENT, f"no QMP greeting at {path} in {seconds:g} s") from None
        except (FileNotFoundError, ConnectionRefusedError):
            raise QmpError("connect", ABSENT, f"nobody listens at {path}") from None
        except (OSError, ValueError) as error:
            raise QmpError("connect", GONE, f"{path}: {error}") from None
        else:
            writer = None
            return client
        finally:
            if writer is not None:  # it did not come to an end above
                await (client.close() if client is not None else _close(writer))

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run ``command`` and return its answer; an underscore in an argument's name stands for a hyphen.

        Raises:
            QmpError: QEMU says no, or closes the connection (GONE), or is silent for QMP_ANSWER_SECONDS_MAX (SILENT).
        """
        if self.gone:
            raise QmpError(command, GONE, "QEMU has closed the connection")
        number = next(self._ids)
        request: dict[str, Any] = {"execute": command, "id": number}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._writer.write(json.dumps(request).encode() + b"\n")
        try:
            async with asyncio.timeout(QMP_ANSWER_SECONDS_MAX):
                message = await answer
        except TimeoutError:
            raise QmpError(command, SILENT, f"no answer in {QMP_ANSWER_SECONDS_MAX:g} s") from None
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
        """The first event ``name`` whose data are ``matching``, whether it has come already or is to come.

        ``since`` is the length that ``events`` had: older ones are left out.

        Raises:
            QmpError: QEMU goes away first.
            TimeoutError: after ``timeout_seconds``.
        """
        looked_at = since
        async with asyncio.timeout(timeout_seconds):
            while True:
                for event in self.events[looked_at:]:
                    if event.name == name and matching(event.data):
                        return event
                looked_at = len(self.events)
                if self.gone:
                    raise QmpError(f"waiting for {name}", GONE, "QEMU has closed the connection")
                self._changed.clear()
                await self._changed.wait()

    async def wait_news(self, heard: int, timeout_seconds: float) -> None:
        """Wait until there were more than ``heard`` events, or QEMU is gone, or ``timeout_seconds`` have passed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                while self.heard <= heard and not self.gone:
                    self._changed.clear()
                    await self._changed.wait()

    async def close(self) -> None:
        """Close the connection; QEMU itself runs on."""
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
        await _close(self._writer)

    def drop(self) -> None:
        """Close the connection without waiting for its end; nobody may use it afterwards."""
        if self._reading is not None:
            self._reading.cancel()
        self.gone = True
        self._writer.transport.abort()

    @property
    def process_id(self) -> int:
        """Of the process that listens at the other end (``SO_PEERCRED``, unix(7)); 0 if it is in another namespace.

        Raises:
            OSError: the connection has gone.
        """
        there: socket.socket = self._writer.get_extra_info("socket")
        with socket.socket(fileno=os.dup(there.fileno())) as twin:
            pid: int = _CREDENTIALS.unpack(twin.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
        return pid

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _read(self) -> None:
        """Hand answers to those who wait and keep events, until QEMU closes or sends what is no QMP."""
        try:
            while line := await self._reader.readline():
                self._take(json.loads(line))
        except (OSError, ValueError, RecursionError):  # reset; a line too long, not JSON, or nested to exhaust us
            pass
        finally:
            self.gone = True
            self._changed.set()
            gone = {"error": {"class": GONE, "desc": "QEMU has closed the connection"}}
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_result(gone)

    def _take(self, message: Any) -> None:
        """One message of QEMU. Raises ValueError if it is none."""
        if not isinstance(message, dict) or not isinstance(message.get("error", {}), dict):
            raise ValueError("not a QMP message")  # noqa: TRY004 # of the same kind as a line that is no JSON
        if "event" in message:
            name, data = message["event"], message.get("data")
            if self._wanted and name not in self._wanted:
                return
            self.heard += 1
            if len(self.events) < QMP_EVENTS_MAX:
                at = asyncio.get_running_loop().time()
                self.events.append(Event(str(name), data if isinstance(data, dict) else {}, at))
            self._changed.set()
            return
        number = message.get("id")
        waiting = self._waiting.get(number) if isinstance(number, int) else None
        if waiting is not None and not waiting.done():
            waiting.set_result(message)


async def _greeted(path: Path, *, patient: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    """A connection and the first line on it, as soon as ``path`` takes one."""
    while True:
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=QMP_LINE_BYTES_MAX)
            greeting = await reader.readline()
        except BaseException as error:
            if writer is not None:
                await _close(writer)
            full = isinstance(error, OSError) and error.errno in FULL
            early = patient and isinstance(error, FileNotFoundError | ConnectionRefusedError)
            if not full and not early:
                raise
        else:
            return reader, writer, greeting
        await asyncio.sleep(CONNECT_POLL_SECONDS)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()

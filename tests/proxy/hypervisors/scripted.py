"""A QEMU of a few lines: its monitor answers as QEMU's does (qapi/migration.json, misc.json, run-state.json).

Its states move as the real ones do, on commands and when a test says so; what a test wants otherwise it puts into `on`.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}}, "capabilities": []}}\r\n'
NIL = "00000000-0000-0000-0000-000000000000"


class Refused(Exception):
    """Raised by a command to answer with an error, of the given class."""

    def __init__(self, why: str, error_class: str = "GenericError") -> None:
        super().__init__(why)
        self.error_class = error_class


class ScriptedQemu:
    """One QEMU.

    Args:
        status, migration: where it begins.
    """

    def __init__(self, path: Path, status: str, migration: str = "none") -> None:
        self.path = path
        self.status = status
        self.migration = migration
        self.why = ""
        self.uuid = NIL
        self.before = "running"
        self.autostart = True
        known = ("events", "pause-before-switchover", "late-block-activate", "postcopy-ram", "x-colo")
        self.capabilities = dict.fromkeys(known, False)
        self.commands: list[str] = []
        self.ever_ran = status == "running"
        self.on: dict[str, Callable[[dict[str, Any]], Any]] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Open the monitor."""
        self._server = await asyncio.start_unix_server(self._talk, self.path)

    def end(self, *, unlink: bool = True) -> None:
        """The process ends: tidily, or as by SIGKILL, which leaves the socket's file."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.close()
        if unlink:
            self.path.unlink(missing_ok=True)

    def break_connections(self) -> None:
        """Close every connection; go on listening."""
        for writer in list(self._writers):
            writer.close()

    def become(self, status: str | None = None, migration: str | None = None, why: str = "") -> None:
        """Move on, and say so in events as QEMU does."""
        if status is not None and status != self.status:
            runs = self.status in {"running", "suspended"}
            self.status = status
            if (status in {"running", "suspended"}) != runs:
                self.event("STOP" if runs else "RESUME")
            self.ever_ran |= status == "running"
        if migration is not None:
            self.migration, self.why = migration, why
            if self.capabilities["events"]:
                self.event("MIGRATION", status=migration)

    def event(self, name: str, **data: Any) -> None:
        """Send an event to whoever is connected."""
        for writer in self._writers:
            writer.write(json.dumps({"event": name, "data": data}).encode() + b"\r\n")

    def halt(self) -> None:
        """The source reaches its switch-over."""
        self.before = self.status
        self.become("finish-migrate")
        if self.capabilities["pause-before-switchover"]:
            self.become(migration="pre-switchover")
        else:
            self.become("postmigrate", "completed")

    def arrive(self) -> None:
        """All of the machine is here."""
        self.become("running" if self.autostart else "paused", "completed")

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        writer.write(GREETING)
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                request = json.loads(line)
                command = request["execute"]
                reply: dict[str, Any] = {"id": request["id"]}
                try:
                    reply["return"] = self._answer(command, request.get("arguments", {}))
                except Refused as refusal:
                    reply["error"] = {"class": refusal.error_class, "desc": str(refusal)}
                if reply.get("return") is not NotImplemented:
                    writer.write(json.dumps(reply).encode() + b"\r\n")
                if command == "quit" and "return" in reply and reply["return"] is not NotImplemented:
                    self.end()
        self._writers.discard(writer)
        writer.close()

    def _answer(self, command: str, arguments: dict[str, Any]) -> Any:
        """NotImplemented stands for no answer at all."""
        if not command.startswith("query-") and command != "qmp_capabilities":
            self.commands.append(command)
        if command in self.on:
            return self.on[command](arguments)
        plain = command.replace("-", "_")
        known: Callable[[dict[str, Any]], Any] | None = getattr(self, f"do_{plain}", None)
        if known is None:
            raise Refused(f"The command {command} has not been found", "CommandNotFound")
        return known(arguments)

    def do_qmp_capabilities(self, _: Any) -> Any:
        return {}

    def do_query_status(self, _: Any) -> Any:
        return {"status": self.status, "running": self.status == "running"}

    def do_query_migrate(self, _: Any) -> Any:
        if self.migration == "none":
            return {}
        return {"status": self.migration} | ({"error-desc": self.why} if self.why else {})

    def do_query_name(self, _: Any) -> Any:
        return {"name": "vm1"}

    def do_query_uuid(self, _: Any) -> Any:
        return {"UUID": self.uuid}

    def do_query_migrate_capabilities(self, _: Any) -> Any:
        return [{"capability": name, "state": state} for name, state in self.capabilities.items()]

    def do_migrate_set_capabilities(self, arguments: dict[str, Any]) -> Any:
        if self.migration in {"setup", "active", "pre-switchover", "device"}:
            raise Refused("There's a migration process in progress")
        for entry in arguments["capabilities"]:
            self.capabilities[entry["capability"]] = entry["state"]
        return {}

    def do_stop(self, _: Any) -> Any:
        if self.status == "inmigrate":
            self.autostart = False
        else:
            self.become("paused")
        return {}

    def do_cont(self, _: Any) -> Any:
        if self.status == "inmigrate":
            self.autostart = True
        elif self.status == "finish-migrate":
            raise Refused("Migration is not finalized yet")
        else:
            self.become("running")
        return {}

    def do_migrate_continue(self, arguments: dict[str, Any]) -> Any:
        if arguments["state"] != self.migration:
            raise Refused(f"Migration not in expected state: {self.migration}")
        if self.migration == "pre-switchover":
            self.become(migration="device")
        elif self.migration == "cancelling":
            self.become(self.before, "cancelled")
        return {}

    def do_migrate_cancel(self, _: Any) -> Any:
        if self.migration in {"setup", "active", "pre-switchover", "device"}:
            was = self.before if self.status == "finish-migrate" else self.status
            self.become(migration="cancelling")
            self.become(was, "cancelled")
        return {}

    def do_quit(self, _: Any) -> Any:
        return {}


@asynccontextmanager
async def scripted(path: Path, status: str, migration: str = "none") -> AsyncIterator[ScriptedQemu]:
    """A ScriptedQemu that listens, and ends with the block."""
    qemu = ScriptedQemu(path, status, migration)
    await qemu.listen()
    try:
        yield qemu
    finally:
        qemu.end()

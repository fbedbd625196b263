"""Asking one QEMU how it stands, over a connection that is made anew when it breaks; whether it has ended."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Final

from proxy.errors import HypervisorFailed
from proxy.handover.table import Side
from proxy.hypervisors.base import Vm
from proxy.hypervisors.monitor import ABSENT, GONE, SILENT, Qmp, QmpError
from proxy.limits import QMP_CONNECTS_MAX, QMP_POLL_SECONDS, QMP_RETRY_SECONDS
from proxy.process import lives, written_down

NIL_UUID: Final = "00000000-0000-0000-0000-000000000000"  # of a QEMU without -uuid
NEWS: Final = frozenset({"MIGRATION", "STOP", "RESUME", "SHUTDOWN"})  # events of QEMU that change how it stands
SOCKETS: Final = Path("/proc/net/unix")
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
UNKNOWN: Final = "?"  # a copy's, where the process that listens is in another namespace, say


ANY: Final = Vm("", "")  # whichever machine this QEMU has


@dataclass(frozen=True, slots=True)
class Look:
    """What QEMU said of itself: its RunState, its MigrationStatus (``none`` before any), and why that failed."""

    status: str
    migration: str = "none"
    why: str = ""


class QemuAsking:
    """One QEMU and the connection to its monitor.

    It connects when it is first asked, and again when QEMU has closed the connection. QEMU serves one client a monitor
    at a time: ``close`` it as soon as the session is over.

    Args:
        path: the monitor's unix socket, for this relay alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._qmp: Qmp | None = None
        self._connecting = asyncio.Lock()

    async def close(self) -> None:
        """Close the connection, if there is one; the next question opens another."""
        qmp, self._qmp = self._qmp, None
        if qmp is not None:
            await qmp.close()

    def let_go(self) -> None:
        """See ``Hypervisor.let_go``: another client may have the monitor then."""
        qmp, self._qmp = self._qmp, None
        if qmp is not None:
            qmp.drop()

    async def pin(self, vm: Vm, side: Side) -> Vm:
        """See ``Hypervisor.pin``: the machine's name, and the process that answers here, which has no other machine.

        A QEMU that is started at the same path later is another copy, although all that it says of itself is the same.
        """
        del side
        found = await self.machine()
        return replace(vm, name=found.name, uuid=found.uuid, copy=self._process() or UNKNOWN)

    def _process(self) -> str:
        """Which process answers: its number, when it was started and in which run of the host; empty if not known."""
        if self._qmp is None or self._qmp.gone:
            return ""
        try:
            process, boot = written_down(self._qmp.process_id), BOOT_ID.read_text(encoding="ascii").strip()
        except OSError:
            return ""
        return f"{process}@{boot}" if process else ""

    async def machine(self) -> Vm:
        """The machine's name and UUID as QEMU was given them; each empty if it was not.

        Raises:
            HypervisorFailed: it cannot be asked.
        """
        name, uuid = await self._ask("query-name"), await self._ask("query-uuid")
        found = word_of(uuid, "UUID").lower()
        return Vm(word_of(name, "name"), "" if found == NIL_UUID else found)

    # ------------------------------------------------------------------ for the hand-over

    @property
    def _heard(self) -> int:
        return self._qmp.heard if self._qmp is not None else 0

    async def _connected(self) -> Qmp | None:
        """The connection, made anew if need be; None if there is no QEMU any more. Raises HypervisorFailed."""
        async with self._connecting:
            if self._qmp is not None and self._qmp.gone:
                await self.close()
            attempts = 0
            while self._qmp is None:
                try:
                    self._qmp = await Qmp.connect(self.path, patient=False, wanted=NEWS)
                except QmpError as error:
                    if error.error_class == ABSENT:
                        await asyncio.to_thread(self._prove_absent)
                        return None
                    attempts += 1
                    if error.error_class != GONE or attempts == QMP_CONNECTS_MAX:
                        raise self._unanswered(error) from None
                    await asyncio.sleep(QMP_RETRY_SECONDS)
            return self._qmp

    def _prove_absent(self) -> None:
        """Raise HypervisorFailed unless a socket that nobody listens at means that its QEMU has ended.

        A socket that refuses has lost its listener. One that is not there may have been removed under a QEMU that runs
        on: the kernel still knows its name then.
        """
        if self.path.exists():
            return
        folder = os.path.realpath(self.path.parent)
        try:
            lines = SOCKETS.read_text(errors="replace").splitlines()[1:]
        except OSError as error:
            raise self._failed(f"may run or not: its socket is not there, and {SOCKETS}: {error.strerror}") from None
        for line in lines:
            bound = PurePath(line.split(maxsplit=7)[-1])
            relative = not bound.is_absolute()
            if bound.name == self.path.name and (relative or os.path.realpath(bound.parent) == folder):
                raise self._failed(
                    "runs on, but its socket was removed: nobody can ask it any more; put the machine's end beyond "
                    "doubt by hand (`ss -xlp` names its process)"
                )

    async def _ask(self, command: str, **arguments: Any) -> Any:
        """One command's answer. Raises HypervisorFailed if QEMU says no, or is gone, or silent."""
        qmp = await self._connected()
        if qmp is None:
            raise self._failed("is not there: start it, or correct --qmp")
        try:
            return await qmp.execute(command, **arguments)
        except QmpError as error:
            raise self._unanswered(error) from None

    async def _refusal(self, command: str, **arguments: Any) -> str:
        """Why ``command`` was refused or not answered; empty if it was carried out."""
        try:
            await self._ask(command, **arguments)
        except HypervisorFailed as error:
            return str(error)
        return ""

    async def _look(self) -> Look | None:
        """What QEMU says of itself now; None if it has ended. Raises HypervisorFailed if it cannot be asked."""
        while True:
            qmp = await self._connected()
            if qmp is None:
                return None
            try:
                migration = await qmp.execute("query-migrate")
                status = await qmp.execute("query-status")
            except QmpError as error:
                if error.error_class != GONE:
                    raise self._unanswered(error) from None
                continue  # it ends, or its monitor was reset: connecting tells which
            return Look(
                word_of(status, "status") or "unknown",
                word_of(migration, "status") or "none",
                word_of(migration, "error-desc"),
            )

    async def _seen(self, vm: Vm) -> Look | None:
        """What the QEMU of ``vm`` says of itself; None if it has ended. Raises HypervisorFailed if it cannot be asked.

        Another one may have been started at its path since. One that has another machine was never meant.
        """
        look = await self._look()
        if look is None:
            return None
        meant, found = vm.copy, self._process()
        if meant not in {"", UNKNOWN} and found and found != meant:
            process, _, boot = meant.partition("@")
            if found.endswith(f"@{boot}") and lives(process):
                raise self._failed(
                    f"is another one than process {process.partition(' ')[0]}, which runs on and cannot be asked any "
                    "more: put its end beyond doubt by hand"
                )
            return None
        await self._same(vm)
        return look

    async def _present(self, vm: Vm = ANY) -> Look:
        look = await self._seen(vm)
        if look is None:
            raise self._failed("is not there: start it, or correct --qmp")
        return look

    async def _until(self, enough: Callable[[Look | None], bool]) -> None:
        """Look at each event, and without one each QMP_POLL_SECONDS, until it is ``enough``, or that raises."""
        while True:
            await self._connected()
            heard = self._heard  # before the look: what comes after it wakes us
            if enough(await self._look()):
                return
            await self._news(heard, QMP_POLL_SECONDS)

    async def _news(self, heard: int, timeout_seconds: float) -> None:
        if self._qmp is not None:
            await self._qmp.wait_news(heard, timeout_seconds)

    async def _same(self, vm: Vm) -> None:
        """Raise HypervisorFailed if another machine answers here: a QEMU started later, or a wrong ``--qmp``."""
        if not vm.uuid:
            return
        found = (await self.machine()).uuid
        if found and found != vm.uuid:
            raise self._failed(f"has machine {found}, not {vm.uuid}: correct --qmp")

    # ------------------------------------------------------------------ errors

    def _failed(self, what: str) -> HypervisorFailed:
        return HypervisorFailed(f"the QEMU at {self.path} {what}")

    def _unanswered(self, error: QmpError) -> HypervisorFailed:
        if error.error_class == SILENT:
            return self._failed(
                f"does not answer ({error}): it hangs, or another client has its monitor: give the relay one of its own"
            )
        return self._failed(f"cannot be asked: {error}" if error.error_class == GONE else f"refuses: {error}")


def word_of(answer: Any, key: str) -> str:
    """A string of an answer; empty if it is not there."""
    value = answer.get(key) if isinstance(answer, dict) else None
    return value if isinstance(value, str) else ""

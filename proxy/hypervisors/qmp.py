"""One QEMU under the hand-over, through a monitor of its own (``-qmp unix:PATH,server=on,wait=off``).

What QEMU does, by its source (7.2 and 10.0, the same where nothing else is said) and seen with both roles:

- ``stop`` while a machine is awaited (``inmigrate``) clears autostart, as ``-S`` would: the machine arrives paused.
  ``cont`` there sets it again, and runs nothing yet: so it is never sent before the machine is whole.
- With pause-before-switchover the source halts in ``pre-switchover``, its machine stopped (``finish-migrate``), until
  ``migrate-continue``; then ``device``, ``completed``, and a moment later ``postmigrate``. Between the last two
  ``cont`` is refused ("Migration is not finalized yet"), and has to be tried again.
- A migration that fails or is cancelled before ``completed`` ends with the source's machine as it was before: running,
  or paused if it was (7.2: ``postmigrate`` then). Once ``completed`` only ``cont`` runs it, which takes the disks back.
- ``migrate_cancel`` in ``pre-switchover`` frees it. In 7.2 a cancel in the instant before is not noticed by the
  migration's thread, which then waits for ever in ``cancelling`` with the machine stopped (30 of 1000 cancels that were
  sent at the event STOP; none of 400 in 10.0); ``migrate-continue`` for that state frees it.
- A destination that arrives paused leaves the disks' locks to the source until its ``cont``; before 10.0 only with
  late-block-activate, else the source's ``cont`` fails (``Failed to get shared "write" lock``, seen in 7.2).
- ``quit`` first cancels a migration, which runs a machine that was leaving: so a source is told to quit only after
  ``completed``. It closes its monitors after the last processor has stopped and the disks are closed.
- Postcopy runs the destination's machine before the source has given it up, and COLO runs both: neither is guarded.

Events only say when to look: what holds is what ``query-migrate`` and then ``query-status`` answer.
"""

import asyncio
from enum import Enum, auto, unique
from typing import Final

from proxy.errors import HypervisorFailed
from proxy.hypervisors.asking import BOOT_ID, Look, QemuAsking, word_of
from proxy.hypervisors.base import CopyState, Fate, Vm
from proxy.hypervisors.monitor import QmpError
from proxy.limits import (
    QMP_POLL_SECONDS,
    QMP_QUIT_SECONDS_MAX,
    QMP_RETRY_SECONDS,
    QMP_REVIVE_SECONDS_MAX,
    QMP_STUCK_SECONDS,
    QMP_TAKE_SECONDS_MAX,
)

LATE_DISKS: Final = "late-block-activate"  # a paused arrival leaves the disks' locks to the source, as 10.0 does anyway
UNGUARDED: Final = ("postcopy-ram", "x-colo")  # capabilities that run the destination's machine too early
# RunState and MigrationStatus of QEMU's qapi/run-state.json and qapi/migration.json.
_GIVEN: Final = frozenset({"finish-migrate", "postmigrate"})
_HELD: Final = frozenset({"paused", "prelaunch", "postmigrate"})
_UNDER_WAY: Final = frozenset({"setup", "wait-unplug", "active", "pre-switchover", "device"})
_POSTCOPY: Final = frozenset({"postcopy-active", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover"})
_SWITCHING: Final = frozenset({"pre-switchover", "device"})


@unique
class Revival(Enum):
    """What a source's QEMU needs next so that its machine runs on."""

    NOTHING = auto()
    WAIT = auto()
    CANCEL = auto()
    CONTINUE = auto()


def departing_state(look: Look) -> CopyState:
    """How the source's copy stands. What is neither given away nor paused counts as running, as it may at any time."""
    if look.status in _GIVEN:
        return CopyState.SUSPENDED
    return CopyState.PAUSED if look.status in {"paused", "prelaunch"} else CopyState.RUNNING


def arriving_state(look: Look) -> CopyState:
    """How the destination's copy stands. What is neither awaited nor held counts as running: it may have run."""
    if look.status == "inmigrate":
        return CopyState.INCOMING
    if look.status not in _HELD:
        return CopyState.RUNNING
    return CopyState.PAUSED if look.migration == "completed" else CopyState.INCOMING


def revival(look: Look) -> Revival:
    """The next step towards a source's machine that runs, or stands as its operator or its guest left it."""
    if look.migration in _UNDER_WAY:
        return Revival.CANCEL
    if look.migration == "cancelling":
        return Revival.WAIT
    if look.status not in _GIVEN:
        return Revival.NOTHING
    return Revival.CONTINUE if look.status == "postmigrate" else Revival.WAIT


class QemuMonitor(QemuAsking):
    """What the hand-over asks of one QEMU (``Hypervisor``), and the steps of a guarded migration."""

    kind = "qmp"

    # ------------------------------------------------------------------ source

    async def guard_departure(self) -> None:
        """Make the next migration, or the one under way, halt before its switch-over.

        Raises:
            HypervisorFailed: a migration is under way that will not; or it is to use what cannot be guarded; or QEMU
                does not answer, or has no machine to give.
        """
        look = await self._present()
        if look.status == "inmigrate":
            raise self._failed("waits for a machine itself: --qmp must name the monitor of the QEMU to be migrated")
        await self._refuse_unguarded()
        if look.migration in _UNDER_WAY:
            if not await self._capability("pause-before-switchover"):
                raise self._failed(
                    "is migrating already, and will not halt before its switch-over: cancel, and migrate again while "
                    "the relay is ready"
                )
            return
        await self._enable("events", "pause-before-switchover")

    async def until_switchover(self) -> bool:
        """Wait, without limit, until the migration under way has halted before its switch-over, or is beyond it.

        Returns:
            Whether the machine ran until then; if not, its operator had paused it, and it is to arrive paused.

        Raises:
            HypervisorFailed: it failed or was cancelled, or cannot be guarded, or QEMU is gone or is not migrating.
        """
        ran = True

        def enough(look: Look | None) -> bool:
            nonlocal ran
            if look is None:
                raise self._failed("has ended while its machine was leaving")
            if look.migration in _SWITCHING or (look.migration == "completed" and look.status in _GIVEN):
                return True
            if look.migration not in _UNDER_WAY:
                raise self._ended(look)
            if look.status in {"running", "suspended", "paused"}:  # finish-migrate says nothing of what was before
                ran = look.status != "paused"
            return False

        await self._until(enough)
        await self._refuse_unguarded()
        return ran

    async def go_on(self) -> None:
        """Let a migration that has halted give its machine away; nothing if somebody else did.

        Raises:
            HypervisorFailed: it has failed or was cancelled meanwhile, or QEMU does not answer.
        """
        look = await self._present()
        if look.migration == "pre-switchover":
            try:
                await self._ask("migrate-continue", state="pre-switchover")
            except HypervisorFailed:
                if (await self._present()).migration not in {"device", "completed"}:
                    raise
        elif look.migration not in {"device", "completed"}:
            raise self._ended(look)

    async def until_given_up(self) -> None:
        """Wait, without limit, until the migration has completed: the machine is stopped here and all of it is sent.

        Raises:
            HypervisorFailed: it failed or was cancelled, or QEMU is gone, or the machine runs again.
        """

        def enough(look: Look | None) -> bool:
            if look is None:
                raise self._failed("has ended while its machine was leaving")
            if look.migration == "completed":
                if look.status not in _GIVEN:
                    raise self._failed(f"has given its machine away, but is {look.status}: somebody has continued it")
                return True
            if look.migration not in _UNDER_WAY:
                raise self._ended(look)
            return False

        await self._until(enough)

    async def migrates(self) -> None:
        """See that a migration is under way, which will halt before its switch-over.

        To be called when a connection has come that should be this QEMU's.

        Raises:
            HypervisorFailed: there is none, or it will not.
        """
        await self.guard_departure()
        look = await self._present()
        if look.migration not in _UNDER_WAY:
            raise self._ended(look)
        if look.status == "postmigrate":
            raise self._failed(
                "has given its machine away before, and migrates again: `korora handover list` may say to whom; where "
                "no other host has it, `cont` at its monitor, then migrate"
            )

    async def let_through(self) -> None:
        """See to it that a migration under way that nobody guards does not halt for ever. Waits for its switch-over.

        Raises:
            HypervisorFailed: QEMU does not answer, or does not go on.
        """
        await self._until(lambda look: look is None or look.migration not in _UNDER_WAY - {"pre-switchover"})
        look = await self._look()
        if look is not None and look.migration == "pre-switchover":
            await self.go_on()

    async def departing(self, vm: Vm) -> CopyState:
        """See ``Hypervisor.departing``."""
        look = await self._seen(vm)
        if look is None:
            return CopyState.ABSENT
        if look.status == "inmigrate":
            raise self._failed("waits for a machine: it is another QEMU than the one that was migrated")
        return departing_state(look)

    async def fate(self, vm: Vm) -> Fate:
        """See ``Hypervisor.fate``: another QEMU at its monitor that runs the same machine was started since."""
        look = await self._look()
        if look is not None and look.status == "running" and vm.uuid and (await self.machine()).uuid == vm.uuid:
            return Fate.AGAIN
        boot = vm.copy.partition("@")[2]
        return Fate.ENDED if boot in {"", BOOT_ID.read_text(encoding="ascii").strip()} else Fate.LOST

    async def revive(self, vm: Vm) -> None:
        """See ``Hypervisor.revive``. A machine that its operator paused, or its guest ended, is left so.

        Once given away, one that was paused stays ``postmigrate``: only ``cont`` leads back, and runs it.
        """
        refusal = ""
        since: float | None = None
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(QMP_REVIVE_SECONDS_MAX):
                while True:
                    heard = self._heard
                    look = await self._seen(vm)
                    if look is None and await self.fate(vm) is Fate.AGAIN:
                        return
                    look = look or await self._present(vm)
                    if look.status == "inmigrate" or look.migration in _POSTCOPY:
                        raise self._failed(f"cannot be turned back: {look.status}, migration {look.migration}")
                    match revival(look):
                        case Revival.NOTHING:
                            return
                        case Revival.CANCEL:
                            await self._ask("migrate_cancel")
                        case Revival.CONTINUE if vm.paused:
                            return
                        case Revival.CONTINUE:
                            refusal = await self._refusal("cont")
                        case Revival.WAIT if look.migration == "cancelling":
                            since = clock() if since is None else since
                            if clock() - since >= QMP_STUCK_SECONDS:
                                await self._refusal("migrate-continue", state="cancelling")
                    await self._news(heard, QMP_RETRY_SECONDS)
        except TimeoutError:
            said = f" ({refusal})" if refusal else ""
            raise self._failed(
                f"does not run its machine again{said}: see that no other host has it or its disks, then `cont` at "
                "its monitor"
            ) from None

    async def remove(self, vm: Vm) -> None:
        """See ``Hypervisor.remove``."""
        look = await self._seen(vm)
        if look is None:
            return
        if look.status not in _GIVEN or look.migration != "completed":
            raise self._failed(
                f"has not given its machine away ({look.status}, migration {look.migration}) and is not told to quit: "
                "if the machine runs elsewhere, kill this process (SIGKILL)"
            )
        await self._quit()

    # ------------------------------------------------------------------ both

    async def has_vtpm(self) -> bool:
        """Whether the machine has an emulated TPM, whose state its stream carries.

        Raises:
            HypervisorFailed: it cannot be asked.
        """
        await self._present()
        qmp = await self._connected()
        try:
            answer = [] if qmp is None else await qmp.execute("query-tpm")
        except QmpError as error:
            if error.error_class == "CommandNotFound":
                return False  # built without TPMs
            raise self._unanswered(error) from None
        listed = answer if isinstance(answer, list) else []
        return any(word_of(tpm.get("options"), "type") == "emulator" for tpm in listed if isinstance(tpm, dict))

    # ------------------------------------------------------------------ destination

    async def guard_arrival(self) -> None:
        """See to it that the machine this QEMU waits for will not run by itself.

        To be called before the first byte of it is written, whether QEMU was started with ``-S`` or not.

        Raises:
            HypervisorFailed: it does not wait for a machine, or QEMU does not answer.
        """
        look = await self._present()
        if look.status != "inmigrate" or look.migration == "failed":
            raise self._failed(
                f"does not wait for a machine ({look.status}, migration {look.migration}): start it anew with -incoming"
            )
        await self._enable("events", LATE_DISKS)
        await self._ask("stop")
        look = await self._present()
        if look.status != "inmigrate" and arriving_state(look) is not CopyState.PAUSED:
            raise self._failed(f"is {look.status} before its machine could be guarded")

    async def until_arrived(self) -> None:
        """Wait, without limit, until the machine is here, whole and paused.

        Raises:
            HypervisorFailed: it failed to load, or QEMU is gone, or runs the machine already.
        """

        def enough(look: Look | None) -> bool:
            if look is None:
                raise self._failed("has ended while its machine was arriving: its log says why")
            if look.migration in {"failed", "cancelled"}:
                raise self._ended(look)
            state = arriving_state(look)
            if state is CopyState.RUNNING:
                raise self._failed(f"is {look.status}, and nobody here has told it to be: something else continued it")
            return state is CopyState.PAUSED

        await self._until(enough)

    async def arriving(self, vm: Vm) -> CopyState:
        """See ``Hypervisor.arriving``."""
        look = await self._seen(vm)
        return CopyState.ABSENT if look is None else arriving_state(look)

    async def take(self, vm: Vm) -> None:
        """See ``Hypervisor.take``. QEMU's machine has its name from the start: waits until it is whole and paused.

        One that runs has been started: by whoever died before it could write that down.
        """
        if arriving_state(await self._present(vm)) is CopyState.RUNNING:
            return
        try:
            async with asyncio.timeout(QMP_TAKE_SECONDS_MAX):
                await self.until_arrived()
        except TimeoutError:
            raise self._failed(f"has not got the whole machine in {QMP_TAKE_SECONDS_MAX:g} s") from None

    async def start(self, vm: Vm) -> None:
        """See ``Hypervisor.start``."""
        look = await self._present(vm)
        state = arriving_state(look)
        if state is CopyState.RUNNING:
            return
        if state is not CopyState.PAUSED:  # `cont` would run it later, unasked
            raise self._failed(f"has not got the whole machine: {look.status}, migration {look.migration}")
        qmp = self._qmp
        refusal = await self._refusal("cont")
        after = await self._look()
        if after is not None and arriving_state(after) is CopyState.RUNNING:
            return
        if after is None and qmp is not None and any(event.name == "RESUME" for event in qmp.events):
            return  # it ran, and has ended since
        stands = "gone" if after is None else after.status
        raise self._failed(
            f"does not run its machine ({refusal or stands}): `cont` at its monitor says what hinders it"
        )

    async def destroy(self, vm: Vm) -> None:
        """See ``Hypervisor.destroy``. The whole QEMU ends."""
        look = await self._seen(vm)
        if look is None:
            return
        if look.status == "inmigrate":
            await self._ask("stop")  # were it not guarded, it could begin to run before it ends
            look = await self._look()
        if look is None:
            return
        if arriving_state(look) is CopyState.RUNNING:
            raise self._failed(f"is {look.status}: a machine that may have run is not destroyed")
        await self._quit()

    # ------------------------------------------------------------------ helpers

    async def _capability(self, name: str) -> bool:
        answer = await self._ask("query-migrate-capabilities")
        listed = answer if isinstance(answer, list) else []
        return any(word_of(entry, "capability") == name and entry.get("state") is True for entry in listed)

    async def _enable(self, *names: str) -> None:
        await self._ask("migrate-set-capabilities", capabilities=[{"capability": n, "state": True} for n in names])
        for name in names:
            if not await self._capability(name):
                raise self._failed(f"did not take the migration capability {name}")

    async def _refuse_unguarded(self) -> None:
        for name in UNGUARDED:
            if await self._capability(name):
                raise self._failed(
                    f"has the migration capability {name}, which runs the machine at the destination before it is "
                    "given up here: turn it off, or migrate without --qmp"
                )

    async def _quit(self) -> None:
        """End QEMU and see it gone. Raises HypervisorFailed if it is not."""
        refusal = ""
        try:
            async with asyncio.timeout(QMP_QUIT_SECONDS_MAX):
                refusal = await self._refusal("quit")
                while await self._still_there():  # noqa: ASYNC110 # nothing tells when a listening socket goes
                    await asyncio.sleep(QMP_RETRY_SECONDS)
        except TimeoutError:
            said = f" ({refusal})" if refusal else ""
            raise self._failed(f"was told to quit and is still there{said}: kill its process (SIGKILL)") from None

    async def _still_there(self) -> bool:
        if self._qmp is not None and not self._qmp.gone:
            await self._qmp.wait_news(self._qmp.heard, QMP_POLL_SECONDS)
            return True
        try:
            return await self._connected() is not None
        except HypervisorFailed:  # its listening socket goes after its monitor: a connection in between breaks
            return True

    def _ended(self, look: Look) -> HypervisorFailed:
        if look.migration in {"failed", "cancelling", "cancelled"}:
            said = f" ({look.why})" if look.why else ""
            return self._failed(
                f"says that its migration {look.migration.replace('ing', 'ed')}{said}: its log says more"
            )
        return self._failed(
            f"does not migrate as it should ({look.status}, migration {look.migration}): see that --qmp names the "
            "monitor of this machine"
        )

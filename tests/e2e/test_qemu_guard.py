"""Two real QEMUs under guard, without relays: a machine that leaves halts, one that arrives waits, and both turn back.

What decides in a hand-over is played by each test; what is held here is that QEMU does what the decisions rest on: in
no case do both copies run, and after each turn the guest counts on where it should.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import pytest

from korora.demo.qemu import BOOT_SECONDS, QemuVm
from korora.demo.serial import continuity
from proxy.errors import HypervisorFailed
from proxy.hypervisors import monitor
from proxy.hypervisors.base import CopyState, Vm
from proxy.hypervisors.qmp import QemuMonitor
from tests.e2e.rig import FAST, SLOW, SPEC, STEP_SECONDS, Rig, private_folder
from tests.e2e.watching import never_two

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]

T = TypeVar("T")
VM = Vm("guest", "")
STILL_SECONDS = 1.0  # a guest that runs counts about ten times in it


async def done(step: Awaitable[T]) -> T:
    """The step's result, within STEP_SECONDS."""
    async with asyncio.timeout(STEP_SECONDS):
        return await step


@dataclass
class Both:
    """Source and destination, each with the relay's own monitor beside the test's; who runs is watched all along."""

    source: QemuVm
    destination: QemuVm
    leaving: QemuMonitor
    coming: QemuMonitor
    wire: str

    async def begin(self, bandwidth: int = FAST) -> None:
        """Migrate, under guard at both ends."""
        await self.coming.guard_arrival()
        await self.leaving.guard_departure()
        await self.source.qmp.execute("migrate-set-parameters", max_bandwidth=bandwidth)
        await self.source.qmp.execute("migrate", uri=self.wire)

    async def halted(self) -> None:
        """The source waits in pre-switchover."""
        await self.begin()
        assert await done(self.leaving.until_switchover()) is True
        assert await self.leaving.departing(VM) is CopyState.SUSPENDED
        assert await self.coming.arriving(VM) is CopyState.INCOMING

    async def handed_over(self) -> None:
        """The source has completed, the destination is whole and paused: nobody runs."""
        await self.halted()
        await self.leaving.go_on()
        await done(self.leaving.until_given_up())
        await done(self.coming.take(VM))
        assert await self.leaving.departing(VM) is CopyState.SUSPENDED
        assert await self.coming.arriving(VM) is CopyState.PAUSED
        await self.nothing_arrived()

    async def nothing_arrived(self) -> None:
        """The destination's guest has not said a word, and does not."""
        await asyncio.sleep(STILL_SECONDS)
        assert self.destination.serial.beats == []

    async def counts_on_here(self) -> None:
        """The source's guest goes on with the next number, its memory sound."""
        last = self.source.serial.last
        assert last is not None
        await self.source.wait_beat(lambda beat: beat.checked >= last.checked + SPEC.checks_of_everything, STEP_SECONDS)
        beats = self.source.serial.beats
        assert [beat.number for beat in beats] == list(range(beats[0].number, beats[-1].number + 1))
        assert beats[-1].bad == 0
        assert self.destination.serial.beats == []

    async def counts_on_there(self) -> None:
        """The destination's guest goes on with the next number, its memory sound, and the source's is still."""
        here = self.source.serial.last
        there = await self.destination.wait_beat(lambda beat: True, STEP_SECONDS)
        enough = there.checked + SPEC.checks_of_everything
        await self.destination.wait_beat(lambda beat: beat.checked >= enough, STEP_SECONDS)
        counted = continuity(self.source.serial, self.destination.serial)
        assert counted is not None
        assert counted.unbroken, counted
        assert self.source.serial.last is here


@asynccontextmanager
async def both(rig: Rig, *options: str) -> AsyncIterator[Both]:
    """The guest running at the source, an empty QEMU at the destination, nothing begun.

    Args:
        options: further ones of the destination's QEMU.
    """
    async with private_folder() as folder:
        wire = f"unix:{folder / 'wire'}"
        monitors = {name: folder / f"{name}.guard" for name in ("source", "destination")}
        second = {name: ("-qmp", f"unix:{path},server=on,wait=off") for name, path in monitors.items()}
        leaving, coming = (QemuMonitor(path) for path in monitors.values())
        async with (
            QemuVm("source", rig.machine, folder, f"exec:cat <{rig.snapshot}", second["source"]) as source,
            QemuVm("destination", rig.machine, folder, wire, (*second["destination"], *options)) as destination,
        ):
            made = Both(source, destination, leaving, coming, wire)
            await source.wait_beat(lambda beat: True, BOOT_SECONDS)
            try:
                async with never_two(lambda: (source, destination)):
                    yield made
            finally:
                await leaving.close()
                await coming.close()


@pytest.mark.parametrize("options", [(), ("-S",)], ids=["plain", "-S"])
async def test_a_machine_moves_when_both_have_been_told(rig: Rig, options: tuple[str, ...]) -> None:
    async with both(rig, *options) as made:
        await made.handed_over()
        await made.coming.start(VM)
        await made.leaving.remove(VM)
        assert await made.leaving.departing(VM) is CopyState.ABSENT
        assert await made.coming.arriving(VM) is CopyState.RUNNING
        await made.counts_on_there()


async def test_without_the_guard_the_same_destination_runs_by_itself(rig: Rig) -> None:
    """What `stop` while it waits is for: the tests above would not hold without it."""
    async with both(rig) as made:
        await made.source.set_capabilities()
        await made.source.qmp.execute("migrate", uri=made.wire)
        assert await made.source.wait_migration(STEP_SECONDS) == "completed"
        await made.destination.wait_beat(lambda beat: True, STEP_SECONDS)
        assert await made.coming.arriving(VM) is CopyState.RUNNING
        with pytest.raises(HypervisorFailed, match="something else continued it"):
            await done(made.coming.until_arrived())
        with pytest.raises(HypervisorFailed, match="is not destroyed"):
            await made.coming.destroy(VM)


async def test_turned_back_in_the_middle(rig: Rig) -> None:
    async with both(rig) as made:
        await made.begin(SLOW)
        waiting = asyncio.create_task(made.leaving.until_switchover())
        async with asyncio.timeout(STEP_SECONDS):
            while not (await made.source.migration()).get("ram", {}).get("transferred"):  # noqa: ASYNC110 # no event
                await asyncio.sleep(0.02)
        await done(made.leaving.revive(VM))
        with pytest.raises(HypervisorFailed, match="migration cancelled"):
            await done(waiting)
        await made.coming.destroy(VM)
        assert await made.coming.arriving(VM) is CopyState.ABSENT
        await made.counts_on_here()


async def test_turned_back_where_the_source_halts(rig: Rig) -> None:
    async with both(rig) as made:
        await made.halted()
        await done(made.leaving.revive(VM))
        assert await made.leaving.departing(VM) is CopyState.RUNNING
        with pytest.raises(HypervisorFailed, match="migration cancelled"):
            await done(made.leaving.until_given_up())
        await made.coming.destroy(VM)
        assert await made.coming.arriving(VM) is CopyState.ABSENT
        await made.counts_on_here()


async def test_turned_back_after_the_source_has_given_everything(rig: Rig) -> None:
    async with both(rig) as made:
        await made.handed_over()
        await made.coming.destroy(VM)
        assert await made.coming.arriving(VM) is CopyState.ABSENT
        await done(made.leaving.revive(VM))
        assert await made.leaving.departing(VM) is CopyState.RUNNING
        await made.counts_on_here()


async def test_turned_back_at_once_after_going_on(rig: Rig) -> None:
    """Whichever step QEMU is in: device, completed but not finalized, or done."""
    async with both(rig) as made:
        await made.halted()
        await made.leaving.go_on()
        await done(made.leaving.revive(VM))
        assert await made.leaving.departing(VM) is CopyState.RUNNING
        await made.coming.destroy(VM)
        await made.counts_on_here()


async def test_a_machine_that_turned_back_can_leave_again(rig: Rig) -> None:
    async with both(rig) as made:
        await made.halted()
        await done(made.leaving.revive(VM))
        with pytest.raises(HypervisorFailed, match="migration cancelled"):
            await done(made.leaving.until_switchover())
        await made.coming.destroy(VM)
        await made.leaving.guard_departure()
        await made.source.qmp.execute("migrate", uri=f"exec:cat >{made.wire.removeprefix('unix:')}.file")
        assert await done(made.leaving.until_switchover()) is True
        await made.leaving.go_on()
        await done(made.leaving.until_given_up())
        await done(made.leaving.revive(VM))
        await made.counts_on_here()


async def test_a_destination_that_is_killed_before_it_has_everything(rig: Rig) -> None:
    async with both(rig) as made:
        await made.halted()
        waiting = asyncio.create_task(made.coming.until_arrived())
        made.destination.kill()
        with pytest.raises(HypervisorFailed, match="has ended while its machine was arriving"):
            await done(waiting)
        assert await made.coming.arriving(VM) is CopyState.ABSENT
        await done(made.leaving.revive(VM))
        await made.counts_on_here()


async def test_a_source_that_is_killed_after_it_has_given_everything(rig: Rig) -> None:
    async with both(rig) as made:
        await made.handed_over()
        made.source.kill()
        async with asyncio.timeout(STEP_SECONDS):
            while made.source.running:  # noqa: ASYNC110 # the child's end has no event here
                await asyncio.sleep(0.02)
        assert await made.leaving.departing(VM) is CopyState.ABSENT
        await made.coming.start(VM)
        await made.counts_on_there()


async def test_a_destination_that_cannot_be_asked(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen, it answers nothing: nothing is believed of it, and thawed it is as it was."""
    async with both(rig) as made:
        await made.handed_over()
        await made.coming.close()
        with monkeypatch.context() as short:
            short.setattr(monitor, "QMP_ANSWER_SECONDS_MAX", 0.5)
            os.kill(made.destination.pid, signal.SIGSTOP)
            try:
                for ask in (made.coming.arriving, made.coming.start, made.coming.destroy):
                    with pytest.raises(HypervisorFailed, match="does not answer"):
                        await ask(VM)
            finally:
                os.kill(made.destination.pid, signal.SIGCONT)
        assert await made.coming.arriving(VM) is CopyState.PAUSED
        await made.coming.start(VM)
        await made.counts_on_there()


async def test_a_monitor_that_another_client_has_is_told(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async with both(rig) as made:
        assert await made.coming.arriving(VM) is CopyState.INCOMING
        monkeypatch.setattr(monitor, "QMP_ANSWER_SECONDS_MAX", 0.5)
        late = QemuMonitor(made.coming.path)
        with pytest.raises(HypervisorFailed, match="another client has its monitor"):
            await late.arriving(VM)
        await made.coming.close()
        assert await late.arriving(VM) is CopyState.INCOMING
        await late.close()


async def test_a_machine_its_operator_paused_leaves_paused_and_stays_so_when_it_turns_back(rig: Rig) -> None:
    async with both(rig) as made:
        await made.begin(SLOW)
        waiting = asyncio.create_task(made.leaving.until_switchover())
        await made.source.qmp.execute("stop")
        await made.source.qmp.execute("migrate-set-parameters", max_bandwidth=FAST)
        assert await done(waiting) is False
        await done(made.leaving.revive(VM))
        assert await made.leaving.departing(VM) is CopyState.PAUSED
        await made.source.qmp.execute("cont")
        await made.counts_on_here()


async def test_a_migration_that_began_unguarded_is_refused(rig: Rig) -> None:
    async with both(rig) as made:
        await made.source.qmp.execute("migrate-set-parameters", max_bandwidth=SLOW)
        await made.source.qmp.execute("migrate", uri=made.wire)
        with pytest.raises(HypervisorFailed, match="cancel, and migrate again"):
            await made.leaving.guard_departure()

"""What the hand-over asks of a QEMU, against one of a few lines: each answer, each refusal, each way of vanishing."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import HypervisorFailed
from proxy.handover.table import Side
from proxy.hypervisors import asking, monitor, qmp
from proxy.hypervisors.asking import Look
from proxy.hypervisors.base import CopyState, Fate, Hypervisor, Vm
from proxy.hypervisors.qmp import QemuMonitor, Revival, arriving_state, departing_state, revival
from proxy.process import written_down
from tests.proxy.hypervisors.scripted import Refused, ScriptedQemu, scripted

pytestmark = pytest.mark.timeout(20)

VM = Vm("vm1", "")
STEP = 5.0
Act = Callable[[QemuMonitor], Awaitable[object]]


@asynccontextmanager
async def pair(path: Path, status: str, migration: str = "none") -> AsyncIterator[tuple[ScriptedQemu, QemuMonitor]]:
    async with scripted(path / "qmp", status, migration) as qemu:
        watch = QemuMonitor(qemu.path)
        try:
            yield qemu, watch
        finally:
            await watch.close()


async def finish(task: asyncio.Task[Any]) -> Any:
    async with asyncio.timeout(STEP):
        return await task


async def asked(qemu: ScriptedQemu, command: str) -> asyncio.Event:
    """An event that is set when `command`, a query, is asked for again."""
    happened = asyncio.Event()
    answer = getattr(qemu, f"do_{command.replace('-', '_')}")

    def note(arguments: dict[str, Any]) -> Any:
        happened.set()
        return answer(arguments)

    qemu.on[command] = note
    return happened


def test_it_is_what_the_hand_over_asks_for(tmp_path: Path) -> None:
    asks: Hypervisor = QemuMonitor(tmp_path / "qmp")
    assert asks.kind == "qmp"


# ------------------------------------------------------------------ how a copy stands

# From qapi/run-state.json: every RunState there is.
RUN_STATES = [
    "debug",
    "inmigrate",
    "internal-error",
    "io-error",
    "paused",
    "postmigrate",
    "prelaunch",
    "finish-migrate",
    "restore-vm",
    "running",
    "save-vm",
    "shutdown",
    "suspended",
    "watchdog",
    "guest-panicked",
    "colo",
]
MIGRATIONS = [
    "none",
    "setup",
    "cancelling",
    "cancelled",
    "active",
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover-setup",
    "postcopy-recover",
    "completed",
    "failed",
    "colo",
    "pre-switchover",
    "device",
    "wait-unplug",
]


@pytest.mark.parametrize("status", RUN_STATES)
@pytest.mark.parametrize("migration", MIGRATIONS)
def test_what_may_run_is_never_taken_for_a_copy_that_can_be_destroyed(status: str, migration: str) -> None:
    look = Look(status, migration)
    if status not in {"inmigrate", "paused", "prelaunch", "postmigrate"}:
        assert arriving_state(look) is CopyState.RUNNING
    assert (departing_state(look) is CopyState.SUSPENDED) == (status in {"finish-migrate", "postmigrate"})


def test_a_copy_is_whole_when_its_migration_is_complete_and_not_before() -> None:
    assert arriving_state(Look("inmigrate", "completed")) is CopyState.INCOMING
    assert arriving_state(Look("paused", "postcopy-active")) is CopyState.INCOMING
    assert arriving_state(Look("paused", "completed")) is CopyState.PAUSED


@pytest.mark.parametrize("status", RUN_STATES)
@pytest.mark.parametrize("migration", MIGRATIONS)
def test_a_machine_is_continued_only_where_its_migration_left_it(status: str, migration: str) -> None:
    step = revival(Look(status, migration))
    if step is Revival.CONTINUE:
        assert status == "postmigrate"
    if step is Revival.NOTHING:
        assert status not in {"finish-migrate", "postmigrate"}
        assert migration not in {"setup", "active", "pre-switchover", "device", "wait-unplug", "cancelling"}


@pytest.mark.parametrize(
    ("status", "departing", "arriving"),
    [
        ("running", CopyState.RUNNING, CopyState.RUNNING),
        ("suspended", CopyState.RUNNING, CopyState.RUNNING),
        ("paused", CopyState.PAUSED, CopyState.PAUSED),
        ("finish-migrate", CopyState.SUSPENDED, CopyState.RUNNING),
        ("postmigrate", CopyState.SUSPENDED, CopyState.PAUSED),
    ],
)
async def test_a_qemu_is_asked_how_it_stands(
    tmp_path: Path, status: str, departing: CopyState, arriving: CopyState
) -> None:
    async with pair(tmp_path, status, "completed") as (_, watch):
        assert await watch.departing(VM) is departing
        assert await watch.arriving(VM) is arriving


@pytest.mark.parametrize("unlink", [True, False], ids=["ended", "killed"])
async def test_a_qemu_that_ended_is_absent_to_both_roles(tmp_path: Path, unlink: bool) -> None:
    async with pair(tmp_path, "running") as (qemu, watch):
        assert await watch.departing(VM) is CopyState.RUNNING
        qemu.end(unlink=unlink)
        assert await watch.departing(VM) is CopyState.ABSENT
        assert await watch.arriving(VM) is CopyState.ABSENT
        await watch.destroy(VM)
        await watch.remove(VM)
        for act in (watch.guard_departure, watch.guard_arrival, lambda: watch.start(VM), lambda: watch.revive(VM)):
            with pytest.raises(HypervisorFailed, match="is not there"):
                await act()


@pytest.mark.parametrize("relative", [False, True])
async def test_a_socket_that_was_removed_under_its_qemu_proves_nothing(
    tmp_path: Path, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a source whose guest runs would be called gone, and the destination's copy be started beside it."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind("qmp" if relative else str(tmp_path / "qmp"))
        alive.listen(1)
        monkeypatch.chdir("/")
        (tmp_path / "qmp").unlink()
        watch = QemuMonitor(tmp_path / "qmp")
        for ask in (watch.departing, watch.arriving):
            with pytest.raises(HypervisorFailed, match="its socket was removed"):
                await ask(VM)
    assert await watch.departing(VM) is CopyState.ABSENT


async def test_without_the_kernel_s_list_absence_is_not_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "SOCKETS", tmp_path / "none")
    with pytest.raises(HypervisorFailed, match="may run or not"):
        await QemuMonitor(tmp_path / "qmp").departing(VM)


async def test_a_monitor_that_does_not_answer_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "QMP_ANSWER_SECONDS_MAX", 0.05)
    async with pair(tmp_path, "running") as (qemu, watch):
        qemu.on["query-status"] = lambda _: NotImplemented
        with pytest.raises(HypervisorFailed, match="give the relay one of its own"):
            await watch.departing(VM)


async def test_a_connection_that_breaks_is_made_again(tmp_path: Path) -> None:
    async with pair(tmp_path, "running") as (qemu, watch):
        await watch.departing(VM)
        qemu.break_connections()
        assert await watch.departing(VM) is CopyState.RUNNING


async def test_a_qemu_that_breaks_what_waits_at_its_socket_is_tried_again(tmp_path: Path) -> None:
    """As one that ends does for a moment; then it refuses, and is absent."""
    path = tmp_path / "qmp"
    broken = 0

    async def end(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal broken
        broken += 1
        writer.transport.abort()
        if broken == 3:
            server.close()

    server = await asyncio.start_unix_server(end, path)
    assert await QemuMonitor(path).arriving(VM) is CopyState.ABSENT
    assert broken == 3


async def test_what_never_speaks_qmp_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "QMP_CONNECTS_MAX", 2)

    async def end(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_unix_server(end, tmp_path / "qmp")
    with pytest.raises(HypervisorFailed, match="cannot be asked"):
        await QemuMonitor(tmp_path / "qmp").arriving(VM)
    server.close()
    await server.wait_closed()


async def test_another_machine_at_the_monitor_is_told(tmp_path: Path) -> None:
    mine = "11111111-2222-3333-4444-555555555555"
    async with pair(tmp_path, "paused", "completed") as (qemu, watch):
        assert (await watch.machine()) == Vm("vm1", "")
        qemu.uuid = mine.upper().replace("1", "2")
        assert (await watch.machine()).uuid == "22222222-2222-3333-4444-555555555555"
        for act in (
            watch.departing,
            watch.arriving,
            watch.take,
            watch.start,
            watch.destroy,
            watch.revive,
            watch.remove,
        ):
            with pytest.raises(HypervisorFailed, match="correct --qmp"):
                await act(Vm("vm1", mine))
        assert qemu.commands == []


@pytest.mark.parametrize(
    ("answer", "there"),
    [
        ([{"id": "tpm0", "model": "tpm-tis", "options": {"type": "emulator", "data": {"chardev": "tpm"}}}], True),
        ([{"id": "tpm0", "model": "tpm-crb", "options": {"type": "passthrough", "data": {}}}], False),
        ([], False),
        (None, False),
        ([{"id": "tpm0"}, "x"], False),
    ],
)
async def test_a_qemu_tells_whether_its_stream_carries_a_vtpm(tmp_path: Path, answer: Any, there: bool) -> None:
    async with pair(tmp_path, "running") as (qemu, monitor):
        qemu.on["query-tpm"] = lambda _: answer
        assert await monitor.has_vtpm() is there


async def test_a_qemu_without_tpms_has_none_and_one_that_will_not_say_is_an_error(tmp_path: Path) -> None:
    async with pair(tmp_path, "running") as (qemu, monitor):
        assert await monitor.has_vtpm() is False

        def refuse(_: Any) -> Any:
            raise Refused("not now")

        qemu.on["query-tpm"] = refuse
        with pytest.raises(HypervisorFailed, match="refuses: query-tpm: not now"):
            await monitor.has_vtpm()
        qemu.end()
        with pytest.raises(HypervisorFailed, match="is not there"):
            await monitor.has_vtpm()


@pytest.mark.parametrize("answer", [None, 7, [], {"status": 5}], ids=str)
async def test_answers_of_another_shape_are_not_believed(tmp_path: Path, answer: Any) -> None:
    async with pair(tmp_path, "paused", "completed") as (qemu, watch):
        qemu.on["query-status"] = lambda _: answer
        assert await watch.arriving(VM) is CopyState.RUNNING  # nothing is destroyed on the strength of it
        with pytest.raises(HypervisorFailed):
            await watch.destroy(VM)
        assert qemu.commands == []


# ------------------------------------------------------------------ source


async def test_a_guarded_source_halts_goes_on_and_gives_up(tmp_path: Path) -> None:
    async with pair(tmp_path, "running") as (qemu, watch):
        await watch.guard_departure()
        assert (qemu.capabilities["events"], qemu.capabilities["pause-before-switchover"]) == (True, True)
        qemu.become(migration="active")
        await watch.guard_departure()  # again, once its connection has come: it will halt
        waiting = asyncio.create_task(watch.until_switchover())
        qemu.halt()
        assert await finish(waiting) is True
        assert await watch.departing(VM) is CopyState.SUSPENDED
        await watch.go_on()
        await watch.go_on()
        giving = asyncio.create_task(watch.until_given_up())
        qemu.become("postmigrate", "completed")
        await finish(giving)
        assert qemu.commands.count("migrate-continue") == 1


async def test_a_wait_is_ended_by_an_event_and_not_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "QMP_POLL_SECONDS", 3600.0)
    async with pair(tmp_path, "running") as (qemu, watch):
        await watch.guard_departure()
        qemu.become(migration="active")
        looked = await asked(qemu, "query-status")
        waiting = asyncio.create_task(watch.until_switchover())
        await finish(asyncio.create_task(looked.wait()))
        qemu.halt()
        await finish(waiting)


async def test_without_events_it_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "QMP_POLL_SECONDS", 0.01)
    async with pair(tmp_path, "finish-migrate", "active") as (qemu, watch):
        looked = await asked(qemu, "query-status")
        waiting = asyncio.create_task(watch.until_switchover())
        await finish(asyncio.create_task(looked.wait()))
        qemu.migration = "pre-switchover"
        await finish(waiting)


@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_a_migration_that_ends_early_is_told_with_its_reason(tmp_path: Path, end: str) -> None:
    async with pair(tmp_path, "running", "active") as (qemu, watch):
        for act in (watch.until_switchover, watch.until_given_up):
            waiting = asyncio.create_task(act())
            qemu.become("running", end, "Broken pipe")
            with pytest.raises(HypervisorFailed, match=rf"migration {end} \(Broken pipe\)"):
                await finish(waiting)
        with pytest.raises(HypervisorFailed, match=end):
            await watch.go_on()
        assert qemu.commands == []


async def test_a_source_that_dies_while_it_is_waited_for(tmp_path: Path) -> None:
    async with pair(tmp_path, "running", "active") as (qemu, watch):
        looked = await asked(qemu, "query-status")
        waiting = asyncio.create_task(watch.until_switchover())
        await finish(asyncio.create_task(looked.wait()))
        qemu.end(unlink=False)
        with pytest.raises(HypervisorFailed, match="has ended while its machine was leaving"):
            await finish(waiting)


async def test_a_migration_that_will_not_halt_is_not_guarded(tmp_path: Path) -> None:
    async with pair(tmp_path, "running", "active") as (_, watch):
        with pytest.raises(HypervisorFailed, match="cancel, and migrate again"):
            await watch.guard_departure()


@pytest.mark.parametrize("capability", ["postcopy-ram", "x-colo"])
async def test_what_runs_the_machine_over_there_too_early_is_refused(tmp_path: Path, capability: str) -> None:
    async with pair(tmp_path, "running") as (qemu, watch):
        await watch.guard_departure()
        qemu.capabilities[capability] = True
        with pytest.raises(HypervisorFailed, match=capability):
            await watch.guard_departure()
        qemu.become(migration="active")
        qemu.halt()
        with pytest.raises(HypervisorFailed, match=capability):
            await watch.until_switchover()
        assert "migrate-continue" not in qemu.commands


async def test_a_capability_that_is_not_taken_is_told(tmp_path: Path) -> None:
    async with pair(tmp_path, "running") as (qemu, watch):
        qemu.on["migrate-set-capabilities"] = lambda _: {}
        with pytest.raises(HypervisorFailed, match="did not take"):
            await watch.guard_departure()


async def test_the_monitor_of_the_wrong_qemu_is_told(tmp_path: Path) -> None:
    async with pair(tmp_path, "inmigrate") as (_, watch):
        for act in (watch.guard_departure, lambda: watch.departing(VM)):
            with pytest.raises(HypervisorFailed, match="waits for a machine"):
                await act()
    async with pair(tmp_path, "running", "completed") as (_, watch):  # of an earlier migration
        for act in (watch.until_switchover, watch.go_on):
            if act == watch.go_on:
                continue
            with pytest.raises(HypervisorFailed, match="see that --qmp names"):
                await act()
        with pytest.raises(HypervisorFailed, match="somebody has continued it"):
            await watch.until_given_up()


async def test_a_machine_its_operator_paused_is_to_arrive_paused(tmp_path: Path) -> None:
    async with pair(tmp_path, "running") as (qemu, watch):
        await watch.guard_departure()
        qemu.become(migration="active")
        looked = await asked(qemu, "query-status")
        waiting = asyncio.create_task(watch.until_switchover())
        await finish(asyncio.create_task(looked.wait()))
        looked.clear()
        qemu.become("paused")
        await finish(asyncio.create_task(looked.wait()))
        looked.clear()
        qemu.status = "finish-migrate"  # a machine that did not run is not stopped: no event
        qemu.event("STOP")
        await finish(asyncio.create_task(looked.wait()))
        qemu.become(migration="pre-switchover")
        assert await finish(waiting) is False


# ------------------------------------------------------------------ turning back


@pytest.mark.parametrize("migration", ["setup", "active", "pre-switchover", "device"])
async def test_a_migration_under_way_is_cancelled_and_its_machine_runs(tmp_path: Path, migration: str) -> None:
    status = "finish-migrate" if migration in {"pre-switchover", "device"} else "running"
    async with pair(tmp_path, status, migration) as (qemu, watch):
        await watch.revive(VM)
        assert (qemu.status, qemu.migration, qemu.commands) == ("running", "cancelled", ["migrate_cancel"])


async def test_after_completion_the_machine_is_continued_as_soon_as_qemu_lets_it(tmp_path: Path) -> None:
    async with pair(tmp_path, "finish-migrate", "completed") as (qemu, watch):
        looked = await asked(qemu, "query-status")
        reviving = asyncio.create_task(watch.revive(VM))
        await finish(asyncio.create_task(looked.wait()))
        qemu.become("postmigrate")
        await finish(reviving)
        assert (qemu.status, qemu.commands) == ("running", ["cont"])


async def test_disks_that_the_other_side_still_locks_are_waited_for(tmp_path: Path) -> None:
    refusals = iter(['Failed to get "write" lock', 'Failed to get "write" lock'])
    async with pair(tmp_path, "postmigrate", "completed") as (qemu, watch):

        def locked(arguments: dict[str, Any]) -> Any:
            for refusal in refusals:
                raise Refused(refusal)
            return qemu.do_cont(arguments)

        qemu.on["cont"] = locked
        await watch.revive(VM)
        assert (qemu.status, qemu.commands) == ("running", ["cont"] * 3)


async def test_a_machine_that_cannot_be_revived_is_told_with_what_qemu_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "QMP_REVIVE_SECONDS_MAX", 0.2)

    def locked(_: Any) -> Any:
        raise Refused('Failed to get "write" lock')

    async with pair(tmp_path, "postmigrate", "completed") as (qemu, watch):
        qemu.on["cont"] = locked
        with pytest.raises(HypervisorFailed, match=r'Failed to get "write" lock.*then `cont` at its monitor'):
            await watch.revive(VM)


async def test_a_thread_that_missed_its_cancel_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU 7.2: cancelled in the instant before it halts, it waits for migrate-continue for ever."""
    monkeypatch.setattr(qmp, "QMP_STUCK_SECONDS", 0.1)
    async with pair(tmp_path, "finish-migrate", "active") as (qemu, watch):

        def missed(_: Any) -> Any:
            qemu.become(migration="cancelling")
            return {}

        qemu.on["migrate_cancel"] = missed
        await watch.revive(VM)
        assert (qemu.status, qemu.commands) == ("running", ["migrate_cancel", "migrate-continue"])


@pytest.mark.parametrize(
    ("status", "migration"), [("paused", "cancelled"), ("running", "failed"), ("guest-panicked", "none")]
)
async def test_a_machine_is_left_as_its_operator_or_guest_left_it(tmp_path: Path, status: str, migration: str) -> None:
    async with pair(tmp_path, status, migration) as (qemu, watch):
        await watch.revive(VM)
        assert (qemu.status, qemu.commands) == (status, [])


@pytest.mark.parametrize(("status", "migration"), [("inmigrate", "none"), ("finish-migrate", "postcopy-active")])
async def test_what_cannot_be_turned_back_is_not_touched(tmp_path: Path, status: str, migration: str) -> None:
    async with pair(tmp_path, status, migration) as (qemu, watch):
        with pytest.raises(HypervisorFailed, match="cannot be turned back"):
            await watch.revive(VM)
        assert qemu.commands == []


async def test_a_source_is_removed_only_once_it_has_given_its_machine_away(tmp_path: Path) -> None:
    stands = [
        ("running", "completed"),
        ("finish-migrate", "pre-switchover"),
        ("postmigrate", "failed"),
        ("paused", "none"),
    ]
    for status, migration in stands:
        async with pair(tmp_path, status, migration) as (qemu, watch):
            with pytest.raises(HypervisorFailed, match="is not told to quit"):
                await watch.remove(VM)
            assert qemu.commands == []
    async with pair(tmp_path, "postmigrate", "completed") as (qemu, watch):
        await watch.remove(VM)
        assert qemu.commands == ["quit"]
        assert await watch.departing(VM) is CopyState.ABSENT


# ------------------------------------------------------------------ destination


async def test_a_guarded_destination_arrives_paused_and_runs_when_it_is_told(tmp_path: Path) -> None:
    async with pair(tmp_path, "inmigrate") as (qemu, watch):
        await watch.guard_arrival()
        assert (qemu.capabilities["events"], qemu.capabilities["late-block-activate"]) == (True, True)
        assert await watch.arriving(VM) is CopyState.INCOMING
        with pytest.raises(HypervisorFailed, match="has not got the whole machine"):
            await watch.start(VM)
        assert not qemu.autostart  # a `cont` here would have undone the guard
        qemu.become(migration="active")
        waiting = asyncio.create_task(watch.until_arrived())
        qemu.arrive()
        await finish(waiting)
        await watch.take(VM)
        assert await watch.arriving(VM) is CopyState.PAUSED
        assert not qemu.ever_ran
        await watch.start(VM)
        await watch.start(VM)
        assert qemu.commands == ["migrate-set-capabilities", "stop", "cont"]
        assert await watch.arriving(VM) is CopyState.RUNNING


@pytest.mark.parametrize(
    ("status", "migration"),
    [("running", "none"), ("paused", "completed"), ("prelaunch", "none"), ("inmigrate", "failed")],
)
async def test_a_qemu_that_waits_for_no_machine_is_refused(tmp_path: Path, status: str, migration: str) -> None:
    async with pair(tmp_path, status, migration) as (qemu, watch):
        with pytest.raises(HypervisorFailed, match="start it anew with -incoming"):
            await watch.guard_arrival()
        assert qemu.commands == []


async def test_a_machine_that_runs_before_it_could_be_guarded_is_told(tmp_path: Path) -> None:
    async with pair(tmp_path, "inmigrate") as (qemu, watch):

        def too_late(_: Any) -> Any:
            qemu.arrive()
            return {}

        qemu.on["stop"] = too_late
        with pytest.raises(HypervisorFailed, match="before its machine could be guarded"):
            await watch.guard_arrival()


async def test_somebody_else_who_continues_the_arriving_machine_is_told(tmp_path: Path) -> None:
    async with pair(tmp_path, "inmigrate") as (qemu, watch):
        await watch.guard_arrival()
        qemu.do_cont({})
        qemu.become(migration="active")
        waiting = asyncio.create_task(watch.until_arrived())
        qemu.arrive()
        with pytest.raises(HypervisorFailed, match="something else continued it"):
            await finish(waiting)
        with pytest.raises(HypervisorFailed, match="is not destroyed"):
            await watch.destroy(VM)
        assert "quit" not in qemu.commands


@pytest.mark.parametrize("how", ["failed", "gone"])
async def test_a_machine_that_does_not_load_is_told(tmp_path: Path, how: str) -> None:
    async with pair(tmp_path, "inmigrate") as (qemu, watch):
        await watch.guard_arrival()
        looked = await asked(qemu, "query-status")
        waiting = asyncio.create_task(watch.until_arrived())
        await finish(asyncio.create_task(looked.wait()))
        if how == "failed":
            qemu.become(migration="failed", why="load of migration failed")
        else:
            qemu.end()
        with pytest.raises(
            HypervisorFailed, match=r"load of migration failed|has ended while its machine was arriving"
        ):
            await finish(waiting)


async def test_a_machine_that_never_becomes_whole_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "QMP_TAKE_SECONDS_MAX", 0.05)
    async with pair(tmp_path, "inmigrate", "active") as (_, watch):
        with pytest.raises(HypervisorFailed, match="has not got the whole machine"):
            await watch.take(VM)


async def test_a_start_is_believed_when_the_machine_is_seen_to_run(tmp_path: Path) -> None:
    async with pair(tmp_path, "paused", "completed") as (qemu, watch):
        qemu.on["cont"] = lambda _: {}
        with pytest.raises(HypervisorFailed, match=r"does not run its machine \(paused\)"):
            await watch.start(VM)
    async with pair(tmp_path, "paused", "completed") as (qemu, watch):  # carried out, and the answer is lost

        def broken(arguments: dict[str, Any]) -> Any:
            qemu.do_cont(arguments)
            qemu.break_connections()
            return {}

        qemu.on["cont"] = broken
        await watch.start(VM)
        assert qemu.commands == ["cont"]


@pytest.mark.parametrize("ran", [True, False])
async def test_a_qemu_that_ends_at_its_start_has_run_if_it_said_so(tmp_path: Path, ran: bool) -> None:
    async with pair(tmp_path, "paused", "completed") as (qemu, watch):

        def ends(arguments: dict[str, Any]) -> Any:
            if ran:
                qemu.do_cont(arguments)
            qemu.end()
            return NotImplemented

        qemu.on["cont"] = ends
        if ran:
            await watch.start(VM)
        else:
            with pytest.raises(HypervisorFailed, match="does not run its machine"):
                await watch.start(VM)
        assert await watch.arriving(VM) is CopyState.ABSENT


@pytest.mark.parametrize(
    ("status", "migration", "commands"),
    [
        ("inmigrate", "none", ["stop", "quit"]),
        ("inmigrate", "active", ["stop", "quit"]),
        ("paused", "completed", ["quit"]),
    ],
)
async def test_a_copy_is_destroyed_and_seen_to_be_gone(
    tmp_path: Path, status: str, migration: str, commands: list[str]
) -> None:
    async with pair(tmp_path, status, migration) as (qemu, watch):
        await watch.destroy(VM)
        assert qemu.commands == commands
        assert await watch.arriving(VM) is CopyState.ABSENT


async def test_a_running_copy_is_never_destroyed(tmp_path: Path) -> None:
    async with pair(tmp_path, "running", "completed") as (qemu, watch):
        with pytest.raises(HypervisorFailed, match="is not destroyed"):
            await watch.destroy(VM)
        assert qemu.commands == []


@pytest.mark.parametrize("how", ["hangs", "refuses"])
async def test_a_qemu_that_does_not_quit_is_not_called_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(qmp, "QMP_QUIT_SECONDS_MAX", 0.2)
    monkeypatch.setattr(qmp, "QMP_POLL_SECONDS", 0.02)

    def refuse(_: Any) -> Any:
        raise Refused("not now")

    async with pair(tmp_path, "paused", "completed") as (qemu, watch):
        qemu.on["quit"] = refuse if how == "refuses" else lambda _: NotImplemented
        with pytest.raises(HypervisorFailed, match=r"is still there.*SIGKILL"):
            await watch.destroy(VM)


async def test_a_monitor_that_only_breaks_off_has_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the connection alone is no proof: its QEMU may listen again."""
    monkeypatch.setattr(qmp, "QMP_QUIT_SECONDS_MAX", 0.2)
    monkeypatch.setattr(qmp, "QMP_POLL_SECONDS", 0.02)
    async with pair(tmp_path, "paused", "completed") as (qemu, watch):

        def breaks_off(_: Any) -> Any:
            qemu.break_connections()
            return NotImplemented

        qemu.on["quit"] = breaks_off
        with pytest.raises(HypervisorFailed, match="is still there"):
            await watch.destroy(VM)


async def test_no_descriptor_is_left(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with pair(tmp_path, "paused", "completed") as (qemu, watch):
        for _ in range(5):
            await watch.arriving(VM)
            qemu.break_connections()
        await watch.arriving(VM)
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


# ------------------------------------------------------------------ which QEMU it is


async def test_a_machine_is_pinned_to_the_process_that_has_it(tmp_path: Path) -> None:
    async with pair(tmp_path, "running") as (qemu, watch):
        qemu.uuid = "6F4E2A10-0000-4000-8000-000000000001"
        pinned = await watch.pin(Vm("", "", paused=True), Side.SOURCE)
        assert (pinned.name, pinned.uuid, pinned.paused) == ("vm1", qemu.uuid.lower(), True)
        process, boot = pinned.copy.split("@")
        assert process.split()[0] == str(os.getpid())
        assert boot == asking.BOOT_ID.read_text().strip()
        assert await watch.departing(pinned) is CopyState.RUNNING


def dead(boot: str) -> str:
    """A copy whose process has ended: no process has that number."""
    return f"4194305 1@{boot}"


ELSEWHERE = dead("another-run-of-the-host")


@pytest.mark.parametrize("ours", [True, False], ids=["this run of the host", "an earlier one"])
async def test_what_was_meant_for_a_qemu_is_not_done_to_its_successor(tmp_path: Path, *, ours: bool) -> None:
    """A supervisor has started another one, of the same name and UUID, at the same path."""
    gone = replace(VM, copy=dead(asking.BOOT_ID.read_text().strip()) if ours else ELSEWHERE)
    async with pair(tmp_path, "postmigrate", "completed") as (qemu, watch):
        assert await watch.departing(gone) is CopyState.ABSENT
        assert await watch.arriving(gone) is CopyState.ABSENT
        await watch.remove(gone)
        await watch.destroy(gone)
        for act in (watch.revive, watch.take, watch.start):
            with pytest.raises(HypervisorFailed, match="is not there"):
                await act(gone)
        assert qemu.commands == []


UUID = "0f9c2f1e-0000-4000-8000-00000000abcd"


@pytest.mark.parametrize("status", ["running", "inmigrate", "paused", "postmigrate"])
async def test_a_machine_that_was_started_anew_runs_and_is_left_alone(tmp_path: Path, status: str) -> None:
    """Its host has crashed, and starts its machines as it comes up. One that waits, or is paused, runs nothing."""
    gone = replace(VM, uuid=UUID, copy=ELSEWHERE)
    async with pair(tmp_path, status) as (qemu, watch):
        qemu.on["query-uuid"] = lambda _: {"UUID": UUID}
        assert await watch.departing(gone) is CopyState.ABSENT
        assert await watch.fate(gone) is (Fate.AGAIN if status == "running" else Fate.LOST)
        if status == "running":
            await watch.revive(gone)
        else:
            with pytest.raises(HypervisorFailed, match=r"is not there|cannot be turned back"):
                await watch.revive(gone)
        assert qemu.commands == []


async def test_what_became_of_a_copy_that_is_gone(tmp_path: Path) -> None:
    """Another machine at its monitor is not it, nor one that cannot be told from it."""
    here = dead(asking.BOOT_ID.read_text().strip())
    async with pair(tmp_path, "running") as (qemu, watch):
        assert await watch.fate(replace(VM, copy=here)) is Fate.ENDED
        qemu.on["query-uuid"] = lambda _: {"UUID": UUID.replace("0", "1")}
        assert await watch.fate(replace(VM, uuid=UUID, copy=here)) is Fate.ENDED
        assert await watch.fate(replace(VM, uuid=UUID, copy=ELSEWHERE)) is Fate.LOST
        qemu.end()
        assert await watch.fate(replace(VM, uuid=UUID, copy=ELSEWHERE)) is Fate.LOST


async def test_a_qemu_that_lost_its_monitor_s_path_to_another_is_not_called_gone(tmp_path: Path) -> None:
    """It runs on: this process, say, which has the socket of neither."""
    async with pair(tmp_path, "postmigrate", "completed") as (qemu, watch):
        mine = await watch.pin(VM, Side.SOURCE)
        parent = replace(mine, copy=f"{written_down(os.getppid())}@{mine.copy.partition('@')[2]}")
        for act in (watch.departing, watch.arriving, watch.remove, watch.destroy, watch.revive, watch.start):
            with pytest.raises(HypervisorFailed, match=f"process {os.getppid()}, which runs on"):
                await act(parent)
        assert qemu.commands == []


async def test_a_qemu_whose_process_cannot_be_seen_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(tmp_path, "running") as (_, watch):
        monkeypatch.setattr(asking, "written_down", lambda pid: "")
        pinned = await watch.pin(VM, Side.SOURCE)
        assert pinned.copy == asking.UNKNOWN
        assert await watch.departing(pinned) is CopyState.RUNNING
        assert await watch.departing(replace(pinned, copy=ELSEWHERE)) is CopyState.RUNNING


async def test_a_monitor_that_was_let_go_is_asked_again(tmp_path: Path) -> None:
    async with pair(tmp_path, "running") as (_, watch):
        for _ in range(3):
            assert await watch.departing(VM) is CopyState.RUNNING
            watch.let_go()
            watch.let_go()


# ------------------------------------------------------------------ before a migration, and without a guard


async def test_a_connection_that_is_not_this_qemu_s_is_told(tmp_path: Path) -> None:
    async with pair(tmp_path, "running") as (qemu, watch):
        with pytest.raises(HypervisorFailed, match="does not migrate as it should"):
            await watch.migrates()
        assert qemu.capabilities["pause-before-switchover"], "but the next one is prepared"
        qemu.become(migration="setup")
        await watch.migrates()
        qemu.become("postmigrate")
        with pytest.raises(HypervisorFailed, match="given its machine away before"):
            await watch.migrates()


async def test_a_migration_that_nobody_guards_goes_on_by_itself(tmp_path: Path) -> None:
    async with pair(tmp_path, "running") as (qemu, watch):
        await watch.guard_departure()
        qemu.become(migration="active")
        passing = asyncio.create_task(watch.let_through())
        await asyncio.sleep(0)
        qemu.halt()
        await finish(passing)
        assert qemu.migration == "device"


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
async def test_nor_is_it_waited_for_when_it_has_ended(tmp_path: Path, end: str) -> None:
    async with pair(tmp_path, "running", "active") as (qemu, watch):
        passing = asyncio.create_task(watch.let_through())
        await asyncio.sleep(0)
        qemu.become(migration=end)
        await finish(passing)
        assert "migrate-continue" not in qemu.commands


async def test_a_copy_that_runs_has_been_taken(tmp_path: Path) -> None:
    """By whoever started it, and died before that was written down."""
    async with pair(tmp_path, "running", "completed") as (_, watch):
        await watch.take(VM)


async def test_a_paused_machine_that_was_given_away_is_left_to_its_operator(tmp_path: Path) -> None:
    async with pair(tmp_path, "postmigrate", "completed") as (qemu, watch):
        await watch.revive(replace(VM, paused=True))
        assert qemu.commands == []
        await watch.revive(VM)
        assert qemu.status == "running"

"""A QEMU's machine changes hosts through two relays, whichever of them dies, and whenever the network does.

Never do two copies run, and after recovery one does. QEMU itself is played here; tests/e2e has real ones.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crypto.tls import TlsConfig
from proxy.control import Finish
from proxy.errors import HypervisorFailed, PolicyRefused, exit_code_of
from proxy.handover.table import Side, State
from proxy.hypervisors import asking, qmp
from proxy.hypervisors.base import CopyState, Vm
from proxy.hypervisors.qmp import QemuMonitor
from proxy.shell.arrival import DestinationRunner
from proxy.shell.departure import SourceRunner
from tests.proxy.shell.handing import STORY_SECONDS_MAX, both_ended, order, quick
from tests.proxy.shell.qemu_hosts import QemuHosts, Story, qemu_hosts
from tests.proxy.support import run, until

__all__ = ["quick"]
pytestmark = pytest.mark.usefixtures("quick", "quick_qemu")

# Roughly in the order in which they are reached where nothing goes wrong.
MOMENTS = (
    "source qemu pre-switchover",
    "destination write prepared before",
    "destination write prepared after",
    "source write prepared before",
    "source write prepared after",
    "source qemu device",
    "source qemu completed",
    "source write voted before",
    "source write voted after",
    "destination qemu completed",
    "destination write voted before",
    "destination write voted after",
    "source write committed before",
    "source write committed after",
    "destination write committed before",
    "destination write committed after",
    "destination qemu running",
    "destination write done before",
    "destination write done after",
    "source write done before",
    "source write done after",
)


@pytest.fixture
def quick_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are pauses for a QEMU that answers at once."""
    for module, name, seconds in (
        (asking, "QMP_POLL_SECONDS", 0.02),
        (asking, "QMP_RETRY_SECONDS", 0.002),
        (qmp, "QMP_RETRY_SECONDS", 0.002),
        (qmp, "QMP_POLL_SECONDS", 0.02),
        (qmp, "QMP_TAKE_SECONDS_MAX", 0.5),
    ):
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
def tell(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> Callable[..., None]:
    """Runs a story on two hosts."""

    def run_it(story: Story, **options: Any) -> None:
        async def whole() -> None:
            async with qemu_hosts(tmp_path, client_tls, server_tls, **options) as both:
                await story(both)
                assert not both.world.wrong, both.world.wrong

        run(whole(), STORY_SECONDS_MAX)

    return run_it


def states(both: QemuHosts) -> list[State]:
    return [both.states()[side] for side in Side]


async def end_of(both: QemuHosts) -> None:
    """All is settled, and one runs, as both journals say."""
    await both.settle()
    world = both.world
    assert not world.wrong, world.wrong
    assert world.running == 1, world.story
    if world.copies[Side.DESTINATION] is CopyState.RUNNING:
        assert states(both) == [State.DONE, State.DONE], world.story
        assert world.copies[Side.SOURCE] is CopyState.ABSENT
    else:
        assert states(both) == [State.ABORTED, State.ABORTED], world.story
        assert world.copies[Side.DESTINATION] is CopyState.ABSENT
    assert all(record.settled for side in Side for record in both.journal(side))


def test_a_machine_changes_hosts(tell: Callable[..., None]) -> None:
    async def story(both: QemuHosts) -> None:
        await both.migrate()
        await both_ended(both)
        assert [ended.error for ended in both.ended.values()] == [None, None]
        assert [ended.report.handover for ended in both.ended.values()] == ["done", "done"]
        assert both.world.copies == {Side.SOURCE: CopyState.ABSENT, Side.DESTINATION: CopyState.RUNNING}
        reached = [what for what in both.world.story if what in MOMENTS]
        assert sorted(reached) == sorted(MOMENTS)
        for first, second in (
            ("source qemu pre-switchover", "destination write prepared before"),
            ("destination write prepared after", "source write prepared before"),
            ("source write prepared after", "source qemu device"),
            ("source qemu completed", "source write voted before"),
            ("destination qemu completed", "destination write voted before"),
            ("destination write voted after", "source write committed before"),
            ("source write voted after", "source write committed before"),
            ("source write committed after", "destination write committed before"),
            ("destination write committed after", "destination qemu running"),
            ("destination qemu running", "destination write done before"),
            ("destination write done after", "source write done before"),
            ("source write done after", "source is absent"),
        ):
            order(both, first, second)
        assert states(both) == [State.DONE, State.DONE]
        assert not both.handovers[Side.SOURCE].unsettled()
        assert not both.handovers[Side.DESTINATION].unsettled()

    tell(story)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "killed",
    [
        pytest.param((Side.SOURCE,), id="source"),
        pytest.param((Side.DESTINATION,), id="there"),
        pytest.param(tuple(Side), id="both"),
    ],
)
def test_a_relay_is_killed_and_comes_back(tell: Callable[..., None], killed: tuple[Side, ...], moment: str) -> None:
    async def story(both: QemuHosts) -> None:
        def kill() -> None:
            for side in killed:
                both.kill(side)

        both.world.at[moment] = kill
        await both.migrate()
        await until(lambda: both.killed == set(killed))
        await both.until_left()
        await end_of(both)

    tell(story)


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_network_is_lost_and_comes_back(tell: Callable[..., None], moment: str) -> None:
    async def story(both: QemuHosts) -> None:
        both.world.at[moment] = both.lose
        await both.migrate()
        await until(lambda: both.middle.refuses)
        await both.until_left()
        await end_of(both)

    tell(story)


BEFORE_IT_MAY_RUN = MOMENTS[: MOMENTS.index("source write committed before")]


@pytest.mark.parametrize("moment", BEFORE_IT_MAY_RUN)
def test_the_destination_s_qemu_dies(tell: Callable[..., None], moment: str) -> None:
    async def story(both: QemuHosts) -> None:
        both.world.at[moment] = lambda: both.soon(lambda: both.qemu[Side.DESTINATION].end(unlink=False))
        await both.migrate()
        await both.until_left()
        await both.settle()
        assert both.world.copies[Side.SOURCE] is CopyState.RUNNING, both.world.story
        assert states(both) == [State.ABORTED, State.ABORTED]

    tell(story)


def test_a_source_s_qemu_dies_once_it_has_sent_everything(tell: Callable[..., None]) -> None:
    """Nobody heard it say so: the destination, which has everything, says."""

    async def story(both: QemuHosts) -> None:
        both.world.at["source qemu device"] = lambda: both.soon(lambda: both.qemu[Side.SOURCE].end(unlink=False))
        await both.migrate()
        await until(lambda: both.world.copies[Side.DESTINATION] is CopyState.RUNNING)
        await end_of(both)

    tell(story)


def test_a_source_that_finishes_before_it_commits_is_told_no_outcome(
    tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All has arrived and both channels have ended, and the copy stands still: that is not done, nor signed so."""
    honest, conclude = SourceRunner.say_word, DestinationRunner.conclude
    concluded = []

    async def early(self: SourceRunner, state: State, why: str, *, paused: bool = False) -> None:
        if state is State.COMMITTED:
            await self.say(Finish())
        else:
            await honest(self, state, why, paused=paused)

    def note(self: DestinationRunner) -> None:
        assert self.guard is not None
        concluded.append(self.guard.party.state)
        conclude(self)

    monkeypatch.setattr(SourceRunner, "say_word", early)
    monkeypatch.setattr(DestinationRunner, "conclude", note)

    async def story(both: QemuHosts) -> None:
        await both.migrate()
        await until(lambda: both.arriving and both.arriving[0].session.state.value != "open")
        await until(lambda: concluded or both.arriving[0].over)
        assert concluded == []
        await end_of(both)

    tell(story)


def test_nothing_is_stated_of_a_machine_that_has_not_halted(
    tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A destination that asks for the statement at once gets none."""
    honest = QemuMonitor.until_switchover
    errors: list[BaseException | None] = []

    async def story(both: QemuHosts) -> None:
        async def early(self: QemuMonitor) -> bool:
            runner = both.departing and both.departing.current
            assert runner is not None
            errors.extend(await asyncio.gather(runner.until_complete(), return_exceptions=True))
            return await honest(self)

        monkeypatch.setattr(QemuMonitor, "until_switchover", early)
        await both.migrate()
        await both_ended(both)
        assert isinstance(errors[0], HypervisorFailed), errors

    tell(story)


def test_a_machine_its_operator_paused_stays_so(tell: Callable[..., None]) -> None:
    async def story(both: QemuHosts) -> None:
        both.qemu[Side.SOURCE].become("paused")
        await both.migrate()
        await both_ended(both)
        assert states(both) == [State.DONE, State.DONE]
        assert both.world.copies == {Side.SOURCE: CopyState.ABSENT, Side.DESTINATION: CopyState.PAUSED}

    tell(story)


def test_a_paused_machine_stays_so_when_another_process_finishes(tell: Callable[..., None]) -> None:
    async def story(both: QemuHosts) -> None:
        both.world.at["destination write committed after"] = lambda: both.kill(Side.DESTINATION)
        both.qemu[Side.SOURCE].become("paused")
        await both.migrate()
        await until(lambda: both.killed == {Side.DESTINATION})
        await both.until_left()
        await both.settle()
        assert both.world.copies == {Side.SOURCE: CopyState.ABSENT, Side.DESTINATION: CopyState.PAUSED}

    tell(story)


def test_a_paused_machine_that_is_turned_back_does_not_run(tell: Callable[..., None]) -> None:
    """Only ``cont`` leads back once it was given away: that is its operator's."""

    async def story(both: QemuHosts) -> None:
        both.world.at["destination write voted after"] = lambda: both.kill(Side.DESTINATION)
        both.qemu[Side.SOURCE].become("paused")
        await both.migrate()
        await until(lambda: both.killed == {Side.DESTINATION})
        await both.until_left()
        await both.settle()
        assert both.world.running == 0
        assert both.qemu[Side.SOURCE].status == "postmigrate"
        assert states(both) == [State.ABORTED, State.ABORTED]

    tell(story)


@pytest.mark.parametrize("monitored", [(Side.SOURCE,), (Side.DESTINATION,), ()], ids=["source", "destination", "none"])
def test_a_session_that_is_not_guarded_at_both_ends_is_let_through(
    tell: Callable[..., None], monitored: tuple[Side, ...]
) -> None:
    """A source that was told to halt goes on by itself, and the destination runs when it has everything."""

    async def story(both: QemuHosts) -> None:
        await both.migrate()
        await both_ended(both)
        assert [ended.error for ended in both.ended.values()] == [None, None]
        assert [ended.report.handover for ended in both.ended.values()] == ["unguarded", "unguarded"]
        assert both.world.copies == {Side.SOURCE: CopyState.SUSPENDED, Side.DESTINATION: CopyState.RUNNING}
        assert not any(both.journal(side) for side in Side)

    tell(story, monitored=monitored)


@pytest.mark.parametrize("side", Side, ids=lambda side: side.value)
@pytest.mark.parametrize("monitored", [(Side.SOURCE,), (Side.DESTINATION,)], ids=["source", "destination"])
def test_it_is_refused_where_that_is_asked_for(
    tell: Callable[..., None], side: Side, monitored: tuple[Side, ...]
) -> None:
    async def story(both: QemuHosts) -> None:
        await both.migrate()
        await until(lambda: Side.SOURCE in both.ended)
        error = both.ended[Side.SOURCE].error
        assert isinstance(error, PolicyRefused)
        assert exit_code_of(error) == 3
        assert "--qmp" in str(error)
        if side is Side.SOURCE:  # the destination had agreed by then, and is told
            await both_ended(both)
            there = both.ended[Side.DESTINATION].error
            assert there is not None
            assert exit_code_of(there) == 3
        assert both.world.copies == {Side.SOURCE: CopyState.RUNNING, Side.DESTINATION: CopyState.INCOMING}
        assert not any(both.journal(side) for side in Side)

    tell(story, monitored=monitored, required=(side,))


@pytest.mark.parametrize("side", Side, ids=lambda side: side.value)
def test_a_no_of_anybody_leaves_the_machine_where_it_is(tell: Callable[..., None], side: Side) -> None:
    async def no(side: Side, vm: Vm) -> None:
        raise PolicyRefused("not today")

    async def story(both: QemuHosts) -> None:
        await both.migrate()
        await both_ended(both)
        await end_of(both)
        assert isinstance(both.ended[side].error, PolicyRefused)
        assert both.world.copies[Side.SOURCE] is CopyState.RUNNING

    tell(story, approvals={side: [no]})


def test_a_migration_that_began_unprepared_is_refused_and_goes_on_at_home(tell: Callable[..., None]) -> None:
    async def story(both: QemuHosts) -> None:
        qemu = both.qemu[Side.SOURCE]
        qemu.on["migrate-set-capabilities"] = lambda _: {}
        await both.migrate()
        await both_ended(both)
        assert isinstance(both.ended[Side.SOURCE].error, HypervisorFailed)
        assert "migrate again" in str(both.ended[Side.SOURCE].error)
        assert not qemu.commands.count("migrate_cancel")
        assert both.world.copies[Side.DESTINATION] is CopyState.INCOMING, "it was not even connected to"

    tell(story)


@pytest.mark.parametrize("status", ["running", "paused"])
def test_a_monitor_of_another_machine_does_it_no_harm(tell: Callable[..., None], status: str) -> None:
    """`--qmp` names a QEMU that has a machine of its own, running or paused."""

    async def story(both: QemuHosts) -> None:
        other = both.qemu[Side.DESTINATION]
        other.status = status
        await both.migrate()
        await both_ended(both)
        assert "does not wait for a machine" in str(both.ended[Side.DESTINATION].error)
        assert other.status == status
        assert not other.commands
        await both.settle()
        assert both.world.copies[Side.SOURCE] is CopyState.RUNNING

    tell(story)

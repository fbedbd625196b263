"""An operator decides a hand-over that a relay still has in hand: nothing has to be stopped first."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from korora import handovers as commands
from korora.handovers import decide
from proxy.errors import ConfigurationError, HypervisorFailed, JournalBusy
from proxy.handover.record import Entry, Head, Record
from proxy.handover.table import Event, Side, State
from proxy.handover.xl import BANNER, FAILED, READY, SUCCEEDED
from proxy.hypervisors.base import CopyState
from proxy.shell import orders
from proxy.shell.handovers import Handovers
from proxy.shell.journal import Journal, now
from proxy.shell.orders import Answer, give, take
from tests.proxy.shell.handing import Hosts, both_ended, quick, tell
from tests.proxy.shell.hosted import VM, Host, Life, MortalJournal, World
from tests.proxy.support import run, until

__all__ = ["quick", "tell"]
pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # who is killed closes nothing
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


async def say(both: Hosts, side: Side, folder: Path, *, run_here: bool) -> Record:
    """What `korora handover resolve` does, in a process of its own."""
    own = Handovers(MortalJournal(folder / side.value, both.lives[side]), lambda kind, monitor: Host(both.lives[side]))
    (record,) = own.journal.records()
    async with asyncio.timeout(30.0):
        return await decide(own, record, run_here=run_here)


@pytest.mark.parametrize("resume_seconds", [0, 30], ids=["over", "may go on"])
def test_a_source_that_waits_for_its_destination_is_told_to_run_on(
    tell: Callable[..., None], tmp_path: Path, resume_seconds: int
) -> None:
    """Committed, and the destination's host is off. Whether its session is over, or waits for the network."""

    async def story(both: Hosts) -> None:
        both.world.at["source write committed after"] = both.lose
        await both.migrate()
        await until(lambda: both.states().get(Side.SOURCE) is State.COMMITTED)
        both.kill(Side.DESTINATION)
        await both.bury(Side.DESTINATION)
        both.world.copies[Side.DESTINATION] = CopyState.ABSENT
        after = await say(both, Side.SOURCE, tmp_path, run_here=True)
        assert after.state is State.ABORTED
        assert after.why == "an operator says so"
        assert both.world.copies[Side.SOURCE] is CopyState.RUNNING
        await until(lambda: Side.SOURCE in both.ended)  # although the destination never heard
        assert both.source_xl is not None
        assert both.source_xl.end == "resumed"
        assert bytes(both.source_xl.heard) == BANNER + READY + FAILED
        assert not list((tmp_path / "source" / "handover").glob("*.order*"))

    tell(story, resume_seconds=resume_seconds)


def test_a_source_that_waits_is_told_to_give_up(tell: Callable[..., None], tmp_path: Path) -> None:
    """The destination's copy was seen to run."""

    async def story(both: Hosts) -> None:
        both.world.at["destination write done after"] = both.lose
        await both.migrate()
        await until(lambda: both.states().get(Side.DESTINATION) is State.DONE)
        after = await say(both, Side.SOURCE, tmp_path, run_here=False)
        assert after.state is State.DONE
        assert both.source_xl is not None
        await until(lambda: both.source_xl is not None and both.source_xl.end == "gone")
        assert bytes(both.source_xl.heard) == BANNER + READY + SUCCEEDED
        await both.settle()

    tell(story)


@pytest.mark.parametrize("moment", ["destination write prepared after", "destination write voted after"])
@pytest.mark.parametrize("run_here", [True, False], ids=["run here", "give up"])
def test_a_destination_that_waits_for_its_source_is_told(
    tell: Callable[..., None], tmp_path: Path, moment: str, run_here: bool
) -> None:
    """The source's host is lost for good, and the destination's relay waits, with xl's receiver in hand."""

    async def story(both: Hosts) -> None:
        both.world.at[moment] = lambda: both.kill(Side.SOURCE)
        await both.migrate()
        await until(lambda: Side.SOURCE in both.killed)
        await both.bury(Side.SOURCE)
        both.world.copies[Side.SOURCE] = CopyState.ABSENT
        await both.until_left()
        after = await say(both, Side.DESTINATION, tmp_path, run_here=run_here)
        assert after.state is (State.DONE if run_here else State.ABORTED)
        wanted = CopyState.RUNNING if run_here else CopyState.ABSENT
        assert both.world.copies[Side.DESTINATION] is wanted
        await until(lambda: Side.DESTINATION in both.ended)

    tell(story)


def test_nobody_runs_a_copy_beside_one_whose_relay_is_connected(tell: Callable[..., None], tmp_path: Path) -> None:
    """It may start it at any moment: what can be seen not to be so is not believed."""

    async def story(both: Hosts) -> None:
        def hang() -> None:
            both.lives[Side.DESTINATION].failures["start"] = 10**6

        both.world.at["destination write committed after"] = hang
        await both.migrate()
        await until(lambda: both.states().get(Side.DESTINATION) is State.COMMITTED)
        with pytest.raises(HypervisorFailed, match="is connected and at work"):
            await say(both, Side.SOURCE, tmp_path, run_here=True)
        assert both.states()[Side.SOURCE] is State.COMMITTED
        assert both.world.copies[Side.SOURCE] is CopyState.SUSPENDED
        both.lives[Side.DESTINATION].failures.clear()
        await both_ended(both)
        assert both.world.copies[Side.DESTINATION] is CopyState.RUNNING

    tell(story)


def test_a_recovery_that_waits_for_its_destination_is_told(tmp_path: Path) -> None:
    """A daemon's, or the process that `korora xl` leaves behind."""

    async def story() -> None:
        left = Left(tmp_path, State.COMMITTED)
        dialled = asyncio.Event()

        class Nowhere:
            async def meet(self, *_: object) -> None:
                dialled.set()
                await asyncio.Event().wait()

        waiting = asyncio.create_task(left.handovers.recover_one(left.record, Nowhere(), seconds=60.0))  # type: ignore[arg-type]
        await dialled.wait()
        after = await decide(left.own, left.record, run_here=True)
        assert after.state is State.ABORTED
        assert left.world.copies[Side.SOURCE] is CopyState.RUNNING
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    run(story(), 30.0)


class Left:
    """A source's hand-over that two processes know of."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder = folder
        self.world = World()
        self.world.copies[Side.SOURCE] = CopyState.SUSPENDED
        life = Life(Side.SOURCE, self.world)
        self.handovers, self.own = (Handovers(Journal(folder), lambda kind, monitor: Host(life)) for _ in range(2))
        self.life = life
        file = self.own.journal.begin(Head("1" * 32, "source", "xl", "there", now()), Entry("open", now()))
        if state is not State.OPEN:
            file.write(state, "", VM)
        file.close()
        (self.record,) = self.own.journal.records()

    @property
    def order(self) -> Path:
        return self.folder / "handover" / f"{'1' * 32}-source.order"

    async def while_held(self, work: Callable[[], Awaitable[object]]) -> None:
        """Somebody has it locked meanwhile, and hears nothing."""
        file = Journal(self.folder).open("1" * 32, Side.SOURCE)
        assert file is not None
        try:
            await work()
        finally:
            file.close()


def test_what_cannot_be_done_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        left = Left(tmp_path, State.COMMITTED)
        left.life.failures["revive"] = 100

        class Nowhere:
            async def meet(self, *_: object) -> None:
                await asyncio.Event().wait()

        waiting = asyncio.create_task(left.handovers.recover_one(left.record, Nowhere(), seconds=60.0))  # type: ignore[arg-type]
        await until(lambda: left.own.journal.held("1" * 32, Side.SOURCE))
        with pytest.raises(HypervisorFailed, match="cannot revive guest"):
            await decide(left.own, left.record, run_here=True)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    run(story(), 30.0)


def test_an_error_that_nobody_expected_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator would else wait for two minutes, and hear that nothing is known."""

    async def breaks(*_: object) -> Answer:
        raise OSError("no such thing")

    monkeypatch.setattr(orders.Ear, "_obey", breaks)

    async def story() -> None:
        left = Left(tmp_path, State.COMMITTED)

        class Nowhere:
            async def meet(self, *_: object) -> None:
                await asyncio.Event().wait()

        waiting = asyncio.create_task(left.handovers.recover_one(left.record, Nowhere(), seconds=60.0))  # type: ignore[arg-type]
        await until(lambda: left.own.journal.held("1" * 32, Side.SOURCE))
        with pytest.raises(HypervisorFailed, match="its log says why"):
            await decide(left.own, left.record, run_here=True)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    run(story(), 30.0)


def test_a_process_that_does_not_listen_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was ordered is taken back: nobody does it an hour later."""
    monkeypatch.setattr(commands, "ORDER_SECONDS_MAX", 0.2)
    left = Left(tmp_path, State.COMMITTED)

    async def work() -> None:
        with pytest.raises(JournalBusy, match="does not wait for an operator's word"):
            await decide(left.own, left.record, run_here=True)
        assert not left.order.exists()

    run(left.while_held(work), 30.0)
    assert left.world.copies[Side.SOURCE] is CopyState.SUSPENDED


def test_who_has_it_may_let_it_go(tmp_path: Path) -> None:
    """Then it is done here."""
    left = Left(tmp_path, State.COMMITTED)

    async def story() -> None:
        file = Journal(tmp_path).open("1" * 32, Side.SOURCE)
        assert file is not None
        asked = asyncio.create_task(decide(left.own, left.record, run_here=True))
        await until(left.order.exists)
        file.close()
        assert (await asked).state is State.ABORTED
        assert left.world.copies[Side.SOURCE] is CopyState.RUNNING
        assert not left.order.exists()

    run(story(), 30.0)


def test_nobody_is_asked_where_nothing_is_to_be_decided(tmp_path: Path) -> None:
    left = Left(tmp_path, State.PREPARED)

    async def work() -> None:
        with pytest.raises(ConfigurationError, match="nothing is left to an operator"):
            await decide(left.own, left.record, run_here=True)

    run(left.while_held(work), 30.0)


# ------------------------------------------------------------------ the file


def test_an_order_is_given_and_answered(tmp_path: Path) -> None:
    left = Left(tmp_path, State.COMMITTED)
    given = give(left.own.journal, left.record, Event.GIVE_UP)
    assert left.order.stat().st_mode & 0o777 == 0o600
    assert given.answer() is None
    taken = take(left.handovers.journal, "1" * 32, Side.SOURCE)
    assert taken is not None
    assert taken.event is Event.GIVE_UP
    assert not given.withdraw()
    assert given.answer() is None
    taken.answer(Answer("no"))
    assert given.answer() == Answer("no")
    given.close()
    assert [path.suffix for path in left.order.parent.iterdir()] == [".journal"]


def test_what_was_withdrawn_is_not_done(tmp_path: Path) -> None:
    left = Left(tmp_path, State.COMMITTED)
    given = give(left.own.journal, left.record, Event.RUN_HERE)
    assert given.withdraw()
    assert take(left.own.journal, "1" * 32, Side.SOURCE) is None
    given.close()


def test_what_somebody_ordered_who_is_gone_is_not_done(tmp_path: Path) -> None:
    """He may have gone because it was a mistake; or the host was, for hours."""
    left = Left(tmp_path, State.COMMITTED)
    given = give(left.own.journal, left.record, Event.RUN_HERE)
    os.close(given._descriptor)
    os.close(given._folder)
    assert left.order.exists()
    assert take(left.own.journal, "1" * 32, Side.SOURCE) is None
    assert not left.order.exists()
    left.order.write_text("from another day")
    given = give(left.own.journal, left.record, Event.RUN_HERE)
    taken = take(left.own.journal, "1" * 32, Side.SOURCE)
    assert taken is not None
    taken.answer(Answer())
    given.close()


def test_one_operator_decides_at_a_time(tmp_path: Path) -> None:
    left = Left(tmp_path, State.COMMITTED)
    given = give(left.own.journal, left.record, Event.RUN_HERE)
    with pytest.raises(JournalBusy, match="another operator"):
        give(left.own.journal, left.record, Event.GIVE_UP)
    given.close()
    give(left.own.journal, left.record, Event.GIVE_UP).close()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"run_here",
        b'{"decision":"prepared"}',
        b'{"decision":"run_here","version":2}',
        b'{"decision":"run_here"' + b" " * orders.ORDER_BYTES_MAX + b"}",
    ],
)
def test_what_is_no_order_is_not_obeyed(tmp_path: Path, content: bytes) -> None:
    left = Left(tmp_path, State.COMMITTED)
    given = give(left.own.journal, left.record, Event.RUN_HERE)
    os.truncate(left.order, 0)
    os.pwrite(given._descriptor, content, 0)
    assert take(left.own.journal, "1" * 32, Side.SOURCE) is None
    given.close()


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_what_is_no_file_is_not_obeyed(tmp_path: Path, kind: str) -> None:
    """Nor followed, nor waited for."""
    left = Left(tmp_path, State.COMMITTED)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b'{"decision":"run_here"}\n')
    match kind:
        case "link":
            left.order.symlink_to(elsewhere)
        case "fifo":
            os.mkfifo(left.order)
        case _:
            left.order.mkdir()
    assert take(left.own.journal, "1" * 32, Side.SOURCE) is None
    assert elsewhere.read_bytes() == b'{"decision":"run_here"}\n'


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's order is somebody else's to read")
def test_root_s_order_can_be_read_by_the_relay_s_user(tmp_path: Path) -> None:
    left = Left(tmp_path, State.COMMITTED)
    os.chown(left.order.parent, 65534, 65534)
    given = give(left.own.journal, left.record, Event.RUN_HERE)
    status = left.order.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (
        0,
        65534,
        0o660,
    )  # whose word it is stays to be seen
    given.close()

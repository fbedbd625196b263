"""A relay that is told to stop in the middle of a last handshake lets it finish, or leaves so that nothing is lost."""

import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.endpoints.pipes import start
from proxy.errors import Interrupted
from proxy.handover.table import Side, State
from proxy.handover.xl import BANNER, READY, SUCCEEDED
from proxy.hypervisors.base import CopyState
from proxy.shell import runner
from tests.proxy.shell.handing import Hosts, both_ended, quick, tell, turned_back
from tests.proxy.shell.hosted import MortalConnection
from tests.proxy.support import run, until

__all__ = ["quick", "tell"]
pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # who is killed closes nothing
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
STOP = Interrupted(signal.SIGTERM)

FINISHING = (
    "destination write prepared after",
    "source write prepared after",
    "source xl ready",
    "source write voted after",
    "destination write voted after",
    "source write committed after",
    "destination write committed after",
)


def stop(both: Hosts, side: Side) -> None:
    """As a signal does."""

    def now() -> None:
        one = both.departing.current if side is Side.SOURCE and both.departing else both.arriving[0]
        assert one is not None
        one.stop(STOP)
        one.stop(STOP)  # a daemon says so twice to some

    both.soon(now)


@pytest.mark.parametrize("side", Side, ids=lambda side: side.value)
@pytest.mark.parametrize("moment", FINISHING)
def test_a_last_handshake_under_way_finishes(tell: Callable[..., None], side: Side, moment: str) -> None:
    if (side, moment) == (Side.SOURCE, FINISHING[0]):
        pytest.skip("the source has not been asked yet, and turns back")

    async def story(both: Hosts) -> None:
        both.world.at[moment] = lambda: stop(both, side)
        await both.migrate()
        await both_ended(both)
        assert [ended.error for ended in both.ended.values()] == [None, None], both.world.story
        assert both.source_xl is not None
        assert bytes(both.source_xl.heard) == BANNER + READY + SUCCEEDED
        assert set(both.states().values()) == {State.DONE}

    tell(story)


@pytest.mark.parametrize("side", Side, ids=lambda side: side.value)
def test_before_that_it_is_cut_at_once(tell: Callable[..., None], side: Side) -> None:
    async def story(both: Hosts) -> None:
        both.world.at["source xl stream"] = lambda: stop(both, side)
        await both.migrate()
        await both_ended(both)
        await turned_back(both)
        assert isinstance(both.ended[side].error, Interrupted)

    tell(story)


@pytest.mark.parametrize("voted", [False, True], ids=["prepared", "voted"])
def test_a_destination_that_cannot_finish_keeps_its_copy(
    tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch, voted: bool
) -> None:
    """Its source's host is lost: to close xl's input would be to destroy the only copy there is."""
    monkeypatch.setattr(runner, "STOPPED_SECONDS_MAX", 0.1)

    async def story(both: Hosts) -> None:
        moment = "destination write voted after" if voted else "source write voted after"

        def cut() -> None:
            both.kill(Side.SOURCE)
            stop(both, Side.DESTINATION)

        both.world.at[moment] = cut
        both.world.at["destination leaves"] = lambda: both.xl[1].cancel() and None  # it is killed before it sees an end
        await both.migrate()
        await until(lambda: Side.DESTINATION in both.ended)
        await both.bury(Side.SOURCE)
        assert "destination leaves" in both.world.story
        both.world.copies[Side.SOURCE] = CopyState.ABSENT
        assert both.world.copies[Side.DESTINATION] in (CopyState.INCOMING, CopyState.PAUSED)
        both.mortal.add(Side.DESTINATION)
        both.begin(Side.DESTINATION)
        await both.settle()
        assert both.world.copies[Side.DESTINATION] is CopyState.RUNNING
        assert set(both.states().values()) == {State.DONE}

    tell(story)


def test_a_source_that_cannot_finish_leaves_xl_waiting(
    tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Committed: the next process is handed xl's pipes, if their holder still has them, and tells it how it ended."""
    monkeypatch.setattr(runner, "STOPPED_SECONDS_MAX", 0.1)

    async def story(both: Hosts) -> None:
        def cut() -> None:
            both.lose()
            stop(both, Side.SOURCE)

        both.world.at["source write committed after"] = cut
        await both.migrate()
        await until(lambda: Side.SOURCE in both.ended)
        assert "source leaves" in both.world.story
        assert both.source_xl is not None
        assert both.source_xl.end == ""
        (pipes,) = both.lives[Side.SOURCE].connections
        both.mortal.add(Side.SOURCE)
        life = both.begin(Side.SOURCE)
        both.mend()
        session = both.journal(Side.SOURCE)[0].head.session
        await both.handovers[Side.SOURCE].readopt(session, MortalConnection(pipes, life), both.contact)
        await until(lambda: both.source_xl is not None and both.source_xl.end == "gone")
        await both.settle()
        assert both.world.copies[Side.DESTINATION] is CopyState.RUNNING

    tell(story)


def test_xl_is_killed_before_its_input_ends(tmp_path: Path) -> None:
    """Or it destroys what it has received."""
    seen = tmp_path / "seen"
    program = f"import pathlib, sys; print('up', flush=True); sys.stdin.read(); pathlib.Path({str(seen)!r}).touch()"

    async def leave() -> None:
        connection = start([sys.executable, "-S", "-c", program], "xl", wind_down=True)
        buffer = memoryview(bytearray(16))
        await until(lambda: connection.read_into(buffer))
        connection.leave()
        await asyncio.wait({connection._ended}, timeout=10.0)
        assert connection._ended.result() == -signal.SIGKILL
        assert not seen.exists()

    async def story() -> None:
        for _ in range(10):
            await leave()

    run(story(), 60.0)

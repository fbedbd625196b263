"""A machine changes hosts through two relays, whichever of them dies, and whenever the network does.

Never do two copies run; after recovery one does; and xl is told what it takes to get there, byte for byte.
"""

import asyncio
import socket
import time
from pathlib import Path

import pytest

from crypto.tls import TlsConfig
from proxy.control import PROTOCOL_VERSION, Message, Recover, Refuse, Word
from proxy.endpoints.sockets import listen_tcp, readable
from proxy.errors import PeerLost
from proxy.handover.table import Side, State
from proxy.handover.xl import BANNER, FAILED, READY, SUCCEEDED
from proxy.hypervisors.base import CopyState, Vm
from proxy.shell import guard, link, visits
from proxy.shell.contact import Contact
from proxy.shell.destination import Destination, Terms
from proxy.shell.handovers import Handovers
from proxy.shell.journal import Journal
from proxy.shell.link import ControlLink
from tests.proxy.shell.handing import Host, Hosts, hosts, quick
from tests.proxy.support import OPAQUE, Middle, run, until

__all__ = ["quick"]
pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # who is killed closes nothing
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
STORY_SECONDS_MAX = 60.0

# In the order in which they are reached where nothing goes wrong.
MOMENTS = (
    "source xl stream",
    "destination xl ready",
    "destination write prepared before",
    "destination write prepared after",
    "source write prepared before",
    "source write prepared after",
    "source xl ready",
    "source xl go",
    "source write voted before",
    "source write voted after",
    "destination xl go",
    "destination xl reported",
    "destination write voted before",
    "destination write voted after",
    "source write committed before",
    "source write committed after",
    "destination write committed before",
    "destination write committed after",
    "destination start before",
    "destination start after",
    "destination write done before",
    "destination write done after",
    "source write done before",
    "source write done after",
)


def test_a_machine_changes_hosts(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def story() -> None:
        async with hosts(tmp_path, client_tls, server_tls) as both:
            await both.migrate()
            await until(lambda: len(both.ended) == 2)
            world = both.world
            assert [ended.error for ended in both.ended.values()] == [None, None]
            assert [ended.report.handover for ended in both.ended.values()] == ["done", "done"]
            reports = {side: ended.report for side, ended in both.ended.items()}
            assert {report.handover_kind for report in reports.values()} == {"xl"}
            took = reports[Side.SOURCE].handover_seconds
            assert took is not None
            assert 0 <= took < STORY_SECONDS_MAX
            assert reports[Side.DESTINATION].handover_seconds is None
            assert world.copies == {Side.SOURCE: CopyState.ABSENT, Side.DESTINATION: CopyState.RUNNING}
            assert not world.wrong
            reached = [what for what in world.story if what in MOMENTS]
            assert sorted(reached) == sorted(MOMENTS)
            order = [MOMENTS.index(what) for what in reached if "write" in what or "start" in what]
            assert order == sorted(order), world.story
            assert both.source_xl is not None
            assert bytes(both.source_xl.heard) == BANNER + READY + SUCCEEDED
            assert both.source_xl.end == "gone"
            assert both.states() == {Side.SOURCE: State.DONE, Side.DESTINATION: State.DONE}
            assert not both.handovers[Side.SOURCE].unsettled()
            assert not both.handovers[Side.DESTINATION].unsettled()

    run(story(), STORY_SECONDS_MAX)


async def end_of(both: Hosts) -> None:
    await both.settle()
    world = both.world
    assert not world.wrong, world.wrong
    assert world.running == 1, world.story
    assert both.source_xl is not None
    heard = bytes(both.source_xl.heard)
    assert heard in (
        b"",
        BANNER,
        BANNER + READY,
        BANNER + READY + SUCCEEDED,
        BANNER + READY + FAILED,
    ), heard
    states = both.states()
    if world.copies[Side.DESTINATION] is CopyState.RUNNING:
        assert states == {Side.SOURCE: State.DONE, Side.DESTINATION: State.DONE}
        assert world.copies[Side.SOURCE] is CopyState.ABSENT
    else:
        assert set(states.values()) == {State.ABORTED}
        assert world.copies[Side.DESTINATION] is CopyState.ABSENT
    for side in Side:
        for record in both.journal(side):
            assert record.settled


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("side", Side, ids=lambda side: side.value)
def test_a_relay_is_killed_and_comes_back(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig, side: Side, moment: str
) -> None:
    async def story() -> None:
        async with hosts(tmp_path, client_tls, server_tls) as both:
            both.world.at[moment] = lambda: both.kill(side)
            await both.migrate()
            await until(lambda: side in both.killed)
            await both.until_left()
            await end_of(both)

    run(story(), STORY_SECONDS_MAX)


@pytest.mark.parametrize("moment", MOMENTS)
def test_both_relays_are_killed_and_come_back(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig, moment: str
) -> None:
    async def story() -> None:
        async with hosts(tmp_path, client_tls, server_tls) as both:

            def kill() -> None:
                for side in Side:
                    both.kill(side)

            both.world.at[moment] = kill
            await both.migrate()
            await until(lambda: both.killed == set(Side))
            await end_of(both)

    run(story(), STORY_SECONDS_MAX)


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_network_is_lost_and_comes_back(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig, moment: str
) -> None:
    async def story() -> None:
        async with hosts(tmp_path, client_tls, server_tls) as both:
            both.world.at[moment] = both.lose
            await both.migrate()
            await until(lambda: both.middle.refuses)
            await both.until_left()
            await end_of(both)
            source = both.source_xl
            assert source is not None
            if both.world.copies[Side.SOURCE] is CopyState.RUNNING:
                assert source.end == "resumed"
                assert bytes(source.heard) in (BANNER, BANNER + READY + FAILED)
            else:
                assert source.end == "gone"
                assert bytes(source.heard) == BANNER + READY + SUCCEEDED

    run(story(), STORY_SECONDS_MAX)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("side", Side, ids=lambda side: side.value)
def test_a_host_is_lost_for_good(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig, side: Side, moment: str
) -> None:
    """The other runs what it may, keeps what may be the only copy, and says by its journal what it cannot know."""
    committed = MOMENTS.index(moment) >= MOMENTS.index("source write committed before")

    async def story() -> None:
        async with hosts(tmp_path, client_tls, server_tls) as both:
            both.world.at[moment] = lambda: both.kill(side)
            await both.migrate()
            await until(lambda: side in both.killed)
            await both.bury(side)
            await both.until_left()
            await until(lambda: all(task.done() for task in both.xl) or committed or side is Side.SOURCE)
            world = both.world
            if side is Side.DESTINATION:
                await until(lambda: both.states()[Side.SOURCE] in (State.COMMITTED, State.DONE, State.ABORTED))
                turned_back = both.states()[Side.SOURCE] is State.ABORTED
                assert turned_back is not committed
                await until(lambda: (world.copies[Side.SOURCE] is CopyState.RUNNING) is turned_back)
            else:
                ends = {
                    State.PREPARED: (CopyState.INCOMING, CopyState.PAUSED),  # it may be the only copy that is left
                    State.VOTED: (CopyState.PAUSED,),
                    State.DONE: (CopyState.RUNNING,),
                    State.ABORTED: (CopyState.ABSENT,),
                }
                await until(lambda: world.copies[Side.DESTINATION] in ends.get(both.states()[Side.DESTINATION], ()))
            assert not world.wrong

    run(story(), STORY_SECONDS_MAX)


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_network_is_cut_and_the_session_goes_on(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig, moment: str
) -> None:
    """Within the resume time nobody turns back: what was said and lost is said again."""

    async def story() -> None:
        async with hosts(tmp_path, client_tls, server_tls, resume_seconds=30) as both:
            both.world.at[moment] = lambda: both.lose(mend=True)
            await both.migrate()
            await until(lambda: len(both.ended) == 2)
            assert [ended.error for ended in both.ended.values()] == [None, None]
            assert both.world.copies == {Side.SOURCE: CopyState.ABSENT, Side.DESTINATION: CopyState.RUNNING}
            assert not both.world.wrong
            assert both.source_xl is not None
            assert bytes(both.source_xl.heard) == BANNER + READY + SUCCEEDED
            assert both.states() == {Side.SOURCE: State.DONE, Side.DESTINATION: State.DONE}

    run(story(), STORY_SECONDS_MAX)


def test_no_copy_is_there_before_the_journal_has_its_name(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    """Or a destination that dies in between leaves a domain behind of which nobody knows any more."""

    async def story() -> None:
        async with hosts(tmp_path, client_tls, server_tls) as both:
            both.world.at["destination write open before"] = lambda: time.sleep(0.2)
            await both.migrate()
            await until(lambda: len(both.ended) == 2)
            story = both.world.story
            assert story.index("destination write open after") < story.index("destination is incoming")

    run(story(), STORY_SECONDS_MAX)


def test_nothing_is_promised_before_it_is_known_which_copy_leaves(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A toolstack that takes its time, and a small machine: without its name nobody could take it up after a crash."""

    async def story() -> None:
        asked = asyncio.Event()

        async def pin(self: Host, vm: Vm, side: Side) -> Vm:
            if side is Side.SOURCE:
                asked.set()
                await asyncio.Event().wait()
            return vm

        monkeypatch.setattr(Host, "pin", pin)
        monkeypatch.setattr(guard, "APPROVAL_SECONDS_MAX", 0.2)
        monkeypatch.setattr(link, "DRAIN_SECONDS_MAX", 0.1)
        async with hosts(tmp_path, client_tls, server_tls) as both:
            await both.migrate()
            await asked.wait()
            await until(lambda: Side.SOURCE in both.ended)
            await both.settle()
            assert both.world.copies == {Side.SOURCE: CopyState.RUNNING, Side.DESTINATION: CopyState.ABSENT}
            (record,) = both.journal(Side.SOURCE)
            assert "prepared" not in {entry.state for entry in record.entries}

    run(story(), STORY_SECONDS_MAX)


class Parent(Middle):
    """The network, and a daemon behind it: it gives what brings no preface to the worker with the least to do."""

    idle = 0
    """The port of that worker; 0 while there is none."""

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            near, _ = await loop.sock_accept(self._listener)
            if self.refuses:
                near.close()
                continue
            near.setblocking(False)
            await readable(near.fileno())
            head = near.recv(4, socket.MSG_PEEK)
            self.began.append(head)
            target = self.idle if self.idle and head[:1] == b"\x16" else self.target
            far = socket.create_connection(("127.0.0.1", target))
            far.setblocking(False)
            self.links.append((near, far))
            which = len(self.links) - 1
            self._tasks += [asyncio.create_task(self._carry(*pair, which)) for pair in ((near, far), (far, near))]


def test_the_process_that_has_it_is_asked_where_there_are_several(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    """The worker that is at work on it holds it locked, and no other one can do anything about it, ever."""

    async def story() -> None:
        async with hosts(tmp_path, client_tls, server_tls) as both:
            parent = both.middle = Parent()
            both.world.at["source write committed before"] = both.lose
            await both.migrate()
            await until(lambda: both.middle.refuses)
            await both.until_left()
            life = both.lives[Side.DESTINATION]
            idle = Handovers(Journal(tmp_path / Side.DESTINATION.value), lambda kind, monitor: Host(life))
            listener = listen_tcp("127.0.0.1", 0, "127.0.0.1:0")
            parent.idle = listener.getsockname()[1]
            terms = Terms(paging=OPAQUE, handovers=idle)
            worker = Destination(
                server_tls, {}, listener, terms=terms, begin=lambda runner: runner.run(), failed=lambda error: None
            )
            serving = asyncio.create_task(worker.serve())
            try:
                both.mend()
                await until(lambda: len(both.ended) == 2)
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
                listener.close()
            assert both.world.copies == {Side.SOURCE: CopyState.ABSENT, Side.DESTINATION: CopyState.RUNNING}
            assert both.states() == {Side.SOURCE: State.DONE, Side.DESTINATION: State.DONE}

    run(story(), STORY_SECONDS_MAX)


def test_a_relay_that_ends_while_its_session_fails_ends(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    """Both reach the session as one cancellation; it must not take it for its own, and wait for its peer for ever."""

    async def story() -> None:
        async with hosts(tmp_path, client_tls, server_tls) as both:
            committed = asyncio.Event()
            loop = asyncio.get_running_loop()

            def lose() -> None:
                both.middle.silent = both.middle.refuses = True
                loop.call_soon_threadsafe(committed.set)

            both.world.at["source write committed after"] = lose
            await both.migrate()
            await committed.wait()
            assert both.departing is not None
            assert both.departing.current is not None
            (task,) = both.tasks[Side.SOURCE]
            both.departing.current.fail(PeerLost("at the same moment"))
            task.cancel()
            await asyncio.wait({task}, timeout=STORY_SECONDS_MAX / 2)
            assert task.cancelled()

    run(story(), STORY_SECONDS_MAX)


def test_a_machine_that_has_moved_has_moved(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    """Whether the toolstack can be asked about what it left here is no matter of the session's verdict."""

    async def story() -> None:
        async with hosts(tmp_path, client_tls, server_tls) as both:
            both.world.at["source write done after"] = lambda: both.lives[Side.SOURCE].failures.update(departing=1)
            await both.migrate()
            await until(lambda: len(both.ended) == 2)
            assert [ended.error for ended in both.ended.values()] == [None, None]
            await end_of(both)

    run(story(), STORY_SECONDS_MAX)


def test_a_peer_that_comes_without_end_is_sent_away(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each visit costs a connection, and commands of the toolstack; sessions have their own limit."""
    monkeypatch.setattr(visits, "VISITS_MAX", 2)
    monkeypatch.setattr(link, "DRAIN_SECONDS_MAX", 0.1)

    async def story() -> None:
        async with hosts(tmp_path, client_tls, server_tls) as both:
            both.begin(Side.DESTINATION)
            contact = Contact(both.client, both.peer)
            recovery = Recover(PROTOCOL_VERSION, bytes(16), "voted")

            async def visit() -> tuple[ControlLink, Message]:
                met = await contact.meet("beta")
                await met.send(recovery)
                return met, await met.receive()

            links = []
            for _ in range(2):
                met, answer = await visit()
                assert answer == Word("unknown")
                links.append(met)
            met, answer = await visit()
            assert isinstance(answer, Refuse)
            await met.close()
            await links.pop().close()
            for met in links:
                await met.close()

    run(story(), STORY_SECONDS_MAX)

"""One side of a hand-over at work: written first, done to its end, tried again, and never half seen from outside."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import HypervisorFailed, JournalError, PolicyRefused
from proxy.handover.record import Entry, Head
from proxy.handover.table import Event, Side, State
from proxy.hypervisors.base import CopyState, Vm
from proxy.limits import HYPERVISOR_ATTEMPTS_MAX
from proxy.shell import party as module
from proxy.shell.journal import Journal, JournalFile
from proxy.shell.party import Bare, Party
from tests.proxy.shell.hosted import VM, Host, Life, MortalJournal, World
from tests.proxy.support import run, until

SESSION = "0123456789abcdef" * 2
UNDONE = HYPERVISOR_ATTEMPTS_MAX


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HYPERVISOR_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(module, "RESUMED_SECONDS_MAX", 0.0)


class Willing(Bare):
    """Hands that approve of what they are told to approve of."""

    no = False

    async def approve(self) -> None:
        if self.no:
            raise PolicyRefused("not today")


class OneSide:
    """One side with its journal, its host and what it has said."""

    def __init__(self, folder: Path, side: Side) -> None:
        self.world = World()
        self.life = Life(side, self.world)
        self.journal = MortalJournal(folder, self.life)
        self.host = Host(self.life)
        self.said: list[str] = []
        self.side = side
        head = Head(SESSION, "source" if side is Side.SOURCE else "destination", "xl", "beta", "2026")
        self.file = self.journal.begin(head, Entry("open", ""))
        self.party = self.make(self.file)

    def make(self, file: JournalFile) -> Party:
        async def say(state: State, why: str) -> None:
            self.said.append(state.value)

        self.hands = Willing(self.host, paused=False)
        party = self.party = Party(file, self.host, self.hands, say)
        return party

    async def at(self, *events: Event) -> Party:
        await self.party.named(VM)
        for event in events:
            await self.party.tell(event)
        return self.party

    def restart(self) -> Party:
        """As the next process finds it."""
        self.party.close()
        file = self.journal.open(SESSION, self.side)
        assert file is not None
        return self.make(file)

    def copy(self, state: CopyState) -> None:
        self.world.copies[self.side] = state

    @property
    def written(self) -> list[str]:
        return [entry.state for entry in Journal(self.journal.folder.parent).records()[0].entries]


def source(folder: Path) -> OneSide:
    return OneSide(folder, Side.SOURCE)


def destination(folder: Path) -> OneSide:
    return OneSide(folder, Side.DESTINATION)


def story(work: Coroutine[Any, Any, None]) -> None:
    run(work, 20.0)


TO_PREPARED = (Event.WHOLE,)
TO_VOTED = (Event.WHOLE, Event.TOOK)


def test_the_way_of_a_destination(tmp_path: Path) -> None:
    async def way() -> None:
        one = destination(tmp_path)
        one.copy(CopyState.PAUSED)
        party = await one.at(*TO_VOTED)
        assert (party.state, one.said) == (State.VOTED, ["prepared", "voted"])
        await party.tell(Event.PEER_COMMITTED, "both have voted")
        assert (party.state, party.decided, one.said[2:]) == (State.DONE, True, ["done"])
        assert one.world.copies[Side.DESTINATION] is CopyState.RUNNING
        assert one.written == ["open", "open", "prepared", "voted", "committed", "done"]
        story = one.world.story
        assert story.index("destination write committed after") < story.index("destination start before")
        assert story.index("destination is running") < story.index("destination write done before")
        await party.settle()
        assert party.record.settled
        party.close()

    story(way())


@pytest.mark.parametrize(
    ("at", "event", "then", "said"),
    [
        (TO_VOTED, Event.PEER_COMMITTED, State.VOTED, ["prepared", "voted"]),
        (TO_PREPARED, Event.TOOK, State.PREPARED, ["prepared"]),
    ],
)
def test_what_cannot_be_written_is_not_done(
    tmp_path: Path, at: tuple[Event, ...], event: Event, then: State, said: list[str]
) -> None:
    async def way() -> None:
        one = destination(tmp_path)
        one.copy(CopyState.PAUSED)
        party = await one.at(*at)
        one.life.full = True
        with pytest.raises(JournalError):
            await party.tell(event)
        assert (party.state, one.said) == (then, said)
        assert one.world.copies[Side.DESTINATION] is CopyState.PAUSED
        assert "destination start before" not in one.world.story
        one.life.full = False
        await party.tell(event)
        assert party.state is not then, "there is room again"
        party.close()

    story(way())


def test_a_prepared_that_cannot_be_written_is_not_said(tmp_path: Path) -> None:
    async def way() -> None:
        one = destination(tmp_path)
        party = await one.at()
        one.life.full = True
        with pytest.raises(JournalError):
            await party.tell(Event.WHOLE)
        assert (one.said, party.state) == ([], State.ASKED)
        party.close()

    story(way())


def test_an_end_that_cannot_be_written_is_come_to_all_the_same(tmp_path: Path) -> None:
    """Whoever takes up what was written before comes to the same end: nobody need stay suspended."""

    async def way() -> None:
        one = source(tmp_path)
        party = await one.at(Event.PEER_PREPARED, Event.GAVE_UP)
        one.copy(CopyState.SUSPENDED)
        one.life.full = True
        await party.tell(Event.LOST)
        assert party.state is State.ABORTED
        assert one.world.copies[Side.SOURCE] is CopyState.RUNNING
        one.life.full = False
        again = one.restart()
        assert again.state is State.VOTED
        await again.tell(Event.RESTARTED)
        assert again.state is State.ABORTED
        again.close()

    story(way())


def test_an_operator_s_word_that_cannot_be_written_is_not_acted_upon(tmp_path: Path) -> None:
    """Nobody else comes to that end: a COMMITTED that is taken up again would have the other copy run beside it."""

    async def way() -> None:
        one = source(tmp_path)
        party = await one.at(Event.PEER_PREPARED, Event.GAVE_UP, Event.PEER_VOTED)
        one.copy(CopyState.SUSPENDED)
        one.life.full = True
        with pytest.raises(JournalError):
            await party.tell(Event.RUN_HERE)
        assert party.state is State.COMMITTED
        assert one.world.copies[Side.SOURCE] is CopyState.SUSPENDED
        one.life.full = False
        await party.tell(Event.RUN_HERE)
        assert one.world.copies[Side.SOURCE] is CopyState.RUNNING
        assert one.written[-1] == "aborted"
        party.close()

    story(way())


def test_a_no_is_told_as_what_it_is(tmp_path: Path) -> None:
    async def way() -> None:
        one = destination(tmp_path)
        one.copy(CopyState.INCOMING)
        one.hands.no = True
        party = await one.at(Event.WHOLE)
        assert (party.state, one.said) == (State.ABORTED, ["aborted"])
        assert party.record.why
        assert one.world.copies[Side.DESTINATION] is CopyState.ABSENT
        assert "prepared" not in one.written
        party.close()

    story(way())


# ------------------------------------------------------------------ hypervisors that will not


@pytest.mark.parametrize("times", [1, UNDONE - 1])
@pytest.mark.parametrize("what", ["start", "destroy", "revive", "remove"])
def test_a_hypervisor_that_fails_for_a_while(tmp_path: Path, what: str, times: int) -> None:
    async def way() -> None:
        one, event, wanted = at_once(tmp_path, what)
        one.life.failures[what] = times
        await (await one.at(*BEFORE[what])).tell(event)
        assert one.party.decided
        assert one.world.copies[one.side] is wanted
        assert not one.party.trouble
        one.party.close()

    story(way())


@pytest.mark.parametrize("what", ["start", "destroy", "revive", "remove"])
def test_a_hypervisor_that_fails_for_long(tmp_path: Path, what: str) -> None:
    """Told, and not said to be done; tried again when somebody asks for it."""

    async def way() -> None:
        one, event, wanted = at_once(tmp_path, what)
        one.life.failures[what] = UNDONE + 1
        party = await one.at(*BEFORE[what])
        await party.tell(event)
        assert f"cannot {what} guest: {what}: it will not" in party.trouble
        assert one.world.copies[one.side] is not wanted
        if what in {"start", "destroy"}:
            assert not party.decided
            assert one.said[-1] not in {"done", "aborted"}
        await party.again()
        assert party.decided
        assert not party.trouble
        assert one.world.copies[one.side] is wanted
        story = len(one.world.story)
        await party.again()
        assert len(one.world.story) == story, "what is done is not done again"
        party.close()

    story(way())


BEFORE: dict[str, tuple[Event, ...]] = {
    "start": TO_VOTED,
    "destroy": TO_VOTED,
    "revive": (Event.PEER_PREPARED, Event.GAVE_UP),
    "remove": (Event.PEER_PREPARED, Event.GAVE_UP, Event.PEER_VOTED),
}


def at_once(folder: Path, what: str) -> tuple[OneSide, Event, CopyState]:
    """A side, the event by which it has to do that, and how its copy stands afterwards."""
    if what in {"start", "destroy"}:
        one = destination(folder)
        one.copy(CopyState.PAUSED)
        event = Event.PEER_COMMITTED if what == "start" else Event.PEER_ABORTED
        return one, event, CopyState.RUNNING if what == "start" else CopyState.ABSENT
    one = source(folder)
    one.copy(CopyState.SUSPENDED)
    event = Event.LOST if what == "revive" else Event.PEER_DONE
    return one, event, CopyState.RUNNING if what == "revive" else CopyState.ABSENT


def test_a_copy_that_is_not_there_when_it_is_to_start(tmp_path: Path) -> None:
    """It was committed to, and nobody here destroyed it: who knows whether it ran? Both sides say so."""

    async def way() -> None:
        one = destination(tmp_path)
        one.copy(CopyState.PAUSED)
        party = await one.at(*TO_VOTED)
        one.copy(CopyState.ABSENT)
        await party.tell(Event.PEER_COMMITTED)
        assert (party.state, one.said[-1]) == (State.DOUBT, "doubt")
        party.close()

    story(way())


def test_a_copy_that_is_not_there_before_its_source_committed(tmp_path: Path) -> None:
    async def way() -> None:
        one = destination(tmp_path)
        party = await one.at(*TO_VOTED)
        await party.tell(Event.MISSING)
        assert (party.state, one.said[-1]) == (State.ABORTED, "aborted")
        party.close()

    story(way())


def test_a_hypervisor_that_cannot_be_asked(tmp_path: Path) -> None:
    """Silence is not absence."""

    async def way() -> None:
        one = destination(tmp_path)
        one.copy(CopyState.PAUSED)
        party = await one.at(*TO_VOTED)
        one.life.failures.update(start=UNDONE, arriving=2 * UNDONE)
        await party.tell(Event.PEER_COMMITTED)
        assert party.state is State.COMMITTED
        assert "doubt" not in one.written
        party.close()

    story(way())


def test_a_take_that_fails_after_the_commit_is_tried_again_and_not_for_ever(tmp_path: Path) -> None:
    async def way() -> None:
        one = destination(tmp_path)
        one.copy(CopyState.INCOMING)
        party = await one.at(Event.WHOLE)
        one.life.failures["take"] = UNDONE
        await party.tell(Event.RUN_HERE)
        assert (party.state, party.trouble) == (State.COMMITTED, "cannot take guest: take: it will not")
        assert one.world.story.count("destination take before") == UNDONE
        await party.again()
        assert party.state is State.DONE
        party.close()

    story(way())


# ------------------------------------------------------------------ whoever tells it is cancelled


class Slow:
    """A journal's disk that takes its time."""

    def __init__(self, file: JournalFile) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()
        self._real = file.write
        file.write = self.write  # type: ignore[method-assign]

    def write(self, *args: Any, **kwargs: Any) -> None:
        self.inside.set()
        assert self.go_on.wait(20)
        self._real(*args, **kwargs)


def test_a_state_is_seen_once_it_is_on_the_disk(tmp_path: Path) -> None:
    """Or it is said to a peer that comes back just then, and forgotten by a crash."""

    async def way() -> None:
        one = source(tmp_path)
        party = await one.at(Event.PEER_PREPARED, Event.GAVE_UP)
        slow = Slow(one.file)
        telling = asyncio.ensure_future(party.tell(Event.PEER_VOTED))
        await until(slow.inside.is_set)
        assert (party.state, party.handover.word) == (State.VOTED, State.VOTED)
        slow.go_on.set()
        await telling
        assert (party.state, party.handover.word) == (State.COMMITTED, State.COMMITTED)
        party.close()

    story(way())


def test_what_was_begun_is_done_to_its_end(tmp_path: Path) -> None:
    """A session ends, and its tasks with it, while its machine is being written about or started."""

    async def way() -> None:
        one = destination(tmp_path)
        one.copy(CopyState.PAUSED)
        party = await one.at(*TO_VOTED)
        slow = Slow(one.file)
        telling = asyncio.ensure_future(party.tell(Event.PEER_COMMITTED))
        await until(slow.inside.is_set)
        telling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await telling
        party.close()  # takes effect when it may
        slow.go_on.set()
        await party.idle()
        assert party.state is State.DONE
        assert one.world.copies[Side.DESTINATION] is CopyState.RUNNING
        assert one.written[-2:] == ["committed", "done"]
        await until(lambda: one.file._descriptor < 0)
        again = one.restart()
        assert again.state is State.DONE
        again.close()

    story(way())


def test_events_follow_one_another(tmp_path: Path) -> None:
    async def way() -> None:
        one = destination(tmp_path)
        one.copy(CopyState.PAUSED)
        party = await one.at()
        slow = Slow(one.file)
        telling = [asyncio.ensure_future(party.tell(event)) for event in (*TO_VOTED, Event.PEER_COMMITTED)]
        await until(slow.inside.is_set)
        slow.go_on.set()
        await asyncio.gather(*telling)
        assert one.written == ["open", "open", "prepared", "voted", "committed", "done"]
        party.close()

    story(way())


def test_a_step_that_fails_when_nobody_waits_any_more(tmp_path: Path) -> None:
    async def way() -> None:
        one = destination(tmp_path)
        party = await one.at(Event.WHOLE)
        slow = Slow(one.file)
        telling = asyncio.ensure_future(party.tell(Event.TOOK))
        await until(slow.inside.is_set)
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        one.life.full = True
        slow.go_on.set()
        await party.idle()
        assert party.state is State.PREPARED
        party.close()
        await until(lambda: one.file._descriptor < 0)

    story(way())


def test_a_name_is_kept_with_the_state_that_it_has(tmp_path: Path) -> None:
    async def way() -> None:
        one = destination(tmp_path)
        await one.at(Event.WHOLE)
        assert one.restart().vm == VM
        assert one.party.record.head.session == SESSION
        one.party.close()

    story(way())


# ------------------------------------------------------------------ bare hands


@pytest.mark.parametrize("paused", [False, True])
def test_a_machine_that_is_to_stay_paused(tmp_path: Path, paused: bool) -> None:
    async def way() -> None:
        one = destination(tmp_path)
        one.copy(CopyState.PAUSED)
        bare = Bare(one.host, paused=paused)
        await bare.start(VM)
        assert one.world.copies[Side.DESTINATION] is (CopyState.PAUSED if paused else CopyState.RUNNING)
        one.copy(CopyState.ABSENT)
        with pytest.raises(HypervisorFailed):
            await bare.start(VM)
        one.party.close()

    story(way())


@pytest.mark.parametrize("what", ["destroy", "revive"])
def test_without_a_name_nothing_is_meant(tmp_path: Path, what: str) -> None:
    """Not the machine that happens to have none, and not the first in the list."""

    async def way() -> None:
        one = source(tmp_path)
        act: Callable[[Vm], Coroutine[Any, Any, None]] = getattr(Bare(one.host, paused=False), what)
        await act(Vm("", ""))
        assert not [line for line in one.world.story if what in line]
        one.party.close()

    story(way())


def test_a_session_that_is_over_gets_no_approval(tmp_path: Path) -> None:
    async def way() -> None:
        one = source(tmp_path)
        with pytest.raises(HypervisorFailed):
            await Bare(one.host, paused=False).approve()
        one.party.close()

    story(way())

"""A relay finishes what its journal has of hand-overs whose sessions are over."""

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from crypto.errors import AuthenticationError
from crypto.keys import SessionId
from proxy.control import PROTOCOL_VERSION, Recover
from proxy.errors import ConfigurationError, HypervisorFailed, PolicyRefused, RelayError
from proxy.handover.record import Entry, Head, Record
from proxy.handover.table import Event, Side, State
from proxy.hypervisors.base import CopyState, Fate, Vm
from proxy.process import written_down
from proxy.shell import handovers
from proxy.shell.contact import Contact
from proxy.shell.guard import Guard
from proxy.shell.handovers import Handovers, Reach
from proxy.shell.journal import Journal, now
from proxy.shell.party import Party
from tests.proxy.shell.handing import Host, Life, World, quick
from tests.proxy.support import run, until

__all__ = ["quick"]
pytestmark = pytest.mark.usefixtures("quick")

VM = Vm("guest", "6f2fb9a1-0d3e-4a4c-9c0c-5f1f6a2b7c8d", "5@boot")
OTHER = Vm("other", "6f2fb9a1-0d3e-4a4c-9c0c-000000000000", "6@boot")
THIRD = Vm("third", "6f2fb9a1-0d3e-4a4c-9c0c-111111111111", "7@boot")


class SessionThatIsOver:
    """What a guard's session does when it is over: nothing."""

    async def say_word(self, state: State, why: str, *, paused: bool = False) -> None:
        """See ``guard.Session``."""

    def serve(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """See ``guard.Session``."""
        work.close()

    def fail(self, error: BaseException) -> None:
        """See ``guard.Session``."""

    async def until_delivered(self) -> None:
        """See ``guard.Session``."""


class Left:
    """What a relay left of its hand-overs, and the world as it finds it."""

    def __init__(self, folder: Path, source: CopyState = CopyState.SUSPENDED) -> None:
        self.journal = Journal(folder)
        self.world = World()
        self.world.copies[Side.SOURCE] = source
        self.life = Life(Side.SOURCE, self.world)
        self.ended: list[tuple[str, State]] = []
        self.handovers = Handovers(
            self.journal,
            lambda kind, monitor: Host(self.life),
            ended=lambda record: self.ended.append((record.head.session[0], record.state)),
        )

    def record(
        self,
        session: str,
        *states: State,
        vm: Vm = VM,
        side: Side = Side.SOURCE,
        peer: str = "there",
        monitor: str = "",
        holder: str = "",
    ) -> None:
        head = Head(session * 32, side.value, "qmp" if monitor else "xl", peer, now(), monitor=monitor, holder=holder)
        file = self.journal.begin(head, Entry("open", now()))
        for state in states:
            file.write(state, "", vm)
        file.close()

    async def recover(self, reach: Reach = lambda record: None) -> list[tuple[str, State]]:
        """One round; what it says stays."""
        return [(record.head.session[0], record.state) for record in await self.handovers.recover(reach)]


@pytest.mark.parametrize("second", [State.OPEN, State.PREPARED, State.VOTED, State.COMMITTED, State.DONE, State.DOUBT])
def test_a_machine_that_leaves_once_more_is_not_revived_for_an_earlier_attempt(tmp_path: Path, second: State) -> None:
    """The first destination is away, so that nothing can be settled with it; a second may run the machine by now."""
    left = Left(tmp_path)
    left.record("1", State.VOTED, State.ABORTED)
    left.record("2", second)
    first = left.journal.records()[0]
    assert run(left.handovers.recover_one(first, None)) is not None
    assert left.world.copies[Side.SOURCE] is CopyState.SUSPENDED
    assert left.world.story.count("source revive before") == 0


def test_a_machine_whose_name_is_not_known_yet_may_be_the_same(tmp_path: Path) -> None:
    left = Left(tmp_path)
    left.record("1", State.VOTED, State.ABORTED)
    left.record("2")
    run(left.handovers.recover_one(left.journal.records()[0], None))
    assert left.world.copies[Side.SOURCE] is CopyState.SUSPENDED


def test_two_attempts_that_both_turned_back_do_not_wait_for_each_other(tmp_path: Path) -> None:
    left = Left(tmp_path)
    left.record("1", State.VOTED, State.ABORTED)
    left.record("2", State.VOTED, State.ABORTED)
    run(left.recover())
    assert left.world.copies[Side.SOURCE] is CopyState.RUNNING


def test_another_machine_is_none_of_its_business(tmp_path: Path) -> None:
    left = Left(tmp_path)
    left.record("1", State.VOTED, State.ABORTED)
    left.record("2", State.COMMITTED, vm=OTHER)
    run(left.handovers.recover_one(left.journal.records()[0], None))
    assert left.world.copies[Side.SOURCE] is CopyState.RUNNING


@pytest.mark.parametrize("error", [RelayError("no such kind"), AuthenticationError("expired"), OSError("no identity")])
def test_one_that_cannot_be_taken_up_keeps_no_other_waiting(tmp_path: Path, error: Exception) -> None:
    left = Left(tmp_path)
    left.record("1", State.COMMITTED, vm=OTHER)
    left.record("2", State.VOTED)

    def reach(record: Record) -> None:
        raise error

    assert run(left.recover(reach)) == [("1", State.COMMITTED), ("2", State.ABORTED)]  # done what needs no peer
    assert left.world.copies[Side.SOURCE] is CopyState.RUNNING


def test_one_whose_hypervisor_is_not_known_here_is_not_kept_locked(tmp_path: Path) -> None:
    left = Left(tmp_path)
    left.record("1", State.VOTED)

    def toolstack(kind: str, monitor: str) -> Host:
        raise ConfigurationError("no hypervisor of that kind can be asked here", "update this relay")

    unable = Handovers(left.journal, toolstack)
    with pytest.raises(ConfigurationError):
        run(unable.recover_one(left.journal.records()[0], None))
    run(left.recover())
    assert left.world.copies[Side.SOURCE] is CopyState.RUNNING


def test_one_that_takes_long_keeps_no_other_machine_waiting(tmp_path: Path) -> None:
    """Its xl may take a quarter of a minute, its peer two minutes; the other machine runs nowhere meanwhile."""
    left = Left(tmp_path)
    left.record("1", State.ABORTED, vm=OTHER)
    left.record("2", State.ABORTED, vm=THIRD)
    answers = asyncio.Event()

    class Slow(Host):
        async def departing(self, vm: Vm) -> CopyState:
            if vm == OTHER:
                await answers.wait()
            return await super().departing(vm)

    left.handovers = Handovers(left.journal, lambda kind, monitor: Slow(left.life))

    async def story() -> None:
        first = asyncio.create_task(left.recover())
        await until(lambda: left.world.copies[Side.SOURCE] is CopyState.RUNNING)
        assert not first.done()
        # Nor does it keep those waiting that are left while it is at work; and nobody else takes it up meanwhile.
        left.world.copies[Side.SOURCE] = CopyState.SUSPENDED
        left.record("3", State.ABORTED)
        await left.recover()
        assert left.world.copies[Side.SOURCE] is CopyState.RUNNING
        assert not first.done()
        answers.set()
        await first

    run(story())


@pytest.mark.parametrize("name", ["", "guest"])
def test_two_of_one_qemu_do_not_wait_at_its_monitor_for_each_other(tmp_path: Path, name: str) -> None:
    """It has one client at a time, and whoever comes second is not even greeted; names need not tell."""
    left = Left(tmp_path)
    left.record("1", State.ABORTED, vm=Vm("", "", "5 1@boot"), monitor="/run/qmp")
    left.record("2", State.ABORTED, vm=Vm(name, "", "5 2@boot"), monitor="/run/qmp")
    left.record("3", State.ABORTED, vm=Vm(name, "", "7 1@boot"), monitor="/run/another")
    asking: list[str] = []
    together: set[str] = set()

    class Single(Host):
        kind = "qmp"

        def __init__(self, life: Life, monitor: str) -> None:
            super().__init__(life)
            self._monitor = monitor

        async def departing(self, vm: Vm) -> CopyState:
            assert self._monitor not in asking, "one that hangs on it until it gives up"
            asking.append(self._monitor)
            await asyncio.sleep(0.01)
            together.update(asking if len(asking) > 1 else ())
            asking.remove(self._monitor)
            return await super().departing(vm)

    left.handovers = Handovers(left.journal, lambda kind, monitor: Single(left.life, monitor))
    run(left.recover())
    assert left.world.copies[Side.SOURCE] is CopyState.RUNNING
    assert together == {"/run/qmp", "/run/another"}, "another QEMU waits for nobody"


def test_an_end_that_recovery_comes_to_is_told_once(tmp_path: Path) -> None:
    """Of what ended before, its session has told; what a source's visit ends is told, too."""
    left = Left(tmp_path)
    left.record("1", State.VOTED)
    left.record("2", State.VOTED, State.ABORTED, vm=OTHER)
    left.record("3", State.COMMITTED, vm=THIRD)
    left.record("4", State.PREPARED, side=Side.DESTINATION, vm=THIRD)
    left.record("5", side=Side.DESTINATION, vm=Vm("", ""))
    session = SessionId(bytes.fromhex("4" * 32))
    left.world.copies[Side.DESTINATION] = CopyState.INCOMING
    for _ in range(2):
        run(left.recover())
        assert sorted(left.ended) == [("1", State.ABORTED), ("5", State.ABORTED)]
    for _ in range(2):
        run(left.handovers.answer("there", session, Recover(PROTOCOL_VERSION, session, "aborted")))
    assert left.ended[2:] == [("4", State.ABORTED)]


@pytest.mark.parametrize("state", [State.VOTED, State.ABORTED])
def test_the_holder_of_xl_s_pipes_is_waited_for_unless_it_was_told_the_end_here(tmp_path: Path, state: State) -> None:
    """It brings them to the next process of a daemon. One that was told only takes a moment to end itself."""
    left = Left(tmp_path)
    left.record("1", state, holder=written_down(os.getpid()))
    run(left.recover())
    assert not left.world.story, "xl would hear of it from nobody"

    async def story() -> None:
        file = left.journal.open("1" * 32, Side.SOURCE)
        assert file is not None
        guard = Guard(file, Host(left.life), SessionThatIsOver())
        left.handovers.guards(guard)
        guard.detached = True
        left.handovers.released(guard)
        await left.recover()

    run(story())
    told = state is State.ABORTED
    assert left.world.copies[Side.SOURCE] is (CopyState.RUNNING if told else CopyState.SUSPENDED)


@pytest.mark.parametrize("state", [State.OPEN, State.PREPARED, State.VOTED, State.COMMITTED, State.DOUBT])
@pytest.mark.parametrize("fate", Fate)
def test_a_machine_started_anew_at_its_source_is_not_run_elsewhere_too(
    tmp_path: Path, fate: Fate, state: State
) -> None:
    """A host has crashed, and starts its machines as it comes up: a copy that waits elsewhere is out of date."""
    left = Left(tmp_path, CopyState.ABSENT)
    left.world.fate = fate
    left.record("1", state)
    run(left.recover())
    (record,) = left.journal.records()
    again = fate is Fate.AGAIN and state in {State.OPEN, State.PREPARED, State.VOTED}
    lost = {State.VOTED: State.COMMITTED, State.COMMITTED: State.COMMITTED}.get(state, State.DOUBT)
    assert record.state is (State.ABORTED if again else lost)


@pytest.mark.parametrize("state", [State.COMMITTED, State.DOUBT])
@pytest.mark.parametrize("fate", Fate)
def test_a_destination_is_not_told_to_run_what_was_started_anew_at_its_source(
    tmp_path: Path, fate: Fate, state: State
) -> None:
    """A source had committed, and its host crashed before the word was heard: an operator has to say, truly."""
    left = Left(tmp_path, CopyState.ABSENT)
    left.world.fate = fate
    left.record("1", state)
    if fate is not Fate.AGAIN:
        assert run(agreed(left)) is not None
        return
    for operator in (None, Event.GIVE_UP):
        with pytest.raises(HypervisorFailed, match="was started anew here"):
            run(agreed(left, operator))
    assert left.journal.records()[0].state is state
    party = run(agreed(left, Event.RUN_HERE))
    assert party is not None
    assert (party.state, party.record.settled) == (State.ABORTED, True)


def test_a_machine_that_moved_within_its_host_was_not_started_anew(tmp_path: Path) -> None:
    left = Left(tmp_path, CopyState.ABSENT)
    left.world.fate = Fate.AGAIN
    left.record("1", State.COMMITTED)
    left.record("1", State.COMMITTED, side=Side.DESTINATION)
    assert run(agreed(left)) is not None


@pytest.mark.parametrize(("fate", "says"), [(Fate.AGAIN, "it runs"), (Fate.ENDED, "shut down"), (Fate.LOST, "host")])
def test_the_journal_says_what_became_of_a_copy_that_is_gone(tmp_path: Path, fate: Fate, says: str) -> None:
    left = Left(tmp_path, CopyState.ABSENT)
    left.world.fate = fate
    left.record("1", State.ABORTED)
    party = run(agreed(left))
    assert party is not None
    assert party.record.settled
    assert says in party.record.why


async def agreed(left: Left, operator: Event | None = None) -> Party | None:
    """Recovered, its destination having said that it has ended it, too."""
    contact = Contact(None, None)  # type: ignore[arg-type]

    async def run_errand(contact: Contact, party: Party, *, seconds: float) -> None:
        await party.tell(Event.PEER_ABORTED)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handovers, "run_errand", run_errand)
        return await left.handovers.recover_one(left.journal.records()[0], contact, operator=operator and (operator, 0))


# ------------------------------------------------------------------ what stays


def test_what_stays_is_told_as_it_stands_afterwards(tmp_path: Path) -> None:
    left = Left(tmp_path)
    left.record("1", State.VOTED)
    left.record("2", State.COMMITTED, vm=OTHER)
    left.record("3", State.DONE, State.DOUBT, vm=THIRD)
    assert run(left.recover()) == [("1", State.ABORTED), ("2", State.COMMITTED), ("3", State.DOUBT)]
    assert run(left.recover()) == [("1", State.ABORTED), ("2", State.COMMITTED), ("3", State.DOUBT)]


def test_what_is_settled_does_not_stay(tmp_path: Path) -> None:
    left = Left(tmp_path)
    left.record("1", side=Side.DESTINATION)  # nothing had happened here
    assert run(left.recover()) == []
    assert left.journal.records()[0].settled


@pytest.mark.parametrize("state", [State.OPEN, State.PREPARED, State.VOTED, State.COMMITTED, State.DOUBT])
def test_what_another_process_is_at_work_on_stays_once_it_is_past_its_first_state(tmp_path: Path, state: State) -> None:
    """A machine may stand still for as long as its peer is away; a migration of an hour is nothing."""
    left = Left(tmp_path)
    left.record("1", state)
    file = Journal(tmp_path).open("1" * 32, Side.SOURCE)
    assert file is not None
    assert run(left.recover()) == ([] if state is State.OPEN else [("1", state)])
    file.close()
    assert left.world.copies[Side.SOURCE] is CopyState.SUSPENDED
    assert not left.world.story


@pytest.mark.parametrize("state", [State.OPEN, State.ABORTED])
def test_what_ended_before_it_had_a_name_is_settled(tmp_path: Path, state: State) -> None:
    """No hypervisor can be asked about it, for ever."""
    left = Left(tmp_path, CopyState.RUNNING)
    left.life.failures.update({"departing": 100, "arriving": 100})
    left.record("1", *{State.ABORTED} & {state}, vm=Vm("", ""), side=Side.DESTINATION)
    run(left.recover())
    assert left.handovers.unsettled() == []


@pytest.mark.parametrize("state", [State.OPEN, State.ABORTED])
def test_a_destination_is_told_of_what_ended_before_it_had_a_name(tmp_path: Path, state: State) -> None:
    """It may have the machine whole, and wait."""
    left = Left(tmp_path, CopyState.RUNNING)
    left.life.failures.update({"departing": 100, "arriving": 100})
    left.record("1", *{State.ABORTED} & {state}, vm=Vm("", ""))
    run(left.recover())
    (record,) = left.handovers.unsettled()  # it could not be reached
    assert record.state is State.ABORTED


@pytest.mark.parametrize("state", [State.OPEN, State.ABORTED])
def test_a_source_is_told_of_what_ended_before_it_had_a_name(tmp_path: Path, state: State) -> None:
    """There is no machine that the hypervisor here could be asked about; the source must not ask for ever."""
    left = Left(tmp_path)
    left.life.failures.update({"departing": 100, "arriving": 100})
    left.record("1", *{State.ABORTED} & {state}, side=Side.DESTINATION, vm=Vm("", ""))
    session = SessionId(bytes.fromhex("1" * 32))
    said = run(left.handovers.answer("there", session, Recover(PROTOCOL_VERSION, session, "aborted")))
    assert said.state == "aborted"
    assert left.handovers.unsettled() == []


def test_only_its_own_source_s_coming_is_counted(tmp_path: Path) -> None:
    left = Left(tmp_path)
    left.record("1", State.ABORTED, side=Side.DESTINATION)
    key = ("1" * 32, Side.DESTINATION)
    left.handovers._untold[key] = None
    session = SessionId(bytes.fromhex("1" * 32))
    with pytest.raises(PolicyRefused):
        run(left.handovers.answer("another", session, Recover(PROTOCOL_VERSION, session, "aborted")))
    run(left.handovers.answer("there", session, Recover(PROTOCOL_VERSION, session, "asked")))
    assert left.handovers.untold == 1
    run(left.handovers.answer("there", session, Recover(PROTOCOL_VERSION, session, "aborted")))
    assert left.handovers.untold == 0

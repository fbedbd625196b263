"""A relay finishes what its journal has of hand-overs whose sessions are over."""

from pathlib import Path

import pytest

from crypto.errors import AuthenticationError
from proxy.errors import ConfigurationError, RelayError
from proxy.handover.record import Entry, Head, Record
from proxy.handover.table import Side, State
from proxy.hypervisors.base import CopyState, Vm
from proxy.shell.handovers import Handovers
from proxy.shell.journal import Journal, now
from tests.proxy.shell.handing import Host, Life, World, quick
from tests.proxy.support import run

__all__ = ["quick"]
pytestmark = pytest.mark.usefixtures("quick")

VM = Vm("guest", "6f2fb9a1-0d3e-4a4c-9c0c-5f1f6a2b7c8d", "5@boot")


class Left:
    """What a relay left of its hand-overs, and the world as it finds it."""

    def __init__(self, folder: Path, source: CopyState = CopyState.SUSPENDED) -> None:
        self.journal = Journal(folder)
        self.world = World()
        self.world.copies[Side.SOURCE] = source
        self.life = Life(Side.SOURCE, self.world)
        self.handovers = Handovers(self.journal, lambda kind, monitor: Host(self.life))

    def record(self, session: str, *states: State, vm: Vm = VM, side: Side = Side.SOURCE, peer: str = "there") -> None:
        head = Head(session * 32, side.value, "xl", peer, now())
        file = self.journal.begin(head, Entry("open", now()))
        for state in states:
            file.write(state, "", vm)
        file.close()

    async def recover(self) -> None:
        await self.handovers.recover(lambda record: None)


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
    left.record("2", State.COMMITTED, vm=Vm("other", "6f2fb9a1-0d3e-4a4c-9c0c-000000000000", "6@boot"))
    run(left.handovers.recover_one(left.journal.records()[0], None))
    assert left.world.copies[Side.SOURCE] is CopyState.RUNNING


@pytest.mark.parametrize("error", [RelayError("no such kind"), AuthenticationError("expired"), OSError("no identity")])
def test_one_that_cannot_be_taken_up_keeps_no_other_waiting(tmp_path: Path, error: Exception) -> None:
    left = Left(tmp_path)
    left.record("1", State.COMMITTED, vm=Vm("other", "6f2fb9a1-0d3e-4a4c-9c0c-000000000000", "6@boot"))
    left.record("2", State.VOTED)

    def reach(record: Record) -> None:
        raise error

    run(left.handovers.recover(reach))  # and the second is done what needs no peer
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

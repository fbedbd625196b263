"""A hand-over is taken up while others are at work on copies of that machine: xl that ends, a retry, an earlier one."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.errors import HypervisorFailed, PolicyRefused
from proxy.handover.record import Entry, Head, Record
from proxy.handover.table import Side, State
from proxy.hypervisors.base import CopyState, Vm
from proxy.process import sender_above, written_down
from proxy.shell import party, whose
from proxy.shell.handovers import Handovers
from proxy.shell.journal import Journal
from tests.proxy.shell.handing import Host, Hosts, Life, World, quick, tell
from tests.proxy.shell.hosted import VM as GUEST
from tests.proxy.support import run, until

__all__ = ["quick", "tell"]
pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # who is killed closes nothing
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

VM = Vm("guest", "6f2fb9a1-0d3e-4a4c-9c0c-5f1f6a2b7c8d")
PINNED = Vm(VM.name, VM.uuid, "7@boot")


class Pinning(Host):
    """One whose copy that arrives has an id."""

    async def pin(self, vm: Vm, side: Side) -> Vm:
        return Vm(vm.name, vm.uuid, "7@boot+alone")


class There:
    """A destination's journal, and its hypervisor as recovery finds it."""

    def __init__(self, folder: Path, copy: CopyState = CopyState.INCOMING, side: Side = Side.DESTINATION) -> None:
        self.side = side
        self.world = World()
        self.world.copies[side] = copy
        self.life = Life(side, self.world)
        self.journal = Journal(folder)
        self.handovers = Handovers(self.journal, lambda kind, monitor: Pinning(self.life))

    def record(
        self, session: str, *states: State, vm: Vm = VM, tool: str = "", at: str = "2026-01-01T00:00:00.000"
    ) -> Record:
        file = self.journal.begin(Head(session * 32, self.side.value, "xl", "there", at), Entry("open", at))
        file.tool = tool
        for state in states or ((State.OPEN,) if vm.name else ()):
            file.write(state, "", vm)
        file.close()
        return next(one for one in self.journal.records() if one.head.session == session * 32)

    def recover(self, record: Record) -> State:
        taken = run(self.handovers.recover_one(record, None))
        assert taken is not None
        return taken.state

    @property
    def copy(self) -> CopyState:
        return self.world.copies[self.side]


@contextmanager
def living() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that lives until it is killed."""
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            yield process
        finally:
            process.kill()


# ------------------------------------------------------------------ xl that ends


def test_a_receiver_that_winds_down_is_waited_for(tmp_path: Path) -> None:
    """A relay that is back promises no copy that is being destroyed."""
    there = There(tmp_path)

    async def story() -> None:
        with living() as receiver:
            record = there.record("1", State.PREPARED, vm=PINNED, tool=written_down(receiver.pid))
            taking = asyncio.create_task(there.handovers.recover_one(record, None))
            await asyncio.sleep(0.5)
            assert there.world.story == []
            there.world.copies[Side.DESTINATION] = CopyState.ABSENT
            receiver.kill()
            taken = await taking
            assert taken is not None
            assert taken.state is State.ABORTED

    run(story(), 30.0)


def test_one_that_hangs_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whose, "WIND_DOWN_SECONDS_MAX", 0.3)
    there = There(tmp_path)
    with living() as receiver:
        record = there.record("1", State.PREPARED, vm=PINNED, tool=written_down(receiver.pid))
        with pytest.raises(HypervisorFailed, match=f"process {receiver.pid}, is still at work"):
            there.recover(record)
        assert there.world.story == []
    assert there.recover(record) is State.PREPARED


def test_the_receiver_is_written_down_with_the_machine_s_name(
    tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so before it can make a copy."""

    async def story(both: Hosts) -> None:
        with living() as receiver:
            real = both.egress

            def egress(*args: object) -> object:
                made = real(*args)  # type: ignore[arg-type]
                connect = made.connect

                async def connected(xl_flags: str) -> object:
                    connection = await connect(xl_flags)
                    connection.pid = receiver.pid  # type: ignore[attr-defined]
                    return connection

                made.connect = connected  # type: ignore[method-assign,assignment]
                return made

            both.egress = egress  # type: ignore[method-assign,assignment]
            await both.migrate()
            await until(lambda: len(both.ended) == 2)
            (record,) = both.journal(Side.DESTINATION)
            assert record.tool == written_down(receiver.pid)
            assert {entry.tool for entry in record.entries if entry.name} == {record.tool}

    tell(story)


@pytest.mark.parametrize("state", [State.VOTED, State.DONE])
def test_an_xl_that_is_dead_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: State) -> None:
    """It resumes nothing, and removes nothing: the machine stands still meanwhile."""
    monkeypatch.setattr(party, "RESUMED_SECONDS_MAX", 3600.0)
    there = There(tmp_path, CopyState.SUSPENDED, Side.SOURCE)
    with living() as sender:
        tool = written_down(sender.pid)
    record = there.record("1", state, vm=PINNED, tool=tool)
    assert there.recover(record) is (State.ABORTED if state is State.VOTED else State.DONE)
    assert there.copy is (CopyState.RUNNING if state is State.VOTED else CopyState.ABSENT)


def test_one_that_lives_is_given_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(party, "RESUMED_SECONDS_MAX", 3600.0)
    there = There(tmp_path, CopyState.SUSPENDED, Side.SOURCE)

    async def story() -> None:
        with living() as sender:
            record = there.record("1", State.VOTED, vm=PINNED, tool=written_down(sender.pid))
            taking = asyncio.create_task(there.handovers.recover_one(record, None))
            await until(lambda: there.world.story.count("source departing before") > 5)
            assert "source revive before" not in there.world.story
            sender.kill()
            await taking
            assert there.copy is CopyState.RUNNING

    run(story(), 30.0)


def test_the_xl_that_has_started_a_transport_is_found(tmp_path: Path) -> None:
    """By shells, or directly; and nothing else is taken for one."""
    transport = f"{sys.executable} -S -c 'import os; print(os.getpid(), flush=True); input()'"
    program = tmp_path / "xl"
    program.write_text(f"#!{sys.executable} -S\nimport subprocess, sys\nsubprocess.run(['sh', '-c', sys.argv[-1]])\n")
    program.chmod(0o755)
    for words, found in (((program, "migrate", "-s", "", "guest"), True), ((program, "list"), False)):
        for command in (transport, f"sh -c {transport!r}; true".replace("'", '"', 0)):
            with subprocess.Popen([*words, command], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as xl:
                assert xl.stdout is not None
                pid = int(xl.stdout.readline())
                assert sender_above(pid) == (written_down(xl.pid) if found else "")
                xl.communicate(b"\n", timeout=30.0)


# ------------------------------------------------------------------ a copy that is another hand-over's

LATER, EARLIER = "2026-01-02T00:00:00.000", "2025-12-31T00:00:00.000"


def test_what_a_killed_xl_has_left_is_destroyed(tmp_path: Path) -> None:
    there = There(tmp_path)
    assert there.recover(there.record("1")) is State.ABORTED
    assert there.copy is CopyState.ABSENT


def test_the_copy_of_a_retry_is_not_destroyed(tmp_path: Path) -> None:
    """It arrives under the same name, in this process or another; what broke off before has left nothing, then."""
    there = There(tmp_path)
    first = there.record("1")
    there.record("2", at=LATER)
    retry = there.journal.open("2" * 32, Side.DESTINATION)  # at work
    assert retry is not None
    assert there.recover(first) is State.ABORTED
    assert there.copy is CopyState.INCOMING
    retry.close()


@pytest.mark.parametrize("at", [LATER, EARLIER])
@pytest.mark.parametrize("state", [State.PREPARED, State.VOTED, State.UNDOING])
def test_a_copy_that_another_has_pinned_is_its(tmp_path: Path, at: str, state: State) -> None:
    """An earlier one, too: it waits for its source, and its copy may be the only one."""
    there = There(tmp_path)
    first = there.record("1")
    there.record("2", state, vm=PINNED, at=at)
    assert there.recover(first) is State.ABORTED
    assert there.copy is CopyState.INCOMING


def test_one_that_has_not_told_its_machine_yet_may_be_a_retry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(party, "HYPERVISOR_ATTEMPTS_MAX", 2)
    there = There(tmp_path)
    first = there.record("1")
    there.record("2", vm=Vm("", ""), at=LATER)
    assert there.recover(first) is State.UNDOING
    assert there.copy is CopyState.INCOMING
    assert not there.journal.records()[0].settled


@pytest.mark.parametrize(
    ("other", "at", "vm"),
    [
        pytest.param((), EARLIER, VM, id="an earlier one of it"),
        pytest.param((State.ABORTED,), LATER, VM, id="one that has ended"),
        pytest.param((), LATER, Vm("other", "6f2fb9a1-0d3e-4a4c-9c0c-000000000000"), id="another machine's"),
        pytest.param((State.PREPARED,), LATER, Vm(VM.name, VM.uuid, "8@boot"), id="another copy's"),
    ],
)
def test_others_are_not_in_its_way(tmp_path: Path, other: tuple[State, ...], at: str, vm: Vm) -> None:
    there = There(tmp_path)
    first = there.record("1")
    there.record("2", *other, vm=vm, at=at)
    assert there.recover(first) is State.ABORTED
    assert there.copy is CopyState.ABSENT


def test_a_session_that_fails_leaves_a_retry_s_copy_alone(tell: Callable[..., None]) -> None:
    """While its own xl is wound down the same machine may come again."""

    async def no(_: Side, vm: Vm) -> None:
        raise PolicyRefused("not today")

    async def story(both: Hosts) -> None:
        def retried() -> None:
            head = Head("f" * 32, "destination", "xl", "alpha", "9999")
            file = both.handovers[Side.DESTINATION].journal.begin(head, Entry("open", "9999"))
            file.write(State.OPEN, "named", GUEST)
            file.close()

        both.world.at["destination xl ready"] = retried
        both.world.at["destination arriving before"] = lambda: both.world.put(Side.DESTINATION, CopyState.INCOMING)
        await both.migrate()
        await until(lambda: len(both.ended) == 2)
        assert "destination arriving before" in both.world.story
        assert "destination destroy before" not in both.world.story

    tell(story, approvals={Side.DESTINATION: [no]})

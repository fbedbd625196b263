"""What is left of a hand-over is taken up, and decided, by those only who are certified for it."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from crypto.keys import SessionId
from korora.agents.integrity.certification import Certification
from korora.agents.integrity.monitor import Monitor
from korora.cli.handover import app
from korora.custody import POLICY, Custody, custody_beside, note_policy
from korora.handovers import decide
from korora.policy.file import PolicyFile
from korora.relay import on_record
from proxy.authority import Act
from proxy.control import PROTOCOL_VERSION, Recover
from proxy.errors import EXIT_POLICY, ConfigurationError, PolicyRefused
from proxy.handover.record import Entry, Head, Record
from proxy.handover.table import Side, State
from proxy.hypervisors.base import CopyState
from proxy.shell.handovers import Handovers
from proxy.shell.journal import Journal, now
from tests.proxy.shell.handing import quick
from tests.proxy.shell.hosted import VM, Host, Life, World
from tests.proxy.support import run, until

__all__ = ["quick"]
pytestmark = pytest.mark.usefixtures("quick")

SESSION = "1" * 32
RELAY = ["recover", "commit", "record"]
NAMED = """
[certification]
by = "security-office"

[[triple]]
subject = "relay"
procedure = {procedures}
items = ["configuration", "memory", "journal", "receipts"]

[[triple]]
subject = "uid:{uid}"
procedure = ["resolve"]
items = ["journal", "memory", "reason"]
"""


def policy(folder: Path, uid: int, procedures: list[str] | None = None) -> PolicyFile:
    """One that lets the relay do that, and that user decide."""
    path = folder / "policy.toml"
    path.write_text(NAMED.format(uid=uid, procedures=RELAY if procedures is None else procedures))
    path.chmod(0o600)
    return PolicyFile(path)


class Left:
    """A hand-over whose session is over, and two processes that know of it by one policy."""

    def __init__(self, folder: Path, certified: Certification, state: State, side: Side = Side.SOURCE) -> None:
        self.folder, self.side = folder, side
        self.world = World()
        standing = CopyState.SUSPENDED if side is Side.SOURCE else CopyState.PAUSED
        self.world.copies[side] = standing
        life = Life(side, self.world)
        self.custody, own = (Custody("alpha", Monitor(certified)) for _ in range(2))
        self.acts: list[tuple[str, str]] = []
        self.handovers, self.own = (
            Handovers(Journal(folder), lambda kind, monitor: Host(life), ended=self._ended, trustee=trustee)
            for trustee in (self.custody, own)
        )
        file = self.own.journal.begin(Head(SESSION, side.value, "xl", "there", now()), Entry("open", now()))
        file.write(state, "", VM)
        file.close()

    def _ended(self, record: Record) -> None:
        self.acts = [(act.subject, act.procedure) for act in self.custody.acts(record)]

    @property
    def record(self) -> Record:
        (record,) = self.own.journal.records()
        return record

    @property
    def copy(self) -> CopyState:
        return self.world.copies[self.side]


@pytest.fixture
def me() -> int:
    return os.getuid()


def test_a_recovery_is_performed_and_told(tmp_path: Path) -> None:
    left = Left(tmp_path, Certification.default(), State.VOTED)
    run(left.handovers.recover_one(left.record, None))
    assert left.copy is CopyState.RUNNING
    assert left.acts == [("relay", "recover"), ("relay", "record")]
    assert left.custody.acts(left.record) == ()  # it was let go


@pytest.mark.parametrize("state", [State.PREPARED, State.VOTED])
def test_a_relay_that_may_not_recover_touches_no_copy(tmp_path: Path, me: int, state: State) -> None:
    left = Left(tmp_path, policy(tmp_path, me, ["commit", "record"]).current.certification, state)
    with capture_logs() as logged:
        stays = run(left.handovers.recover(lambda _: None))
    assert [record.state for record in stays] == [state]
    assert left.copy is CopyState.SUSPENDED
    (line,) = (line for line in logged if line["event"] == "a hand-over stays unsettled")
    assert "clark-wilson: relay has no triple for recover" in line["reason"]
    free = Left(tmp_path / "free", policy(tmp_path, me).current.certification, state)
    run(free.handovers.recover(lambda _: None))
    assert free.copy is CopyState.RUNNING  # so the defence is what refuses


def test_a_source_that_comes_back_is_answered_by_who_may_recover(tmp_path: Path, me: int) -> None:
    """It has committed: the machine would be started here."""
    word = Recover(PROTOCOL_VERSION, bytes.fromhex(SESSION), "committed")
    for number, procedures in enumerate((["commit", "record"], ["recover", "record"])):
        certified = policy(tmp_path, me, procedures).current.certification
        left = Left(tmp_path / str(number), certified, State.VOTED, Side.DESTINATION)
        with pytest.raises(PolicyRefused, match="relay has no triple for") as caught:
            run(left.handovers.answer("there", SessionId(bytes.fromhex(SESSION)), word))
        assert caught.value.rule == "clark-wilson"
        assert (left.record.state, left.copy) == (State.VOTED, CopyState.PAUSED)
    left = Left(tmp_path / "free", policy(tmp_path, me).current.certification, State.VOTED, Side.DESTINATION)
    assert run(left.handovers.answer("there", SessionId(bytes.fromhex(SESSION)), word)).state == "done"
    assert left.acts == [("relay", "recover"), ("relay", "record"), ("relay", "commit")]
    assert left.copy is CopyState.RUNNING


def test_who_only_looks_is_answered_all_the_same(tmp_path: Path, me: int) -> None:
    left = Left(
        tmp_path, policy(tmp_path, me, ["commit", "record"]).current.certification, State.VOTED, Side.DESTINATION
    )
    asked = Recover(PROTOCOL_VERSION, bytes.fromhex(SESSION), "asked")
    assert run(left.handovers.answer("there", SessionId(bytes.fromhex(SESSION)), asked)).state == "voted"


# ---- an operator's word


class Nowhere:
    """A destination that does not answer."""

    async def meet(self, *_: object) -> None:
        await asyncio.Event().wait()


async def ordered(left: Left) -> Record:
    """What an operator says while a process has the hand-over in hand."""
    waiting = asyncio.create_task(left.handovers.recover_one(left.record, Nowhere(), seconds=60.0))  # type: ignore[arg-type]
    try:
        await until(lambda: left.own.journal.held(SESSION, Side.SOURCE))
        return await decide(left.own, left.record, run_here=True)
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def said(left: Left) -> Record:
    """What he says where nobody has it."""
    return await decide(left.own, left.record, run_here=True)


@pytest.mark.parametrize("way", [ordered, said], ids=["to who has it in hand", "beside"])
def test_whoever_has_no_triple_does_not_decide(tmp_path: Path, me: int, way: object) -> None:
    assert way in (ordered, said)
    speak = ordered if way is ordered else said
    left = Left(tmp_path / "refused", policy(tmp_path, me + 1).current.certification, State.COMMITTED)
    with capture_logs() as logged, pytest.raises(PolicyRefused, match=f"uid:{me} has no triple for resolve") as caught:
        run(speak(left), 30.0)
    assert caught.value.rule == "clark-wilson"
    assert (left.record.state, left.copy) == (State.COMMITTED, CopyState.SUSPENDED)
    if way is ordered:
        (line,) = (line for line in logged if line["event"] == "an operator's order is refused")
        assert (line["uid"], line["rule"]) == (me, "clark-wilson")
    left = Left(tmp_path / "allowed", policy(tmp_path, me).current.certification, State.COMMITTED)
    assert run(speak(left), 30.0).state is State.ABORTED
    assert left.copy is CopyState.RUNNING
    if way is ordered:
        assert (f"uid:{me}", "resolve") in left.acts


# ---- a command that works beside a relay goes by the relay's policy


def test_a_command_goes_by_the_policy_of_the_relay_beside_it(tmp_path: Path, me: int) -> None:
    state = tmp_path / "state"
    left = Left(state, Certification.default(), State.COMMITTED)
    note_policy(state, policy(tmp_path, me + 1))
    assert (state / POLICY).stat().st_mode & 0o777 == 0o600
    done = CliRunner().invoke(app, ["resolve", SESSION, "--give-up", "--certain", "--state", str(state)])
    assert isinstance(done.exception, PolicyRefused)
    assert (done.exception.exit_code, done.exception.rule) == (EXIT_POLICY, "clark-wilson")
    assert left.record.state is State.COMMITTED
    note_policy(state, policy(tmp_path, me))
    custody_beside(state).resolve(left.record, me)
    note_policy(state, PolicyFile(None))
    assert not (state / POLICY).exists()
    custody_beside(state).resolve(left.record, me)  # certified as built in


def test_a_policy_that_has_gone_is_no_policy_that_allows(tmp_path: Path, me: int) -> None:
    left = Left(tmp_path / "state", Certification.default(), State.COMMITTED)
    note_policy(tmp_path / "state", policy(tmp_path, me))
    (tmp_path / "policy.toml").unlink()
    with pytest.raises(ConfigurationError, match=r"policy\.toml: cannot be read"):
        custody_beside(tmp_path / "state").resolve(left.record, me)
    for content in (b"x" * 5000, b"\xff\n"):
        (tmp_path / "state" / POLICY).write_bytes(content)
        with pytest.raises(ConfigurationError, match="cannot be read"):
            custody_beside(tmp_path / "state")


def test_who_takes_it_up_again_and_again_is_asked_again(tmp_path: Path, me: int) -> None:
    monitor = Monitor(Certification.default())
    custody = Custody("alpha", monitor)
    left = Left(tmp_path, Certification.default(), State.COMMITTED)
    for _ in range(3):
        custody.recover(left.record)
        custody.commit(left.record)
        custody.resolve(left.record, me)
        custody.commit(left.record)
        custody.over(left.record)
        custody.over(left.record)
    custody.recover(left.record)
    monitor.reload(policy(tmp_path, me, ["recover", "record"]).current.certification)
    with pytest.raises(PolicyRefused, match="no triple for commit"):
        custody.commit(left.record)


def test_the_end_of_a_recovered_hand_over_is_on_record_although_the_loop_ends_at_once(tmp_path: Path) -> None:
    """`korora handover recover` and a command that has been told to stop end with it."""
    left = Left(tmp_path, Certification.default(), State.ABORTED)
    settled: list[tuple[str, int]] = []

    class Slow:
        def knows(self, record: Record) -> bool:
            return False

        def settled(self, record: Record, acts: tuple[Act, ...]) -> None:
            settled.append((record.head.session, len(acts)))

    may = Event()

    async def story() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        loop.run_in_executor(None, may.wait, 10.0)  # a disk that is slow: what comes now has to queue
        left.custody.recover(left.record)
        on_record(Slow(), left.custody)(left.record)  # type: ignore[arg-type]
        left.custody.over(left.record)
        await asyncio.sleep(0)

    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(asyncio.run, story())
        with pytest.raises(TimeoutError):
            running.result(0.3)  # it waits for that thread
        may.set()
        running.result(10.0)
    assert settled == [(SESSION, 2)]

"""The journal: what it says is on the disk, one process has it at a time, and no crash or full disk makes it wrong."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from proxy.errors import JournalBusy, JournalError
from proxy.handover.record import Entry, Head, line
from proxy.handover.table import Side, State
from proxy.hypervisors.base import Vm
from proxy.limits import JOURNAL_SECONDS, REASON_CHARACTERS_MAX
from proxy.shell import journal as module
from proxy.shell.journal import FOLDER, Journal

VM = Vm("guest", "0f9c2f1e-0000-4000-8000-00000000abcd")
OPEN = Entry("open", "2026-01-02T03:04:05+00:00")
SECONDS_MAX = 30.0


def head(number: int = 1, side: Side = Side.SOURCE) -> Head:
    began = f"2026-01-02T03:04:{number % 60:02}"
    return Head(f"{number:032x}", "source" if side is Side.SOURCE else "destination", "xl", "beta", began)


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / FOLDER).iterdir()}


# ------------------------------------------------------------------ what it keeps


def test_what_is_written_is_found_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    file = journal.begin(head(), OPEN)
    file.write(State.PREPARED, "approved", VM)
    file.write(State.VOTED, "x" * 2 * REASON_CHARACTERS_MAX)
    file.close()
    (record,) = journal.records()
    assert (record.head, record.state, record.vm) == (head(), State.VOTED, VM)
    assert record.entries[0] == OPEN
    assert len(record.why) == REASON_CHARACTERS_MAX
    again = journal.open(head().session, Side.SOURCE)
    assert again is not None
    assert again.record == record
    again.write(State.DONE, "peer_done", settled=True)
    again.close()
    assert journal.records()[0].settled
    assert journal.records()[0].vm == VM, "who does not name the machine leaves its name as it was"


def test_both_sides_of_one_session_on_one_host(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    files = [journal.begin(head(side=side), OPEN) for side in Side]
    files[0].write(State.ABORTED, "lost")
    assert {record.side: record.state for record in journal.records()} == {
        Side.SOURCE: State.ABORTED,
        Side.DESTINATION: State.OPEN,
    }
    for file in files:
        file.close()


def test_what_is_not_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.open(head().session, Side.SOURCE) is None
    assert journal.records() == []
    assert not (tmp_path / FOLDER).exists(), "looking makes nothing"


def test_the_oldest_comes_first(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in (3, 1, 2):
        journal.begin(head(number), OPEN).close()
    assert [record.head for record in journal.records()] == [head(1), head(2), head(3)]


def test_a_session_s_id_is_used_once(tmp_path: Path) -> None:
    """Or the second session's file would take the place of what the first has promised."""
    journal = Journal(tmp_path)
    file = journal.begin(head(), OPEN)
    file.write(State.PREPARED, "approved")
    before = written(tmp_path)
    with pytest.raises(JournalError, match="there already") as failure:
        journal.begin(head(), OPEN)
    assert failure.value.remedy
    assert written(tmp_path) == before
    file.close()


def test_two_that_begin_one_session_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of one daemon: both have looked, neither has made its file. One gets it, whole, and the other is told."""
    real, meeting, outcomes = os.fsync, threading.Barrier(2, timeout=SECONDS_MAX), []

    def together(descriptor: int) -> None:
        real(descriptor)
        if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            meeting.wait()

    def begin(journal: Journal, process: int) -> None:
        try:
            outcomes.append(journal.begin(head(), OPEN))
        except JournalError:
            outcomes.append(None)

    numbers = iter((71, 72))
    monkeypatch.setattr(os, "getpid", lambda: next(numbers))
    monkeypatch.setattr(os, "fsync", together)
    (tmp_path / FOLDER).mkdir()
    threads = [threading.Thread(target=begin, args=(Journal(tmp_path), number)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS_MAX)
    monkeypatch.undo()
    (got,) = [file for file in outcomes if file is not None]
    assert len(outcomes) == 2
    got.write(State.PREPARED, "approved")
    got.close()
    assert Journal(tmp_path).records()[0].state is State.PREPARED
    assert len(written(tmp_path)) == 1


# ------------------------------------------------------------------ whose it is


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Journal(tmp_path / "state").begin(head(), OPEN).close()
    finally:
        os.umask(before)
    (path,) = (tmp_path / "state" / FOLDER).iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("there", ["file", "nothing", "folder", "fifo"])
def test_a_link_is_not_followed(tmp_path: Path, there: str) -> None:
    journal = Journal(tmp_path)
    journal.begin(head(1), OPEN).close()
    path = tmp_path / FOLDER / f"{head(2).session}-source.journal"
    target = tmp_path / "elsewhere"
    match there:
        case "file":
            target.write_bytes(line(head(2)) + line(OPEN))
        case "folder":
            target.mkdir()
        case "fifo":
            os.mkfifo(target)
    path.symlink_to(target)
    with pytest.raises(JournalError) as failure:
        journal.open(head(2).session, Side.SOURCE)
    assert failure.value.remedy
    with pytest.raises(JournalError):
        journal.begin(head(2), OPEN)
    assert [record.head for record in journal.records()] == [head(1)]
    assert journal.unreadable == {"source": 1}
    if there == "file":
        assert target.read_bytes() == line(head(2)) + line(OPEN)


@pytest.mark.parametrize("what", ["folder", "fifo"])
@pytest.mark.timeout(30)
def test_what_is_no_file_is_no_journal(tmp_path: Path, what: str) -> None:
    journal = Journal(tmp_path)
    journal.begin(head(1), OPEN).close()
    path = tmp_path / FOLDER / f"{head(2).session}-source.journal"
    path.mkdir() if what == "folder" else os.mkfifo(path)
    with pytest.raises(JournalError):
        journal.open(head(2).session, Side.SOURCE)
    assert [record.head for record in journal.records()] == [head(1)]
    assert journal.unreadable == {"source": 1}
    journal.begin(head(3), OPEN).close()


def test_what_cannot_be_read_is_counted_by_its_side_until_it_can_be(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number, side in ((1, Side.SOURCE), (2, Side.DESTINATION), (3, Side.DESTINATION)):
        journal.begin(head(number, side), OPEN).close()
    assert len(journal.records()) == 3
    assert not journal.unreadable
    broken = [tmp_path / FOLDER / f"{head(number).session}-destination.journal" for number in (2, 3)]
    whole = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(path.read_bytes()[1:])
    assert [record.head for record in journal.records()] == [head(1)]
    assert journal.unreadable == {"destination": 2}
    broken[0].write_bytes(whole[0])
    broken[1].unlink()
    assert len(journal.records()) == 2
    assert not journal.unreadable


@pytest.mark.parametrize("what", ["file", "read-only", "missing device"])
def test_a_folder_that_cannot_be_had(tmp_path: Path, what: str) -> None:
    state = tmp_path / "state"
    match what:
        case "file":
            state.write_text("")
        case "read-only":
            state = Path("/proc/self/korora")
        case _:
            state.symlink_to(tmp_path / "nowhere" / "else")
    with pytest.raises(JournalError, match="cannot keep a journal") as failure:
        Journal(state).begin(head(), OPEN)
    assert "--state" in failure.value.remedy
    assert Journal(state).records() == []


# ------------------------------------------------------------------ one process at a time


HOLDER = """
import sys
from pathlib import Path
from proxy.handover.record import Entry, Head
from proxy.handover.table import Side, State
from proxy.shell.journal import Journal
journal, session = Journal(Path(sys.argv[1])), sys.argv[2]
file = journal.begin(Head(session, "source", "xl", "beta", "2026"), Entry("open", ""))
file.write(State.PREPARED, "mine")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["kill", "exit"])
@pytest.mark.timeout(60)
def test_another_process_waits_until_its_holder_has_gone(tmp_path: Path, end: str) -> None:
    """The lock is the process's: it needs no clean-up, however that ended."""
    journal, session = Journal(tmp_path), head().session
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), session], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(JournalBusy) as busy:
            journal.open(session, Side.SOURCE)
        assert busy.value.remedy
        assert session[:8] in str(busy.value)
        (record,) = journal.records()
        assert record.state is State.PREPARED, "it may be read meanwhile"
        if end == "kill":
            holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=SECONDS_MAX)
    finally:
        holder.kill()
        holder.wait(SECONDS_MAX)
    file = journal.open(session, Side.SOURCE)
    assert file is not None
    assert file.record.state is State.PREPARED
    file.write(State.ABORTED, "ours")
    file.close()


def test_one_process_has_it_once(tmp_path: Path) -> None:
    """Recovery and a session of the same process are two, too."""
    journal = Journal(tmp_path)
    file = journal.begin(head(), OPEN)
    with pytest.raises(JournalBusy):
        journal.open(head().session, Side.SOURCE)
    file.close()
    again = journal.open(head().session, Side.SOURCE)
    assert again is not None
    with pytest.raises(JournalBusy):
        journal.open(head().session, Side.SOURCE)
    again.close()
    again.close()


def test_a_child_does_not_inherit_the_lock(tmp_path: Path) -> None:
    """Or a hypervisor's program, which outlives the relay, would keep it."""
    journal = Journal(tmp_path)
    begun = journal.begin(head(), OPEN)
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            close_fds=False,
        )
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"\n"
            begun.close()
            again = journal.open(head().session, Side.SOURCE)
            assert again is not None
            begun = again
        finally:
            child.communicate(timeout=SECONDS_MAX)
    begun.close()


def test_closing_waits_for_the_line_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor that is closed under a thread may be another file's, or a socket's, when the thread writes to it."""
    file = Journal(tmp_path).begin(head(), OPEN)
    inside, go_on = threading.Event(), threading.Event()
    real = os.write

    def slow(descriptor: int, data: bytes) -> int:
        inside.set()
        assert go_on.wait(SECONDS_MAX)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", slow)
    writing = threading.Thread(target=file.write, args=(State.PREPARED, "approved"))
    writing.start()
    assert inside.wait(SECONDS_MAX)
    closing = threading.Thread(target=file.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    go_on.set()
    for thread in (writing, closing):
        thread.join(SECONDS_MAX)
    monkeypatch.undo()
    assert Journal(tmp_path).records()[0].state is State.PREPARED
    with pytest.raises(JournalError):
        file.write(State.VOTED, "gave_up")


# ------------------------------------------------------------------ room


def aged(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_what_is_settled_goes_when_it_is_old(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    ages = {1: JOURNAL_SECONDS + 60, 2: JOURNAL_SECONDS - 3600}
    for number, age in ages.items():
        file = journal.begin(head(number), OPEN)
        file.write(State.DONE, "peer_done", settled=True)
        file.close()
        aged(file.path, age)
    journal.begin(head(3), OPEN).close()
    assert [record.head for record in journal.records()] == [head(2), head(3)]


def test_what_is_settled_goes_when_it_is_too_much_the_oldest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "JOURNAL_FILES_MAX", 4)
    journal = Journal(tmp_path)
    for number in range(1, 8):
        file = journal.begin(head(number), OPEN)
        if number != 2:
            file.write(State.ABORTED, "lost", settled=True)
        file.close()
        aged(file.path, 1000 - number)
    # Looked at before each new one: one more than the limit may be there.
    assert [record.head for record in journal.records()] == [head(2), head(4), head(5), head(6), head(7)]


def test_nothing_unsettled_or_damaged_is_ever_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However old, and however many: each may be the only witness of a machine that is in doubt."""
    monkeypatch.setattr(module, "JOURNAL_FILES_MAX", 2)
    journal = Journal(tmp_path)
    states = [state for state in State if state not in (State.ASKED, State.UNDOING)]
    for number, state in enumerate(states):
        file = journal.begin(head(number), OPEN)
        file.write(state, "")
        file.close()
        aged(file.path, 10 * JOURNAL_SECONDS)
    damaged = journal.begin(head(50), OPEN)
    damaged.write(State.DONE, "", settled=True)
    damaged.close()
    damaged.path.write_bytes(damaged.path.read_bytes().replace(b"done", b"dune"))
    aged(damaged.path, 10 * JOURNAL_SECONDS)
    before = set(written(tmp_path))
    journal.begin(head(60), OPEN).close()
    assert before < set(written(tmp_path))
    assert len(written(tmp_path)) == len(states) + 2


def test_what_a_crash_left_half_made_goes_after_a_while(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(head(1), OPEN).close()
    for name, age in (("x-source.new-12", 7200), ("y-source.new-13", 10)):
        (tmp_path / FOLDER / name).touch()
        aged(tmp_path / FOLDER / name, age)
    journal.begin(head(2), OPEN).close()
    assert "x-source.new-12" not in written(tmp_path)
    assert "y-source.new-13" in written(tmp_path)


def test_pruning_waits_for_nothing(tmp_path: Path) -> None:
    """A pipe or a link among the files is passed over."""
    journal = Journal(tmp_path)
    journal.begin(head(1), OPEN).close()
    os.mkfifo(tmp_path / FOLDER / "pipe-source.journal")
    aged(tmp_path / FOLDER / "pipe-source.journal", 10 * JOURNAL_SECONDS)
    outside = tmp_path / "outside"
    outside.write_bytes(line(head(9)) + line(Entry("done", "", settled=True)))
    link = tmp_path / FOLDER / "link-source.journal"
    link.symlink_to(outside)
    aged(outside, 10 * JOURNAL_SECONDS)
    journal.begin(head(2), OPEN).close()
    assert outside.exists()
    assert link.is_symlink()


def test_no_lock_is_taken_by_looking(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(head(), OPEN).close()
    file = journal.open(head().session, Side.SOURCE)
    assert file is not None
    assert journal.records()
    with file.path.open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.close()
    assert journal.records()
    with file.path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

"""The journal on disks that fill up, fail and forget, in a process that dies: what was said is there, and whole."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.errors import JournalDamaged, JournalError
from proxy.handover.record import Entry, Head, line, read
from proxy.handover.table import Side, State
from proxy.hypervisors.base import Vm
from proxy.limits import JOURNAL_BYTES_MAX, REASON_CHARACTERS_MAX
from proxy.shell import journal as module
from proxy.shell.journal import FOLDER, Journal, JournalFile

VM = Vm("guest", "0f9c2f1e-0000-4000-8000-00000000abcd")
OPEN = Entry("open", "2026-01-02T03:04:05+00:00")


def head(number: int = 1) -> Head:
    return Head(f"{number:032x}", "source", "xl", "beta", f"2026-01-02T03:04:{number:02}")


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / FOLDER).iterdir()}


class Disk:
    """The calls that write, one of which fails: before it has done anything, or in its midst."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fail_at = -1
        self.error = errno.ENOSPC
        self.taken = 0
        """Bytes that a write takes before it fails."""
        for name in ("open", "write", "fsync", "link", "ftruncate"):
            monkeypatch.setattr(os, name, self._instead(name, getattr(os, name)))

    def _instead(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            number = len(self.calls)
            self.calls.append(name)
            if number == self.fail_at:
                if name == "write" and self.taken:
                    real(args[0], bytes(args[1])[: self.taken])  # type: ignore[call-overload]
                raise OSError(self.error, os.strerror(self.error))
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("taken", [0, 1, 40])
@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_line_that_the_disk_does_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int, taken: int
) -> None:
    file = Journal(tmp_path).begin(head(), OPEN)
    file.write(State.PREPARED, "approved", VM)
    before = written(tmp_path)
    disk = Disk(monkeypatch)
    disk.error, disk.taken, disk.fail_at = error, taken, ["write", "fsync"].index(call)
    with pytest.raises(JournalError, match=os.strerror(error)) as failure:
        file.write(State.VOTED, "gave_up")
    assert failure.value.remedy
    assert written(tmp_path) == before, "half a line would make damage of the next one"
    assert file.record.state is State.PREPARED
    file.write(State.ABORTED, "no room")
    file.close()
    monkeypatch.undo()
    (record,) = Journal(tmp_path).records()
    assert [entry.state for entry in record.entries] == ["open", "prepared", "aborted"]


def test_half_a_line_that_cannot_be_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written after it: it stays a torn end, which is no damage."""
    file = Journal(tmp_path).begin(head(), OPEN)
    real = os.write

    def half(descriptor: int, data: bytes) -> int:
        if broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        broken.append(True)
        return real(descriptor, bytes(data)[:40])

    def no(descriptor: int, size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    broken: list[bool] = []
    monkeypatch.setattr(os, "write", half)
    monkeypatch.setattr(os, "ftruncate", no)
    with pytest.raises(JournalError):
        file.write(State.PREPARED, "approved")
    monkeypatch.undo()
    with pytest.raises(JournalError):
        file.write(State.PREPARED, "approved")
    file.close()
    again = Journal(tmp_path).open(head().session, Side.SOURCE)
    assert again is not None
    assert again.record.state is State.OPEN
    again.write(State.ABORTED, "taken up")
    again.close()
    assert Journal(tmp_path).records()[0].state is State.ABORTED


def test_nothing_is_left_of_a_hand_over_that_could_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails, at whichever step; and where only the folder's own sync failed, what is left had not begun."""
    (tmp_path / FOLDER).mkdir()
    descriptors = len(os.listdir("/proc/self/fd"))
    disk = Disk(monkeypatch)
    steps = {0: "open", 1: "write", 2: "fsync", 3: "link", 4: "open", 5: "fsync"}
    for step, name in steps.items():
        disk.calls, disk.fail_at = [], step
        with pytest.raises(JournalError, match="cannot keep a journal"):
            Journal(tmp_path).begin(head(step), OPEN)
        assert disk.calls[step] == name
        left = written(tmp_path)
        assert set(left) == ({f"{head(s).session}-source.journal" for s in range(4, step + 1)})
        assert len(os.listdir("/proc/self/fd")) == descriptors, name
    monkeypatch.undo()
    assert {record.state for record in Journal(tmp_path).records()} == {State.OPEN}
    assert all(not record.vm.name for record in Journal(tmp_path).records())


def test_the_disk_has_it_before_anybody_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's lines before its name, its name before `begin` returns, a line before `write` does."""
    disk = Disk(monkeypatch)
    file = Journal(tmp_path).begin(head(), OPEN)
    assert disk.calls == ["open", "fsync", "open", "write", "fsync", "link", "open", "fsync"], "the new folder's first"
    disk.calls = []
    file.write(State.PREPARED, "approved")
    assert disk.calls == ["write", "fsync"]
    file.close()
    disk.calls = []
    Journal(tmp_path).begin(head(2), OPEN).close()
    assert disk.calls == ["open", "write", "fsync", "link", "open", "fsync"]


class Crash(BaseException):
    """The process is gone: nothing after this runs, but what its operating system does for it."""


@pytest.mark.parametrize("step", range(9))
def test_a_crash_at_any_step_leaves_what_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """`begin`, then two states; a write may have got half way. What was returned from is there, nothing is damaged."""
    (tmp_path / FOLDER).mkdir()
    told: list[str] = []
    calls = 0

    def dying(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls - 1 == step:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(bytes(args[1])) // 2])  # type: ignore[call-overload]
                raise Crash
            if calls - 1 > step:
                raise AssertionError(f"{name} after the crash")
            return real(*args, **kwargs)

        return call

    for name in ("open", "write", "fsync", "link"):
        monkeypatch.setattr(os, name, dying(name, getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", lambda _: None)
    files: list[JournalFile] = []

    def live() -> None:
        files.append(Journal(tmp_path).begin(head(), OPEN))
        told.append("open")
        for state in (State.PREPARED, State.VOTED):
            files[0].write(state, "")
            told.append(state.value)

    with pytest.raises(Crash):
        live()
    monkeypatch.undo()
    for file in files:
        file.close()
    again = Journal(tmp_path).open(head().session, Side.SOURCE)
    if not told and again is None:
        assert step <= 3, "the name is given by link"
        return
    assert again is not None
    states = [entry.state for entry in again.record.entries]
    assert states[: len(told)] == told
    assert states in (told, [*told, ("open", "prepared", "voted")[len(told)]]), "at most the one that was under way"
    again.write(State.ABORTED, "taken up")
    again.close()
    assert Journal(tmp_path).records()[0].state is State.ABORTED


@pytest.mark.parametrize("rest", [b"{", b'{"state":"voted","at":"', bytes(100), b"\0" * 30 + b"alse} 12345678\n"])
def test_a_torn_end_is_cut_off_before_anything_is_written_behind_it(tmp_path: Path, rest: bytes) -> None:
    file = Journal(tmp_path).begin(head(), OPEN)
    file.close()
    with file.path.open("ab") as torn:
        torn.write(rest)
    (record,) = Journal(tmp_path).records()
    assert record.state is State.OPEN
    assert file.path.read_bytes().endswith(rest), "who only reads changes nothing"
    again = Journal(tmp_path).open(head().session, Side.SOURCE)
    assert again is not None
    again.write(State.ABORTED, "taken up")
    again.close()
    assert [entry.state for entry in read(file.path.read_bytes())[0].entries] == ["open", "aborted"]


def test_a_damaged_file_is_kept_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path)
    file = journal.begin(head(), OPEN)
    file.write(State.COMMITTED, "")
    file.close()
    journal.begin(head(2), OPEN).close()
    content = file.path.read_bytes().replace(b"committed", b"cammitted")
    file.path.write_bytes(content)
    with pytest.raises(JournalDamaged) as failure:
        journal.open(head().session, Side.SOURCE)
    assert str(file.path) in str(failure.value)
    assert "keep it" in failure.value.remedy
    assert [record.head for record in journal.records()] == [head(2)]
    assert file.path.read_bytes() == content
    with pytest.raises(JournalDamaged):
        journal.open(head().session, Side.SOURCE)  # and not busy: the lock was let go


def test_a_full_file_takes_no_more(tmp_path: Path) -> None:
    file = Journal(tmp_path).begin(head(), OPEN)
    room = JOURNAL_BYTES_MAX - file.path.stat().st_size
    probe = len(line(Entry("doubt", module.now(), "x" * REASON_CHARACTERS_MAX)))
    for _ in range(room // probe):
        file.write(State.DOUBT, "x" * REASON_CHARACTERS_MAX)
    before = file.path.read_bytes()
    with pytest.raises(JournalError):
        file.write(State.DOUBT, "x" * REASON_CHARACTERS_MAX)
    assert file.path.read_bytes() == before
    file.close()
    assert Journal(tmp_path).records()[0].state is State.DOUBT

"""The journal of hand-overs: one append-only file for each side of each, locked by whoever acts on it (ADR 16).

A file is made whole under another name and renamed, so that it never lacks its head. The lock is the kernel's (flock):
it goes with the process, however that dies. Everything here blocks for as long as a disk takes to write a line.
"""

import errno
import fcntl
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from proxy.errors import JournalBusy, JournalDamaged, JournalError
from proxy.handover.record import Entry, Head, Record, line, read
from proxy.handover.table import Side, State
from proxy.hypervisors.base import Vm
from proxy.limits import JOURNAL_BYTES_MAX, JOURNAL_FILES_MAX, JOURNAL_SECONDS, REASON_CHARACTERS_MAX

log = structlog.get_logger("korora.handover")

FOLDER: Final = "handover"
_SUFFIX: Final = ".journal"


def now() -> str:
    """This moment, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class JournalFile:
    """One side of one hand-over, locked by this process. ``Journal`` makes them."""

    def __init__(self, path: Path, descriptor: int, record: Record) -> None:
        self.path, self.record = path, record
        self._descriptor = descriptor

    def write(self, state: State, why: str, vm: Vm | None = None, *, settled: bool = False) -> None:
        """Append a state; it is on the disk when this returns.

        Raises:
            JournalError: the disk does not take it. Nothing may follow from the state.
        """
        told = vm or self.record.vm
        entry = Entry(
            state=state.value,  # type: ignore[arg-type]  # the literal's values are the states that are written
            at=now(),
            why=why[:REASON_CHARACTERS_MAX],
            name=told.name,
            uuid=told.uuid,
            settled=settled,
        )
        try:
            _append(self._descriptor, line(entry))
        except OSError as error:
            raise JournalError(
                f"cannot write {self.path}: {error.strerror}", "make room on its disk, or repair it"
            ) from None
        self.record.entries.append(entry)

    def close(self) -> None:
        """Let the lock go."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Journal:
    """The folder of all of them.

    Args:
        state: where a relay keeps what outlives its sessions; ``handover`` is made in it when first needed.
    """

    def __init__(self, state: Path) -> None:
        self.folder = state / FOLDER

    def begin(self, head: Head, entry: Entry) -> JournalFile:
        """Begin a hand-over's file.

        Raises:
            JournalError: it cannot be made, or is there.
        """
        path = self._path(head.session, Side(head.side))
        fresh = path.with_suffix(f".new-{os.getpid()}")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._prune()
            if path.exists():
                raise JournalError(f"{path} is there already", "a session's id is used once: migrate again")
            descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _append(descriptor, line(head) + line(entry))
                fresh.rename(path)
                _sync_folder(self.folder)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise JournalError(
                f"cannot keep a journal in {self.folder}: {error.strerror}",
                "name a folder that can be written by --state",
            ) from None
        return JournalFile(path, descriptor, Record(head, [entry]))

    def open(self, session: str, side: Side) -> JournalFile | None:
        """Take a hand-over up; None if there is none of it.

        Raises:
            JournalBusy: another process is at work on it.
            JournalDamaged, JournalError: it cannot be read.
        """
        path = self._path(session, side)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise JournalError(f"cannot open {path}: {error.strerror}", "see to its owner and mode") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            record, good = _read(path, descriptor)
            os.ftruncate(descriptor, good)
            os.fsync(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise JournalBusy(
                f"hand-over {session[:8]} is being worked on by another process", "wait, or stop that process"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise JournalError(f"cannot read {path}: {error.strerror}", "see to its disk") from None
        except BaseException:
            os.close(descriptor)
            raise
        return JournalFile(path, descriptor, record)

    def records(self) -> list[Record]:
        """All that can be read, the oldest first; what cannot is told in the log."""
        found = []
        for path in self._files():
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                found.append(_read(path, descriptor)[0])
            except (JournalError, OSError) as error:
                log.warning("a hand-over's journal cannot be read", path=str(path), reason=str(error))
            finally:
                os.close(descriptor)
        return sorted(found, key=lambda record: record.head.began)

    def _files(self) -> list[Path]:
        try:
            return sorted(self.folder.glob(f"*{_SUFFIX}"))[: 2 * JOURNAL_FILES_MAX]
        except OSError:
            return []

    def _prune(self) -> None:
        """Remove settled hand-overs that are old, or too many; an unsettled one is never removed."""
        files = sorted(self._files(), key=_age, reverse=True)
        excess = len(files) - JOURNAL_FILES_MAX
        for path in files:
            if excess <= 0 and not _old(path):
                return
            try:
                settled = read(path.read_bytes())[0].settled
                if settled:
                    path.unlink()
                    excess -= 1
            except (JournalDamaged, OSError):
                continue

    def _path(self, session: str, side: Side) -> Path:
        return self.folder / f"{session}-{side.value}{_SUFFIX}"


def _append(descriptor: int, content: bytes) -> None:
    size = os.fstat(descriptor).st_size
    if size + len(content) > JOURNAL_BYTES_MAX:
        raise OSError(errno.EFBIG, "it is full")
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)  # half a line would make damage of the next one
        raise


def _read(path: Path, descriptor: int) -> tuple[Record, int]:
    content = os.pread(descriptor, JOURNAL_BYTES_MAX + 1, 0)
    try:
        return read(content)
    except JournalDamaged as error:
        raise JournalDamaged(
            f"{path} is damaged: {error}", "keep it, and look at both hosts' xl list before anything else"
        ) from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _old(path: Path) -> bool:
    return _age(path) > JOURNAL_SECONDS

"""The journal of hand-overs: one append-only file for each side of each, locked by whoever acts on it (ADR 16).

A file is made whole under another name and linked to its own, so that it never lacks its head and none is ever
replaced. The lock is the kernel's (flock): it goes with the process, however that dies. Everything here blocks for as
long as a disk takes to write a line.
"""

import errno
import fcntl
import os
import stat
import threading
import time
from collections import Counter
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
_FRESH_SECONDS: Final = 3600.0  # making one takes as long as a disk takes to write two lines
FRESH: Final = ".new-"  # while it is made; a crash may leave one, which then says nothing


def now() -> str:
    """This moment, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class JournalFile:
    """One side of one hand-over, locked by this process. ``Journal`` makes them."""

    def __init__(self, path: Path, descriptor: int, record: Record) -> None:
        self.path, self.record = path, record
        self.tool = record.tool
        """The xl process at work here, written down with each state; see ``Entry``."""
        self._descriptor = descriptor
        self._busy = threading.Lock()
        """Held while a thread writes: a descriptor that were closed meanwhile could be another file's by then."""
        self._broken = False
        """Whether part of a line stands at its end and cannot be taken away."""

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
            copy=told.copy,
            paused=told.paused,
            settled=settled,
            tool=self.tool,
        )
        with self._busy:
            try:
                self._append(line(entry))
            except OSError as error:
                raise JournalError(
                    f"cannot write {self.path}: {error.strerror}", "make room on its disk, or repair it"
                ) from None
            self.record.entries.append(entry)

    def _append(self, content: bytes) -> None:
        if self._descriptor < 0 or self._broken:
            raise OSError(errno.EBADF, "it is closed" if self._descriptor < 0 else "its end is damaged")
        size = os.fstat(self._descriptor).st_size
        if size + len(content) > JOURNAL_BYTES_MAX:
            raise OSError(errno.EFBIG, "it is full")
        try:
            _write(self._descriptor, content)
        except OSError:
            try:
                os.ftruncate(self._descriptor, size)  # half a line would make damage of the next one
            except OSError:
                self._broken = True
            raise

    def close(self) -> None:
        """Let the lock go; a line that is being written is written first."""
        with self._busy:
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
        self.unreadable: Counter[str] = Counter()
        """Files that could not be read when all were last looked at, by the side that their names tell."""

    def begin(self, head: Head, entry: Entry) -> JournalFile:
        """Begin a hand-over's file.

        Raises:
            JournalError: it cannot be made, or is there.
        """
        path = self._path(head.session, Side(head.side))
        fresh = path.with_suffix(f"{FRESH}{os.getpid()}")
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _sync_folder(self.folder.parent)
            self._prune()
            descriptor = self._make(fresh, path, line(head) + line(entry))
        except OSError as error:
            raise JournalError(
                f"cannot keep a journal in {self.folder}: {error.strerror}",
                "name a folder that can be written by --state",
            ) from None
        return JournalFile(path, descriptor, Record(head, [entry]))

    def _make(self, fresh: Path, path: Path, content: bytes) -> int:
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write(descriptor, content)
            os.link(fresh, path)
            _sync_folder(self.folder)
        except FileExistsError:
            os.close(descriptor)
            raise JournalError(f"{path} is there already", "a session's id is used once: migrate again") from None
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            with suppress(OSError):
                fresh.unlink()
        return descriptor

    def open(self, session: str, side: Side) -> JournalFile | None:
        """Take a hand-over up; None if there is none of it.

        Raises:
            JournalBusy: another process is at work on it.
            JournalDamaged, JournalError: it cannot be read.
        """
        path = self._path(session, side)
        try:
            descriptor = _open(path, os.O_RDWR | os.O_APPEND)
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

    def held(self, session: str, side: Side) -> bool:
        """Whether a process is at work on that hand-over.

        Raises:
            JournalError: it cannot be told.
        """
        path = self._path(session, side)
        try:
            descriptor = _open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise JournalError(f"cannot open {path}: {error.strerror}", "see to its owner and mode") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def has(self, session: str, side: Side) -> bool:
        """Whether that side of a hand-over is on record: both are where a machine migrates within its host."""
        return self._path(session, side).exists()

    def records(self) -> list[Record]:
        """All that can be read, the oldest first; what cannot is told in the log."""
        found = []
        unreadable: Counter[str] = Counter()
        for path in self._files():
            try:
                descriptor = _open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # removed meanwhile
            except OSError as error:
                unreadable[_side_of(path)] += 1
                log.warning("a hand-over's journal cannot be read", path=str(path), reason=error.strerror or str(error))
                continue
            try:
                found.append(_read(path, descriptor)[0])
            except (JournalError, OSError) as error:
                unreadable[_side_of(path)] += 1
                log.warning("a hand-over's journal cannot be read", path=str(path), reason=str(error))
            finally:
                os.close(descriptor)
        self.unreadable = unreadable
        return sorted(found, key=lambda record: record.head.began)

    def _files(self) -> list[Path]:
        try:
            return sorted(self.folder.glob(f"*{_SUFFIX}"))[: 2 * JOURNAL_FILES_MAX]
        except OSError:
            return []

    def _prune(self) -> None:
        """Remove settled hand-overs that are old, or too many; an unsettled one is never removed."""
        for path in self.folder.glob(f"*{FRESH}*"):
            if _age(path) > _FRESH_SECONDS:
                with suppress(OSError):
                    path.unlink()
        files = sorted(self._files(), key=_age, reverse=True)
        excess = len(files) - JOURNAL_FILES_MAX
        for path in files:
            if excess <= 0 and not _old(path):
                return
            try:
                descriptor = _open(path, os.O_RDONLY)
                try:
                    settled = _read(path, descriptor)[0].settled
                finally:
                    os.close(descriptor)
                if settled:
                    path.unlink()
                    excess -= 1
            except (JournalDamaged, OSError):
                continue

    def _path(self, session: str, side: Side) -> Path:
        return self.folder / f"{session}-{side.value}{_SUFFIX}"


def _side_of(path: Path) -> str:
    """By its name; a name that is none of ours is a source's, whose machine is the one that may be lost."""
    side = path.stem.rpartition("-")[2]
    return side if side == Side.DESTINATION.value else Side.SOURCE.value


def _open(path: Path, flags: int) -> int:
    """Open a file that is one: what else has its name is not followed, and not waited for."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file")
    return descriptor


def _write(descriptor: int, content: bytes) -> None:
    """All of it, and on the disk."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


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

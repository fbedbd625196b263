"""The directory in which processes share their metrics: one small file of numbers for each process and kind of metric.

prometheus-client's multi-process mode names those files by process id. Here they carry the name of the worker instead
("0", "1", … and "supervisor"): a worker that is started again goes on counting in the files of the one before it, so
that no counter falls, and there are never more files than workers.
"""

import fcntl
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Final, Self

from korora.metrics.families import FAMILIES
from korora.metrics.family import Family, Kind
from proxy.errors import ConfigurationError

SUBDIRECTORY: Final = "metrics"
LOCK: Final = "lock"
FILE_BYTES: Final = 128 * 1024  # all series of one file take less than half of it, so that no file grows later
WORKER_NAME: Final = re.compile(r"[a-z0-9]{1,32}")  # part of a file's name, which `_` divides

_NOT_A_PROBLEM_TWICE: Final = "name another state directory, or stop the process that uses this one"


def file_kind(family: Family) -> str:
    """The beginning of the name of the file that holds a metric."""
    return family.kind.value if family.kind is not Kind.GAUGE else f"gauge_{family.merge.value}"


FILE_KINDS: Final = tuple(sorted({file_kind(family) for family in FAMILIES}))


class SharedDirectory:
    """The supervisor's hold on the directory; workers only need its ``path``.

    It is locked, so that two daemons with one state directory do not count into each other's files.
    """

    def __init__(self, path: Path, lock: int, *, temporary: bool) -> None:
        self.path = path
        self._lock = lock
        self._temporary = temporary

    @classmethod
    def prepare(cls, parent: Path | None = None) -> Self:
        """Make ``parent``/metrics with mode 0700, and empty it of an earlier run's numbers.

        Args:
            parent: an existing directory, best on a tmpfs (systemd's RuntimeDirectory); None for a temporary
                directory, which ``close`` removes.

        Raises:
            ConfigurationError: it cannot be made, is not ours, or another process uses it.
        """
        try:
            if parent is None:
                path = Path(tempfile.mkdtemp(prefix="korora-metrics-"))
            else:
                path = parent / SUBDIRECTORY
                path.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                facts = os.fstat(descriptor)
                if facts.st_uid != os.geteuid():
                    raise ConfigurationError(f"{path} belongs to another user", "remove it, or name another directory")
                if stat.S_IMODE(facts.st_mode) != 0o700:
                    os.fchmod(descriptor, 0o700)
                lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            where = parent or tempfile.gettempdir()
            raise ConfigurationError(
                f"cannot keep metrics in {where}: {error.strerror}", "make that directory, or name another one"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for old in path.glob("*.db"):
                old.unlink()
        except BlockingIOError:
            os.close(lock)
            raise ConfigurationError(f"another process keeps its metrics in {path}", _NOT_A_PROBLEM_TWICE) from None
        except OSError as error:
            os.close(lock)
            raise ConfigurationError(f"cannot empty {path}: {error.strerror}", "remove what stands in it") from None
        return cls(path, lock, temporary=parent is None)

    def forget(self, worker: str) -> None:
        """A worker has ended: what it said of the present is void, what it counted stays.

        Call it when the process has been reaped and before another one takes its name.
        """
        for kind in FILE_KINDS:
            if kind.startswith("gauge_live"):
                (self.path / f"{kind}_{worker}.db").unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the directory; all workers have ended. A temporary one is removed."""
        if self._temporary:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def allocate(directory: Path, worker: str) -> None:
    """Give a worker's files their room on the disk.

    They are mapped into memory: where the disk is full, a write into a hole would kill the process by SIGBUS.

    Raises:
        ConfigurationError: there is no room, or no such directory.
        ValueError: a name that no worker can have.
    """
    if WORKER_NAME.fullmatch(worker) is None:
        raise ValueError(f"no name for a worker: {worker!r}")
    try:
        for kind in FILE_KINDS:
            path = directory / f"{kind}_{worker}.db"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, FILE_BYTES)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise ConfigurationError(
            f"cannot keep metrics in {directory}: {error.strerror}", "free space there, or name another directory"
        ) from None

"""The ledgers on a host's disk: a file for each vTPM, locked by whoever acts on it. Everything here blocks."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from korora.agents.vtpm import epochs
from korora.agents.vtpm.epochs import LEDGER_BYTES_MAX, Entry, Ledger
from korora.agents.vtpm.handover import Holding
from proxy.errors import VtpmFailed, VtpmRefused

FOLDER: Final = "vtpm"
_SUFFIX: Final = ".ledger"
_ASIDE: Final = "forgotten-"

LEFT: Final = "left"
"""Of a vTPM that goes in a file: what is kept until it has come there; see ``courier``."""


def now() -> str:
    """This moment, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class LedgerFile:
    """One vTPM's, locked by this process until ``Ledgers.locked`` ends."""

    def __init__(self, path: Path, descriptor: int, ledger: Ledger) -> None:
        self.path, self.ledger, self._descriptor = path, ledger, descriptor

    def write(self, entry: Entry) -> None:
        """Append an entry; it is on the disk when this returns.

        Raises:
            VtpmFailed: the disk does not take it. Nothing may follow from it.
        """
        content = epochs.line(entry)
        size = os.fstat(self._descriptor).st_size
        try:
            if size + len(content) > LEDGER_BYTES_MAX:
                raise VtpmFailed(f"{self.path} is full", "move it away while the vTPM is here; keep it")
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, size)  # half a line would make damage of the next one
            raise VtpmFailed(f"cannot write {self.path}: {error.strerror}", "make room on its disk") from None
        self.ledger.entries.append(entry)


class Ledgers:
    """All of a host.

    Args:
        state: where a relay keeps what outlives its sessions; ``vtpm`` is made in it when first needed.
    """

    def __init__(self, state: Path) -> None:
        self.folder = state / FOLDER

    def names(self) -> list[str]:
        """The machines' UUIDs."""
        return sorted(path.stem for path in self.folder.glob(f"*{_SUFFIX}"))

    def kept(self, uuid: str) -> Path:
        """Where what has arrived is, until it is released."""
        return self.folder / f"{uuid}.arrived"

    def file(self, uuid: str, what: str) -> Path:
        """Where something else is kept of that vTPM."""
        return self.folder / f"{uuid}.{what}"

    def read(self, uuid: str) -> Ledger:
        """As it stands; empty where there is none.

        Raises:
            VtpmFailed: it cannot be read.
        """
        path = self.folder / f"{uuid}{_SUFFIX}"
        try:
            return epochs.read(path.read_bytes())[0]
        except FileNotFoundError:
            return Ledger()
        except OSError as error:
            raise VtpmFailed(f"cannot read {path}: {error.strerror}", "see to its owner and mode") from None

    def knew(self, uuid: str, session: str) -> bool:
        """Whether that session stands in a ledger that was put aside."""
        return any(
            entry.session == session
            for path in self.folder.glob(f"{uuid}.{_ASIDE}*")
            for entry in epochs.read(path.read_bytes())[0].entries
        )

    @contextmanager
    def locked(self, uuid: str) -> Iterator[LedgerFile]:
        """One ledger, to act on it.

        Raises:
            VtpmFailed: another process does, or it cannot be read.
        """
        path = self.folder / f"{uuid}{_SUFFIX}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh = not path.exists()
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_there(path, descriptor):
                    raise BlockingIOError  # it was put aside in just that moment, and is nobody's ledger any more
                if fresh:
                    sync_folder(self.folder)
                ledger, good = epochs.read(os.pread(descriptor, LEDGER_BYTES_MAX + 1, 0))
                os.ftruncate(descriptor, good)
                yield LedgerFile(path, descriptor, ledger)
            finally:
                os.close(descriptor)
        except BlockingIOError:
            raise VtpmFailed(f"another process is at work on the vTPM of {uuid}", "wait, or stop it") from None
        except OSError as error:
            raise VtpmFailed(f"cannot keep {path}: {error.strerror}", "see to its owner, mode and disk") from None

    def forget(self, uuid: str, *, certain: bool = False) -> Path | None:
        """Put a ledger aside, so that this host knows nothing of that vTPM; where it is kept, None if there is none.

        Args:
            uuid: the machine's.
            certain: an operator knows that no hand-over is under way, although the ledger has none of its end.

        Raises:
            VtpmRefused: a hand-over is under way.
            VtpmFailed: another process acts on it, or it cannot be moved.
        """
        path = self.folder / f"{uuid}{_SUFFIX}"
        if not path.exists():
            return None
        with self.locked(uuid) as file:
            if file.ledger.holding is Holding.LEAVING and self.file(uuid, LEFT).exists():
                raise VtpmRefused(
                    f"the vTPM of {uuid} has left in a file: korora vtpm settle first, which has its copy"
                )
            if file.ledger.holding in (Holding.LEAVING, Holding.ARRIVING) and not certain:
                raise VtpmRefused(
                    f"the vTPM of {uuid} is {file.ledger.holding.value}: see korora handover list; where no hand-over "
                    "of its machine is unsettled, at neither host, say it again with --certain"
                )
            aside = path.with_suffix(f".{_ASIDE}{now().replace(':', '')}")
            path.rename(aside)
            sync_folder(self.folder)
        return aside


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether the file that was opened is the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def keep(path: Path, content: bytes) -> None:
    """A file of this host's alone, whole and on the disk when this returns."""
    fresh = path.with_suffix(".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fresh.rename(path)
    sync_folder(path.parent)


def remove(*paths: Path) -> None:
    """Files that must not be there any more when this returns; what is not there is no error."""
    for path in paths:
        path.unlink(missing_ok=True)
    for folder in {path.parent for path in paths}:
        if folder.is_dir():
            sync_folder(folder)


def flush(*paths: Path) -> None:
    """What somebody else has written there is on the disk when this returns, if there is any that we may open."""
    for path in paths:
        with suppress(FileNotFoundError, PermissionError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """What was made and removed in it is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

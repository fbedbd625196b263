"""file: endpoints. One-way; a file written is PATH.partial until it is whole, then fsynced and renamed."""

import asyncio
import errno
import fcntl
import os
import select
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from proxy.endpoints.sockets import explain
from proxy.errors import ConfigurationError, HypervisorFailed
from proxy.limits import CONNECT_SECONDS_MAX, PIPE_BYTES

PARTIAL_SUFFIX: Final = ".partial"
_CLOSED: Final = -1  # in place of a number that may be somebody else's descriptor by now
_LOCK_ATTEMPTS_MAX: Final = 3  # sessions that may end between our opening of their file and our lock
_FIFO_POLL_SECONDS: Final = 0.05  # a FIFO without a reader can only be asked again


def _special(path: str) -> bool:
    """Whether the path is a FIFO or device, which is written and read directly."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


class FileReader:
    """A regular file, FIFO or device as the source's hypervisor."""

    write_fd: int | None = None

    def __init__(self, path: str, label: str) -> None:
        self.label = label
        self.user: int | None = os.getuid()
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        mode = os.fstat(self._fd).st_mode
        self._fifo = stat.S_ISFIFO(mode)
        if self._fifo:
            grow_pipe(self._fd)
        self.read_fd: int | None = self._fd if self._fifo or stat.S_ISCHR(mode) else None
        self._begun = not self._fifo
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN | select.POLLHUP)

    def read_into(self, buffer: memoryview) -> int | None:
        """See ``Connection.read_into``."""
        if self._fd == _CLOSED:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if not self._begun:
            # A FIFO that nobody has opened for writing yet reads as ended; only poll tells the two apart.
            if not self._poll.poll(0):
                return None
            self._begun = True
        try:
            return os.readv(self._fd, [buffer])
        except BlockingIOError:
            return None

    def write(self, data: memoryview) -> int:
        """A file takes no answer."""
        raise HypervisorFailed(f"{self.label} is one-way, and the other side sent {len(data)} bytes back")

    def finish(self) -> None:
        """Nothing can be told to a file."""

    async def settle(self) -> None:
        """Close."""
        self._close()

    async def abort(self) -> None:
        """Close: the file stays where it was."""
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, _CLOSED
        if fd != _CLOSED:
            os.close(fd)


class FileWriter:
    """A regular file as the destination: PATH.partial, locked, mode 0600."""

    read_fd: int | None = None
    write_fd: int | None = None
    user: int | None = None

    def __init__(self, path: str, label: str) -> None:
        self.label = label
        self._path = Path(path)
        self._partial = Path(path + PARTIAL_SUFFIX)
        self._fd = _open_locked(self._partial)
        self._ending = threading.Lock()
        """Held while it is decided who ends the file: ``settle``, which works in a thread, or ``abort``."""

    def read_into(self, buffer: memoryview) -> int | None:
        """A file says nothing: its direction ends at once."""
        del buffer
        return 0

    def write(self, data: memoryview) -> int:
        """See ``Connection.write``."""
        return os.write(self._fd, data)

    def finish(self) -> None:
        """The rename waits for ``settle``."""

    async def settle(self) -> None:
        """fsync, rename, fsync the directory.

        Raises:
            HypervisorFailed: the disk refuses.
        """
        try:
            await asyncio.to_thread(self._commit)
        except OSError as error:
            raise HypervisorFailed(f"cannot finish {self.label}: {explain(error)}") from None

    def _commit(self) -> None:
        try:
            os.fsync(self._fd)
            with self._ending:
                if self._fd == _CLOSED:
                    # Called off in the meantime, and the lock with it: the name may be another session's by now.
                    raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
                self._partial.rename(self._path)
                self._close()
        except OSError:
            self._discard()
            raise
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    async def abort(self) -> None:
        """Remove the partial file; what stood at PATH before is untouched."""
        self._discard()

    def _discard(self) -> None:
        with self._ending:
            if self._fd == _CLOSED:
                return  # nothing at that name is ours any more
            with suppress(OSError):
                self._partial.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, _CLOSED
        os.close(fd)


def _open_locked(partial: Path) -> int:
    """Open, lock and empty a partial file.

    Raises:
        BlockingIOError: another session is writing it.
        OSError: it cannot be opened.
    """
    for _ in range(_LOCK_ATTEMPTS_MAX):
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Before the lock was ours, another session may have ended: what we opened is then its whole, renamed file.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), partial.lstat()):
                    os.ftruncate(fd, 0)
                    return fd
        except OSError:
            os.close(fd)
            raise
        os.close(fd)
    raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))


class SpecialWriter:
    """A FIFO or device as the destination, written directly. On failure it just stays short."""

    read_fd: int | None = None
    user: int | None = None

    def __init__(self, fd: int, label: str) -> None:
        self.label = label
        self._fd = fd
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode):
            grow_pipe(fd)
        self.write_fd: int | None = None if stat.S_ISBLK(mode) else fd

    def read_into(self, buffer: memoryview) -> int | None:
        """Nothing comes back."""
        del buffer
        return 0

    def write(self, data: memoryview) -> int:
        """See ``Connection.write``."""
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0

    def finish(self) -> None:
        """The close in ``settle`` is all a FIFO's reader sees."""

    async def settle(self) -> None:
        """Flush a block device, then close."""
        try:
            if self.write_fd is None:
                await asyncio.to_thread(os.fsync, self._fd)
        except OSError as error:
            raise HypervisorFailed(f"cannot finish {self.label}: {explain(error)}") from None
        finally:
            self._close()

    async def abort(self) -> None:
        """Close."""
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, _CLOSED
        if fd != _CLOSED:
            os.close(fd)


class FileIngress:
    """Gives one connection: the file."""

    single = True

    def __init__(self, path: str, label: str) -> None:
        self._path, self.label = path, label

    async def open(self) -> None:
        """See ``Ingress.open``."""
        try:
            if stat.S_ISDIR(os.stat(self._path).st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not os.access(self._path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise ConfigurationError(
                f"cannot read {self.label}: {explain(error)}", "give the path of a readable file"
            ) from None

    async def accept(self) -> FileReader:
        """See ``Ingress.accept``."""
        try:
            return FileReader(self._path, self.label)
        except OSError as error:
            raise HypervisorFailed(f"cannot read {self.label}: {explain(error)}") from None

    async def close(self) -> None:
        """Nothing was left behind."""


class FileEgress:
    """Writes one stream to the file."""

    single = True
    exclusive = True
    handover: Literal["", "xl"] = ""
    paused = False

    def __init__(self, path: str, label: str) -> None:
        self._path, self.label = path, label

    async def check(self) -> None:
        """See ``Egress.check``."""
        path = Path(self._path)
        try:
            os.lstat(self._path + ("" if _special(self._path) else PARTIAL_SUFFIX))
        except FileNotFoundError:
            pass  # as it should be
        except OSError as error:
            raise ConfigurationError(
                f"cannot write {self.label}: {explain(error)}",
                "give the path of a file in a directory that you may use",
            ) from None
        if os.path.isdir(path):
            raise ConfigurationError(f"cannot write {self.label}: it is a directory", "give the path of a file")
        if not os.path.isdir(path.parent):
            raise ConfigurationError(
                f"cannot write {self.label}: there is no directory {path.parent}", "make the directory first"
            )
        writable = path if _special(self._path) else path.parent
        if not os.access(writable, os.W_OK):
            raise ConfigurationError(f"cannot write {self.label}: permission denied", f"allow writing to {writable}")

    async def connect(self, xl_flags: str) -> FileWriter | SpecialWriter:
        """See ``Egress.connect``."""
        del xl_flags
        try:
            if _special(self._path):
                return SpecialWriter(await self._open_special(), self.label)
            return FileWriter(self._path, self.label)
        except (OSError, TimeoutError) as error:
            reason = explain(error)
            if isinstance(error, BlockingIOError):
                reason = "another session is writing it"
            raise HypervisorFailed(f"cannot write {self.label}: {reason}") from None

    async def _open_special(self) -> int:
        """Open for writing; a FIFO that nobody reads yet is waited for."""
        async with asyncio.timeout(CONNECT_SECONDS_MAX):
            while True:
                try:
                    return os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                await asyncio.sleep(_FIFO_POLL_SECONDS)


def grow_pipe(fd: int) -> None:
    """Give a pipe room for fewer wake-ups; where the user's limit forbids it, it stays as it is."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        return

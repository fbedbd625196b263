"""Every step by which the store changes the disk, one method a step, so that a test can fail or die at each.

What survives a crash: a file's content once ``sync`` has returned, a name made, renamed or removed once ``sync_folder``
of its folder has.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

FILE_MODE: Final = 0o600
FOLDER_MODE: Final = 0o700

Buffer = bytes | bytearray | memoryview


class Disk:
    """The file system. Descriptors are the caller's to close."""

    def make_folder(self, path: Path) -> None:
        """Make a folder of mode 0700; one that is there stays as it is."""
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)

    def create(self, path: Path) -> int:
        """A new file of mode 0600, open for both; refuses a name that is taken."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)

    def write(self, descriptor: int, content: Buffer, offset: int) -> None:
        """All of ``content`` at ``offset``."""
        rest = memoryview(content)
        while rest:
            written = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[written:], offset + written

    def resize(self, descriptor: int, size: int) -> None:
        """Cut a file, or lengthen it by a hole."""
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        """Make a file's content last."""
        os.fsync(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder last."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file another name."""
        old.rename(new)

    def remove(self, path: Path) -> None:
        """Remove a name; an absent one is as good as removed."""
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        """Remove a folder if it is empty."""
        try:
            path.rmdir()
        except OSError:
            return

    def free(self, path: Path) -> int:
        """Bytes that can still be written where ``path`` is."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize

    def shred(self, path: Path) -> None:
        """Overwrite a small file where it lies, and remove it: what it was the key of is lost with it."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # absent, or no file of ours: a link, a pipe
            self.remove(path)
            return
        try:
            with contextlib.suppress(OSError):  # a full or failing disk: then removing it has to do
                self.write(descriptor, os.urandom(os.fstat(descriptor).st_size), 0)
                self.sync(descriptor)
        finally:
            os.close(descriptor)
        self.remove(path)


def opened(path: Path) -> int:
    """A file open for reading; a link is not followed, a pipe not waited for."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def read_exactly(descriptor: int, size: int, offset: int) -> bytearray:
    """``size`` bytes at ``offset``.

    Raises:
        ValueError: the file ends before.
        OSError: it cannot be read.
    """
    content = bytearray(size)
    rest = memoryview(content)
    while rest:
        count = os.preadv(descriptor, [rest], offset)
        if count == 0:
            raise ValueError("the file is too short")
        rest, offset = rest[count:], offset + count
    return content


def lock_shared(descriptor: int) -> None:
    """Say that a file is in use, for as long as the descriptor is open.

    Raises:
        BlockingIOError: it is being written or removed.
    """
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def lock_alone(descriptor: int) -> None:
    """Be the only one to use a file, for as long as the descriptor is open.

    Raises:
        BlockingIOError: it is in use, in this process or another.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder, in the file ``path``; waits for whoever holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

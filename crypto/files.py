"""Private files: written whole or not at all, and never readable by others, not even for a moment.

A file is written beside its place, fsynced and renamed, and its directory is fsynced, so that after a crash a reader
finds the old content or the new.
"""

import os
import secrets
import stat
from pathlib import Path
from typing import Final

FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700


def make_private_directory(path: Path) -> None:
    """Make `path` and its missing parents with mode 0700; an existing directory that is empty gets that mode too.

    An existing directory with something in it keeps its mode: it is not ours alone.

    Raises:
        OSError: it cannot be made, or something else stands there.
    """
    for missing in reversed([path, *path.parents]):
        try:
            missing.mkdir(mode=DIRECTORY_MODE)
        except FileExistsError:
            continue
        except OSError:
            if not missing.is_dir():  # a parent on a read-only file system is fine as long as it is there
                raise
    if not any(path.iterdir()):
        path.chmod(DIRECTORY_MODE)


def write_private(path: Path, content: bytes, *, owner: os.stat_result | None = None, durably: bool = True) -> None:
    """Put `content` at `path` with mode 0600, atomically and durably; replaces what stands there.

    Args:
        path: where; its directory must exist. A symbolic link there is replaced, not followed.
        content: the whole file.
        owner: whose user and group the file shall have, where that differs from ours and we may give it away.
        durably: False for what may be older, or an empty file, after the machine has crashed: it waits for no disk.

    Raises:
        OSError: nothing has changed then.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), FILE_MODE)
            if owner is not None and (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(content)
            file.flush()
            if durably:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durably:
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make renames within `path` survive a crash.

    Raises:
        OSError: the directory cannot be opened or synced.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(path: Path, bytes_max: int) -> tuple[bytes, int]:
    """The content of a regular file, and its mode bits as they were when it was open.

    Raises:
        OSError: it cannot be opened.
        ValueError: not a regular file, or larger than `bytes_max`.
    """
    # O_NONBLOCK: opening a FIFO must not hang.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        content = file.read(bytes_max + 1)
        if len(content) > bytes_max:
            raise ValueError(f"larger than {bytes_max} bytes")
        return content, stat.S_IMODE(status.st_mode)

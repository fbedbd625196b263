"""The key of this host, under which everything it keeps at rest is wrapped.

32 random bytes in a file of their own, made on first use. Whoever has the file can read what the host has stored, and
without it nothing of that can ever be read again.
"""

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from crypto.errors import IdentityMalformed, IdentityMissing, IdentityPermissions
from crypto.files import FILE_MODE, fsync_directory, make_private_directory, read_bounded

HOST_KEY_FILE: Final = "store.key"
HOST_KEY_BYTES: Final = 32
_READABLE_BY_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def host_key(path: Path) -> bytes:
    """The host key in ``path``, 32 bytes; made there if there is none.

    Of several processes that make it at once, one wins and all return its key.

    Raises:
        IdentityMissing: it can neither be read nor made.
        IdentityPermissions: others than its owner can read it.
        IdentityMalformed: the file is no host key.
    """
    for _ in range(2):
        try:
            return _read(path)
        except FileNotFoundError:
            _make(path)
        except OSError as error:
            raise IdentityMissing(f"{path} cannot be read: {error.strerror}", "run as the user who owns it") from None
    raise IdentityMissing(f"{path} vanished as it was made", "see who removes files there")


def _read(path: Path) -> bytes:
    try:
        content, mode = read_bounded(path, HOST_KEY_BYTES)
    except ValueError as error:
        raise IdentityMalformed(f"{path} is {error}", _remedy(path)) from None
    if mode & _READABLE_BY_OTHERS:
        raise IdentityPermissions(
            f"{path} has mode {mode:04o}: a key must be its owner's alone",
            f"remove it and the store beside it if somebody may have read it, else chmod 600 {path}",
        )
    if len(content) != HOST_KEY_BYTES:
        raise IdentityMalformed(f"{path} holds {len(content)} bytes, expected {HOST_KEY_BYTES}", _remedy(path))
    return content


def _make(path: Path) -> None:
    """Write a new key beside its place and link it there, which fails where another process was quicker."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        make_private_directory(path.parent)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), FILE_MODE)
                file.write(secrets.token_bytes(HOST_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                return
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(path.parent)
    except OSError as error:
        raise IdentityMissing(
            f"{path} cannot be made: {error.strerror}", "check the path, its permissions and the free space"
        ) from None


def _remedy(path: Path) -> str:
    return f"put the right key back; or remove {path}, and what was stored under it is lost"

"""A host's own log of receipts: append-only files, to which several processes may append at once.

    FOLDER/entries   an envelope a line, as ``dsse.encode`` writes it
    FOLDER/index     for each entry: where it ends in `entries` (8 bytes, big-endian), and the hashes that it adds to
                     the tree (32 bytes each, see merkle)
    FOLDER/head      the last head that was signed

The entry is on the disk when ``append`` returns. The index follows from the entries: what a crash leaves of it is made
anew. A line that a crash left without its newline was never said to be logged, and is cut away; everything else that
is wrong is damage, and damage is never repaired here: it is evidence. Every lock is the kernel's (flock) and goes with
the process. Everything here blocks for as long as a disk takes to write.
"""

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from nacl.signing import SigningKey

from crypto.errors import HeadMalformed, LogDamaged, LogUnusable, ReceiptMalformed
from crypto.files import fsync_directory, make_private_directory, read_bounded
from crypto.receipts import checkpoint as heads
from crypto.receipts.checkpoint import Checkpoint
from crypto.receipts.dsse import Envelope, decode, encode
from crypto.receipts.limits import CHECKPOINT_BYTES_MAX, RECEIPT_BYTES_MAX, TREE_SIZE_MAX
from crypto.receipts.merkle import HASH_BYTES, Tree, leaf_hash, stored

FOLDER: Final = "receipts"
ENTRIES: Final = "entries"
INDEX: Final = "index"
HEAD: Final = "head"
_HEAD_FILE_BYTES: Final = 512  # a sector, which a disk writes whole or not at all; no head is longer than 310 bytes
_FILE_MODE: Final = 0o600
END: Final = struct.Struct(">Q")
_END_MAX: Final = 1 << 62  # bytes of entries: no file is longer, and no system call takes it
_HOLE: Final = bytes(8)  # a record that was never written reads as zeros; no whole one holds eight in a row
_KEEP: Final = (
    "keep {folder} as evidence, and see korora receipts verify; moved away, a new log begins, and its peers will say so"
)
_ROOM: Final = "make room on its disk, see to its owner and mode, and migrate again"


class ReceiptLog:
    """The log in a folder; nothing is opened between two calls.

    Args:
        folder: ``entries`` is made in it at the first append.
        told: hears in words what a crash had left and was put in order.

    Every method raises LogUnusable where the disk or its permissions refuse, and LogDamaged where what stands there
    was not written so.
    """

    def __init__(self, folder: Path, told: Callable[[str], None] = lambda _: None) -> None:
        self.folder = folder
        self._told = told

    def append(self, envelope: Envelope) -> int:
        """Log a receipt; it is on the disk when this returns.

        Returns:
            Its index; the first is 0.

        Raises:
            ReceiptMalformed: it is too large.
            LogUnusable: the disk does not take it; nothing was logged, and nothing may follow from it.
        """
        content = encode(envelope)
        with self._opened(write=True) as files:
            if files.size >= TREE_SIZE_MAX:
                raise LogUnusable(f"{self.folder} is full", "move it away: a new log begins")
            return files.append(content + b"\n")

    def head(self) -> tuple[int, bytes]:
        """How many entries there are, and the root over them."""
        with self._opened() as files:
            return files.size, files.tree.root()

    def root(self, size: int) -> bytes:
        """The root over the first ``size`` entries.

        Raises:
            ValueError: there are not as many.
        """
        with self._opened() as files:
            return files.tree.root(size)

    def checkpoint(self, name: str, key: SigningKey) -> str:
        """The head as it is now, signed; the last one is kept beside the log, so that a shorter log shows.

        Args:
            name: this host's.
            key: its signing key.
        """
        with self._opened(write=True) as files:
            return self._signed_head(files, name, key)

    def _signed_head(self, files: "_Files", name: str, key: SigningKey) -> str:
        text = heads.sign(Checkpoint(heads.origin_of(name), files.size, files.tree.root()), key)
        try:
            _keep_head(self.folder / HEAD, text.encode())
        except OSError as error:
            raise self._unusable("write", error) from None
        return text

    def inclusion(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """The proof that an entry is among the first ``size``, or all (RFC 9162 §2.1.3).

        Raises:
            ValueError: there are not as many, or the entry is not among them.
        """
        with self._opened() as files:
            return files.tree.inclusion(index, size)

    def consistency(self, old: int, new: int | None = None) -> tuple[bytes, ...]:
        """The proof that the first ``old`` entries begin the first ``new``, or all (RFC 9162 §2.1.4).

        Raises:
            ValueError: there are not as many, or ``old`` is more than ``new``.
        """
        with self._opened() as files:
            return files.tree.consistency(old, new)

    def prove(self, olds: tuple[int, ...], name: str, key: SigningKey) -> tuple[str, tuple[tuple[bytes, ...], ...]]:
        """The signed head of now, and for each earlier size the proof that it continues that; what a peer asks for.

        A size that the log never had gets an empty proof: the peer will see what that means.
        """
        with self._opened(write=True) as files:
            text = self._signed_head(files, name, key)
            size = files.size
            return text, tuple(files.tree.consistency(old, size) if 0 <= old <= size else () for old in olds)

    def entry(self, index: int) -> Envelope:
        """One receipt.

        Raises:
            ValueError: there are not as many.
        """
        with self._opened() as files:
            if not 0 <= index < files.size:
                raise ValueError(f"the log has {files.size} entries, so none has index {index}")
            return files.entry(index)

    def entries(self, start: int = 0) -> Iterator[tuple[int, Envelope]]:
        """Those from ``start`` on that are there now, each with its index; the log is not locked meanwhile."""
        with self._opened() as files:
            files.unlock()  # whoever appends goes on: what is read here does not change any more
            for index in range(max(0, start), files.size):
                yield index, files.entry(index)

    def last_head(self) -> str | None:
        """The last head that was signed, as it stands on the disk: not verified; None where there is none.

        Raises:
            HeadMalformed: its file is not text of that length.
        """
        try:
            content, _ = read_bounded(self.folder / HEAD, CHECKPOINT_BYTES_MAX)
            return content.strip(b"\0").decode() or None  # a crash may leave an empty file, or zeros
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable("read", error) from None
        except ValueError:
            raise HeadMalformed(f"{self.folder / HEAD} is no head", _KEEP.format(folder=self.folder)) from None

    @contextmanager
    def _opened(self, *, write: bool = False) -> "Iterator[_Files]":
        """The files, locked, and in order as far as is cheap to see."""
        try:
            files = self._open(write=write)
        except OSError as error:
            raise self._unusable("open", error) from None
        try:
            if self._settle(files, write=write):
                self._check_head(files)
                files.cut(self._told)  # not before: what a head covers is no crash's leaving
            yield files
        except OSError as error:
            raise self._unusable("read", error) from None
        finally:
            files.close()

    def _open(self, *, write: bool) -> "_Files":
        try:
            entries = open_file(self.folder / ENTRIES, write=write)
        except FileNotFoundError:
            if not write:
                return _Files(self.folder, -1, -1)
            make_private_directory(self.folder)
            entries = open_file(self.folder / ENTRIES, write=write)
        try:
            fcntl.flock(entries, fcntl.LOCK_EX if write else fcntl.LOCK_SH)
            index = open_file(self.folder / INDEX, write=True) if write else _open_reading(self.folder / INDEX)
            if write and os.fstat(entries).st_size == 0:
                fsync_directory(self.folder)
        except BaseException:
            os.close(entries)
            raise
        return _Files(self.folder, entries, index)

    def _settle(self, files: "_Files", *, write: bool) -> bool:
        """Index what a crash left out; False where that cannot be written here, and what is new is left out."""
        files.count()
        if files.is_settled():
            return True
        if not write:
            files.unlock()  # a lock is not made stronger in place: two that try would wait for each other
            try:
                files.swap(self._open(write=True))
            except OSError:  # a copy that is only to be read
                self._told("the end of the log is not in its index yet, and left out: it cannot be written here")
                return False
            files.count()
        files.reindex(self._told)
        return True

    def _check_head(self, files: "_Files") -> None:
        """The log has not become shorter or another than it was when its head was last signed; cheap."""
        text = self.last_head()
        if text is None:
            return
        head = heads.parse(text)
        keep = _KEEP.format(folder=self.folder)
        if head.size > files.size:
            raise LogDamaged(
                f"{self.folder / ENTRIES} is truncated: {files.size} entries are left of {head.size}", keep
            )
        if files.tree.root(head.size) != head.root:
            raise LogDamaged(
                f"{self.folder / ENTRIES} was rewritten: its first {head.size} entries are not those whose head was "
                f"signed; korora receipts verify says which",
                keep,
            )

    def _unusable(self, what: str, error: OSError) -> LogUnusable:
        return LogUnusable(f"cannot {what} the log in {self.folder}: {error.strerror or error}", _ROOM)


class _Files:
    """Both files, open and locked, and how many entries the index knows."""

    def __init__(self, folder: Path, entries: int, index: int) -> None:
        self._folder, self._entries, self._index = folder, entries, index
        self.size = 0
        self.tree = Tree(self, 0)

    # ---- the index

    def count(self) -> None:
        """See how many whole records the index has, leaving out those at its end that a crash left as holes."""
        length = os.fstat(self._index).st_size if self._index >= 0 else 0
        low, high = 0, min(length // (END.size + HASH_BYTES), TREE_SIZE_MAX)
        while low < high:  # records grow with the tree, so their number follows from the file's length
            middle = (low + high + 1) // 2
            low, high = (middle, high) if _start(middle) <= length else (low, middle - 1)
        while low and self._is_torn(low - 1):
            low -= 1
        self._sized(low)

    def __getitem__(self, place: int) -> bytes:
        """Of the tree's hashes, where it is kept (see merkle): behind the end of each entry follow those it adds."""
        low, high = 0, self.size
        while low < high - 1:
            middle = (low + high) // 2
            low, high = (middle, high) if stored(middle) <= place else (low, middle)
        content = os.pread(self._index, HASH_BYTES, HASH_BYTES * place + END.size * (low + 1))
        if len(content) != HASH_BYTES:
            raise LogDamaged(f"{self._folder / INDEX} ends early", "remove it: it is made anew from the entries")
        return content

    def _sized(self, size: int) -> None:
        self.size = size
        self.tree = Tree(self, size)

    def _record(self, index: int) -> bytes:
        return os.pread(self._index, _start(index + 1) - _start(index), _start(index))

    def _end(self, index: int) -> int:
        """Where an entry ends."""
        if index < 0:
            return 0
        end: int = END.unpack(self._record(index)[: END.size])[0]
        if end > _END_MAX:
            raise self._misled(index, end)
        return end

    # ---- the entries

    def entry(self, index: int) -> Envelope:
        """One entry, which must be what its hash in the index says."""
        try:
            return decode(self._logged(index))
        except ReceiptMalformed as error:
            raise self._damaged(index, f"is no receipt: {error}") from None

    def _logged(self, index: int) -> bytes:
        """The line of an entry, which must be what its hash in the index says."""
        content = self._line(index)
        if leaf_hash(content) != self._record(index)[END.size :][:HASH_BYTES]:
            raise self._damaged(index, "is altered: it is not what its hash in the index says")
        return content

    def is_settled(self) -> bool:
        """Whether both files end with the same entry.

        Raises:
            LogDamaged: the last entry that the index knows is not what is there.
        """
        if self._entries < 0:
            return True
        if self.size:
            self._logged(self.size - 1)
        whole = (os.fstat(self._index).st_size if self._index >= 0 else 0) == _start(self.size)
        return whole and os.fstat(self._entries).st_size == self._end(self.size - 1)

    def reindex(self, told: Callable[[str], None]) -> None:
        """Index what was logged and is not indexed."""
        os.ftruncate(self._index, _start(self.size))
        before = self.size
        while (line := self._next_line()) is not None:
            self._add(self._made(line, self.size))
        if self.size > before:
            told(f"{self.size - before} entries were logged and not in the index: it has them now")

    def cut(self, told: Callable[[str], None]) -> None:
        """Cut away what was not logged whole."""
        if self._entries < 0:
            return
        end, length = self._end(self.size - 1), os.fstat(self._entries).st_size
        if length > end:
            os.ftruncate(self._entries, end)
            os.fsync(self._entries)
            told(f"a crash left {length - end} bytes of an entry that was never logged: they were cut away")

    def append(self, line: bytes) -> int:
        """Write an entry at the end, durably; or leave all as it was."""
        end, record = self._end(self.size - 1), self._made(line, self.size)
        try:
            _write_at(self._entries, line, end)
            os.fsync(self._entries)
            self._add(record)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._entries, end)
                os.ftruncate(self._index, _start(self.size))
                os.fsync(self._entries)
            raise LogUnusable(f"cannot write the log in {self._folder}: {error.strerror or error}", _ROOM) from None
        return self.size - 1

    def _made(self, line: bytes, index: int) -> bytes:
        """The record that an entry has."""
        end = self._end(index - 1) + len(line)
        return END.pack(end) + b"".join(Tree(self, index).append(leaf_hash(line[:-1])))

    def _is_torn(self, index: int) -> bool:
        """Whether a record, of which nothing was said, lacks bytes that a crash kept from the disk: they read as 0."""
        record = self._record(index)
        if _HOLE in record:
            return True
        line = os.pread(self._entries, RECEIPT_BYTES_MAX + 1, self._end(index - 1)).partition(b"\n")
        if not line[1]:
            return False
        self._sized(index)
        whole = self._made(line[0] + line[1], index)
        return record != whole and all(one in (0, other) for one, other in zip(record, whole, strict=True))

    def _add(self, record: bytes) -> None:
        _write_at(self._index, record, _start(self.size))
        self._sized(self.size + 1)

    def _line(self, index: int) -> bytes:
        """An entry's bytes, without its newline."""
        start, end = self._end(index - 1), self._end(index)
        if not start < end <= start + RECEIPT_BYTES_MAX + 1:
            raise self._misled(index, end)
        content = os.pread(self._entries, end - start, start)
        if len(content) < end - start:
            raise self._damaged(index, f"is cut short: {len(content)} bytes are left of {end - start}")
        if not content.endswith(b"\n"):
            raise self._damaged(index, "is altered: its newline is gone")
        return content[:-1]

    def _next_line(self) -> bytes | None:
        """The whole line behind the last entry that is indexed; None where there is none.

        Raises:
            LogDamaged: it is whole, and no entry.
        """
        end = self._end(self.size - 1)
        content = os.pread(self._entries, RECEIPT_BYTES_MAX + 1, end)
        line, newline, _ = content.partition(b"\n")
        if not newline:
            if len(content) > RECEIPT_BYTES_MAX:
                raise self._damaged(self.size, f"is longer than {RECEIPT_BYTES_MAX} bytes")
            return None
        try:
            whole = encode(decode(line)) == line
        except ReceiptMalformed:
            whole = False
        if whole:
            return line + newline
        if _HOLE in line and end + len(line) + 1 == os.fstat(self._entries).st_size:
            return None  # torn, although its newline is there: a disk writes sectors in any order
        raise self._damaged(self.size, "is altered: it is no receipt")

    def _damaged(self, index: int, what: str) -> LogDamaged:
        return LogDamaged(f"{self._folder / ENTRIES}: entry {index} {what}", _KEEP.format(folder=self._folder))

    def _misled(self, index: int, end: int) -> LogDamaged:
        return LogDamaged(
            f"{self._folder / INDEX} is altered: entry {index} does not end at {end}",
            "remove it: it is made anew from the entries, and korora receipts verify checks those",
        )

    def swap(self, other: "_Files") -> None:
        """Go on with the files that another one has opened."""
        self.close()
        self._entries, self._index = other._entries, other._index

    def unlock(self) -> None:
        """Let others append."""
        if self._entries >= 0:
            fcntl.flock(self._entries, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of both files."""
        for descriptor in (self._entries, self._index):
            if descriptor >= 0:
                os.close(descriptor)
        self._entries = self._index = -1


def _start(index: int) -> int:
    """Where an entry's record begins in the index."""
    return END.size * index + HASH_BYTES * stored(index)


def open_file(path: Path, *, write: bool) -> int:
    """Open a file that is one: what else has its name is not followed, and not waited for."""
    flags = os.O_RDWR | os.O_CREAT if write else os.O_RDONLY
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, _FILE_MODE)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return descriptor


def _open_reading(path: Path) -> int:
    try:
        return open_file(path, write=False)
    except FileNotFoundError:
        return -1


def _write_at(descriptor: int, content: bytes, offset: int) -> None:
    rest = memoryview(content)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _keep_head(path: Path, text: bytes) -> None:
    """Put a head where the last one is, and zeros behind it. It waits for no disk: an older one is as good.

    In place, because ext4 waits for the disk where a file is replaced.
    """
    descriptor = open_file(path, write=True)
    try:
        _write_at(descriptor, text.ljust(_HEAD_FILE_BYTES, b"\0"), 0)
    finally:
        os.close(descriptor)

"""The store's folder: which segments lie there, what of them is whole, and how one is made and removed.

Names are made, renamed and removed under the folder's lock, by whichever process holds it. Beside it each segment's
data file is locked by whoever writes or reads it, so that room is never made at the cost of one in use.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from chunking.errors import SegmentDamaged, SegmentTaken, SegmentUnknown, StoreError, StoreUnusable
from chunking.limits import STORE_LEASE_BYTES, STORE_LEASES_MIN, STORE_SEGMENTS_MAX
from chunking.store import layout
from chunking.store.counters import Counters
from chunking.store.disk import Disk, lock_alone, locked, opened
from chunking.store.keys import Sealer, StoreKeys
from chunking.store.layout import DAMAGED, DATA, INDEX, KEY, PARTIAL, Note
from chunking.store.segment import read_note

LOCK: Final = "lock"
_WHOLE: Final = frozenset({KEY, DATA, INDEX})
_STAT_BLOCK_BYTES: Final = 512  # the unit of st_blocks


class Bounds(NamedTuple):
    """How much a store may take.

    Args:
        bytes_max: of all its files.
        free_bytes_min: that it leaves on the disk.
    """

    bytes_max: int
    free_bytes_min: int


@dataclass(slots=True)
class Group:
    """The files of one segment: their sizes by suffix, and when it was last used (nanoseconds since 1970)."""

    folder: Path
    name: bytes
    sizes: dict[str, int] = field(default_factory=dict)
    used: int = 0

    @property
    def whole(self) -> bool:
        """Whether it is a segment: finished, and not known to be damaged."""
        return self.sizes.keys() == _WHOLE

    @property
    def damaged(self) -> bool:
        """Whether it is marked as damaged."""
        return DAMAGED in self.sizes

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(self.sizes.values())

    def path(self, suffix: str) -> Path:
        """Of one of its files."""
        return layout.path(self.folder, self.name, suffix)


class StoreFolder:
    """The folder and the rules of changing it.

    Args:
        path: of the folder; made if it is not there.
        disk: the steps on the disk.
        counters: of this process.

    Raises:
        StoreUnusable: it cannot be made or used, or others may look into it.
    """

    def __init__(self, path: Path, disk: Disk, counters: Counters) -> None:
        self.path = path
        self._disk = disk
        self._counters = counters
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            disk.make_folder(path)
            mode = stat.S_IMODE(path.stat().st_mode)
            with self.locked():
                pass
        except OSError as error:
            raise StoreUnusable(
                f"the store {path} cannot be used: {error.strerror or error}",
                "check the path, its permissions and the free space",
            ) from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise StoreUnusable(
                f"the store {path} has mode {mode:04o}: it must be its owner's alone", f"chmod 700 {path}"
            )

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Hold the folder's lock; waits, for the moment others hold it."""
        return locked(self.path / LOCK)

    def groups(self) -> Iterator[Group]:
        """All segments, whole or not; what vanishes meanwhile is left out."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.path) if layout.is_folder(entry.name))
        except OSError:
            return
        for name in names:
            yield from self.groups_in(self.path / name)

    def groups_in(self, folder: Path) -> Iterator[Group]:
        """Those of one tenant's folder."""
        groups: dict[bytes, Group] = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            for entry in entries:
                parsed = layout.parsed(entry.name)
                if parsed is None:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    group = groups.setdefault(parsed[0], Group(folder, parsed[0]))
                    group.sizes[parsed[1]] = status.st_size
                    if parsed[1] == KEY:
                        group.used = status.st_mtime_ns
        yield from groups.values()

    def clean(self, keys: StoreKeys) -> None:
        """Remove what no session can use any more: segments never finished, damaged, or of a lost key.

        Those in use stay.
        """
        with self.locked():
            for group in list(self.groups()):
                if not (group.whole and _key_opens(keys, group)):
                    self._remove_unused(group)
            for entry in list(os.scandir(self.path)):
                if layout.is_folder(entry.name):
                    self._disk.remove_folder(self.path / entry.name)

    def make_room(self, size: int, bounds: Bounds, *, besides: int) -> bool:
        """Under the lock: remove segments, least recently used first, until a file of ``size`` bytes fits; says if so.

        Args:
            size: bytes that the file ``besides`` is to have.
            bounds: of the store.
            besides: the file, open; its present size does not count.
        """
        status = os.fstat(besides)
        growth = size - status.st_blocks * _STAT_BLOCK_BYTES
        if size > bounds.bytes_max:
            return False
        groups = list(self.groups())
        total = sum(group.bytes for group in groups) - (status.st_size if status.st_nlink else 0)
        many = len(groups)

        def fits() -> bool:
            left = self._disk.free(self.path) - growth >= bounds.free_bytes_min
            return left and total + size <= bounds.bytes_max and many <= STORE_SEGMENTS_MAX

        for group in sorted(groups, key=lambda group: (group.whole, group.used)):
            if fits():
                return True
            if self._remove_unused(group):
                total -= group.bytes
                many -= 1
                self._counters.add(segments_evicted=1)
        return fits()

    def shred(self, group: Group) -> None:
        """Under the lock: the key first, so that nothing of it can be read again whatever happens next."""
        self._disk.shred(group.path(KEY))
        self._disk.sync_folder(group.folder)
        for suffix in (INDEX, PARTIAL, DAMAGED, DATA):  # the data last: while its name stands, the rest is looked for
            self._disk.remove(group.path(suffix))
        self._disk.remove_folder(group.folder)

    def in_use(self, group: Group) -> bool:
        """Whether a session of any process reads or writes it."""
        try:
            descriptor = opened(group.path(DATA))
        except OSError:
            return False
        try:
            lock_alone(descriptor)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _remove_unused(self, group: Group) -> bool:
        """Remove it unless it is in use; says whether it was."""
        try:
            descriptor = opened(group.path(DATA))
        except OSError:  # absent, or no file of ours: nobody can be using it
            descriptor = -1
        try:
            if descriptor >= 0:
                lock_alone(descriptor)  # held until all of it is gone
            self.shred(group)
        except OSError:
            return False
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return True


def _key_opens(keys: StoreKeys, group: Group) -> bool:
    """Whether a segment can be read: a process that died as it shredded a key leaves one that cannot."""
    try:
        read_note(keys, group.folder, group.name)
    except (SegmentDamaged, SegmentUnknown):
        return False
    return True


class Founding:
    """A segment in the making, as its writer meets it (``chunking.store.writer.Founded``).

    Args:
        store: the folder.
        keys: of the store.
        disk: the steps on the disk.
        note: for the key file.
        name: the segment's.
        bounds: of the store.

    Raises:
        SegmentTaken: there is one of that name.
        OSError: the disk refuses; nothing is left then.
    """

    def __init__(
        self, store: StoreFolder, keys: StoreKeys, disk: Disk, *, note: Note, name: bytes, bounds: Bounds
    ) -> None:
        self.folder = store.path / keys.folder(note.tenant)
        self.page_key = keys.page_key(self.folder.name)
        self.lease_bytes = min(STORE_LEASE_BYTES, bounds.bytes_max // STORE_LEASES_MIN)
        self.sealer: Sealer
        self.data = self.index = -1
        self._store = store
        self._disk = disk
        self._bounds = bounds
        self._group = Group(self.folder, name)
        with store.locked():
            disk.make_folder(self.folder)
            if os.path.lexists(self._group.path(KEY)) or os.path.lexists(self._group.path(DATA)):
                raise SegmentTaken(f"segment {name.hex()} is there already")
            try:
                self._make(keys, note)
            except BaseException:
                self._close()
                with contextlib.suppress(OSError):
                    store.shred(self._group)
                raise

    def lease(self, size: int) -> bool:
        """Have room for a data file of ``size`` bytes; the file is lengthened, so that other processes count it."""
        with self._store.locked():
            room = self._store.make_room(size, self._bounds, besides=self.data)
            if room:
                self._disk.resize(self.data, size)
        return room

    def publish(self) -> None:
        """Give the index its name.

        Raises:
            StoreError: the segment was forgotten meanwhile.
        """
        with self._store.locked():
            gone = os.fstat(self.data).st_nlink == 0 or not self._group.path(KEY).exists()
            if gone:
                raise StoreError("the segment was forgotten as it was written")
            self._disk.rename(self._group.path(PARTIAL), self._group.path(INDEX))
            self._disk.sync_folder(self.folder)

    def remove(self) -> None:
        """Leave nothing, unless the names are another's by now."""
        with contextlib.suppress(OSError), self._store.locked():
            if os.path.samestat(self._identity, os.stat(self._group.path(DATA))):
                self._store.shred(self._group)

    def _make(self, keys: StoreKeys, note: Note) -> None:
        disk, group = self._disk, self._group
        self.data = disk.create(group.path(DATA))
        self._identity = os.fstat(self.data)
        lock_alone(self.data)
        self.sealer, wrapped = keys.make(self.folder.name, group.name, layout.pack_note(note))
        self.index = disk.create(group.path(PARTIAL))
        key = disk.create(group.path(KEY))
        try:
            disk.write(key, wrapped, 0)
            disk.sync(key)
            moment = int(note.created * 1e9)
            os.utime(key, ns=(moment, moment))
        finally:
            os.close(key)
        disk.sync_folder(self.folder)
        disk.sync_folder(self._store.path)

    def _close(self) -> None:
        for descriptor in (self.data, self.index):
            if descriptor >= 0:
                os.close(descriptor)

"""The store as a process uses it: what it offers, opens, writes, forgets and tells of itself."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self
from weakref import WeakSet

from chunking.errors import SegmentDamaged, SegmentUnknown
from chunking.limits import (
    OFFER_KEPT_MIN,
    STORE_BYTES_DEFAULT,
    STORE_FREE_BYTES_MIN,
    VIEW_PAGES_MAX,
    VIEW_SEGMENTS_MAX,
)
from chunking.store import layout
from chunking.store.behind import WriteBehind
from chunking.store.counters import Counters
from chunking.store.disk import Disk
from chunking.store.folder import Bounds, Founding, Group, StoreFolder
from chunking.store.keys import StoreKeys
from chunking.store.layout import DAMAGED, KEY, SEGMENT_NAME_BYTES, Note
from chunking.store.segment import Segment, read_note
from chunking.store.view import Agreed, StoreView
from chunking.store.writer import Fingerprinter, SegmentWriter


class SegmentInfo(NamedTuple):
    """A whole segment. ``created`` is in seconds since 1970, ``vm`` None where the machine is not known."""

    name: bytes
    pages: int
    kept: int
    vm: str | None
    created: float
    file_bytes: int


class Forgotten(NamedTuple):
    """What was forgotten: segments, their bytes, and how many of them running sessions still read until they end."""

    segments: int
    bytes: int
    in_use: int


class TenantStatus(NamedTuple):
    """What is stored of one machine of one tenant; ``vm`` is None for those not known."""

    tenant: str
    vm: str | None
    segments: int
    pages: int
    bytes: int
    newest: float


@dataclass(frozen=True, slots=True)
class Status:
    """The store as it lies on the disk.

    Attributes:
        bytes: of all files.
        segments: whole ones.
        unfinished: being written now, or left by a process that died.
        damaged: no longer offered, and soon removed.
        machines: by tenant and machine.
    """

    bytes: int
    segments: int
    unfinished: int
    damaged: int
    machines: tuple[TenantStatus, ...]


class Store:
    """A store of pages, of which any number of processes may use the same folder.

    Args:
        directory: the folder; made if it is not there.
        keys: of this host.
        bytes_max: of all its files together; least recently used segments go first.
        free_bytes_min: that it leaves on the disk; to that end segments go too.
        fingerprint: of pages (n, 4096), the same function that the encoder uses; None if sessions always give them.
        disk: the steps on the disk.
        counters: to count in.

    Raises:
        StoreUnusable: the folder cannot be used, or others may look into it.
    """

    def __init__(
        self,
        directory: Path,
        keys: StoreKeys,
        *,
        bytes_max: int = STORE_BYTES_DEFAULT,
        free_bytes_min: int = STORE_FREE_BYTES_MIN,
        fingerprint: Fingerprinter | None = None,
        disk: Disk | None = None,
        counters: Counters | None = None,
    ) -> None:
        self.counters = counters if counters is not None else Counters()
        self._keys = keys
        self._bounds = Bounds(bytes_max, free_bytes_min)
        self._fingerprint = fingerprint
        self._disk = disk if disk is not None else Disk()
        self._folder = StoreFolder(directory, self._disk, self.counters)
        self._behind = WriteBehind()
        self._writers: WeakSet[SegmentWriter] = WeakSet()
        self._folder.clean(keys)

    def close(self, seconds: float | None = None) -> bool:
        """Give up what is not finished, and wait until the rest is on the disk, or for so long; says whether it is."""
        for writer in list(self._writers):
            writer.abort()
        return self._behind.end(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all that was written so far is on the disk, or for so long; says whether it is."""
        return self._behind.wait(seconds)

    def segments(
        self,
        tenant: str,
        vm: str | None = None,
        *,
        segments_max: int = VIEW_SEGMENTS_MAX,
        pages_max: int = VIEW_PAGES_MAX,
    ) -> list[SegmentInfo]:
        """What to offer a peer: whole segments of a tenant, those of this machine first, then the most recent.

        Segments of which many pages were dropped here are left out.
        """
        infos = [info for info in self._infos(tenant) if info.kept >= OFFER_KEPT_MIN * info.pages]
        infos.sort(key=lambda info: (vm is None or info.vm != vm, -info.created, info.name))
        chosen: list[SegmentInfo] = []
        for info in infos:
            if len(chosen) >= segments_max:
                break
            if info.pages <= pages_max:
                chosen.append(info)
                pages_max -= info.pages
        return chosen

    def held(self, tenant: str, offered: Iterable[Agreed]) -> list[Agreed]:
        """Of what a peer offers, what is held here too, in the peer's order, with the pages that both have.

        Two ends of a session that broke off number the same pages alike, and one may have numbered more of them.
        """
        own = {info.name: info.pages for info in self._infos(tenant)}
        held: list[Agreed] = []
        pages_left = VIEW_PAGES_MAX
        for name, pages in offered:
            if len(held) >= VIEW_SEGMENTS_MAX:
                break
            both = min(pages, own.pop(name, -1))  # popped: a name counts once
            if 0 <= both <= pages_left:
                held.append(Agreed(name, both))
                pages_left -= both
        return held

    def view(self, tenant: str, agreed: Sequence[Agreed], vm: str | None = None) -> StoreView:
        """The stored pages of a session.

        Args:
            tenant: whose; segments of another cannot be named.
            agreed: the segments, in the order both sides have.
            vm: the machine, if it is known yet.

        Raises:
            SegmentUnknown: one is not held here, or has fewer pages, or comes twice, or they are too many.
        """
        if len(agreed) > VIEW_SEGMENTS_MAX or len({name for name, _ in agreed}) < len(agreed):
            raise SegmentUnknown("too many segments, or one of them twice")
        if any(pages < 0 for _, pages in agreed) or sum(pages for _, pages in agreed) > VIEW_PAGES_MAX:
            raise SegmentUnknown("segments of too many pages")
        folder = self._folder.path / self._keys.folder(tenant)
        with contextlib.ExitStack() as undo:
            segments = []
            for name, pages in agreed:
                segment = self._segment(folder, name)
                undo.callback(segment.close)
                if pages > segment.pages:
                    raise SegmentUnknown(f"segment {name.hex()} has {segment.pages} pages, not {pages}")
                segments.append((segment, pages))
            undo.pop_all()
        for segment, _ in segments:
            with contextlib.suppress(OSError):  # what is used is removed last; where that cannot be noted, so be it
                os.utime(layout.path(folder, segment.name, KEY))
        return StoreView(
            segments,
            page_key=self._keys.page_key(folder.name),
            disk=self._disk,
            counters=self.counters,
            vm=vm,
        )

    def writer(
        self,
        tenant: str,
        segment: bytes,
        vm: str | None = None,
        *,
        now: float,
        slots: int,
        view: StoreView | None = None,
    ) -> SegmentWriter:
        """Begin a session's segment. Nothing is written before this returns; whether it can be shows later.

        Args:
            tenant: whose.
            segment: its name, 16 bytes: the session's id.
            vm: the machine, if it is known yet.
            now: seconds since 1970.
            slots: of the session's page cache.
            view: the stored pages of the session.

        Raises:
            ValueError: the name has another length, or tenant or machine a name too long.
        """
        if len(segment) != SEGMENT_NAME_BYTES:
            raise ValueError(f"a segment's name has {SEGMENT_NAME_BYTES} bytes, not {len(segment)}")
        note = Note(now, tenant, vm)
        layout.pack_note(note)
        writer = SegmentWriter(
            lambda: Founding(self._folder, self._keys, self._disk, note=note, name=segment, bounds=self._bounds),
            behind=self._behind,
            counters=self.counters,
            disk=self._disk,
            fingerprint=self._fingerprint,
            vm=vm,
            slots=slots,
            view=view,
        )
        self._writers.add(writer)
        return writer

    def forget(self, *, vm: str | None = None, tenant: str | None = None) -> Forgotten:
        """Shred the keys of a machine's segments, or a tenant's, or of that machine of that tenant, and remove them.

        Unfinished segments of machines not known yet go too. What running sessions have open they read to their end.

        Raises:
            ValueError: neither is given.
        """
        if vm is None and tenant is None:
            raise ValueError("which machine or tenant is to be forgotten")
        segments = total = in_use = 0
        with self._folder.locked():
            for group in list(self._groups(tenant)):
                if vm is not None and not self._may_be(group, vm):
                    continue
                segments, total, in_use = segments + 1, total + group.bytes, in_use + self._folder.in_use(group)
                self._folder.shred(group)
        return Forgotten(segments, total, in_use)

    def status(self) -> Status:
        """What lies on the disk now."""
        machines: dict[tuple[str, str | None], TenantStatus] = {}
        total = segments = unfinished = damaged = 0
        for group in self._folder.groups():
            total += group.bytes
            info = self._info(group) if group.whole else None
            if info is None:
                unfinished, damaged = unfinished + (not group.whole and not group.damaged), damaged + group.damaged
                continue
            tenant, found = info
            segments += 1
            known = machines.get((tenant, found.vm), TenantStatus(tenant, found.vm, 0, 0, 0, 0.0))
            machines[tenant, found.vm] = known._replace(
                segments=known.segments + 1,
                pages=known.pages + found.kept,
                bytes=known.bytes + group.bytes,
                newest=max(known.newest, found.created),
            )
        ordered = sorted(machines.values(), key=lambda row: (row.tenant, row.vm is None, row.vm or ""))
        return Status(total, segments, unfinished, damaged, tuple(ordered))

    def _groups(self, tenant: str | None) -> Iterator[Group]:
        if tenant is None:
            return self._folder.groups()
        return self._folder.groups_in(self._folder.path / self._keys.folder(tenant))

    def _infos(self, tenant: str) -> Iterator[SegmentInfo]:
        for group in self._groups(tenant):
            found = self._info(group) if group.whole else None
            if found is not None:
                yield found[1]

    def _info(self, group: Group) -> tuple[str, SegmentInfo] | None:
        """Tenant and description of a whole segment; None if it cannot be used, and it is marked if it is damaged."""
        try:
            with self._segment(group.folder, group.name) as segment:
                return segment.note.tenant, SegmentInfo(
                    segment.name,
                    segment.pages,
                    segment.summary.kept,
                    segment.vm,
                    segment.note.created,
                    segment.file_bytes,
                )
        except SegmentUnknown:
            return None

    def _segment(self, folder: Path, name: bytes) -> Segment:
        try:
            return Segment(self._keys, folder, name)
        except SegmentDamaged as error:
            marker = layout.path(folder, name, DAMAGED)
            with contextlib.suppress(OSError):
                os.close(self._disk.create(marker))
                self.counters.add(segments_damaged=1)
            raise SegmentUnknown(str(error)) from None

    def _may_be(self, group: Group, vm: str) -> bool:
        """Whether a segment is this machine's, or unfinished and perhaps so, or can no longer be told from that."""
        if group.whole:
            info = self._info(group)
            return info is None or info[1].vm == vm
        try:
            _, note = read_note(self._keys, group.folder, group.name)
        except (SegmentDamaged, SegmentUnknown):
            return True
        return note.vm in {None, vm}

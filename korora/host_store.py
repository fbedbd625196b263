"""The content store as sessions use it: opened in a relay's state folder, under the host's key."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Final

import numpy as np
import structlog
from numpy.typing import NDArray

from chunking import kernels
from chunking.errors import ChunkingError
from chunking.limits import STORE_BYTES_DEFAULT, STORE_SEGMENTS_MAX
from chunking.store import Agreed, Counters, SegmentWriter, StoreView
from chunking.store.table import Placement
from chunking.stored import StoredPages
from crypto.errors import CryptoError
from korora.store import open_store
from proxy.control import StoredSegment
from proxy.limits import SEGMENTS_MAX
from proxy.paging import FramePages, Stored

_FLUSH_SECONDS_MAX: Final = 60.0  # what is written behind, at a relay's end: longer than a slow disk takes

COUNTED: Final = tuple(field.name for field in fields(Counters) if not field.name.startswith("_"))

log = structlog.get_logger("korora.store")


class HostStore:
    """The content store of one process.

    Args:
        state: the relay's state folder; made if it is not there.
        bytes_max: of the store on the disk.
        clock: seconds since 1970.

    Raises:
        IdentityError: the host's key cannot be used.
        StoreUnusable: the folder cannot be used.
    """

    def __init__(
        self, state: Path, bytes_max: int = STORE_BYTES_DEFAULT, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.counters = Counters()
        self._clock = clock
        self._store = open_store(state, bytes_max=bytes_max, fingerprint=_fingerprints, counters=self.counters)

    def counts(self) -> dict[str, int]:
        """What the store of this process has done so far, by the names of ``Counters``."""
        return {name: getattr(self.counters, name) for name in COUNTED}

    def offered(self, tenant: str) -> tuple[StoredSegment, ...]:
        """See ``StoreAccess.offered``."""
        found = self._store.segments(tenant, segments_max=SEGMENTS_MAX)
        return tuple(StoredSegment(info.name, info.pages) for info in found)

    def held(
        self, tenant: str, offered: Sequence[StoredSegment], alias: Callable[[bytes], bytes]
    ) -> tuple[StoredSegment, ...]:
        """See ``StoreAccess.held``."""
        infos = self._store.segments(tenant, segments_max=STORE_SEGMENTS_MAX, pages_max=sys.maxsize)
        names = {alias(info.name): info.name for info in infos}
        known = [Agreed(names[segment.name], segment.pages) for segment in offered if segment.name in names]
        found = self._store.held(tenant, known)
        return tuple(StoredSegment(name, pages) for name, pages in found)

    def open(self, tenant: str, name: bytes, segments: Sequence[StoredSegment], slots: int) -> Stored:
        """See ``StoreAccess.open``."""
        view = self._store.view(tenant, [Agreed(segment.name, segment.pages) for segment in segments])
        try:
            writer = self._store.writer(tenant, name, now=self._clock(), slots=slots, view=view)
        except BaseException:
            view.close()
            raise
        return _SessionStored(view, writer, name)

    def wait(self, seconds: float) -> bool:
        """Whether all that sessions have left so far is on the disk, after so long at most."""
        return self._store.wait(seconds)

    def close(self) -> None:
        """Wait until what sessions have left is on the disk."""
        if not self._store.close(_FLUSH_SECONDS_MAX):
            log.warning("the content store could not be written in time", seconds_max=_FLUSH_SECONDS_MAX)


class _SessionStored:
    """One session's part."""

    def __init__(self, view: StoreView, writer: SegmentWriter, name: bytes) -> None:
        self._view, self._writer = view, writer
        self._segment = name.hex()[:8]
        self._named = False

    @property
    def pages(self) -> StoredPages:
        """See ``Stored.pages``."""
        return self._view

    def verify(self, ordinal: int, page: bytes) -> None:
        """See ``Stored.verify``."""
        self._view.verify(ordinal, page)

    def record(self, stream: memoryview, pfns: NDArray[np.uint64], pages: FramePages) -> None:
        """See ``Stored.record``."""
        self._writer.add_from(stream, pages.new.offsets)
        self._writer.place(Placement(pfns, pages.kinds, pages.locations, pages.copied))

    def name(self, vm: str) -> None:
        """See ``Stored.name``."""
        if self._named:
            return
        self._named = True
        try:
            self._writer.name(vm)
        except ValueError as error:
            log.warning("the VM's name is not kept", segment=self._segment, reason=str(error))
            return
        self._view.prefer(vm)

    def close(self, *, keep: bool) -> None:
        """See ``Stored.close``."""
        if keep:
            self._writer.finish()
        else:
            self._writer.abort()
        self._view.close()


def open_host_store(state: Path, bytes_max: int = STORE_BYTES_DEFAULT) -> HostStore | None:
    """The content store in ``state``, or None with a warning where it cannot be used: a relay works without it."""
    if not bytes_max:
        return None
    try:
        return HostStore(state, bytes_max)
    except (CryptoError, ChunkingError, OSError) as error:
        log.warning("the content store is not used", state=str(state), reason=str(error))
        return None


def _fingerprints(pages: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """As the encoder computes them."""
    flat = np.ascontiguousarray(pages).reshape(-1)
    prints = np.empty(len(pages), np.uint64)
    kernels.fingerprints(flat, np.arange(0, len(flat), pages.shape[1], dtype=np.uint32), prints)
    return prints

"""What the store's tests share: keys, fingerprints, pages, and a store that has been written."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chunking.pages import PAGE_BYTES
from chunking.store import SegmentWriter, Store
from chunking.store.table import Kind, Placement
from crypto.at_rest import HostKeys

KEYS = HostKeys(bytes(range(32)))
TENANT = "tenant-of-note"
VM = "machine-of-note"
SLOTS = 64
FIRST, SECOND, THIRD = (bytes([number]) * 16 for number in (0xA1, 0xB2, 0xC3))
SECONDS = 30.0  # no wait lasts: this only keeps a broken test from hanging

_FACTORS = np.random.default_rng(7).integers(0, 2**64, PAGE_BYTES // 8, np.uint64) | np.uint64(1)


def fingerprint(pages: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """A hash good enough to propose."""
    words = pages.view("<u8")
    sums: NDArray[np.uint64] = ((words ^ (words >> np.uint64(32))) * _FACTORS).sum(axis=1, dtype=np.uint64)
    return sums


def pages_of(seed: int, count: int) -> NDArray[np.uint8]:
    """Pages that nobody else has."""
    return np.random.default_rng(seed).integers(0, 256, (count, PAGE_BYTES), np.uint8)


def opened(folder: Path, **options: object) -> Store:
    """A store of this host in ``folder``."""
    defaults = {"fingerprint": fingerprint, "free_bytes_min": 0}
    return Store(folder / "store", KEYS, **{**defaults, **options})  # type: ignore[arg-type]


def literals(pfns: Sequence[int], slots: Sequence[int] | None = None) -> Placement:
    """A frame of new pages only."""
    where = range(len(pfns)) if slots is None else slots
    return frame([(pfn, Kind.LITERAL, slot) for pfn, slot in zip(pfns, where, strict=True)])


def frame(rows: Sequence[tuple[int, Kind, int]], copied: Sequence[int] = ()) -> Placement:
    """A frame of pages, each as PFN, kind and location."""
    columns = list(zip(*rows, strict=True)) if rows else [(), (), ()]
    return Placement(
        np.array(columns[0], np.uint64),
        np.array(columns[1], np.uint8),
        np.array(columns[2], np.uint32),
        np.array(copied, np.uint32),
    )


def written(
    store: Store, pages: NDArray[np.uint8], name: bytes = FIRST, *, vm: str | None = VM, now: float = 1.0
) -> SegmentWriter:
    """A finished segment of these pages, at PFNs 100 and up."""
    writer = store.writer(TENANT, name, vm, now=now, slots=SLOTS)
    for start in range(0, len(pages), SLOTS):
        part = pages[start : start + SLOTS]
        writer.add(part)
        writer.place(literals(range(100 + start, 100 + start + len(part))))
    writer.finish()
    assert writer.wait(SECONDS)
    assert writer.failure is None
    return writer


def offsets(count: int) -> NDArray[np.uint32]:
    """Where pages begin that lie one after the other."""
    return np.arange(count, dtype=np.uint32) * np.uint32(PAGE_BYTES)


def ordinals(*numbers: int) -> NDArray[np.int64]:
    """An array of ordinals."""
    return np.array(numbers, np.int64)


def files_in(folder: Path) -> list[Path]:
    """All files of the store but its lock."""
    return sorted(path for path in (folder / "store").rglob("*") if path.is_file() and path.name != "lock")

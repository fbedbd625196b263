"""What can be wrong with frames, pages and the store.

ChunkingError
├── FrameMalformed      a frame's body is not what its encoding allows: wrong counts, references out of range, a bomb
├── PagesMissing        pages of the content store that the frame refers to cannot be read here; they can be asked for
└── StoreError          the content store refuses; the session goes on without
    ├── StoreUnusable   its folder cannot be used; `remedy` says what to do                        exit code 2
    ├── SegmentUnknown  no such segment is held here whole, or not with that many pages
    ├── SegmentTaken    a segment of that name is held or being written here
    ├── SegmentDamaged  something of a segment did not open or cannot be read
    └── PageForged      a page that the peer gave is not the one that was stored
"""

from collections.abc import Sequence


class ChunkingError(Exception):
    """Base of this room's errors."""


class FrameMalformed(ChunkingError):
    """A frame's body is none: the peer is at fault, and nothing of the frame may be used."""


class PagesMissing(ChunkingError):
    """Stored pages that a frame refers to cannot be read here.

    Args:
        ordinals: which of the stored pages, as the session counts them; ascending, each once.
    """

    def __init__(self, ordinals: Sequence[int]) -> None:
        super().__init__(f"{len(ordinals)} stored pages cannot be read, the first is {ordinals[0]}")
        self.ordinals = tuple(ordinals)


class StoreError(ChunkingError):
    """The content store refuses; nothing of a session depends on it."""


class StoreUnusable(StoreError):
    """The store's folder cannot be used.

    Args:
        message: what is wrong, with the path.
        remedy: what a person does about it, without a full stop.
    """

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


class SegmentUnknown(StoreError):
    """No whole and undamaged segment of that name and length is held here for that tenant."""


class SegmentTaken(StoreError):
    """A segment is written once: one of that name is there, or being written."""


class SegmentDamaged(StoreError):
    """Something of a segment did not open, or cannot be read; the rest of it may be good."""


class PageForged(StoreError):
    """A page given in place of a stored one has another id than the stored one."""

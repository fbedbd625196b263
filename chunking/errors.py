"""What can be wrong with frames, pages and the store.

ChunkingError
├── FrameMalformed      a frame's body is not what its encoding allows: wrong counts, references out of range, a bomb
└── PagesMissing        pages of the content store that the frame refers to cannot be read here; they can be asked for
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

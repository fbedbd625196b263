"""Where pages lie in a piece of a stream: what parsers of streams say and the frame encoder takes. Sans-IO."""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES: Final = 4096  # guest memory moves in these, whatever the guest's own page size (Xen, QEMU on x86)
WORD_BYTES: Final = 8  # entries of page tables in a stream: Xen's PFN lists, QEMU's page headers
NO_PFN: Final = 2**64 - 1  # of a page that lies nowhere in a guest: a chunk of a disk, or of an unknown stream


class Spans(NamedTuple):
    """The structure of one piece of a stream, as runs: other bytes, then words of a table, then whole pages.

    A run may lack any of its three parts. ``runs`` covers the piece's first ``used`` bytes without gap or overlap:
    ``sum(other + WORD_BYTES * words + PAGE_BYTES * pages) == used``.

    Args:
        used: bytes of the piece that are described; what follows is the beginning of a page, to be seen again.
        runs: shape (n, 3), uint32: other bytes, table words of 8 bytes, pages of 4096 bytes.
        pfns: uint64, one a page in the piece's order: where in the guest the page lies. Formats that know several
            memory blocks make one number of block and offset; equal numbers mean the same page of the guest.
        marked: uint64: pages that the piece says something of without carrying their bytes (zero in QEMU).
        big_endian: byte order of the table words.
    """

    used: int
    runs: NDArray[np.uint32]
    pfns: NDArray[np.uint64]
    marked: NDArray[np.uint64]
    big_endian: bool


def plain(size: int) -> Spans:
    """``size`` bytes of which nothing is known."""
    nothing = np.empty(0, np.uint64)
    return Spans(size, np.array([[size, 0, 0]], np.uint32), nothing, nothing, big_endian=False)

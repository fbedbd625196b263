"""What the frame encoder and decoder want of pages of earlier sessions; chunking/store/ keeps them."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class StoredPages(Protocol):
    """Stored pages that both sides of a session have agreed on, numbered from 0 (ordinals); they never change."""

    @property
    def count(self) -> int:
        """How many there are."""

    def find(self, fingerprints: NDArray[np.uint64], raw: memoryview, offsets: NDArray[np.uint32]) -> NDArray[np.int64]:
        """The ordinals of stored pages equal to these, or -1; equality is certain, not a matter of fingerprints.

        Args:
            fingerprints: of the pages, as ``kernels.fingerprints`` computes them.
            raw: bytes in which the pages lie.
            offsets: where each begins in ``raw``.
        """

    def bases(self, pfns: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The ordinals of the pages last seen at these PFNs, or -1."""

    def read(self, ordinals: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The stored pages, shape (n, 4096).

        Raises:
            PagesMissing: some cannot be read.
        """

"""Where each page of the guest was last put. Only the source knows page frame numbers; the wire has locations."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from chunking.cache import NO_LOCATION
from chunking.limits import PFN_CHUNKS_MAX

CHUNK_BITS: Final = 16


class PfnMap:
    """The last location of each PFN's content, in chunks of 65536 pages made when first needed.

    4 bytes a guest page: 64 MiB for a guest of 64 GiB. At most ``PFN_CHUNKS_MAX`` chunks; pages beyond are not
    remembered. A location may have been given to another page since: what is based on it is merely longer then.
    """

    def __init__(self) -> None:
        self._chunks: dict[int, NDArray[np.uint32]] = {}

    def look_up(self, pfns: NDArray[np.uint64]) -> NDArray[np.uint32]:
        """The locations of these PFNs, NO_LOCATION where none is known."""
        locations = np.full(len(pfns), NO_LOCATION, np.uint32)
        for number, which, within in _by_chunk(pfns):
            chunk = self._chunks.get(number)
            if chunk is not None:
                locations[which] = chunk[within]
        return locations

    def put(self, pfns: NDArray[np.uint64], locations: NDArray[np.uint32]) -> None:
        """Remember where these PFNs' content is now; of a PFN named twice the last counts."""
        for number, which, within in _by_chunk(pfns):
            chunk = self._chunks.get(number)
            if chunk is None:
                if len(self._chunks) == PFN_CHUNKS_MAX:
                    continue
                chunk = self._chunks[number] = np.full(1 << CHUNK_BITS, NO_LOCATION, np.uint32)
            chunk[within] = locations[which]


def _by_chunk(pfns: NDArray[np.uint64]) -> list[tuple[int, NDArray[np.bool_] | slice, NDArray[np.uint64]]]:
    """For each chunk touched: its number, which of ``pfns`` lie in it, and where within it."""
    if not len(pfns):
        return []
    numbers, within = pfns >> np.uint64(CHUNK_BITS), pfns & np.uint64((1 << CHUNK_BITS) - 1)
    if numbers.min() == numbers.max():
        return [(int(numbers[0]), slice(None), within)]
    parts = []
    for number in np.unique(numbers):
        which = numbers == number
        parts.append((int(number), which, within[which]))
    return parts

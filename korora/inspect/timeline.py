"""Pages over the stream's course, by kind, and where in the guest pages come again: bounded, coarser when long."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from korora.inspect.limits import REGIONS_MAX, TIME_BINS_MAX

KINDS: Final = ("zero", "duplicate", "delta", "literal")
_REGION_BITS: Final = 6  # 64 pages to begin with


class Timeline:
    """Bins along the stream."""

    def __init__(self) -> None:
        self.pieces_per_bin = 1
        self.region_bits = _REGION_BITS
        """A region of the heat map is 2^``region_bits`` pages."""
        self.bytes: list[int] = []
        """Stream bytes of each bin."""
        self.pages: list[NDArray[np.int64]] = []
        """Pages of each bin by ``KINDS``."""
        self.dirty: list[dict[int, int]] = []
        """Pages of each bin that were sent before, by region of the guest."""
        self._regions: set[int] = set()
        self._pieces = 0

    def add(self, stream_bytes: int, kinds: NDArray[np.int64], again: NDArray[np.uint64]) -> None:
        """The next piece.

        Args:
            stream_bytes: its length.
            kinds: its pages by ``KINDS``.
            again: PFNs of its pages that were sent before.
        """
        if self._pieces % self.pieces_per_bin == 0:
            if len(self.bytes) == TIME_BINS_MAX:
                self._halve()
            self.bytes.append(0)
            self.pages.append(np.zeros(len(KINDS), np.int64))
            self.dirty.append({})
        self._pieces += 1
        self.bytes[-1] += stream_bytes
        self.pages[-1] = self.pages[-1] + kinds
        regions, counts = np.unique(again >> np.uint64(self.region_bits), return_counts=True)
        _merge(self.dirty[-1], dict(zip(regions.tolist(), counts.tolist(), strict=True)))
        self._regions.update(regions.tolist())
        while len(self._regions) > REGIONS_MAX:
            self._coarsen()

    @property
    def regions(self) -> list[int]:
        """The regions in which pages came again, in the guest's order."""
        return sorted(self._regions)

    def heat(self) -> NDArray[np.int64]:
        """Shape (regions, bins): how many pages came again there and then."""
        rows = {region: row for row, region in enumerate(self.regions)}
        heat = np.zeros((len(rows), len(self.dirty)), np.int64)
        for column, counts in enumerate(self.dirty):
            for region, count in counts.items():
                heat[rows[region], column] = count
        return heat

    def _halve(self) -> None:
        self.pieces_per_bin *= 2
        pairs = range(0, len(self.bytes), 2)
        self.bytes = [sum(self.bytes[i : i + 2]) for i in pairs]
        self.pages = [np.sum(self.pages[i : i + 2], axis=0) for i in pairs]
        for i in pairs:
            for later in self.dirty[i + 1 : i + 2]:
                _merge(self.dirty[i], later)
        self.dirty = self.dirty[::2]

    def _coarsen(self) -> None:
        self.region_bits += 1
        self._regions = {region >> 1 for region in self._regions}
        for index, counts in enumerate(self.dirty):
            coarser: dict[int, int] = {}
            for region, count in counts.items():
                coarser[region >> 1] = coarser.get(region >> 1, 0) + count
            self.dirty[index] = coarser


def _merge(into: dict[int, int], more: dict[int, int]) -> None:
    for region, count in more.items():
        into[region] = into.get(region, 0) + count

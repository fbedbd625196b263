"""The destination's half of the page engine: frames back to the stream's bytes. Sans-IO.

Bodies come from an authenticated peer and are hostile all the same: counts bound every size before it is allocated,
and every location is compared with what there is.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chunking import kernels
from chunking.cache import NO_LOCATION, PageCache
from chunking.chains import DecompressStream
from chunking.encoder import NewPages, page_offsets
from chunking.errors import FrameMalformed, PagesMissing
from chunking.frame import HEADER, Columns, Flags, Header, PageKind, unpack
from chunking.limits import (
    CHAINS_MAX,
    FRAME_RAW_BYTES_MAX,
    LOCATIONS_MAX,
    META_WINDOW_LOG_MAX,
    ZSTD_WINDOW_LOG_MAX,
)
from chunking.pages import PAGE_BYTES
from chunking.stored import StoredPages


class Unpressed(NamedTuple):
    """A frame decompressed, not yet rebuilt.

    Args:
        raw_bytes: stream bytes it stands for.
        columns: its columns.
        literals: its literal pages; may lie in the body it came from.
    """

    raw_bytes: int
    columns: Columns
    literals: NDArray[np.uint8]


class Rebuilt(NamedTuple):
    """What a frame brought.

    Args:
        kinds: uint8, ``PageKind``, one a page.
        locations: uint32, one a page: where its content is now (a slot), NO_LOCATION for zero pages.
        copied: uint32, one a COPY: the location of the stored page it equals.
        new: pages that a store may keep.
    """

    kinds: NDArray[np.uint8]
    locations: NDArray[np.uint32]
    copied: NDArray[np.uint32]
    new: NewPages


class Decoder:
    """Frames to pages.

    Args:
        cache_bytes: of the page cache, the same at the encoder.
        stored: pages of earlier sessions that both sides hold, the same ones in the same order.
        chains: context chains that the encoder has, at most. Each may take 36 MiB of windows.

    Raises:
        ValueError: sizes out of range.
    """

    def __init__(self, cache_bytes: int, *, stored: StoredPages | None = None, chains: int = CHAINS_MAX) -> None:
        if not 1 <= chains <= CHAINS_MAX:
            raise ValueError(f"{chains} context chains")
        self._cache = PageCache(cache_bytes // PAGE_BYTES)
        self._stored = stored
        self._stored_count = 0 if stored is None else stored.count
        if self._cache.slots + self._stored_count > LOCATIONS_MAX:
            raise ValueError(f"{self._stored_count} stored pages beside {self._cache.slots} slots")
        self._chains = [
            (DecompressStream(META_WINDOW_LOG_MAX), DecompressStream(ZSTD_WINDOW_LOG_MAX)) for _ in range(chains)
        ]

    def chain_of(self, body: memoryview | bytes) -> int:
        """The context chain a body belongs to: bodies of one chain are unpressed in order.

        Raises:
            FrameMalformed: there is no such chain.
        """
        if len(body) < HEADER.size or body[1] >= len(self._chains):
            raise FrameMalformed("a body without a context chain")
        return body[1]

    def unpress(self, body: memoryview | bytes, raw_bytes: int) -> Unpressed:
        """Decompress a frame. Parallel between chains, in order within one.

        Args:
            body: the frame's body; must live until the frame is rebuilt.
            raw_bytes: stream bytes the frame stands for.

        Raises:
            FrameMalformed: the body is none.
        """
        if not 0 < raw_bytes <= FRAME_RAW_BYTES_MAX:
            raise FrameMalformed(f"a frame of {raw_bytes} bytes")
        header = Header.parse(body, raw_bytes)
        meta_stream, literal_stream = self._chains[self.chain_of(body)]
        view = memoryview(body)
        packed_meta, packed = view[HEADER.size :][: header.meta_bytes], view[HEADER.size + header.meta_bytes :]
        meta = meta_stream.decompress(packed_meta, header.columns_bytes, reset=Flags.META_RESET in header.flags)
        columns = unpack(header, meta, self._cache.slots)
        size = header.literals * PAGE_BYTES
        if Flags.LITERALS_ZSTD in header.flags:
            alone = Flags.LITERALS_ALONE in header.flags
            stream = DecompressStream() if alone else literal_stream
            literals = stream.decompress(packed, size, reset=alone or Flags.LITERALS_RESET in header.flags)
        elif len(packed) == size:
            literals = np.frombuffer(packed, np.uint8)
        else:
            raise FrameMalformed(f"{len(packed)} bytes for {header.literals} literal pages")
        return Unpressed(raw_bytes, columns, literals)

    def rebuild(self, unpressed: Unpressed, out: memoryview, *, given: Mapping[int, bytes] | None = None) -> Rebuilt:
        """Write the stream's bytes, and take new pages into the cache. Serial, in cache order.

        Args:
            unpressed: the frame.
            out: writable, ``raw_bytes`` long.
            given: stored pages that were asked for, by ordinal, after a PagesMissing; already checked.

        Raises:
            FrameMalformed: a location or slot out of range; nothing of ``out`` may be used.
            PagesMissing: stored pages cannot be read. Nothing has changed: call again with them given.
            ValueError: ``out`` or a given page has another length.
        """
        if len(out) != unpressed.raw_bytes:
            raise ValueError(f"{len(out)} bytes for a frame of {unpressed.raw_bytes}")
        columns = unpressed.columns
        stored, rows = self._borrow(columns, given or {})
        offsets = page_offsets(columns.runs)
        target = np.frombuffer(out, np.uint8)
        try:
            kernels.rebuild(
                target,
                offsets,
                columns.kinds,
                columns.locations,
                columns.slots,
                self._cache.arena,
                stored.reshape(-1),
                rows,
                columns.masks,
                columns.values,
                unpressed.literals,
            )
            kernels.scatter_runs(target, columns.runs, columns.other, columns.words)
        except ValueError as error:
            raise FrameMalformed(str(error)) from error
        storable = (columns.kinds == PageKind.DELTA) | (columns.kinds == PageKind.LITERAL)
        here = np.where(columns.kinds == PageKind.REF, columns.locations, columns.slots)
        copied = columns.locations[columns.kinds == PageKind.COPY]
        return Rebuilt(columns.kinds, here, copied, NewPages(offsets[storable], columns.slots[storable]))

    def _borrow(self, columns: Columns, given: Mapping[int, bytes]) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """The stored pages that a frame refers to, and for each of its pages the row among them or NO_LOCATION."""
        slots, kinds, locations = self._cache.slots, columns.kinds, columns.locations
        located = (kinds == PageKind.REF) | (kinds == PageKind.DELTA) | (kinds == PageKind.COPY)
        beyond = located & (locations >= slots)
        if np.any(beyond & (kinds == PageKind.REF)) or np.any(~beyond & (kinds == PageKind.COPY)):
            raise FrameMalformed("a reference to a stored page, or a copy of none")
        rows = np.full(len(kinds), NO_LOCATION, np.uint32)
        if not np.any(beyond):
            return np.empty((0, PAGE_BYTES), np.uint8), rows
        ordinals, inverse = np.unique(locations[beyond].astype(np.int64) - slots, return_inverse=True)
        if self._stored is None or ordinals[-1] >= self._stored_count:
            raise FrameMalformed(f"stored page {ordinals[-1]} of {self._stored_count}")
        rows[beyond] = inverse
        pages = np.empty((len(ordinals), PAGE_BYTES), np.uint8)
        here = np.array([ordinal not in given for ordinal in ordinals.tolist()])
        for row in np.flatnonzero(~here).tolist():
            page = given[int(ordinals[row])]
            if len(page) != PAGE_BYTES:
                raise ValueError(f"a page of {len(page)} bytes")
            pages[row] = np.frombuffer(page, np.uint8)
        if np.any(here):
            pages[here] = self._stored.read(ordinals[here])
        return pages, rows


__all__ = ["Decoder", "PagesMissing", "Rebuilt", "Unpressed"]

# Buffers are contiguous numpy arrays. Wrong lengths, and locations, slots or counts out of range, raise ValueError.

import numpy as np
from numpy.typing import NDArray

# The 64-bit fingerprints of the pages at `offsets`, never 0. They propose; bytes or keyed ids decide.
def fingerprints(raw: NDArray[np.uint8], offsets: NDArray[np.uint32], out: NDArray[np.uint64], /) -> None: ...

# What each page is, in page order, and the cache after it: zero, known (REF), little changed (DELTA), else LITERAL.
#
# In: raw, offsets; bases (n: location of the PFN's last content or NO_LOCATION); the cache (arena, then PageIndex's
# buckets, fingerprints, referenced, state); words_max (changed words up to which a delta is taken, 0: none).
# Out: kinds, locations (REF, DELTA: of which slot), slots (of new pages), page_prints (0: zero page), each of n; masks,
# values and literals one after the other (room for n + 1 masks, words_max * (n + 1) words, n pages).
# Returns the numbers of deltas, changed words and literals.
def classify(
    raw: NDArray[np.uint8],
    offsets: NDArray[np.uint32],
    bases: NDArray[np.uint32],
    arena: NDArray[np.uint8],
    buckets: NDArray[np.uint32],
    prints: NDArray[np.uint64],
    referenced: NDArray[np.uint8],
    state: NDArray[np.uint64],
    words_max: int,
    kinds: NDArray[np.uint8],
    locations: NDArray[np.uint32],
    slots: NDArray[np.uint32],
    page_prints: NDArray[np.uint64],
    masks: NDArray[np.uint8],
    values: NDArray[np.uint64],
    literals: NDArray[np.uint8],
    /,
) -> tuple[int, int, int]: ...

# The inverse of classify, page by page: pages into `out` at `offsets`, new ones into the arena too.
#
# rows: for each page the row of `stored` it comes from or is based on, NO_LOCATION: from the arena at `locations`.
def rebuild(
    out: NDArray[np.uint8],
    offsets: NDArray[np.uint32],
    kinds: NDArray[np.uint8],
    locations: NDArray[np.uint32],
    slots: NDArray[np.uint32],
    arena: NDArray[np.uint8],
    stored: NDArray[np.uint8],
    rows: NDArray[np.uint32],
    masks: NDArray[np.uint8],
    values: NDArray[np.uint64],
    literals: NDArray[np.uint8],
    /,
) -> None: ...

# The other bytes and the table words of `runs` (n, 3) out of, or into, the piece that they cover exactly.
def gather_runs(
    raw: NDArray[np.uint8], runs: NDArray[np.uint32], other: NDArray[np.uint8], words: NDArray[np.uint8], /
) -> None: ...
def scatter_runs(
    out: NDArray[np.uint8], runs: NDArray[np.uint32], other: NDArray[np.uint8], words: NDArray[np.uint8], /
) -> None: ...

"""Every limit of the chunking engine, with its unit in its name and its reason beside it."""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

FRAME_RAW_BYTES_MAX: Final = 4 * MIB  # stream bytes of one frame: one Xen batch of 1024 pages
FRAME_BODY_BYTES_MAX: Final = 4 * MIB  # what does not shrink is sent as it is, never longer
FRAME_PAGES_MAX: Final = FRAME_RAW_BYTES_MAX // 4096
FRAME_RUNS_MAX: Final = FRAME_RAW_BYTES_MAX // 8  # each run describes at least a word; QEMU's zero pages take 9 bytes
ZSTD_WINDOW_LOG_MAX: Final = 25  # 32 MiB: a decoder refuses more, for its memory is the peer's choice otherwise
CHAINS_MAX: Final = 16  # context chains of one session: each may hold a window
CACHE_BYTES_DEFAULT: Final = 512 * MIB  # page cache of one session, the smaller of both sides
SEGMENT_PAGES_MAX: Final = 2**24  # 64 GiB of pages that one session stored

"""Every limit of the chunking engine, with its unit in its name and its reason beside it."""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

FRAME_RAW_BYTES_MAX: Final = 4 * MIB  # stream bytes of one frame: one Xen batch of 1024 pages
FRAME_BODY_BYTES_MAX: Final = 4 * MIB  # what does not shrink is sent as it is, never longer
FRAME_PAGES_MAX: Final = FRAME_RAW_BYTES_MAX // 4096
FRAME_RUNS_MAX: Final = FRAME_RAW_BYTES_MAX // 8  # each run describes at least a word; QEMU's zero pages take 9 bytes
ZSTD_WINDOW_LOG_MAX: Final = 25  # 32 MiB: a decoder refuses more, for its memory is the peer's choice otherwise
CHAINS_MAX: Final = 16  # context chains of one session: each may hold a window
CACHE_BYTES_DEFAULT: Final = 512 * MIB  # page cache of one session, the smaller of both sides

# ---- the page cache and its index
CACHE_SLOTS_MAX: Final = 1 << 26  # 256 GiB; locations are 32 bits, and stored pages are numbered above the slots
LOCATIONS_MAX: Final = (1 << 32) - 2  # slots and stored pages together; the last number means "none"
RING_SKIPS_MAX: Final = 64  # slots that an insertion may pass over because they were used: bounds its time
BUCKET_WAYS: Final = 4  # slots that share a bucket of the index: one 16-byte look

# ---- frames of pages
DELTA_WORDS_MAX: Final = 256  # of 512: beyond half a page, what changed compresses no better than the page itself
FRAME_BODY_SLACK_BYTES: Final = 64 * KIB  # a frame of pages may be this much longer than its stream bytes, never more
PFN_CHUNKS_MAX: Final = 4096  # of 65536 pages each: 1 TiB of guest memory in 1 GiB; pages beyond have no base
ALONE_BYTES_MIN: Final = (
    MIB  # literals that need no context of earlier frames; compressing them alone is a fifth quicker
)
META_WINDOW_LOG: Final = 20  # columns of several frames resemble each other; 1 MiB holds them
META_WINDOW_LOG_MAX: Final = 22  # 4 MiB: columns are a hundredth of a stream, and a decoder refuses more

# ---- dirty tracking
DIRTY_CHUNKS_MAX: Final = 4096  # of 65536 pages each: 1 TiB of guest memory in 1 GiB; pages beyond count as untracked
DIRTY_CHUNKS_FREE: Final = 256  # that any guest may have: 64 MiB, and all of a guest of 64 GiB
DIRTY_PAGES_PER_CHUNK: Final = 4096  # each further one wants that many pages followed
ROUNDS_KEPT_MAX: Final = 64  # rounds whose sizes are remembered; hypervisors make fewer than 32

# The content store.
STORE_BYTES_DEFAULT: Final = 20 * GIB  # on disk, all tenants: a few guests of middling size
STORE_FREE_BYTES_MIN: Final = GIB  # left on the disk for everybody else: a store must not be what fills a host
STORE_QUEUE_BYTES_MAX: Final = 32 * MIB  # pages waiting for the disk, in all of a process: then pages are dropped
STORE_JOBS_MAX: Final = 4096  # notes wait there too, and weigh little
STORE_LEASE_BYTES: Final = 64 * MIB  # a writer asks for room in these, so that a store never outgrows its limit
STORE_LEASES_MIN: Final = 16  # or, in a small store, in that part of it
STORE_SEGMENTS_MAX: Final = 4096  # held at once, all tenants: a look at the store opens two small files for each
SEGMENT_PAGES_MAX: Final = 1 << 25  # 128 GiB of new pages in one session; what follows is not kept
STORE_NAME_BYTES_MAX: Final = 255  # a tenant's or a virtual machine's name, in UTF-8
OFFER_KEPT_MIN: Final = (
    0.9  # of a segment's pages, or it is not offered: each page not kept costs the session a round trip
)
VIEW_SEGMENTS_MAX: Final = 16  # of one session: each holds two files open
VIEW_PAGES_MAX: Final = 1 << 23  # of one session: at the source 12 bytes of memory each, and the page tables
VIEW_SIEVE_BITS_MAX: Final = 24  # a sieve of 16 MiB before the search of fingerprints
VIEW_BLOCKS_MAX: Final = 64  # opened blocks that a session keeps: 4 MiB
VIEW_ID_CHUNKS_MAX: Final = 64  # opened pieces of id tables that a session keeps: 1 MiB
TABLE_CHUNKS_FREE: Final = 64  # pieces of a page table that any guest may have: 2 MiB
TABLE_PLACES_PER_CHUNK: Final = 512  # each further one wants that many pages placed: scattered PFNs cost no memory
# ---- streams of which nothing is known
CHUNK_BYTES_AVERAGE: Final = 16 * KIB  # of content-defined chunks; each ends in a page that is never found again

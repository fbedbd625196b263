"""A session's part of the content store, opened where both ends want it and there is one."""

from collections.abc import Sequence

import structlog

from chunking.errors import ChunkingError
from chunking.pages import PAGE_BYTES
from proxy.control import StoredSegment
from proxy.paging import PagingTerms, Stored

log = structlog.get_logger("korora.store")


def open_stored(
    paging: PagingTerms, session_id: bytes, segments: Sequence[StoredSegment], cache_bytes: int
) -> Stored | None:
    """Open it; None where there is no store or it cannot be used: a session never fails for its sake.

    Reads the disk.
    """
    if paging.library is None or not paging.tenant:
        return None
    try:
        return paging.library.open(paging.tenant, session_id, segments, cache_bytes // PAGE_BYTES)
    except (ChunkingError, OSError) as error:
        log.warning("the content store is not used", session=session_id.hex()[:8], reason=str(error))
        return None

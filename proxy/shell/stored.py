"""A session's part of the content store, opened where both ends want it and there is one."""

import asyncio
from collections.abc import Sequence

import structlog
from msgspec.structs import astuple

from chunking.errors import ChunkingError
from chunking.pages import PAGE_BYTES
from crypto.keys import Direction, segment_alias
from proxy.control import StoredSegment
from proxy.paging import PagingTerms, Stored

log = structlog.get_logger("korora.store")


def aliased(segments: Sequence[StoredSegment], direction: Direction, exporter: bytes) -> tuple[StoredSegment, ...]:
    """Segments as a peer is told of them, on the connection with this exporter."""
    return tuple(
        StoredSegment(segment_alias(name, direction, exporter), pages) for name, pages in map(astuple, segments)
    )


async def open_stored(
    paging: PagingTerms, name: bytes, segments: Sequence[StoredSegment], cache_bytes: int
) -> Stored | None:
    """Open it; None where there is no store or it cannot be used: a session never fails for its sake.

    Args:
        paging: this relay's terms.
        name: of what the session will leave (``crypto.keys.segment_name``).
        segments: that both ends hold.
        cache_bytes: of the session's page cache.
    """
    opening = asyncio.get_running_loop().run_in_executor(None, _open, paging, name, segments, cache_bytes)
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close)  # the thread goes on all the same, and what it opens must be closed
        raise


def _open(paging: PagingTerms, name: bytes, segments: Sequence[StoredSegment], cache_bytes: int) -> Stored | None:
    if paging.store is None or not paging.tenant:
        return None
    try:
        return paging.store.open(paging.tenant, name, segments, cache_bytes // PAGE_BYTES)
    except (ChunkingError, OSError) as error:
        log.warning("the content store is not used", segment=name.hex()[:8], reason=str(error))
        return None


def _close(opening: "asyncio.Future[Stored | None]") -> None:
    if not opening.cancelled() and opening.exception() is None and (stored := opening.result()) is not None:
        stored.close(keep=False)

"""What a relay is ready to do about pages: how to encode them, how much to remember of them. Sans-IO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum, unique
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from chunking.encoder import NewPages
from chunking.limits import CACHE_BYTES_DEFAULT, CHAINS_MAX
from chunking.pages import PAGE_BYTES
from chunking.stored import StoredPages
from proxy.control import StoredSegment

CHAINS_DEFAULT: Final = 2  # a third context finds too little in common with the others' frames to be worth its window


@unique
class Encode(StrEnum):
    """How much is done to a stream on its way."""

    AUTO = "auto"  # what pays on this network
    OPAQUE = "opaque"  # nothing: the bytes as they are
    PAGES = "pages"  # at least deduplicated and compressed quickly
    BEST = "best"  # the fewest bytes, whatever it costs here


class FramePages(Protocol):
    """The pages of a frame, as both ends know them (``chunking.encoder.Plan``, ``chunking.decoder.Rebuilt``)."""

    @property
    def kinds(self) -> NDArray[np.uint8]:
        """One a page."""

    @property
    def locations(self) -> NDArray[np.uint32]:
        """One a page: where its content is now."""

    @property
    def copied(self) -> NDArray[np.uint32]:
        """One a copy: the location of the stored page."""

    @property
    def new(self) -> NewPages:
        """Those that nobody has stored yet."""


class Stored(Protocol):
    """What a session has of the content store: pages of earlier sessions, and the record of its own.

    All but ``close`` and ``name`` may be called beside the loop, by one thread after the other.
    """

    @property
    def pages(self) -> StoredPages:
        """Those that both ends hold."""

    def verify(self, ordinal: int, page: bytes) -> None:
        """Check a page that the peer gave instead of one that cannot be read here.

        Raises:
            ChunkingError: it is another page.
        """

    def record(self, stream: memoryview, pfns: NDArray[np.uint64], pages: FramePages) -> None:
        """Keep what a frame brought, for sessions to come; never waits for the disk."""

    def name(self, vm: str) -> None:
        """The VM's name is known now."""

    def close(self, *, keep: bool) -> None:
        """The session is over; its record is kept, or given up."""


class StoreAccess(Protocol):
    """The content store, as a relay has it. Its methods read the disk."""

    def offered(self, tenant: str) -> tuple[StoredSegment, ...]:
        """What earlier sessions of the tenant left here, the most useful first."""

    def held(
        self, tenant: str, offered: Sequence[StoredSegment], alias: Callable[[bytes], bytes]
    ) -> tuple[StoredSegment, ...]:
        """Of what the peer has, what is here as well, under its own name.

        Args:
            tenant: whose.
            offered: what the peer has, under aliases.
            alias: what the peer calls a segment of that name.
        """

    def open(self, tenant: str, name: bytes, segments: Sequence[StoredSegment], slots: int) -> Stored:
        """A session's part.

        Args:
            tenant: whose pages.
            name: of what the session will leave.
            segments: both ends hold; their pages are numbered one segment behind the other.
            slots: of the session's page cache.

        Raises:
            ChunkingError: one of the segments is not here any more.
        """


@dataclass(frozen=True, slots=True)
class PagingTerms:
    """One relay's terms.

    Args:
        encode: what the source does; a destination is content with anything but takes pages only with a cache.
        cache_bytes: page cache of a session; the smaller of both sides counts. 0: pages are not for us.
        chains: contexts a session may compress in.
        tenant: whose stored pages may be used; empty for nobody's.
        store: where they are; None for no store.
    """

    encode: Encode = Encode.AUTO
    cache_bytes: int = CACHE_BYTES_DEFAULT
    chains: int = CHAINS_DEFAULT
    tenant: str = ""
    store: StoreAccess | None = None

    @property
    def wanted(self) -> bool:
        """Whether pages are encoded at all."""
        return self.encode is not Encode.OPAQUE and self.cache_bytes >= PAGE_BYTES

    @property
    def chains_offered(self) -> int:
        """How many contexts to ask for: the fewest bytes come of one."""
        return 1 if self.encode is Encode.BEST else min(self.chains, CHAINS_MAX)

"""What a relay is ready to do about pages: how to encode them, how much to remember of them. Sans-IO."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum, unique
from typing import Final, Protocol

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


class SessionPages(StoredPages, Protocol):
    """Stored pages that a session may refer to."""

    def verify(self, ordinal: int, page: bytes) -> None:
        """Check a page that the peer gave instead of one that cannot be read here.

        Raises:
            ChunkingError: it is another page.
        """


class Recorder(Protocol):
    """Keeps what a session's frames brought, for sessions to come; never in their way."""

    def close(self, *, whole: bool) -> None:
        """The session is over; without ``whole`` nothing of it is kept."""


class Library(Protocol):
    """The content store, as sessions see it."""

    def segments(self, tenant: str) -> Sequence[StoredSegment]:
        """What earlier sessions of the tenant left here, the most useful first."""

    def view(self, tenant: str, segments: Sequence[StoredSegment]) -> SessionPages:
        """The pages of these segments, numbered one segment behind the other; those that are not here have gaps."""


@dataclass(frozen=True, slots=True)
class PagingTerms:
    """One relay's terms.

    Args:
        encode: what the source does; a destination is content with anything but takes pages only with a cache.
        cache_bytes: page cache of a session; the smaller of both sides counts. 0: pages are not for us.
        chains: contexts a session may compress in.
        tenant: whose stored pages may be used; empty for nobody's.
        library: where they are.
    """

    encode: Encode = Encode.AUTO
    cache_bytes: int = CACHE_BYTES_DEFAULT
    chains: int = CHAINS_DEFAULT
    tenant: str = ""
    library: Library | None = None

    @property
    def wanted(self) -> bool:
        """Whether pages are encoded at all."""
        return self.encode is not Encode.OPAQUE and self.cache_bytes >= PAGE_BYTES

    @property
    def chains_offered(self) -> int:
        """How many contexts to ask for: the fewest bytes come of one."""
        return 1 if self.encode is Encode.BEST else min(self.chains, CHAINS_MAX)

"""What page-aware encoding did for a session: pages by kind, bytes saved, seconds spent. Sans-IO."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class PageCounts:
    """Pages by how they were encoded; in the order of ``chunking.frame.PageKind``.

    Args:
        zero: nothing but zeros.
        duplicate: found in the page cache.
        delta: as a difference to another page.
        literal: in full, compressed or not.
        copy: found in the content store.
    """

    zero: int = 0
    duplicate: int = 0
    delta: int = 0
    literal: int = 0
    copy: int = 0

    def add(self, counts: Iterable[int]) -> None:
        """Count some more in, given in the same order."""
        for kind, count in zip(self.__slots__, counts, strict=True):
            setattr(self, kind, getattr(self, kind) + count)

    @property
    def total(self) -> int:
        """All of them."""
        return self.zero + self.duplicate + self.delta + self.literal + self.copy


@dataclass(slots=True)
class PageTally:
    """Sums over the frames of one session, at either end.

    Args:
        pages: by kind, of all frames encoded by pages.
        raw_bytes: stream bytes of those frames.
        body_bytes: bytes of their bodies.
        plain_bytes: stream bytes of frames that went through the line as they were.
        delta_bytes: what pages took that went as differences, before compression; known where they are encoded.
        missing: stored pages that had to be asked for.
        seconds: spent encoding or decoding, all threads together.
        regimes: frames by how much work each got; at the source only.
    """

    pages: PageCounts = field(default_factory=PageCounts)
    raw_bytes: int = 0
    body_bytes: int = 0
    plain_bytes: int = 0
    delta_bytes: int = 0
    missing: int = 0
    seconds: float = 0.0
    regimes: Counter[str] = field(default_factory=Counter)

    def add(self, counts: Iterable[int] | None, raw: int, body: int, seconds: float) -> None:
        """One frame; ``counts`` is None where it went as it was."""
        self.seconds += seconds
        if counts is None:
            self.plain_bytes += raw
            return
        self.pages.add(counts)
        self.raw_bytes += raw
        self.body_bytes += body

    @property
    def saved_bytes(self) -> int:
        """Bytes that did not have to cross the network."""
        return self.raw_bytes - self.body_bytes

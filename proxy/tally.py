"""What page-aware encoding did for a session: pages by kind, bytes saved, seconds spent. Sans-IO."""

from dataclasses import dataclass, field

from chunking.counts import PageCounts


@dataclass(slots=True)
class PageTally:
    """Sums over the frames of one session, at either end.

    Args:
        pages: by kind, of all frames encoded by pages.
        raw_bytes: stream bytes of those frames.
        body_bytes: bytes of their bodies.
        plain_bytes: stream bytes of frames that went as they were.
        seconds: spent encoding or decoding, all threads together.
    """

    pages: PageCounts = field(default_factory=PageCounts)
    raw_bytes: int = 0
    body_bytes: int = 0
    plain_bytes: int = 0
    seconds: float = 0.0

    def add(self, counts: PageCounts | None, raw: int, body: int, seconds: float) -> None:
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

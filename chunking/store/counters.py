"""What the store of this process has done so far, for metrics."""

from dataclasses import dataclass, field
from threading import Lock


@dataclass(slots=True)
class Counters:
    """Counts since the process began; only ever rising.

    Attributes:
        pages_stored: pages sealed and written.
        pages_dropped: pages numbered and not kept: the queue was full, or the store.
        bytes_written: to the disk, seals and tables included.
        hits, misses: pages looked for in the store and found, or not.
        pages_read: pages read for frames.
        pages_missing: pages that a frame wanted and that could not be read.
        segments_finished, segments_abandoned: written whole, or given up and removed.
        segments_damaged: found damaged.
        segments_evicted: removed to make room.
    """

    pages_stored: int = 0
    pages_dropped: int = 0
    bytes_written: int = 0
    hits: int = 0
    misses: int = 0
    pages_read: int = 0
    pages_missing: int = 0
    segments_finished: int = 0
    segments_abandoned: int = 0
    segments_damaged: int = 0
    segments_evicted: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, **amounts: int) -> None:
        """Add to counts by name; several threads may."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

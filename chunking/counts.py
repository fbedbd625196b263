"""How many pages of each kind. Sans-IO."""

from dataclasses import dataclass


@dataclass(slots=True)
class PageCounts:
    """Pages of some frames, by how they were encoded.

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

    def add(self, other: "PageCounts") -> None:
        """Count another's in."""
        self.zero += other.zero
        self.duplicate += other.duplicate
        self.delta += other.delta
        self.literal += other.literal
        self.copy += other.copy

    @property
    def total(self) -> int:
        """All of them."""
        return self.zero + self.duplicate + self.delta + self.literal + self.copy

"""What a migration's streams tell of the guest: its name, and the rounds over its memory. Sans-IO."""

from collections.abc import Callable
from typing import Final

from chunking.dirty import DirtyTracker
from chunking.pages import Spans
from proxy.control import printable
from proxy.limits import VM_NAME_CHARACTERS_MAX
from proxy.streams.vtpm import VtpmWatch

ROUNDS_TOLD: Final = 2  # that have ended: how they compare says whether a migration comes to an end


class GuestView:
    """One guest, as all channels of its session show it.

    A round is the hypervisor's way once through the memory that has changed: it ends where a page comes that was in it.

    Args:
        named: told the VM's name once it is known.
    """

    def __init__(self, named: Callable[[str], None] | None = None) -> None:
        self._named = named
        self.name: str | None = None
        """Of the VM, once a stream has told it; printable and bounded."""
        self.vtpm: VtpmWatch | None = None
        """Is shown the vTPM that QEMU's stream carries; None where nobody wants to know."""
        self._tracker = DirtyTracker()

    def saw(self, spans: Spans, name: str | None) -> None:
        """A piece of a stream has been read.

        Args:
            spans: what it is made of.
            name: of the VM, as the stream's parser has it; None where it has none.
        """
        if self.name is None and name:
            self.name = printable(name)[:VM_NAME_CHARACTERS_MAX]
            if self._named is not None:
                self._named(self.name)
        self._tracker.take(spans.pfns)
        self._tracker.take(spans.marked)

    @property
    def guest_pages(self) -> int:
        """Pages that the streams have brought or spoken of, each time one was."""
        return self._tracker.dirt.pages

    @property
    def rounds(self) -> int:
        """Rounds so far, the one under way included; 0 before any page came."""
        return self._tracker.dirt.rounds

    @property
    def rounds_ended(self) -> tuple[int, ...]:
        """Pages in the last ``ROUNDS_TOLD`` rounds that have ended, or in fewer, the latest last."""
        return self._tracker.dirt.round_pages[-1 - ROUNDS_TOLD : -1]

    @property
    def round_pages(self) -> int:
        """Pages in the round under way."""
        under_way = self._tracker.dirt.round_pages[-1:]
        return sum(under_way)

    @property
    def dirty_pages(self) -> int:
        """Pages that came again: the guest had changed them after they were sent."""
        return self._tracker.dirt.again

"""What a migration's streams tell of the guest: its name, and the rounds over its memory. Sans-IO."""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chunking.dirty import DirtyTracker
from chunking.pages import Spans
from proxy.control import printable
from proxy.limits import VM_NAME_CHARACTERS_MAX

ROUNDS_TOLD: Final = 2  # that have ended: how they compare says whether a migration comes to an end
ROUNDS_EASY_MAX: Final = 1024  # of one migration before it is asked whether they are rounds at all
ROUND_PAGES_MIN: Final = 256  # on average from then on: shorter ones would have ended the migration
_STEP_PAGES: Final = 1024  # looked at in one go


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
        self._follow(spans.pfns)
        self._follow(spans.marked)

    def _follow(self, pfns: NDArray[np.uint64]) -> None:
        """Count pages, a few at a time: many rounds in one piece are no guest's, and would hold everybody else up."""
        for start in range(0, len(pfns), _STEP_PAGES):
            dirt = self._tracker.dirt
            if dirt.rounds > ROUNDS_EASY_MAX + dirt.pages // ROUND_PAGES_MIN:
                return
            self._tracker.take(pfns[start : start + _STEP_PAGES])

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

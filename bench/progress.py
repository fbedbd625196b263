"""One line that follows the run: rewritten on a terminal, a plain line a step elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console


class Progress:
    """Tells people what is being measured; the section's name goes before each step."""

    def __init__(self) -> None:
        """Start the line."""
        self._console = Console(stderr=True)
        self._status = self._console.status("bench") if self._console.is_terminal else None
        self._section = ""
        self._start_s = time.monotonic()
        if self._status is not None:
            self._status.start()

    def section(self, name: str) -> None:
        """The steps from now on belong to this section."""
        self._section = f"{name}: "

    def step(self, what: str) -> None:
        """Say what is being measured now."""
        text = f"bench: {self._section}{what} ({time.monotonic() - self._start_s:.0f} s)"
        if self._status is not None:
            self._status.update(text)
        else:
            sys.stderr.write(text + "\n")

    def warn(self, message: str) -> None:
        """A line that stays."""
        self._console.print(f"bench: {self._section}{message}", highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Take the line away."""
        if self._status is not None:
            self._status.stop()

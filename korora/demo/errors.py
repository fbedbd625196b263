"""What can end the demo early: one class, an exit code each time it is raised, and a remedy where there is one."""

from __future__ import annotations

EXIT_SETUP = 2  # QEMU, kernel or another part is missing
EXIT_HYPERVISOR = 7  # a hypervisor failed, or the guest did not survive
EXIT_BUG = 70


class DemoError(Exception):
    """The demo cannot go on.

    Args:
        message: what happened, one line.
        exit_code: of the design's table.
        remedy: what to do about it, a sentence without its full stop.
    """

    def __init__(self, message: str, exit_code: int = EXIT_HYPERVISOR, remedy: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.remedy = remedy

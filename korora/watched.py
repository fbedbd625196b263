"""The seam between who answers and signs for a host's sessions and whatever counts that; a daemon's observer fits it.

Receipts are made in threads: whatever counts here is called from several at once.
"""

from typing import Protocol

from crypto.errors import ReceiptError


class Watch(Protocol):
    """Told of what happens, in the process where it happens. Must not raise, and must not wait."""

    def decided(self, role: str, point: str, *, allowed: bool) -> None:
        """A session asked whether it may go on, at this point (``proxy.authority.Point``), and has its answer."""

    def approvals_waiting(self, role: str, count: int) -> None:
        """So many sessions of this process wait for people now."""

    def receipt_logged(self, role: str, stage: str, *, both: bool) -> None:
        """A receipt of this stage is in the log, signed by both hosts or by this one alone."""

    def receipt_failed(self) -> None:
        """A session is over, and its outcome cannot be logged."""

    def receipt_spared(self) -> None:
        """An offer was refused, and left no receipt: its peer has left enough of late."""

    def log_disputed(self, error: ReceiptError) -> None:
        """A peer's log is not what it was, or its head is none."""

    def attested(self, seconds: float) -> None:
        """This host has shown its platform, and its TPM took so long."""

    def appraised(self, verdict: str) -> None:
        """A peer's platform was judged: ``proved``, or why not (``AttestationError.reason``)."""

    def surveyed(self, check: str, grade: str) -> None:
        """Two hosts were compared before a session, by one check (``proxy.preflight.CHECKS``)."""


class Unwatched:
    """Counts nothing."""

    def decided(self, role: str, point: str, *, allowed: bool) -> None:
        """See ``Watch``."""

    def approvals_waiting(self, role: str, count: int) -> None:
        """See ``Watch``."""

    def receipt_logged(self, role: str, stage: str, *, both: bool) -> None:
        """See ``Watch``."""

    def receipt_failed(self) -> None:
        """See ``Watch``."""

    def receipt_spared(self) -> None:
        """See ``Watch``."""

    def log_disputed(self, error: ReceiptError) -> None:
        """See ``Watch``."""

    def attested(self, seconds: float) -> None:
        """See ``Watch``."""

    def appraised(self, verdict: str) -> None:
        """See ``Watch``."""

    def surveyed(self, check: str, grade: str) -> None:
        """See ``Watch``."""

"""The seam between the daemon and whatever counts what it does."""

from collections.abc import Sequence
from typing import Protocol

from proxy.report import SessionReport
from proxy.status import SessionStatus


class Observer(Protocol):
    """Told of what happens, in the process where it happens. Must not raise, and must not wait."""

    def session_begun(self, role: str) -> None:
        """A session is open. In a worker."""

    def session_ended(self, report: SessionReport, status: SessionStatus) -> None:
        """A session has ended; its report and its last status. In a worker."""

    def sample(self, statuses: Sequence[SessionStatus], lag_seconds: float) -> None:
        """How all sessions of this worker stand, once a second, and the worst lag of its loop since. In a worker."""

    def peer_refused(self, error: Exception) -> None:
        """A peer was not let in. In a worker."""

    def reloaded(self, *, good: bool) -> None:
        """A reload was asked for, and done or refused. In the parent."""

    def worker_restarted(self) -> None:
        """A worker had died and was started again. In the parent."""


class Unobserved:
    """Counts nothing."""

    def session_begun(self, role: str) -> None:
        """See ``Observer.session_begun``."""

    def session_ended(self, report: SessionReport, status: SessionStatus) -> None:
        """See ``Observer.session_ended``."""

    def sample(self, statuses: Sequence[SessionStatus], lag_seconds: float) -> None:
        """See ``Observer.sample``."""

    def peer_refused(self, error: Exception) -> None:
        """See ``Observer.peer_refused``."""

    def reloaded(self, *, good: bool) -> None:
        """See ``Observer.reloaded``."""

    def worker_restarted(self) -> None:
        """See ``Observer.worker_restarted``."""

"""The seam between the daemon and whatever counts what it does; ``korora.metrics.observer.Observer`` fits it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from crypto.identity import Identity
from korora.watched import Unwatched, Watch
from proxy.report import SessionReport
from proxy.status import SessionStatus


class Observer(Watch, Protocol):
    """Told of what happens, in the process where it happens. Must not raise, and must not wait.

    Called on the event loop, except what is a ``Watch``'s.
    """

    # ---- in a worker

    def session_begun(self, role: str) -> None:
        """A session is open."""

    def session_ended(
        self, report: SessionReport, status: SessionStatus | None = None, error: BaseException | None = None
    ) -> None:
        """A session has ended, open or not; its concluded report, its last status, what ended it early."""

    def sample(self, statuses: Sequence[SessionStatus], lag_seconds: float) -> None:
        """How all sessions of this process stand, once a second, and the worst lag of its loop since."""

    def store(self, counts: Mapping[str, int]) -> None:
        """What the content store of this process has done so far, by the names of ``chunking.store.Counters``."""

    def handover_ended(self, role: str, kind: str, outcome: str, seconds: float | None) -> None:
        """A guarded hand-over has ended, `done` or `aborted`; seconds from `voted` to `done`, where it was both."""

    def handovers_unsettled(self, counts: Mapping[tuple[str, str], int]) -> None:
        """So many hand-overs of this host are not finished, by role and state, `unreadable` being one."""

    def peer_refused(self, error: BaseException) -> None:
        """A peer was not let in."""

    def identity(self, identity: Identity) -> None:
        """An identity was loaded."""

    # ---- in the parent

    def workers(self, alive: int) -> None:
        """So many workers can take work."""

    def worker_restarted(self) -> None:
        """A worker had died and was started again."""

    def session_died(self, role: str) -> None:
        """A session died with its worker."""

    def ready(self, *, on: bool) -> None:
        """Whether new sessions are taken."""

    def draining(self, *, on: bool) -> None:
        """Whether running sessions are seen to their end."""

    def reloaded(self, *, good: bool) -> None:
        """A reload was asked for, and done or refused."""


class Unobserved(Unwatched):
    """Counts nothing."""

    def session_begun(self, role: str) -> None:
        """See ``Observer``."""

    def session_ended(
        self, report: SessionReport, status: SessionStatus | None = None, error: BaseException | None = None
    ) -> None:
        """See ``Observer``."""

    def sample(self, statuses: Sequence[SessionStatus], lag_seconds: float) -> None:
        """See ``Observer``."""

    def store(self, counts: Mapping[str, int]) -> None:
        """See ``Observer``."""

    def handover_ended(self, role: str, kind: str, outcome: str, seconds: float | None) -> None:
        """See ``Observer``."""

    def handovers_unsettled(self, counts: Mapping[tuple[str, str], int]) -> None:
        """See ``Observer``."""

    def peer_refused(self, error: BaseException) -> None:
        """See ``Observer``."""

    def identity(self, identity: Identity) -> None:
        """See ``Observer``."""

    def workers(self, alive: int) -> None:
        """See ``Observer``."""

    def worker_restarted(self) -> None:
        """See ``Observer``."""

    def session_died(self, role: str) -> None:
        """See ``Observer``."""

    def ready(self, *, on: bool) -> None:
        """See ``Observer``."""

    def draining(self, *, on: bool) -> None:
        """See ``Observer``."""

    def reloaded(self, *, good: bool) -> None:
        """See ``Observer``."""

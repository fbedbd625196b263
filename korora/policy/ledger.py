"""Which sessions run, and which have begun within the hour: what limits on their number go by. Pure."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

HOUR: Final = timedelta(hours=1)
STARTS_MAX: Final = 16_384  # kept of the last hour; more than any rule's sessions_per_hour, so that none is loosened


@dataclass(frozen=True, slots=True)
class Usage:
    """How much is in use, as far as one session is concerned: by those that began before it.

    So of many that begin at once, the first ones are within a limit at every point, whoever came later.

    Attributes:
        running: sessions that run.
        peers, tenants, users: the same, of each.
        started: sessions of each peer that have begun within the hour, whether they run or not.
    """

    running: int = 0
    peers: Mapping[str, int] = field(default_factory=dict)
    tenants: Mapping[str, int] = field(default_factory=dict)
    users: Mapping[int, int] = field(default_factory=dict)
    started: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class _Session:
    session: str
    peer: str
    tenant: str
    user: int | None
    at: datetime


class Ledger:
    """Of one process. A session that the offer was allowed is begun; whatever became of it, it is ended once."""

    def __init__(self) -> None:
        self._running: dict[str, _Session] = {}  # in the order they began
        self._started: deque[_Session] = deque(maxlen=STARTS_MAX)

    def begin(self, session: str, peer: str, tenant: str, user: int | None, now: datetime) -> None:
        """A session begins; nothing if it has."""
        if session not in self._running:
            begun = _Session(session, peer, tenant, user, now)
            self._running[session] = begun
            self._started.append(begun)

    def end(self, session: str) -> None:
        """It is over; nothing if it never began."""
        self._running.pop(session, None)

    def usage(self, now: datetime, session: str = "") -> Usage:
        """How much is in use by those that began before ``session``; by all if it has not begun.

        Args:
            now: with its zone. A clock that was set back forgets nothing too early.
        """
        while self._started and now - self._started[0].at >= HOUR:
            self._started.popleft()
        running, started = list(self._running.values()), list(self._started)
        if session in self._running:
            own = self._running[session]
            del running[running.index(own) :]
            del started[started.index(own) if own in started else 0 :]  # over an hour old, it began before them all
        return Usage(
            len(running),
            Counter(each.peer for each in running),
            Counter(each.tenant for each in running),
            Counter(each.user for each in running if each.user is not None),
            Counter(each.peer for each in started),
        )

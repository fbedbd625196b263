"""The sessions that all workers carry: how each stands, and what each may send. Sans-IO."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from korora.daemon import build
from korora.daemon.config import Config, bytes_per_second
from korora.daemon.messages import Begun, Ended
from korora.daemon.rates import WEIGHTS, Claim, demand, share
from proxy.errors import EXIT_LOST, OUTCOMES
from proxy.session import Role
from proxy.status import SessionStatus

FINISHED_KEPT: Final = 50  # sessions that `korora top` can still tell of
_CHANGE_MIN: Final = 0.02  # a rate that changes by less is left as it is
PREFIX_CHARACTERS_MIN: Final = 4  # of a session id that an operator may write short

Key = tuple[str, str]
"""Session id and role: a daemon that sends to itself has both ends."""


@dataclass(slots=True)
class Live:
    """A session as the parent knows it."""

    worker: int
    way: str
    status: SessionStatus
    throughput: float = 0.0
    """Stream bytes a second between the last two statuses, both ways together."""
    sent: float = 0.0
    """The same, of what entered here."""
    own_limit: float | None = None
    """What an operator allowed this one session; overrides the configuration."""
    limited: bool = False
    """Whether an operator has said anything about it."""
    rate: float | None = None
    """What it was last told."""


class Finished(msgspec.Struct, frozen=True):
    """A session that has ended."""

    session_id: str
    role: str
    way: str
    peer: str
    outcome: str
    exit_code: int
    seconds: float
    bytes_in: int
    bytes_out: int
    error: str | None


class Sessions:
    """All sessions there are, of all workers.

    Args:
        config: the configuration that counts now.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.total: float | None = bytes_per_second(config.limits.rate_limit)
        self.live: dict[Key, Live] = {}
        self.finished: deque[Finished] = deque(maxlen=FINISHED_KEPT)
        self.ended = 0

    def reconfigure(self, config: Config) -> None:
        """Another configuration counts; an operator's total goes, what was said of single sessions stays."""
        self.config = config
        self.total = bytes_per_second(config.limits.rate_limit)

    def begun(self, worker: int, message: Begun) -> None:
        """A worker has opened a session."""
        status = message.status
        live = Live(worker, message.way, status)
        live.rate = status.rate_limit
        self.live[status.session_id, status.role] = live

    def sampled(self, status: SessionStatus) -> None:
        """How a session stands now."""
        live = self.live.get((status.session_id, status.role))
        if live is None:
            return
        before, live.status = live.status, status
        elapsed = status.seconds - before.seconds
        if elapsed > 0:
            live.sent = (status.bytes_in - before.bytes_in) / elapsed
            live.throughput = live.sent + (status.bytes_out - before.bytes_out) / elapsed

    def over(self, message: Ended) -> None:
        """A session has ended, open or not."""
        live = self.live.pop((message.session_id, message.role), None)
        status = message.status or (None if live is None else live.status)
        self.ended += 1
        self.finished.appendleft(
            Finished(
                session_id=message.session_id,
                role=message.role,
                way="" if live is None else live.way,
                peer="" if status is None else status.peer,
                outcome=message.outcome,
                exit_code=message.exit_code,
                seconds=message.seconds,
                bytes_in=0 if status is None else status.bytes_in,
                bytes_out=0 if status is None else status.bytes_out,
                error=message.error,
            )
        )

    def lost(self, worker: int) -> list[Key]:
        """A worker has died, and its sessions with it."""
        keys = [key for key, live in self.live.items() if live.worker == worker]
        for key in keys:
            status = self.live[key].status
            words = "the worker that carried it died"
            self.over(Ended(*key, OUTCOMES[EXIT_LOST], EXIT_LOST, status.seconds, words))
        return keys

    def of(self, worker: int) -> list[Live]:
        """The sessions of one worker."""
        return [live for live in self.live.values() if live.worker == worker]

    def arriving(self, worker: int) -> int:
        """How many of them came from another host."""
        return sum(live.status.role == Role.DESTINATION.value for live in self.of(worker))

    def find(self, text: str) -> list[Key]:
        """The sessions of an id, or of the beginning of one.

        Raises:
            ValueError: no session, or several, begin like that.
        """
        if len(text) < PREFIX_CHARACTERS_MIN:
            raise ValueError(f"write at least {PREFIX_CHARACTERS_MIN} digits of the session's id")
        keys = [key for key in self.live if key[0].startswith(text.lower())]
        ids = {session_id for session_id, _ in keys}
        if not ids:
            raise ValueError(f"no session {text!r} is open")
        if len(ids) > 1:
            raise ValueError(f"{len(ids)} sessions begin with {text!r}: write more of it")
        return keys

    # ---- rates

    def limit(self, keys: Iterable[Key], rate: float | None) -> None:
        """An operator's limit for single sessions; None lifts it and the configuration's too."""
        for key in keys:
            self.live[key].own_limit, self.live[key].limited = rate, True

    def allowed(self, live: Live) -> float | None:
        """What a session may send at most, whatever the others do."""
        return live.own_limit if live.limited else build.session_limit(self.config, live.way)

    def priority(self, live: Live) -> str:
        """Of the ingress that a session came by."""
        ingress = self.config.ingress_named(live.way)
        return "normal" if ingress is None else ingress.priority

    def rates(self) -> dict[int, dict[str, float | None]]:
        """Divide the total anew: what each worker must tell which session, where that has changed."""
        sending = [live for (_, role), live in self.live.items() if role == Role.SOURCE.value]
        weights = [WEIGHTS[self.priority(live)] for live in sending]
        claims = []
        for live, weight in zip(sending, weights, strict=True):
            fair = 0.0 if self.total is None else self.total * weight / sum(weights)
            claims.append(Claim(weight, demand(live.sent, live.rate, fair), self.allowed(live)))
        changes: dict[int, dict[str, float | None]] = {}
        for live, rate in zip(sending, share(self.total, claims), strict=True):
            if _differ(live.rate, rate):
                live.rate = rate
                changes.setdefault(live.worker, {})[live.status.session_id] = rate
        return changes

    # ---- seen

    def views(self) -> list[dict[str, Any]]:
        """Every live session for `korora top` and others, oldest first."""
        ordered = sorted(self.live.values(), key=lambda live: -live.status.seconds)
        return [self._view(live) for live in ordered]

    def _view(self, live: Live) -> dict[str, Any]:
        status: dict[str, Any] = msgspec.to_builtins(live.status)
        departs = live.status.role == Role.SOURCE.value
        return status | {
            "way": live.way,
            "worker": live.worker,
            "priority": self.priority(live) if departs else None,
            "throughput": round(live.throughput),
            "limit": self.allowed(live) if departs else None,
            "rate_limit": live.rate if departs else live.status.rate_limit,
            "rounds": None,
            "eta_seconds": None,
        }


def _differ(old: float | None, new: float | None) -> bool:
    if old is None or new is None:
        return old is not new
    return abs(new - old) > _CHANGE_MIN * old

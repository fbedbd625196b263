"""The sessions that all workers carry: how each stands, and what each may send. Sans-IO."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from korora.daemon import build
from korora.daemon.config import Config, bytes_per_second
from korora.daemon.eta import seconds_left
from korora.daemon.messages import Begun, Ended
from korora.daemon.rates import WEIGHTS, Claim, demand, share
from proxy.errors import EXIT_LOST, OUTCOMES
from proxy.session import Role
from proxy.status import SessionStatus

FINISHED_KEPT: Final = 50  # sessions that `korora top` can still tell of
SETTLING_SAMPLES: Final = 2  # the first of them may have begun before the rate was raised
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
    pages_per_second: float = 0.0
    """Pages of the guest, those sent again counted each time."""
    rate: float | None = None
    """What it was last told."""
    settling: int = 0
    """Samples until what it sends can tell what it wants: its rate has just been raised."""


class Finished(msgspec.Struct, frozen=True):
    """A session that has ended."""

    session_id: str
    role: str
    way: str
    peer: str | None
    vm: str | None
    outcome: str
    exit_code: int
    seconds: float
    bytes_in: int
    bytes_out: int
    bytes_saved: int
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

    def begun(self, worker: int, message: Begun) -> bool:
        """A worker has opened a session; whether it may go on.

        Sources choose the ids. One worker refuses an id that it has already, but knows nothing of the others'.
        """
        status = message.status
        key = (status.session_id, status.role)
        if key in self.live:
            return False
        self.live[key] = Live(worker, message.way, status, rate=status.rate_limit)
        return True

    def sampled(self, worker: int, status: SessionStatus) -> None:
        """How a session stands now."""
        live = self.live.get((status.session_id, status.role))
        if live is None or live.worker != worker:
            return
        before, live.status = live.status, status
        live.settling = max(0, live.settling - 1)
        elapsed = status.seconds - before.seconds
        if elapsed > 0:
            live.sent = (status.bytes_in - before.bytes_in) / elapsed
            live.throughput = live.sent + (status.bytes_out - before.bytes_out) / elapsed
            live.pages_per_second = (status.guest_pages - before.guest_pages) / elapsed

    def over(self, worker: int, message: Ended) -> None:
        """A session has ended, open or not."""
        key = (message.session_id, message.role)
        if key in self.live and self.live[key].worker == worker:
            del self.live[key]
        status = message.status
        self.ended += 1
        self.finished.appendleft(
            Finished(
                session_id=message.session_id,
                role=message.role,
                way=message.way,
                peer=message.peer,
                vm=None if status is None else status.vm,
                outcome=message.outcome,
                exit_code=message.exit_code,
                seconds=message.seconds,
                bytes_in=0 if status is None else status.bytes_in,
                bytes_out=0 if status is None else status.bytes_out,
                bytes_saved=0 if status is None else status.paged_bytes - status.body_bytes,
                error=message.error,
            )
        )

    def lost(self, worker: int) -> list[Key]:
        """A worker has died, and its sessions with it."""
        keys = [key for key, live in self.live.items() if live.worker == worker]
        for key in keys:
            live = self.live[key]
            words, last = "the worker that carried it died", live.status
            self.over(
                worker, Ended(*key, live.way, last.peer, OUTCOMES[EXIT_LOST], EXIT_LOST, last.seconds, words, last)
            )
        return keys

    def of(self, worker: int) -> list[Live]:
        """The sessions of one worker."""
        return [live for live in self.live.values() if live.worker == worker]

    def arriving(self, worker: int) -> int:
        """How many of them came from another host."""
        return sum(live.status.role == Role.DESTINATION.value for live in self.of(worker))

    def departing(self, worker: int, way: str) -> int:
        """How many of them leave by one way."""
        return sum(live.status.role == Role.SOURCE.value and live.way == way for live in self.of(worker))

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
        """An operator's limit for single sessions; None lifts it and the configuration's too.

        Raises:
            ValueError: none of them departs: what arrives is limited where it comes from.
        """
        departing = [key for key in keys if key[1] == Role.SOURCE.value]
        if not departing:
            raise ValueError("that session arrives here: limit it where it departs")
        for key in departing:
            self.live[key].own_limit, self.live[key].limited = rate, True

    def allowed(self, live: Live) -> float | None:
        """What a session may send at most, whatever the others do."""
        return live.own_limit if live.limited else build.session_limit(self.config, live.way)

    def priority(self, live: Live) -> str:
        """Of the ingress that a session came by."""
        departure = self.config.departure_named(live.way)
        return "normal" if departure is None else departure.priority

    def rates(self) -> dict[int, dict[str, float | None]]:
        """Divide the total anew: what each worker must tell which session, where that has changed."""
        sending = [live for (_, role), live in self.live.items() if role == Role.SOURCE.value]
        weights = [WEIGHTS[self.priority(live)] for live in sending]
        claims = []
        for live, weight in zip(sending, weights, strict=True):
            fair = 0.0 if self.total is None else self.total * weight / sum(weights)
            wants = None if live.settling else demand(live.sent, live.rate, fair)
            claims.append(Claim(weight, wants, self.allowed(live)))
        changes: dict[int, dict[str, float | None]] = {}
        for live, rate in zip(sending, share(self.total, claims), strict=True):
            if _differ(live.rate, rate):
                if live.rate is None or rate is None or rate > live.rate:
                    live.settling = SETTLING_SAMPLES
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
            "rounds": live.status.rounds or None,
            "bytes_saved": live.status.paged_bytes - live.status.body_bytes,
            "eta_seconds": seconds_left(live.status, live.pages_per_second),
        }


def _differ(old: float | None, new: float | None) -> bool:
    if old is None or new is None:
        return old is not new
    return abs(new - old) > _CHANGE_MIN * old

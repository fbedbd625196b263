"""Which sessions run, and which have begun within the hour: what limits on their number go by. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

import msgspec

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


class Begun(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A session that has begun.

    Attributes:
        session: what its relay calls it.
        peer, tenant, user: see ``proxy.authority.Question``.
        at: when, with its zone.
        process: whose it is; empty where there is but one.
        runs: whether it is not over.
    """

    session: str
    peer: str
    tenant: str
    user: int | None
    at: datetime
    process: str = ""
    runs: bool = True


def counted(begun: Sequence[Begun], now: datetime, session: str, process: str = "") -> Usage:
    """How much is in use by those that began before ``session``; by all if it does not run.

    Args:
        begun: in the order they began.
        now: with its zone. A clock that was set back forgets nothing too early.
        session, process: as ``Begun`` calls it; an empty session is none.
    """
    own = next(
        (
            number
            for number, each in enumerate(begun)
            if each.runs and (each.session, each.process) == (session, process)
        ),
        len(begun),
    )
    running = [each for each in begun[:own] if each.runs]
    return Usage(
        len(running),
        Counter(each.peer for each in running),
        Counter(each.tenant for each in running),
        Counter(each.user for each in running if each.user is not None),
        Counter(each.peer for each in begun[:own] if now - each.at < HOUR),
    )


def kept(begun: Sequence[Begun], now: datetime) -> list[Begun]:
    """Without those that count for nothing any more: at most STARTS_MAX beside those that run."""
    late = [each for each in begun if each.runs or now - each.at < HOUR]
    over = len(late) - STARTS_MAX
    if over <= 0:
        return late
    ended = [number for number, each in enumerate(late) if not each.runs][:over]
    gone = frozenset(ended)
    return [each for number, each in enumerate(late) if number not in gone]

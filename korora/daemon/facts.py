"""What the daemon says of itself, for `korora top`, the control socket and the metrics port's /status."""

import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from korora import __version__
from korora.daemon.config import Config
from korora.daemon.crew import Member
from korora.daemon.table import Sessions
from korora.daemon.ways import Way

REFUSALS_KEPT: Final = 20  # the last peers that were not let in


@dataclass(slots=True)
class Counts:
    """What has happened since the beginning."""

    began: float = field(default_factory=time.time)
    refused: int = 0
    refusals: deque[str] = field(default_factory=lambda: deque(maxlen=REFUSALS_KEPT))
    good_reloads: int = 0
    bad_reloads: int = 0
    restart_needed: list[str] = field(default_factory=list)
    """Keys of the configuration that wait for a restart."""

    def peer_refused(self, reason: str) -> None:
        """A worker did not let a peer in."""
        self.refused += 1
        self.refusals.append(reason)

    def reloaded(self, *, good: bool) -> None:
        """A reload is over."""
        self.good_reloads += good
        self.bad_reloads += not good


def facts(
    counts: Counts, config: Config, sessions: Sessions, *, ways: Iterable[Way], members: Sequence[Member]
) -> dict[str, Any]:
    """All but name, phase and address, as JSON has it."""
    return {
        "version": __version__,
        "pid": os.getpid(),
        "uptime_seconds": round(time.time() - counts.began, 1),
        "sessions_max": config.sessions_max,
        "rate_limit": sessions.total,
        "sessions_ended": sessions.ended,
        "peers_refused": counts.refused,
        "last_refusals": list(counts.refusals),
        "reloads": {"good": counts.good_reloads, "bad": counts.bad_reloads},
        "restart_needed": counts.restart_needed,
        "sessions": sessions.views(),
        "finished": msgspec.to_builtins(list(sessions.finished)),
        "ingresses": [
            {"name": way.name, "from": way.ingress.label, "worker": way.worker, "leaving": way.leaving} for way in ways
        ],
        "xl": {"socket": config.xl.socket, "peers": [peer.name for peer in config.xl_peers()]}
        if config.xl.socket
        else None,
        "egresses": [{"name": egress.name, "to": egress.to} for egress in config.egress],
        "workers": [
            {
                "index": member.index,
                "pid": member.pid,
                "ready": member.ready,
                "restarts": member.restarts,
                "sessions": len(sessions.of(member.index)),
                "lag_seconds": round(member.lag_seconds, 4),
            }
            for member in members
        ],
    }

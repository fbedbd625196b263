"""Who may use which egress, and turns at those that take one session at a time, whichever worker carries it."""

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from crypto.tls import PeerInfo
from korora.daemon.config import Config
from proxy.control import Offer
from proxy.endpoints.base import Egress
from proxy.errors import PolicyRefused
from proxy.limits import HANDSHAKE_SECONDS_MAX


@dataclass(slots=True)
class _Admitted:
    """A session that was let in."""

    egress: str
    at: float
    lock: int | None
    """Descriptor of the lock file that is held for it."""
    begun: bool = False


class Admission:
    """One worker's answer to offers. The lock of an egress goes with the process, however that ends.

    Args:
        folder: an existing directory for lock files.
        clock: seconds.
    """

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self._folder, self._clock = folder, clock
        self._users: dict[str, frozenset[str]] = {}
        self._exclusive: dict[str, bool] = {}
        self._admitted: dict[bytes, _Admitted] = {}

    def reconfigure(self, config: Config, egresses: dict[str, Egress]) -> None:
        """Answer by this from now on."""
        everybody = frozenset(peer.name for peer in config.peer)
        self._users = {egress.name: frozenset(egress.peers) or everybody for egress in config.egress}
        self._exclusive = {name: egress.exclusive for name, egress in egresses.items()}

    def admit(self, peer: PeerInfo, offer: Offer) -> None:
        """See ``Terms.admit``.

        Raises:
            PolicyRefused: this peer may not use that egress, or it is another session's turn.
        """
        self.allow(peer, offer.egress)
        self._forget_stillborn()
        if offer.session in self._admitted:
            return
        lock = self._locked(offer.egress) if self._exclusive.get(offer.egress) else None
        self._admitted[offer.session] = _Admitted(offer.egress, self._clock(), lock)

    def allow(self, peer: PeerInfo, egress: str) -> None:
        """See ``Terms.allow``.

        Raises:
            PolicyRefused: this peer may not use that egress.
        """
        if peer.name not in self._users.get(egress, frozenset()):
            raise PolicyRefused(f"{peer.name} may not use the egress {egress!r}")

    def begun(self, session: bytes) -> str:
        """A session that was admitted is open; the name of its egress."""
        admitted = self._admitted.get(session)
        if admitted is None:
            return ""
        admitted.begun = True
        return admitted.egress

    def ended(self, session: bytes) -> None:
        """A session is over: the next one has its turn."""
        admitted = self._admitted.pop(session, None)
        if admitted is not None and admitted.lock is not None:
            os.close(admitted.lock)

    def _forget_stillborn(self) -> None:
        """Let go of what was admitted and never came to be: its connection broke before ACCEPT had left."""
        late = self._clock() - HANDSHAKE_SECONDS_MAX
        for session in [key for key, admitted in self._admitted.items() if not admitted.begun and admitted.at < late]:
            self.ended(session)

    def _locked(self, egress: str) -> int:
        busy = PolicyRefused(f"the egress {egress!r} serves one session at a time")
        try:
            lock = os.open(self._folder / egress, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise PolicyRefused(f"no turn can be had at the egress {egress!r}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with suppress(OSError):
                os.close(lock)
            raise busy from None
        return lock

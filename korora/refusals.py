"""How many refused offers of one peer leave a receipt: a peer that is refused again and again does not fill the log."""

from collections import OrderedDict, deque
from datetime import datetime, timedelta
from typing import Final

REFUSALS_LOGGED_MAX: Final = 60  # of one peer in an hour and a process: each is a synced entry of 2 KiB, so 3 MiB a day
REFUSALS_WINDOW: Final = timedelta(hours=1)
PEERS_MAX: Final = 1024  # remembered, the latest: all have certificates of our CA, and each takes some 4 KiB


class Refusals:
    """Of a process; called from one thread at a time."""

    def __init__(self) -> None:
        self._times: OrderedDict[str, deque[datetime]] = OrderedDict()
        self._told: set[str] = set()
        """Peers beyond it, of whom that was said."""

    def leaves_receipt(self, peer: str, now: datetime) -> bool:
        """Whether a refusal of that peer, now, is to be logged."""
        times = self._times.setdefault(peer, deque(maxlen=REFUSALS_LOGGED_MAX))
        self._times.move_to_end(peer)
        while len(self._times) > PEERS_MAX:
            self._told.discard(self._times.popitem(last=False)[0])
        if len(times) == REFUSALS_LOGGED_MAX and timedelta(0) <= now - times[0] < REFUSALS_WINDOW:
            return False
        times.append(now)
        self._told.discard(peer)
        return True

    def is_news(self, peer: str) -> bool:
        """Whether it was not said yet that refusals of that peer are not logged any more; once, until one is again."""
        news = peer not in self._told
        self._told.add(peer)
        return news

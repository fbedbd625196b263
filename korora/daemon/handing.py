"""Hand-overs in a worker: those of its sessions, those that come back with xl's pipes, and what the journal has."""

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from korora.daemon import build
from korora.daemon.config import Config
from korora.daemon.observer import Observer
from korora.handovers import open_handovers, reach, recover_for_ever
from korora.xl.desk import lost, verdict_on
from korora.xl.words import Verdict
from proxy.authority import Trustee
from proxy.endpoints.handed import HandedPipes
from proxy.errors import JournalBusy
from proxy.handover.record import UNREADABLE, Record
from proxy.handover.table import State
from proxy.shell.handovers import Handovers, Reach

BUSY_SECONDS: Final = 0.5  # between attempts at a hand-over that another process is at work on


class Handing:
    """One worker's part in hand-overs.

    Args:
        observer: told of what has ended, and of what stays unsettled.
        settled: told of what has ended, too.
    """

    def __init__(self, observer: Observer, settled: Callable[[Record], None]) -> None:
        self._observer, self._settled = observer, settled
        self.handovers: Handovers | None = None
        """None before the first configuration."""
        self._config: Config | None = None

    def configure(self, config: Config, trustee: Trustee) -> bool:
        """Take a configuration over: whether it is the first. The journal stays where that one said."""
        first = self.handovers is None
        if self.handovers is None:
            self.handovers = open_handovers(Path(config.state), self._ended, trustee)
        self._config = config
        return first

    async def recover(self) -> None:
        """Finish what is left unsettled, until cancelled. One worker of a daemon is enough."""
        if self.handovers is not None:
            await recover_for_ever(self.handovers, self._reach, self._unsettled)

    def _reach(self) -> Reach:
        """Destinations are asked by the identity, and judged by the rules, of today."""
        config = self._config
        return reach(Path()) if config is None else reach(Path(config.identity), build.rules_of(config))

    def _ended(self, record: Record) -> None:
        self._observer.handover_ended(
            record.head.side, record.head.kind, record.state.value, record.seconds(State.VOTED, State.DONE)
        )
        self._settled(record)

    def _unsettled(self, left: list[Record]) -> None:
        counts = Counter((record.side.value, record.state.value) for record in left)
        if self.handovers is not None:
            counts.update({(side, UNREADABLE): count for side, count in self.handovers.journal.unreadable.items()})
        self._observer.handovers_unsettled(counts)

    async def readopt(self, session_id: str, pipes: HandedPipes) -> Verdict | None:
        """See ``Readopt``: the journal says how far the hand-over had come."""
        if self.handovers is None:
            pipes.leave()  # the daemon is coming up
            return None
        while True:
            try:
                party = await self.handovers.readopt(session_id, pipes, self._reach())
            except JournalBusy:  # somebody's korora handover recover, say
                await asyncio.sleep(BUSY_SECONDS)
            else:
                return await lost(session_id, pipes) if party is None else verdict_on(party.record)

"""What a session does for its guard, and the guard's part in its life."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from crypto.errors import CryptoError
from proxy.control import Message
from proxy.errors import HypervisorFailed, RelayError
from proxy.handover.table import Side, State
from proxy.handover.words import word_of
from proxy.limits import CONTROL_SECONDS_MAX
from proxy.report import SessionReport
from proxy.session import Session
from proxy.shell.guard import Guard
from proxy.shell.services import Services

log = structlog.get_logger("korora.handover")


class Guarded(Services):
    """A session whose hand-over may be guarded.

    Args:
        session: the sans-IO state.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.guard: Guard | None = None
        """Its hand-over; None where the hypervisors hand over unguarded."""
        self._parted = False
        """Whether the peer was told that the session is over."""
        self.let_go: Callable[[Guard], None] = _close
        """What becomes of the guard afterwards."""

    async def say(self, message: Message) -> None:
        """Send a control message; see ``Runner.say``."""
        raise NotImplementedError

    @property
    def moved(self) -> bool:
        """Whether the machine runs at the destination, whatever became of the session."""
        return self.guard is not None and self.guard.party.state is State.DONE

    async def see_through(self) -> None:
        """What is left of the hand-over of a session that failed, before the hypervisor's connection may close."""
        if self.guard is None or self._failure is None:
            return
        try:
            await self.guard.see_through(self._failure)
        except (RelayError, OSError) as error:
            log.error("the hand-over cannot be seen through", reason=str(error))  # noqa: TRY400 - told, not traced

    async def say_word(self, state: State, why: str, *, paused: bool = False) -> None:
        """See ``guard.Session``; once the peer was told that the session is over, visits have to do.

        A peer that does not read must not keep this side from turning back: what it has not heard it will be told.
        """
        if not self._parted:
            with suppress(RelayError, CryptoError, TimeoutError):
                async with asyncio.timeout(CONTROL_SECONDS_MAX):
                    await self.say(word_of(state, why, paused=paused))

    @property
    def met(self) -> bool:
        """See ``guard.Session``."""
        raise NotImplementedError

    async def until_delivered(self) -> None:
        """See ``guard.Session``."""
        halves = self.session.senders.values()
        if not await self.until(lambda: not any(half.in_flight for half in halves), CONTROL_SECONDS_MAX):
            raise HypervisorFailed("the destination has not taken all that was sent")

    async def finish_handover(self) -> None:
        """The session is over: if all went well, leave nothing of the source's copy behind.

        The machine runs at the destination, whatever comes of this: recovery tries again.
        """
        if self.guard is not None and self._failure is None:
            try:
                await self.guard.finish()
            except RelayError as error:
                log.warning("something of a machine that has moved is left behind", reason=str(error))

    def end_handover(self, report: SessionReport) -> None:
        """Let the guard go; how its hand-over ended is written into the report."""
        if self.guard is None:
            return
        self.let_go(self.guard)
        report.handover, report.handover_kind = self.guard.party.state.value, self.guard.kind
        if self.guard.party.handover.side is Side.SOURCE:
            report.handover_seconds = self.guard.party.record.seconds(State.VOTED, State.DONE)


def _close(guard: Guard) -> None:
    guard.close()

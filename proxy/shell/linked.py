"""The control connection of a session: it is heard, it beats, and it may be lost and come again.

A connection that is lost takes its two tasks and all lanes with it. While the session may resume, that is no failure:
one timer runs until the peer is there again, with a connection and a lane; it is the failure.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import structlog

from crypto.tls import PeerInfo
from proxy.control import Heartbeat, LaneLost, LaneProgress, Message, Word
from proxy.errors import PeerLost, ProtocolViolation
from proxy.limits import FIRST_LANE_SECONDS_MAX, HEARTBEAT_SECONDS, HEARTBEATS_MISSED_MAX
from proxy.session import Session
from proxy.shell.guarded import Guarded
from proxy.shell.lane import LaneKeys
from proxy.shell.link import ControlLink
from proxy.shell.waiting import Signal

log = structlog.get_logger("korora.session")


@dataclass(frozen=True, slots=True)
class Meeting:
    """A peer that was met: the open control connection, who it is, and the keys of its lanes."""

    link: ControlLink
    peer: PeerInfo
    keys: LaneKeys


class Linked(Guarded):
    """A session with a control connection; ``Laned`` gives it lanes, ``Runner`` channels.

    Args:
        session: the sans-IO state.
        meeting: the first control connection, past ACCEPT.
    """

    def __init__(self, session: Session, meeting: Meeting) -> None:
        super().__init__(session)
        self.link: ControlLink | None = meeting.link
        """The control connection; None while the peer is away."""
        self.peer, self.keys = meeting.peer, meeting.keys
        self.changed = Signal()
        """For the source: there are other lanes, or another control connection."""
        self.log = log.bind(session=session.id.hex()[:8], role=session.role.value, peer=meeting.peer.name)
        self._beating: asyncio.Task[None] | None = None
        self._links_sent = self._links_received = 0
        """What control connections that are gone have carried."""

    # ---- what the session adds

    def _came(self) -> None:
        """The peer is there, and has not been told anything yet."""
        raise NotImplementedError

    def _went(self) -> None:
        """The peer is away: drop the lanes, whose keys came of the control connection that is gone."""
        raise NotImplementedError

    def _progress(self) -> tuple[LaneProgress, ...]:
        """What was sent on the lanes so far, for a heartbeat."""
        raise NotImplementedError

    def _progressed(self, lanes: tuple[LaneProgress, ...]) -> None:
        """The peer has said so much on its lanes."""
        raise NotImplementedError

    def _lost_there(self, number: int) -> None:
        """The peer has lost a lane; ours may not show it yet."""
        raise NotImplementedError

    async def _hear(self, message: Message) -> None:
        """Act on a control message that is the role's to hear."""
        raise NotImplementedError

    # ---- the peer comes and goes

    @property
    def met(self) -> bool:
        """See ``guard.Session``."""
        return self.link is not None and not self.over

    def attach(self, meeting: Meeting) -> None:
        """Go on with this control connection: hear it, send heartbeats, and take lanes of its keys from now on."""
        link = self.link = meeting.link
        self.peer, self.keys = meeting.peer, meeting.keys
        self._came()
        if self.guard is not None:
            self.serve(self.guard.repeat(), "repeat the word")
        self._listening = self.serve(self._with(link, self.listen), "listen")
        self._beating = self.serve(self._with(link, self.beat), "heartbeat")
        if self.session.resume_seconds:
            # A first lane is no return: how long losses are waited out says nothing about it.
            self._set_deadline(PeerLost("it opened no lane"), FIRST_LANE_SECONDS_MAX)
        self.changed.wake()
        self.progress.wake()

    async def _with(self, link: ControlLink, work: Callable[[ControlLink], Coroutine[Any, Any, None]]) -> None:
        try:
            await work(link)
        except PeerLost as error:
            self.detach(link, error)

    def detach(self, link: ControlLink, error: PeerLost) -> None:
        """A control connection is lost, and its lanes with it, whose keys came of it: wait for the peer, if agreed."""
        if link is not self.link or self.over or self._concluded:
            return
        if not self.session.resume_seconds:
            self.fail(error)
            return
        self.link = None
        for task in (self._listening, self._beating):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        self._listening = self._beating = None
        self._went()
        link.drop()
        self._links_sent += link.sent_bytes
        self._links_received += link.received_bytes
        self.log.warning("the peer is away", reason=str(error), seconds_max=self.session.resume_seconds)
        self._set_deadline(error)
        self.changed.wake()

    def _set_deadline(self, error: PeerLost, seconds: float = 0) -> None:
        """From now on, ``resume_seconds`` to have control connection and lane again, or ``seconds`` if that is more.

        A deadline that is sooner stays.
        """
        seconds = max(seconds, self.session.resume_seconds)
        if self._deadline is not None:
            if self._deadline.when() <= self._loop.time() + seconds:
                return
            self._deadline.cancel()
        final = PeerLost(f"the peer was away for over {seconds:.0f} s: {error}")
        self._deadline = self._loop.call_later(seconds, self.fail, final)

    def _lift_deadline(self) -> None:
        """Control connection and lane are both there."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    async def say(self, message: Message) -> None:
        """Send a control message that the session's state follows; if the peer is away, RESUME will make up for it."""
        self.session.sent(message)
        link = self.link
        if link is None:
            return
        try:
            await link.send(message)
        except PeerLost as error:
            self.detach(link, error)

    # ---- services of one control connection

    async def beat(self, link: ControlLink) -> None:
        """Send heartbeats."""
        number = 0
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            await link.send(Heartbeat(number, self._progress()))
            number += 1

    async def listen(self, link: ControlLink) -> None:
        """Hear the control connection; silence for three heartbeats means that the peer is lost."""
        silence = HEARTBEAT_SECONDS * HEARTBEATS_MISSED_MAX
        while True:
            try:
                async with asyncio.timeout(silence):
                    message = await link.receive()
            except TimeoutError:
                raise PeerLost(f"no heartbeat for {silence:.0f} s") from None
            self.session.received(message)
            match message:
                case Heartbeat(_, lanes):
                    self._progressed(lanes)
                case LaneLost(number):
                    self._lost_there(number)
                case Word():
                    if self.guard is None:
                        raise ProtocolViolation("a word about a hand-over that nobody guards")
                    self.guard.hear(message)
                case _:
                    await self._hear(message)
            await asyncio.sleep(0)  # a peer that floods its control connection starves nobody else

"""The lanes of a session on its control connection: they join, break, and are left in peace.

A lane that breaks is no failure while the session may resume: the others carry on, and what it took with it is sent
again. Without any, one timer runs until there is a lane again (``proxy.shell.linked``).
"""

import asyncio
import socket

from crypto.keys import LaneId
from proxy.control import LaneLost, LaneProgress
from proxy.errors import PeerLost
from proxy.flow import Departure
from proxy.limits import DRAIN_SECONDS_MAX
from proxy.report import SessionReport
from proxy.session import Session
from proxy.shell.bundle import Bundle
from proxy.shell.lane import BufferPool, FrameOwner, Lane, LaneKeys
from proxy.shell.linked import Linked, Meeting
from proxy.shell.threads import ThreadedLane
from proxy.wire import FrameHeader


class Laned(Linked):
    """A session with lanes; ``Runner`` gives it channels, whose frames they carry.

    Args:
        session: the sans-IO state.
        report: what the lanes did is written into it.
        meeting: the first control connection, past ACCEPT.
        lanes: how many the session is to have.
    """

    def __init__(self, session: Session, report: SessionReport, meeting: Meeting, lanes: int) -> None:
        super().__init__(session, meeting)
        self.report = report
        self.pool = BufferPool()
        self.bundle = Bundle(self)
        self.lanes_wanted = lanes

    # ---- what the session adds

    def frame(self, owner: FrameOwner, header: FrameHeader, body: memoryview) -> None:
        """See ``Host.frame``."""
        raise NotImplementedError

    def acknowledged(self, covered: list[Departure]) -> None:
        """See ``Host.acknowledged``."""
        raise NotImplementedError

    def forget(self, lane: Lane) -> bool:
        """Whether a session that cannot resume does without a lane that broke."""
        del lane
        return False

    # ---- lanes come and go

    @property
    def lanes(self) -> dict[LaneId, Lane]:
        """The lanes that carry the session now."""
        return self.bundle.lanes

    def add_lane(self, lane: Lane) -> None:
        """A lane whose hello has been exchanged joins the session, unless that is over."""
        if self.over or self.link is None:
            lane.drop()
            return
        self.bundle.add(lane)
        self._lift_deadline()
        self.report.lanes = self.bundle.most
        self.serve(self.bundle.receive(lane), f"lane {lane.id}")
        self.progress.wake()

    def make_lane(self, sock: socket.socket, lane: LaneId, keys: LaneKeys) -> Lane:
        """A lane for the hello; where the session is to have several, each has threads of its own."""
        kind = ThreadedLane if self.lanes_wanted > 1 or self.bundle.lanes else Lane
        return kind(sock, lane, *keys.halves(lane), self.pool)

    def lane_broke(self, lane: Lane, error: PeerLost) -> None:
        """See ``Host.lane_broke``."""
        self._bury(lane)
        if self.over:
            return
        self.report.lanes_lost = self.bundle.lost
        if not self.session.resume_seconds:
            if not self.forget(lane):
                self.fail(error)
            return
        self.log.warning("a lane was lost", lane=lane.id, reason=str(error), left=len(self.bundle.lanes))
        if not self.bundle.lanes:
            self._set_deadline(error)
        if self.link is not None:
            self.serve(self.say(LaneLost(lane.id)), "lane lost")
        self.changed.wake()

    def lane_leaves(self, lane: Lane) -> None:
        """See ``Host.lane_leaves``."""
        if not self.bundle.lanes:
            self._set_deadline(PeerLost("it left its last lane"))
        self.serve(self.leave(lane), f"leave {lane.id}")
        self.changed.wake()

    async def leave(self, lane: Lane) -> None:
        """End a lane in peace that is out of the bundle: FINAL after what it still sends, then the peer's end."""
        try:
            async with asyncio.timeout(DRAIN_SECONDS_MAX):
                await lane.finish()
            await lane.close()
        except (PeerLost, TimeoutError) as error:
            self.log.debug("a lane broke while it was left", lane=lane.id, reason=str(error))
        finally:
            self.bundle.give_up(lane)
            self._bury(lane)

    def _bury(self, lane: Lane) -> None:
        lane.drop()
        self.bundle.bury(lane)

    def _lost_there(self, number: int) -> None:
        """See ``Linked._lost_there``."""
        lane = self.bundle.lanes.get(LaneId(number))
        if lane is not None and self.session.resume_seconds:
            self.bundle.broke(lane, PeerLost(f"lane {lane.id} broke at the peer"))

    def _went(self) -> None:
        """See ``Linked._went``: all lanes' keys came of the control connection that is gone."""
        for lane in list(self.bundle.lanes.values()):
            self.bundle.remove(lane)
            self._bury(lane)

    # ---- what they carried

    def _progress(self) -> tuple[LaneProgress, ...]:
        """See ``Linked._progress``."""
        return tuple(LaneProgress(lane.id, lane.sent_bytes) for lane in self.bundle.lanes.values())

    def _progressed(self, lanes: tuple[LaneProgress, ...]) -> None:
        """See ``Linked._progressed``."""
        for told in lanes:
            self.bundle.progress(told)

    def wire_bytes(self) -> tuple[int, int]:
        """Bytes sent to and received from the peer so far, TLS and lanes together."""
        traffic, link = self.bundle.traffic, self.link
        sent, received = (0, 0) if link is None else (link.sent_bytes, link.received_bytes)
        return (
            self._links_sent + sent + traffic.sent_bytes,
            self._links_received + received + traffic.received_bytes,
        )

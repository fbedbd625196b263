"""A session's lanes: which there are, who sends on which, what must be sent again when one breaks.

A frame goes to whichever lane is free first. What arrives by several lanes is put in order here before anybody looks at
it. Lanes join and leave while the session runs; one that breaks costs only time, if the session may resume.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from crypto.keys import LaneId
from crypto.records import RecordType
from proxy.control import LaneProgress
from proxy.errors import PeerLost, ProtocolViolation
from proxy.flow import Departure
from proxy.limits import ACK_EAGER_BYTES, SMALL_BODY_BYTES, TURN_FRAMES
from proxy.ordering import Arrival, Outgoing
from proxy.session import Session, State
from proxy.shell.lane import FrameOwner, Lane, Record, give_back
from proxy.shell.waiting import Gate
from proxy.wire import FRAME_HEADER_BYTES, WHOLE_FRAME, FrameFlags, FrameHeader, pack_acks, parse_acks


class Host(Protocol):
    """What the lanes need of the session that they carry."""

    session: Session

    def frame(self, owner: FrameOwner, header: FrameHeader, body: memoryview) -> None:
        """A frame has arrived, and it is its turn."""

    def acknowledged(self, covered: list[Departure]) -> None:
        """The peer has acknowledged these frames."""

    def fail(self, error: BaseException) -> None:
        """Something that cannot be made good went wrong."""

    def lane_broke(self, lane: Lane, error: PeerLost) -> None:
        """A lane has broken, and is out of the bundle."""

    def lane_leaves(self, lane: Lane) -> None:
        """The peer will use a lane no more, and it is out of the bundle."""


@dataclass(slots=True)
class Traffic:
    """What lanes have carried."""

    sent_bytes: int = 0
    received_bytes: int = 0
    records_sent: int = 0
    records_received: int = 0
    rekeys: int = 0

    def add(self, lane: Lane) -> None:
        """Count one lane's in."""
        self.sent_bytes += lane.sent_bytes
        self.received_bytes += lane.received_bytes
        self.records_sent += lane.records_sent
        self.records_received += lane.records_received
        self.rekeys += lane.rekeys


class Bundle:
    """The lanes of one session.

    Args:
        host: the session.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._session = host.session
        self.lanes: dict[LaneId, Lane] = {}
        self.most = 0
        """Lanes there were at once, at most."""
        self.lost = 0
        """Lanes that broke."""
        self._gone = Traffic()
        self._waiting: deque[asyncio.Future[Lane]] = deque()
        self._assembling: dict[LaneId, tuple[bytearray, int]] = {}
        self._again = Gate()
        self._acks_due = Gate()
        self._unacknowledged_bytes = 0
        self._turns = 0
        self._expected = 0

    # ---- which there are

    def add(self, lane: Lane) -> None:
        """A lane whose hello has been exchanged joins; ``receive`` must be served for it."""
        self.lanes[lane.id] = lane
        lane.start()
        self.most = max(self.most, len(self.lanes))
        lane.on_idle = self._acks_due_now
        while lane.free and self._hand_over(lane):
            pass
        self._again.wake()
        self._acks_due.wake()

    def expect(self) -> None:
        """A lane is about to join: once there is a second one, frames may overtake one another."""
        self._session.inbox.gaps = self._expected > 0
        self._expected += 1

    def remove(self, lane: Lane) -> bool:
        """Take a lane out, broken or not; what it was given and is not acknowledged is sent again. False if it is out.

        The lane itself is the caller's to close.
        """
        if self.lanes.get(lane.id) is not lane:
            return False
        del self.lanes[lane.id]
        self._assembling.pop(lane.id, None)
        self.give_up(lane)
        return True

    def give_up(self, lane: Lane) -> None:
        """Nothing more comes of a lane that is out: whatever it was given and is not acknowledged is sent again."""
        self._session.outbox.lost(lane.id)
        self._session.acknowledge_again()
        self._again.wake()
        self._acks_due.wake()

    def bury(self, lane: Lane) -> None:
        """A lane that is out has been closed: its counts are final."""
        self._gone.add(lane)

    @property
    def traffic(self) -> Traffic:
        """What all lanes have carried so far, those that are gone included."""
        total = Traffic(**{name: getattr(self._gone, name) for name in Traffic.__slots__})
        for lane in self.lanes.values():
            total.add(lane)
        return total

    def progress(self, told: LaneProgress) -> None:
        """Hold a lane's arrivals against what its sender says it has sent.

        Raises:
            RecordMalformed: the record under way claims to be longer than what was sent.
        """
        lane = self.lanes.get(LaneId(told.lane))
        if lane is None:
            return
        received, begun, missing = lane.position
        try:
            self._session.lane_progress(told, received, begun_bytes=begun, missing_bytes=missing)
        except PeerLost as error:
            self.broke(lane, error)

    # ---- who sends on which

    async def take(self, *, first: bool = False) -> Lane:
        """A lane to send on, for one record or frame; ``give_back`` must follow. Waits while there is none.

        Args:
            first: before all others that wait.
        """
        lane = self._idlest()
        if lane is not None:
            lane.outstanding += 1
            return lane
        turn: asyncio.Future[Lane] = asyncio.get_running_loop().create_future()
        if first:
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(turn.result())
            raise

    def give_back(self, lane: Lane) -> None:
        """A lane has sent what it was taken for."""
        lane.outstanding -= 1
        if lane.id in self.lanes:
            self._hand_over(lane)

    def _idlest(self) -> Lane | None:
        best = None
        for lane in self.lanes.values():
            if lane.free and (best is None or (lane.outstanding, lane.turn) < (best.outstanding, best.turn)):
                best = lane
        if best is not None:
            self._turns += 1
            best.turn = self._turns
        return best

    def _hand_over(self, lane: Lane) -> bool:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                lane.outstanding += 1
                turn.set_result(lane)
                return True
        return False

    async def send(self, frame: Outgoing) -> None:
        """Send a frame by the next lane that is free; when it returns, the frame is on its way or will be again."""
        self._session.outbox.add(frame)
        await self._send_by(await self.take(), frame)

    async def _send_by(self, lane: Lane, frame: Outgoing) -> None:
        while self.lanes.get(lane.id) is not lane:  # it broke between our turn and now
            self.give_back(lane)
            lane = await self.take()
        outbox = self._session.outbox
        if frame.settled:  # acknowledged while it waited, because it had arrived by a lane that then broke
            outbox.left(frame)
            self.give_back(lane)
            return
        outbox.leaving(frame, lane.id)
        if lane.threaded:
            lane.post_frame(frame.data, partial(self._posted, lane, frame))
            return
        try:
            await lane.send_frame(frame.data)
        except PeerLost as error:
            self.broke(lane, error)
        finally:
            outbox.left(frame)
            self.give_back(lane)

    def _posted(self, lane: Lane, frame: Outgoing, error: BaseException | None) -> None:
        self._session.outbox.left(frame)
        if isinstance(error, PeerLost):
            self.broke(lane, error)
        elif error is not None:
            self._host.fail(error)
        self.give_back(lane)

    async def resend(self) -> None:
        """Send again what lost lanes had been given, the oldest first and before anything new."""
        outbox = self._session.outbox
        while True:
            while not outbox.waiting:
                await self._again.wait()
            lane = await self.take(first=True)
            frame = outbox.next_again()
            if frame is None:
                self.give_back(lane)
            else:
                await self._send_by(lane, frame)

    def broke(self, lane: Lane, error: PeerLost) -> None:
        """A lane has broken, here or at the peer's end."""
        if self.remove(lane):
            self.lost += 1
            self._host.lane_broke(lane, error)

    # ---- acknowledgements

    def written(self, size: int) -> None:
        """``size`` stream bytes have been written onward; their sender is told soon."""
        self._unacknowledged_bytes += size
        # While more is arriving its acknowledgement can carry this one; nobody waits for it yet.
        if self._unacknowledged_bytes >= ACK_EAGER_BYTES or any(lane.idle for lane in self.lanes.values()):
            self._acks_due.wake()

    def _acks_due_now(self) -> None:
        if self._session.acks_pending:
            self._acks_due.wake()

    async def acknowledge(self) -> None:
        """Send acknowledgements as they fall due; those of one turn of the loop leave together."""
        while True:
            if not self._session.acks_pending:
                await self._acks_due.wait()
                continue
            lane = await self.take(first=True)
            try:
                acks = self._session.take_acks()
                self._unacknowledged_bytes = 0
                if acks:
                    await lane.send(RecordType.ACK, pack_acks(acks))
                    self._host.acknowledged([])
            except PeerLost as error:
                self.broke(lane, error)
                self._session.acknowledge_again()
            finally:
                self.give_back(lane)

    # ---- what arrives

    async def receive(self, lane: Lane) -> None:
        """Take what one lane brings, until it ends.

        Raises:
            IntegrityError: a record is not what must come next.
            ProtocolViolation, StreamCorrupt: a frame is not, or the record has no place here.
        """
        turn = 0
        while True:
            try:
                record = await lane.receive()
            except PeerLost as error:
                self.broke(lane, error)
                return
            if self.lanes.get(lane.id) is not lane:
                record.release()  # it was given up: what it still brings comes again by another
                return
            kind = record.header.type
            if kind is RecordType.FRAME:
                self._take_part(lane, record)
            elif kind is RecordType.ACK:
                covered = self._session.acknowledged(parse_acks(record.payload), asyncio.get_running_loop().time())
                record.release()
                self._host.acknowledged(covered)
            elif kind is RecordType.FINAL:
                record.release()
                self._take_final(lane)
                return
            else:
                raise ProtocolViolation(f"a {kind.name} record on an open lane")
            turn += 1
            if turn % TURN_FRAMES == 0:
                await asyncio.sleep(0)

    def _take_final(self, lane: Lane) -> None:
        if lane.id in self._assembling:
            raise ProtocolViolation(f"lane {lane.id}: FINAL in the middle of a frame")
        # A peer that leaves one of several may not have seen yet that the others have broken here.
        unaware = self._session.resume_seconds > 0 and self.lost > 0
        if self._session.state is State.OPEN and len(self.lanes) == 1 and not unaware:
            raise ProtocolViolation("FINAL on the only lane of an open session")
        if self._session.state is State.OPEN and self.remove(lane):
            self._host.lane_leaves(lane)

    def _take_part(self, lane: Lane, record: Record) -> None:
        """A FRAME record: a whole frame, or the next part of one that is longer than a record."""
        if record.header.flags == WHOLE_FRAME and lane.id not in self._assembling:
            self._arrived(record, record.payload)
            return
        flags = FrameFlags(record.header.flags & 3)
        if record.header.flags > WHOLE_FRAME or bool(flags & FrameFlags.FIRST) == (lane.id in self._assembling):
            raise ProtocolViolation(f"lane {lane.id}: frame flags {record.header.flags:#x} out of turn")
        if flags & FrameFlags.FIRST:
            size = FRAME_HEADER_BYTES + FrameHeader.parse(record.payload).body_bytes
            self._assembling[lane.id] = (bytearray(size), 0)
        frame, filled = self._assembling[lane.id]
        end = filled + record.header.length
        if end > len(frame) or bool(flags & FrameFlags.LAST) != (end == len(frame)):
            raise ProtocolViolation(f"lane {lane.id}: {end} bytes of a frame of {len(frame)}")
        frame[filled:end] = record.payload
        self._assembling[lane.id] = (frame, end)
        record.release()
        if flags & FrameFlags.LAST:
            del self._assembling[lane.id]
            self._arrived(frame, memoryview(frame))

    def _arrived(self, owner: FrameOwner, frame: memoryview) -> None:
        """A whole frame: taken if it is its turn, kept if it is early, dropped if it is here already."""
        inbox = self._session.inbox
        header = FrameHeader.parse(frame)
        arrival = inbox.judge(header.cache_order, len(frame))
        if arrival is Arrival.NEXT:
            self._host.frame(owner, header, frame[FRAME_HEADER_BYTES:])
            while (held := inbox.due()) is not None:
                owner, frame = held
                self._host.frame(owner, FrameHeader.parse(frame), frame[FRAME_HEADER_BYTES:])
        elif arrival is Arrival.AHEAD:
            if isinstance(owner, Record) and len(frame) < SMALL_BODY_BYTES:
                small = bytearray(frame)
                owner.release()
                owner, frame = small, memoryview(small)
            inbox.hold(header.cache_order, (owner, frame), len(frame))
        else:
            give_back(owner)

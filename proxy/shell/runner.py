"""One open session on real sockets: what source and destination share.

    hypervisor ──read──▶ pump ──frame──▶ lane ═══════ lane ──record──▶ check ──frame──▶ deliver ──write──▶ hypervisor

Each channel has a pump (its hypervisor's bytes into frames) and a delivery (checked frames to its hypervisor); each
lane has a receiver; one task answers with acknowledgements, one sends heartbeats, one hears the control connection.
The first error ends them all: the hypervisors are told first, then the peer.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import structlog

from crypto.errors import CryptoError
from crypto.keys import LaneId
from crypto.records import RecordType
from crypto.tls import PeerInfo
from proxy.control import Heartbeat, LaneProgress, Message
from proxy.errors import PeerAborted, PeerLost, ProtocolViolation, RelayError, exit_code_of
from proxy.limits import (
    ABORT_SECONDS_MAX,
    ACK_EAGER_BYTES,
    DRAIN_SECONDS_MAX,
    FRAME_BYTES_MAX,
    HEARTBEAT_SECONDS,
    HEARTBEATS_MISSED_MAX,
    TURN_FRAMES,
)
from proxy.rate import TokenBucket
from proxy.report import SessionReport, tally
from proxy.session import Session, State
from proxy.shell.channel import Channel, FrameOwner
from proxy.shell.lane import BufferPool, Lane, Record
from proxy.shell.link import ControlLink
from proxy.shell.waiting import Gate
from proxy.status import SessionStatus
from proxy.wire import (
    FRAME_HEADER_BYTES,
    WHOLE_FRAME,
    ChannelId,
    FrameFlags,
    FrameHeader,
    FrameKind,
    pack_acks,
    parse_acks,
)

log = structlog.get_logger("korora.session")

P = ParamSpec("P")
R = TypeVar("R")


class Runner:
    """One session on its sockets; ``SourceRunner`` and ``DestinationRunner`` add what the roles do differently.

    Args:
        session: the sans-IO state.
        link: its control connection, past ACCEPT.
        peer: the verified peer.
        report: filled in as the session goes.
    """

    def __init__(self, session: Session, link: ControlLink, peer: PeerInfo, report: SessionReport) -> None:
        self.session = session
        self.link = link
        self.peer = peer
        self.report = report
        self.pool = BufferPool()
        self.lanes: dict[LaneId, Lane] = {}
        self.channels: dict[ChannelId, Channel] = {}
        self.log = log.bind(session=report.session_id[:8], role=session.role.value, peer=peer.name)
        self._loop = asyncio.get_running_loop()
        self._acks_due = Gate()
        self._unacknowledged_bytes = 0
        self._ending = False
        """Whether any direction has ended: only then can an acknowledgement be the last."""
        self._progress = Gate()
        self._failure: BaseException | None = None
        self._services: set[asyncio.Task[None]] = set()
        self._main: asyncio.Task[None] | None = None
        self._concluded = False
        self.over = False
        """Whether the session has ended: no lane may join it any more, for its hypervisors may be closed."""
        self._listening: asyncio.Task[None] | None = None
        self._assembling: dict[LaneId, tuple[bytearray, int]] = {}
        self._began = self._loop.time()
        self.bucket = TokenBucket()

    # ---- seen and steered from outside

    def status(self) -> SessionStatus:
        """This moment of the session."""
        session, lanes = self.session, self.lanes.values()
        senders, receivers = session.senders.values(), session.receivers.values()
        return SessionStatus(
            session_id=self.report.session_id,
            role=session.role.value,
            peer=self.peer.name,
            peer_address=self.report.peer_address,
            vm=self.report.vm,
            state=session.state.value,
            seconds=self._loop.time() - self._began,
            channels=len(receivers),
            lanes=len(lanes),
            bytes_in=sum(half.offset for half in senders),
            bytes_out=sum(half.written_bytes for half in receivers),
            wire_sent=self.link.sent_bytes + sum(lane.sent_bytes for lane in lanes),
            wire_received=self.link.received_bytes + sum(lane.received_bytes for lane in lanes),
            frames_sent=sum(half.frames for half in senders),
            frames_received=sum(half.frames for half in receivers),
            frames_resent=0,
            records_sent=0,
            records_received=0,
            rekeys=0,
            lanes_lost=0,
            resumes=self.report.resumes,
            queue_frames=sum(half.in_flight for half in senders),
            queue_bytes=session.flight.in_flight_bytes,
            window_bytes=session.flight.limit_bytes,
            delay_seconds=session.flight.delay_seconds,
            bytes_per_second=session.flight.bytes_per_second,
            rate_limit=self.bucket.rate,
        )

    def set_rate(self, rate: float | None) -> None:
        """Send no more than ``rate`` stream bytes a second from now on; None lifts the limit."""
        self.bucket.change(rate, self._loop.time())
        for channel in self.channels.values():
            channel.reading.wake()

    # ---- life

    async def run(self) -> None:
        """Carry the session to its end.

        Raises:
            RelayError, CryptoError: what ended it early. The hypervisors and the peer have been told.
        """
        self._main = asyncio.current_task()
        cancelled = False
        try:
            if self._failure is None:  # stop() may have come before us
                await self._conduct()
        except asyncio.CancelledError:
            # Either a task of ours failed and woke us, or somebody called stop().
            cancelled = self._failure is None
            if cancelled:
                self._failure = PeerLost("the relay is stopping")
            elif self._main is not None:
                self._main.uncancel()
        except Exception as error:  # noqa: BLE001 - a bug of ours, too, must not leave a hypervisor waiting
            self._failure = self._failure or error
        finally:
            self._main = None
            self.over = True
            await self._end_services()
        if self._failure is not None:
            await self._fail(self._failure)
            if cancelled:
                raise asyncio.CancelledError
            raise self._failure
        await self._part()

    def stop(self, reason: RelayError) -> None:
        """End the session from outside: the peer and the hypervisors are told ``reason``."""
        self._failed(reason)

    def conclude(self) -> None:
        """Both ends are final: what breaks from here on, breaks behind a finished session."""
        self._concluded = True

    async def _conduct(self) -> None:
        """The role's way from an open session to its agreed end."""
        raise NotImplementedError

    async def _hear(self, message: Message) -> None:
        """Act on a control message other than a heartbeat."""
        raise NotImplementedError

    def serve(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a part of the session until it returns; its failure is the session's."""
        task = self._loop.create_task(self._guard(work), name=name)
        self._services.add(task)
        task.add_done_callback(self._services.discard)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step, it would never be awaited
        return task

    def start_control(self) -> None:
        """Begin to hear the control connection and to send heartbeats."""
        self._listening = self.serve(self.listen(), "listen")
        self.serve(self.beat(), "heartbeat")

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - whatever it is, it must end the session and not just its task
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        if self._concluded:
            return
        if self._failure is None:
            self._failure = error
            if self._main is not None:
                self._main.cancel()
        elif isinstance(self._failure, PeerLost) and isinstance(error, PeerAborted | CryptoError):
            self._failure = error  # why the peer went says more than that it went

    async def _end_services(self) -> None:
        services = [task for task in self._services if task is not self._listening or self._failure is None]
        for task in services:
            task.cancel()
        await asyncio.gather(*services, return_exceptions=True)

    async def _fail(self, failure: BaseException) -> None:
        """Hypervisors first, and the peer at once: one that is wound down may take a minute."""
        abandoning = self._loop.create_task(self.abandon())
        await asyncio.sleep(0)  # it begins with what takes no time: resets, kills
        if self._listening is not None:
            if isinstance(failure, PeerLost):
                # A lane that broke is often the peer giving up: the control connection may still say why.
                await asyncio.wait({self._listening}, timeout=ABORT_SECONDS_MAX / 2)
                failure = self._failure or failure
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        self._account()
        await self.link.abort(exit_code_of(failure), str(failure) or type(failure).__name__)
        await abandoning
        for lane in self.lanes.values():
            lane.drop()
        await self.link.close()

    async def abandon(self) -> None:
        """Make sure that no hypervisor takes this for a clean end."""
        pending = [channel for channel in self.channels.values() if not channel.settled]
        for channel in pending:
            channel.settled = True
        await asyncio.gather(*(channel.connection.abort() for channel in pending), return_exceptions=True)

    async def _part(self) -> None:
        """Both sides have agreed that all is well: FINAL on every lane, close_notify."""
        await self.abandon()  # what connected after the end belongs to no session
        self._account()
        lanes = list(self.lanes.values())
        try:
            async with asyncio.timeout(DRAIN_SECONDS_MAX):
                for lane in lanes:
                    await lane.finish()
        except (PeerLost, TimeoutError):
            self.log.debug("the peer was gone before FINAL")
        await asyncio.gather(self.link.close(), *(lane.close() for lane in lanes))

    async def until(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until ``condition`` holds; False if it did not within ``seconds``."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    await self._progress.wait()
        except TimeoutError:
            return False
        return True

    # ---- channels

    def start_delivery(self, channel: Channel) -> None:
        """Begin to write what arrives for a channel whose receiving half is reserved.

        The source does so before it announces the channel: the destination's first frame may overtake its answer.
        """
        self.channels[channel.number] = channel
        self.serve(channel.deliver(), f"deliver {channel.number}")

    def start_pump(self, channel: Channel) -> None:
        """Begin to read a channel whose sending half is open."""
        self.serve(channel.pump(), f"pump {channel.number}")

    async def settle_channels(self) -> None:
        """Make every local end's result final.

        Raises:
            HypervisorFailed: one of them says it did not work.
        """
        for channel in self.channels.values():
            if not channel.settled:
                await channel.connection.settle()
                channel.settled = True

    @property
    def lane(self) -> Lane:
        """The lane that frames leave by: the newest, for an older one may be about to show that it is broken."""
        return self.lanes[max(self.lanes)]

    async def send_frame(self, frame: memoryview) -> None:
        """See ``Carrier.send_frame``."""
        await self.lane.send_frame(frame)

    def written(self, channel: ChannelId, owner: FrameOwner | None, size: int) -> None:
        """See ``Carrier.written``: the frame's buffer is free, its sender is told soon."""
        if isinstance(owner, Record):
            owner.release()
        self.session.wrote(self.session.receivers[channel], size)
        self._unacknowledged_bytes += size
        # While more is arriving its acknowledgement can carry this one; nobody waits for it yet.
        if self._unacknowledged_bytes >= ACK_EAGER_BYTES or any(lane.idle for lane in self.lanes.values()):
            self._acks_due.wake()

    def ended(self) -> None:
        """See ``Carrier.ended``."""
        self._ending = True
        self._progress.wake()

    # ---- lanes

    def add_lane(self, lane: Lane) -> None:
        """A lane whose hello has been exchanged joins the session, unless that is over."""
        if self.over:
            lane.drop()
            return
        self.lanes[lane.id] = lane
        lane.on_idle = self._acks_due_now
        self.report.lanes = len(self.lanes)
        self.serve(self._receive(lane), f"lane {lane.id}")
        self._progress.wake()

    def _acks_due_now(self) -> None:
        if self.session.acks_pending:
            self._acks_due.wake()

    def forget(self, lane: Lane) -> bool:
        """Whether the session does without a lane that broke."""
        del lane
        return False

    async def _receive(self, lane: Lane) -> None:
        turn = 0
        while True:
            try:
                record = await lane.receive()
            except PeerLost:
                if self.forget(lane):
                    return
                raise
            kind = record.header.type
            if kind is RecordType.FRAME:
                self._take_part(lane, record)
            elif kind is RecordType.ACK:
                self.session.acknowledged(parse_acks(record.payload), self._loop.time())
                record.release()
                for channel in self.channels.values():
                    channel.reading.wake()
                if self._ending:
                    self._progress.wake()
            elif kind is RecordType.FINAL and self.session.state is not State.OPEN:
                return
            else:
                raise ProtocolViolation(f"a {kind.name} record on an open lane")
            turn += 1
            if turn % TURN_FRAMES == 0:
                await asyncio.sleep(0)

    def _take_part(self, lane: Lane, record: Record) -> None:
        """A FRAME record: a whole frame, or the next part of one that is longer than a record."""
        if record.header.flags == WHOLE_FRAME and lane.id not in self._assembling:
            self._take_frame(record, record.payload)
            return
        flags = FrameFlags(record.header.flags & 3)
        if record.header.flags > WHOLE_FRAME or bool(flags & FrameFlags.FIRST) == (lane.id in self._assembling):
            raise ProtocolViolation(f"lane {lane.id}: frame flags {record.header.flags:#x} out of turn")
        if flags & FrameFlags.FIRST:
            size = FRAME_HEADER_BYTES + FrameHeader.parse(record.payload).body_bytes
            self._assembling[lane.id] = (bytearray(min(size, FRAME_HEADER_BYTES + FRAME_BYTES_MAX)), 0)
        frame, filled = self._assembling[lane.id]
        end = filled + record.header.length
        if end > len(frame) or bool(flags & FrameFlags.LAST) != (end == len(frame)):
            raise ProtocolViolation(f"lane {lane.id}: {end} bytes of a frame of {len(frame)}")
        frame[filled:end] = record.payload
        self._assembling[lane.id] = (frame, end)
        record.release()
        if flags & FrameFlags.LAST:
            del self._assembling[lane.id]
            self._take_frame(frame, memoryview(frame))

    def _take_frame(self, owner: FrameOwner, frame: memoryview) -> None:
        header = FrameHeader.parse(frame)
        body = frame[FRAME_HEADER_BYTES:]
        if len(body) != header.body_bytes:
            raise ProtocolViolation(f"a frame with a body of {len(body)} bytes, {header.body_bytes} announced")
        self.session.frame(header, body)
        channel = self.channels.get(header.channel)
        if channel is None:
            raise ProtocolViolation(f"a frame for channel {header.channel} before it is open")
        if header.kind is FrameKind.END:
            if isinstance(owner, Record):
                owner.release()
            channel.take_end()
        else:
            channel.take(owner, body)

    def _account(self) -> None:
        """Write what the session did into its report."""
        lanes = self.lanes.values()
        sent = self.link.sent_bytes + sum(lane.sent_bytes for lane in lanes)
        received = self.link.received_bytes + sum(lane.received_bytes for lane in lanes)
        tally(self.report, self.session, sent_bytes=sent, received_bytes=received)

    # ---- services

    async def acknowledge(self) -> None:
        """Send acknowledgements as they fall due; those of one turn of the loop leave together."""
        while True:
            acks = self.session.take_acks()
            self._unacknowledged_bytes = 0
            if acks:
                await self.lane.send(RecordType.ACK, pack_acks(acks))
                if self._ending:
                    self._progress.wake()
            else:
                await self._acks_due.wait()

    async def beat(self) -> None:
        """Send heartbeats."""
        number = 0
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            progress = tuple(LaneProgress(lane.id, lane.sent_bytes) for lane in self.lanes.values())
            await self.link.send(Heartbeat(number, progress))
            number += 1

    async def listen(self) -> None:
        """Hear the control connection; silence for three heartbeats means that the peer is lost."""
        silence = HEARTBEAT_SECONDS * HEARTBEATS_MISSED_MAX
        while True:
            try:
                async with asyncio.timeout(silence):
                    message = await self.link.receive()
            except TimeoutError:
                raise PeerLost(f"no heartbeat for {silence:.0f} s") from None
            self.session.received(message)
            if isinstance(message, Heartbeat):
                for progress in message.lanes:
                    lane = self.lanes.get(LaneId(progress.lane))
                    if lane is not None:
                        self.session.lane_progress(
                            progress,
                            lane.received_bytes,
                            begun_bytes=lane.begun_bytes,
                            missing_bytes=lane.missing_bytes,
                        )
            else:
                await self._hear(message)
            await asyncio.sleep(0)  # a peer that floods its control connection starves nobody else

    async def say(self, message: Message) -> None:
        """Send a control message that the session's state follows."""
        self.session.sent(message)
        await self.link.send(message)

"""One open session on real sockets: what source and destination share.

    hypervisor ──read──▶ pump ──frame──▶ lane ═══════ lane ──record──▶ check ──frame──▶ deliver ──write──▶ hypervisor

Each channel has a pump (its hypervisor's bytes into frames) and a delivery (checked frames to its hypervisor); each
lane has a receiver; one task answers with acknowledgements, one sends heartbeats, one hears the control connection.
The first error ends them all: the hypervisors are told first, then the peer.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import structlog

from crypto.errors import CryptoError
from crypto.keys import LaneId
from crypto.records import RecordType
from crypto.tls import PeerInfo
from proxy.control import Heartbeat, LaneProgress, Message
from proxy.endpoints.base import Connection
from proxy.errors import HypervisorFailed, PeerAborted, PeerLost, ProtocolViolation, RelayError, exit_code_of
from proxy.limits import (
    ABORT_SECONDS_MAX,
    ACK_EAGER_BYTES,
    DRAIN_SECONDS_MAX,
    FRAME_BYTES_MAX,
    FRAME_EAGER_BYTES,
    HEARTBEAT_SECONDS,
    HEARTBEATS_MISSED_MAX,
    OPAQUE_FRAME_BYTES,
    SMALL_BODY_BYTES,
    TURN_FRAMES,
)
from proxy.report import SessionReport, tally
from proxy.session import Role, Session, State
from proxy.shell.lane import BufferPool, Lane, Record
from proxy.shell.link import ControlLink
from proxy.shell.waiting import Gate
from proxy.streams.formats import EndWatch
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


class Channel:
    """One channel's local end and what waits for it."""

    def __init__(self, number: ChannelId, connection: Connection) -> None:
        self.number = number
        self.connection = connection
        self.reading, self.writing = Gate(connection.read_fd), Gate(connection.write_fd)
        self.inbound: deque[tuple[Record | bytearray, memoryview, int] | None] = deque()
        """Checked frames to write onward: what owns the bytes, those left to write, the frame's size. None is END."""
        self.blocked = False
        """Whether a delivery is under way that newer frames must not overtake."""
        self.settled = False


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
        self._listening: asyncio.Task[None] | None = None
        self._assembling: dict[LaneId, tuple[bytearray, int]] = {}

    # ---- life

    async def run(self) -> None:
        """Carry the session to its end.

        Raises:
            RelayError, CryptoError: what ended it early. The hypervisors and the peer have been told.
        """
        self._main = asyncio.current_task()
        cancelled = False
        try:
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
        """Hypervisors first, then the peer."""
        await self.abandon()
        if self._listening is not None:
            if isinstance(failure, PeerLost):
                # A lane that broke is often the peer giving up: the control connection may still say why.
                await asyncio.wait({self._listening}, timeout=ABORT_SECONDS_MAX / 2)
                failure = self._failure or failure
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        self._account()
        await self.link.abort(exit_code_of(failure), str(failure) or type(failure).__name__)
        for lane in self.lanes.values():
            lane.drop()
        await self.link.close()

    async def abandon(self) -> None:
        """Make sure that no hypervisor takes this for a clean end."""
        pending = [channel for channel in self.channels.values() if not channel.settled]
        for channel in pending:
            channel.settled = True
        await asyncio.gather(*(channel.connection.abort() for channel in pending))

    async def _part(self) -> None:
        """Both sides have agreed that all is well: FINAL on every lane, close_notify."""
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
        self.serve(self._deliver(channel), f"deliver {channel.number}")

    def start_pump(self, channel: Channel) -> None:
        """Begin to read a channel whose sending half is open."""
        self.serve(self._pump(channel), f"pump {channel.number}")

    async def settle_channels(self) -> None:
        """Make every local end's result final.

        Raises:
            HypervisorFailed: one of them says it did not work.
        """
        for channel in self.channels.values():
            if not channel.settled:
                channel.settled = True
                await channel.connection.settle()

    @property
    def lane(self) -> Lane:
        """The lane that frames leave by: the newest, for an older one may be about to show that it is broken."""
        return next(reversed(self.lanes.values()))

    async def _pump(self, channel: Channel) -> None:
        """Read the hypervisor to its end; its descriptor leaves the loop before anything can close it."""
        try:
            await self._frame_stream(channel)
        finally:
            channel.reading.release()

    async def _frame_stream(self, channel: Channel) -> None:
        """Read the hypervisor into frames, never beyond its credit, until its clean end."""
        half = self.session.senders[channel.number]
        flight, connection = self.session.flight, channel.connection
        watch = EndWatch() if self.session.role is Role.SOURCE else None
        buffer = memoryview(bytearray(FRAME_HEADER_BYTES + OPAQUE_FRAME_BYTES))
        stream = buffer[FRAME_HEADER_BYTES:]
        filled = turn = 0
        while True:
            room = min(OPAQUE_FRAME_BYTES, self.session.room_bytes(half))
            drained = False
            if filled < room:
                got = _local(connection, connection.read_into, stream[filled:room])
                if got == 0:
                    break
                filled += got or 0
                # What can be waited for and gave less than asked has no more: the next read would only say so.
                drained = filled < room and connection.read_fd is not None
            # A frame leaves when it is full, when it is long enough, or when nothing of this stream is in flight.
            if filled and (filled >= min(room, FRAME_EAGER_BYTES) or not half.in_flight) and room:
                if watch is not None:
                    watch.feed(stream[:filled])
                await self._send_data(channel, buffer[: FRAME_HEADER_BYTES + filled])
                filled = 0
                turn += 1
                if turn % TURN_FRAMES == 0:
                    # A hypervisor always readable, a lane always writable: nobody else would ever run.
                    await asyncio.sleep(0)
            elif drained:
                await channel.reading.wait_readable()
            elif filled >= room:
                await channel.reading.wait()
        if filled:
            await self.until_room(channel, filled)
            if watch is not None:
                watch.feed(stream[:filled])
            await self._send_data(channel, buffer[: FRAME_HEADER_BYTES + filled])
        await self._check_end(channel, watch)
        end = half.end(self.session.next_order())
        half.departed(flight.depart(0, self._loop.time()))
        self._ending = True
        await self.lane.send_frame(memoryview(end))
        self._progress.wake()

    async def until_room(self, channel: Channel, size: int) -> None:
        """Wait until credit and flight window have room for ``size`` bytes."""
        half = self.session.senders[channel.number]
        while half.credit_room < size or (half.in_flight and self.session.room_bytes(half) < size):
            await channel.reading.wait()

    async def _send_data(self, channel: Channel, frame: memoryview) -> None:
        half = self.session.senders[channel.number]
        size = len(frame) - FRAME_HEADER_BYTES
        half.data(frame, self.session.next_order())
        half.departed(self.session.flight.depart(size, self._loop.time()))
        await self.lane.send_frame(frame)

    async def _check_end(self, channel: Channel, watch: EndWatch | None) -> None:
        """The hypervisor's stream has ended: was it whole?

        Raises:
            HypervisorFailed: the command behind it failed, or a known format ends before its end.
        """
        ended_well = getattr(channel.connection, "ended_well", None)
        if ended_well is not None:
            await ended_well()
        if watch is None:
            return
        if channel.number == 0:
            self.report.stream_format = watch.format.value
        answered = self.session.receivers[channel.number].offset > 0
        if watch.cut(answered=answered):
            offset = self.session.senders[channel.number].offset
            kind = watch.format.value
            raise HypervisorFailed(
                f"{channel.connection.label}: the {kind} stream ended after {offset} bytes, before its end"
            )

    async def _deliver(self, channel: Channel) -> None:
        """Write the hypervisor to its end; its descriptor leaves the loop before anything can close it."""
        try:
            await self._write_stream(channel)
        finally:
            channel.writing.release()

    async def _write_stream(self, channel: Channel) -> None:
        """Write checked frames to the hypervisor, in order, until END."""
        half = self.session.receivers[channel.number]
        connection = channel.connection
        while True:
            while not channel.inbound:
                await channel.writing.wait()
            item = channel.inbound.popleft()
            if item is None:
                _local(connection, connection.finish)
                self._ending = True
                self._wrote(half.channel, 0)
                self._progress.wake()
                return
            owner, view, size = item
            channel.blocked = True
            while view := view[_local(connection, connection.write, view) :]:
                if connection.write_fd is not None:
                    await channel.writing.wait_writable()
            channel.blocked = False
            self._written(half.channel, owner, size)
            if connection.write_fd is None:
                await asyncio.sleep(0)

    def _written(self, channel: ChannelId, owner: Record | bytearray, size: int) -> None:
        """A frame has gone to the hypervisor: its buffer is free, its sender is told soon."""
        if isinstance(owner, Record):
            self.pool.give(owner.buffer)
        self._wrote(channel, size)

    def _wrote(self, channel: ChannelId, size: int) -> None:
        self.session.wrote(self.session.receivers[channel], size)
        self._unacknowledged_bytes += size
        # While more is arriving its acknowledgement can carry this one; nobody waits for it yet.
        if self._unacknowledged_bytes >= ACK_EAGER_BYTES or any(lane.idle for lane in self.lanes.values()):
            self._acks_due.wake()

    # ---- lanes

    def add_lane(self, lane: Lane) -> None:
        """A lane whose hello has been exchanged joins the session."""
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
                turn += 1
                if turn % TURN_FRAMES == 0:
                    await asyncio.sleep(0)
            elif kind is RecordType.ACK:
                self.session.acknowledged(parse_acks(record.payload), self._loop.time())
                self.pool.give(record.buffer)
                for channel in self.channels.values():
                    channel.reading.wake()
                if self._ending:
                    self._progress.wake()
            elif kind is RecordType.FINAL and self.session.state is not State.OPEN:
                return
            else:
                raise ProtocolViolation(f"a {kind.name} record on an open lane")

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
        self.pool.give(record.buffer)
        if flags & FrameFlags.LAST:
            del self._assembling[lane.id]
            self._take_frame(frame, memoryview(frame))

    def _take_frame(self, owner: Record | bytearray, frame: memoryview) -> None:
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
                self.pool.give(owner.buffer)
            channel.inbound.append(None)
        else:
            size = len(body)
            if not channel.inbound and not channel.blocked:
                # Written here and now, the frame is still in this core's cache and no task has to wake for it.
                body = body[_local(channel.connection, channel.connection.write, body) :]
                if not body:
                    self._written(header.channel, owner, size)
                    return
            if isinstance(owner, Record) and len(body) < SMALL_BODY_BYTES:
                # Credit counts stream bytes: a tiny frame that waits must not hold a buffer made for a large one.
                small = bytearray(body)
                self.pool.give(owner.buffer)
                owner, body = small, memoryview(small)
            channel.inbound.append((owner, body, size))
        channel.writing.wake()

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

    async def say(self, message: Message) -> None:
        """Send a control message that the session's state follows."""
        self.session.sent(message)
        await self.link.send(message)


def _local(connection: Connection, act: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Do something to the hypervisor's connection; its errors are the hypervisor's failure."""
    try:
        return act(*args, **kwargs)
    except OSError as error:
        raise HypervisorFailed(f"{connection.label} broke: {error.strerror or error}") from None

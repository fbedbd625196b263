"""One session's state, sans-IO and role-neutral: channels, frame order, windows, which message may come when.

The shell feeds it frames, acknowledgements and messages, and asks it what to send; it knows no sockets and no clock.
"""

from collections.abc import Callable
from enum import Enum, unique
from types import MappingProxyType
from typing import Any, Final

from crypto.errors import RecordMalformed
from crypto.keys import Direction, LaneId, SessionId
from proxy.channel import ReceiveHalf, SendHalf
from proxy.control import (
    Accept,
    ChannelOpen,
    ChannelOpened,
    ChannelState,
    Countersigned,
    Facts,
    Finish,
    Finished,
    Heartbeat,
    LaneGranted,
    LaneLost,
    LaneProgress,
    LaneRequest,
    Message,
    Offer,
    PagesGiven,
    PagesWanted,
    Refuse,
    Shown,
    Statement,
    VtpmGiven,
    VtpmProved,
    VtpmWanted,
    Word,
)
from proxy.errors import PeerLost, ProtocolViolation
from proxy.flow import Departure, FlightWindow, credit_bytes
from proxy.limits import CHANNELS_MAX, HEARTBEATS_MISSED_MAX
from proxy.ordering import Inbox, Outbox, Outgoing
from proxy.wire import Ack, ChannelId, Codec, FrameHeader


@unique
class Role(Enum):
    """Which end of the migration this relay serves."""

    SOURCE = "source"
    DESTINATION = "destination"

    @property
    def sends(self) -> Direction:
        """The direction this end reads from its hypervisor."""
        return Direction.FORWARD if self is Role.SOURCE else Direction.BACKWARD


@unique
class State(Enum):
    """Where a session stands; the diagram is in docs/wire-format.md."""

    GREETING = "greeting"  # TLS is up, OFFER and its answer are due
    OPEN = "open"  # ACCEPT has passed: channels, lanes, frames
    FINISHING = "finishing"  # all channels have ended; FINISH and FINISHED
    CLOSED = "closed"


# What a peer may say in each state; everything else is a violation. ABORT is always heard (proxy/shell/link.py).
ACCEPTED: Final = MappingProxyType(
    {
        (Role.SOURCE, State.GREETING): frozenset({Accept, Refuse}),
        (Role.SOURCE, State.OPEN): frozenset(
            {
                *(ChannelOpened, LaneGranted, LaneLost, Heartbeat, PagesWanted, Word, Facts, Countersigned),
                *(VtpmWanted, VtpmProved),
            }
        ),
        (Role.SOURCE, State.FINISHING): frozenset(
            {Finished, LaneGranted, LaneLost, Heartbeat, Word, Facts, Countersigned}
        ),
        (Role.SOURCE, State.CLOSED): frozenset({LaneLost, Heartbeat, Word}),
        (Role.DESTINATION, State.GREETING): frozenset({Offer}),
        (Role.DESTINATION, State.OPEN): frozenset(
            {ChannelOpen, LaneRequest, LaneLost, Heartbeat, PagesGiven, Finish, Word, Shown, Statement, VtpmGiven}
        ),
        (Role.DESTINATION, State.FINISHING): frozenset({LaneRequest, LaneLost, Heartbeat, Word, Shown, Statement}),
        (Role.DESTINATION, State.CLOSED): frozenset({LaneRequest, LaneLost, Heartbeat, Word, Shown}),
    }
)

# Where a message leads: what this side has sent or received. All others leave the state as it is.
MOVES: Final = MappingProxyType(
    {
        (State.GREETING, Accept): State.OPEN,
        (State.GREETING, Refuse): State.CLOSED,
        (State.OPEN, Finish): State.FINISHING,
        (State.FINISHING, Finished): State.CLOSED,
    }
)


def _keep_nothing(frame: Outgoing) -> None:
    """Before ACCEPT no frame exists."""


class _LaneWatch:
    """How one lane's arrivals compare with what its sender says it has sent."""

    def __init__(self) -> None:
        self.received_bytes = -1
        self.stalled = 0


class Session:
    """One session.

    Args:
        role: which end this is.
        session_id: 16 random bytes, the source's choice.
    """

    def __init__(self, role: Role, session_id: SessionId) -> None:
        self.role = role
        self.id = session_id
        self.state = State.GREETING
        self.flight = FlightWindow()
        self.senders: dict[ChannelId, SendHalf] = {}
        self.receivers: dict[ChannelId, ReceiveHalf] = {}
        self.resume_seconds = 0
        """How long a loss is waited out; 0: it ends the session."""
        self.paged = False
        """Whether frames from the source may be encoded by pages, as ACCEPT says."""
        self.outbox = Outbox(_keep_nothing, keeps=False)
        self.inbox: Inbox[Any] = Inbox(repeats=False)
        """Of whatever the shell keeps a frame in."""
        self._order_sent = 0
        self._unacknowledged: set[ChannelId] = set()
        self._watches: dict[LaneId, _LaneWatch] = {}

    def agree(self, resume_seconds: int, release: Callable[[Outgoing], None]) -> None:
        """ACCEPT has said how long a loss is waited out; before the first frame.

        Args:
            resume_seconds: 0 for a session that ends with the first loss.
            release: told of each frame whose bytes are needed no more.
        """
        self.resume_seconds = resume_seconds
        self.outbox = Outbox(release, keeps=resume_seconds > 0)
        self.inbox = Inbox(repeats=resume_seconds > 0)

    # ---- messages

    def received(self, message: Message) -> None:
        """A message has arrived: is this the time for it?

        Raises:
            ProtocolViolation: it is not.
        """
        if type(message) not in ACCEPTED[self.role, self.state]:
            raise ProtocolViolation(f"{type(message).__name__} while {self.state.value}")
        self._move(message)

    def sent(self, message: Message) -> None:
        """A message has left."""
        self._move(message)

    def _move(self, message: Message) -> None:
        self.state = MOVES.get((self.state, type(message)), self.state)

    # ---- channels

    @property
    def next_channel(self) -> ChannelId:
        """The number of the next channel: they count in the order accepted.

        Raises:
            ProtocolViolation: the session has ``CHANNELS_MAX`` already.
        """
        if len(self.receivers) >= CHANNELS_MAX:
            raise ProtocolViolation(f"a session has at most {CHANNELS_MAX} channels")
        return ChannelId(len(self.receivers))

    def reserve(self, channel: ChannelId) -> int:
        """Make the receiving half of the next channel, return the credit to give its sender.

        Raises:
            ProtocolViolation: it is not the next one.
        """
        if channel != self.next_channel:
            raise ProtocolViolation(f"channel {channel} announced, {self.next_channel} expected")
        credit = credit_bytes(len(self.receivers) + 1)
        self.receivers[channel] = ReceiveHalf(channel, self.role.sends.opposite, credit)
        return credit

    def open(self, channel: ChannelId, credit: int) -> SendHalf:
        """Make the sending half of a reserved channel, with the credit the peer gave.

        Raises:
            ProtocolViolation: it was not reserved, or is open already.
        """
        if channel not in self.receivers or channel in self.senders:
            raise ProtocolViolation(f"channel {channel} opened out of turn")
        half = SendHalf(channel, self.role.sends, credit)
        self.senders[channel] = half
        return half

    @property
    def finished(self) -> bool:
        """Whether every channel has ended both ways and all of it is acknowledged and written."""
        return (
            bool(self.senders)
            and len(self.senders) == len(self.receivers)
            and all(half.finished for half in self.senders.values())
            and all(half.finished for half in self.receivers.values())
        )

    # ---- frames

    def room_bytes(self, half: SendHalf) -> int:
        """Stream bytes a channel may send now, if they are sent as they are.

        Within its credit, and within the flight window or its share of it. The share keeps a channel whose hypervisor
        reads from being starved by others whose hypervisors do not: QEMU's multifd threads wait for one another, and a
        window filled by those that wait would never empty.
        """
        room = half.credit_room
        free = self.flight.room_bytes
        if free < room:
            share = self.flight.limit_bytes // max(1, len(self.senders))
            room = min(room, max(free, share - half.under_way_bytes))
        return max(0, room)

    def next_order(self) -> int:
        """The cache-order number of the next frame sent."""
        order = self._order_sent
        self._order_sent += 1
        return order

    def expect(self, header: FrameHeader) -> ReceiveHalf:
        """Take a frame whose turn it is; its half must ``verify`` it before its bytes may go on.

        Raises:
            ProtocolViolation: an unknown channel, the wrong direction, a codec not agreed on, or out of order.
        """
        half = self.receivers.get(header.channel)
        if half is None or header.direction is not half.direction:
            raise ProtocolViolation(f"a frame for channel {header.channel} {header.direction.label}")
        if header.cache_order != self.inbox.expected:
            raise ProtocolViolation(f"frame {header.cache_order} in cache order, {self.inbox.expected} expected")
        if header.codec is not Codec.OPAQUE and (not self.paged or header.direction is not Direction.FORWARD):
            raise ProtocolViolation(f"{half}: codec {header.codec.name} was not agreed on")
        half.expect(header)
        self.inbox.taken()
        return half

    def wrote(self, half: ReceiveHalf, raw_bytes: int) -> None:
        """A frame of ``raw_bytes`` has been written onward: acknowledge it and give credit."""
        half.wrote(raw_bytes, credit_bytes(len(self.receivers)))
        self._unacknowledged.add(half.channel)

    @property
    def acks_pending(self) -> bool:
        """Whether anything written onward has not been acknowledged."""
        return bool(self._unacknowledged)

    def take_acks(self) -> list[Ack]:
        """The acknowledgements that are due; none twice."""
        acks = [self.receivers[channel].acknowledgement() for channel in sorted(self._unacknowledged)]
        self._unacknowledged.clear()
        return acks

    def acknowledged(self, acks: list[Ack], now: float) -> list[Departure]:
        """Take the peer's acknowledgements, return the frames they cover. ``now`` in seconds of a monotonic clock.

        They come by several lanes, so an older one may come after a newer; it then says nothing.

        Raises:
            ProtocolViolation: of a channel or direction this side does not send, or impossible.
        """
        all_covered: list[Departure] = []
        for ack in acks:
            half = self.senders.get(ack.channel)
            if half is None or ack.direction is not half.direction:
                raise ProtocolViolation(f"an acknowledgement of channel {ack.channel} {ack.direction.label}")
            covered = half.acknowledge(ack)
            for departure in covered:
                self.flight.arrive(departure, now)
            if covered:
                self.outbox.acknowledged(ack.channel, len(covered))
                all_covered += covered
        return all_covered

    # ---- resume

    def channel_states(self) -> tuple[ChannelState, ...]:
        """What this side tells when the session goes on over a new control connection."""
        return tuple(
            ChannelState(half.channel, half.written, half.credit, opened=half.channel in self.senders)
            for half in self.receivers.values()
        )

    def resumed(self, received: int, channels: tuple[ChannelState, ...], now: float) -> list[Departure]:
        """Take what the peer said: which frames it has, and what of them it has written onward; return the latter.

        Raises:
            ProtocolViolation: it cannot have that.
        """
        if received > self._order_sent:
            raise ProtocolViolation(f"the peer says it has {received} frames of {self._order_sent}")
        acks = [
            Ack(ChannelId(state.channel), self.role.sends, state.frames, state.credit)
            for state in channels
            if state.channel in self.senders
        ]
        covered = self.acknowledged(acks, now)
        self.outbox.peer_has(received)
        self.acknowledge_again()
        return covered

    def acknowledge_again(self) -> None:
        """Acknowledgements may have been lost on the way: all there were are due once more.

        Of a channel on which nothing has arrived there were none, and its other end may not be open yet.
        """
        self._unacknowledged.update(channel for channel, half in self.receivers.items() if half.written)

    # ---- lanes

    def lane_progress(
        self, progress: LaneProgress, received_bytes: int, *, begun_bytes: int, missing_bytes: int
    ) -> None:
        """Hold a lane's arrivals against its sender's count, once a heartbeat.

        Record lengths are read before they can be authenticated. A length that was raised on the way would make the
        receiver wait for bytes that never come. It shows here, because the sender's count always stands between two
        records: none that began before it can end behind it.

        Args:
            progress: what the sender had put on the lane when it sent the heartbeat (always whole records).
            received_bytes: what has arrived on it.
            begun_bytes: how much of that belongs to the record under way.
            missing_bytes: what the record under way still lacks, by its header.

        Raises:
            RecordMalformed: the record under way claims to be longer than what was sent.
            PeerLost: what was sent does not arrive, over ``HEARTBEATS_MISSED_MAX`` heartbeats.
        """
        if missing_bytes and received_bytes - begun_bytes < progress.sent_bytes < received_bytes + missing_bytes:
            raise RecordMalformed(f"lane {progress.lane}: a record claims bytes that were never sent")
        watch = self._watches.setdefault(LaneId(progress.lane), _LaneWatch())
        still = received_bytes < progress.sent_bytes and received_bytes == watch.received_bytes
        watch.stalled = watch.stalled + 1 if still else 0
        watch.received_bytes = received_bytes
        if watch.stalled >= HEARTBEATS_MISSED_MAX:
            missing = progress.sent_bytes - received_bytes
            raise PeerLost(f"lane {progress.lane}: {missing} bytes do not arrive although the peer is alive")

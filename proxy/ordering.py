"""Frames on several lanes: what waits to be acknowledged at one end, what waits for its turn at the other. Sans-IO.

Lanes carry frames side by side, so they arrive in any order; cache order puts them right again. A lane that breaks
takes frames with it: the sender keeps each until it is acknowledged, sends those of a lost lane once more by another,
and never encodes anything twice. The receiver drops what it has already.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, unique
from typing import Generic, Protocol, TypeVar

from crypto.keys import LaneId
from proxy.errors import ProtocolViolation
from proxy.limits import ORDER_AHEAD_MAX, REORDER_BYTES_MAX
from proxy.wire import ChannelId

T = TypeVar("T")


class Releasable(Protocol):
    """A buffer that can be used again."""

    def release(self) -> None:
        """Give it back."""


@dataclass(slots=True, eq=False)
class Outgoing:
    """A frame on its way.

    Args:
        order: its cache order.
        channel: its channel.
        data: header and body, as they go into records.
        owner: what ``data`` lies in, to be released when nobody needs it any more; None for bytes of its own.
    """

    order: int
    channel: ChannelId
    data: memoryview
    owner: Releasable | None
    lane: LaneId | None = None
    """The lane it was given to last."""
    senders: int = 0
    """Who is reading its bytes at this moment, or has it and waits for a lane."""
    settled: bool = False
    """Whether it will never be sent again."""


class Outbox:
    """Frames that were made and not acknowledged.

    Args:
        keeps: whether frames are kept for another try; without that, a frame that was sent is forgotten.
        release: called once for each frame whose bytes nobody needs any more.
    """

    def __init__(self, release: Callable[[Outgoing], None], *, keeps: bool) -> None:
        self.keeps = keeps
        self.resent = 0
        """Frames that were sent once more so far."""
        self._release = release
        self._kept: dict[int, Outgoing] = {}
        self._by_channel: dict[ChannelId, deque[Outgoing]] = {}
        self._again: deque[Outgoing] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, frame: Outgoing) -> None:
        """A frame was made; one call each, in cache order. ``leaving`` and ``left`` must follow."""
        frame.senders += 1
        if self.keeps:
            self._kept[frame.order] = frame
            self._by_channel.setdefault(frame.channel, deque()).append(frame)

    def leaving(self, frame: Outgoing, lane: LaneId) -> None:
        """A lane begins to read the frame's bytes."""
        frame.lane = lane

    def left(self, frame: Outgoing) -> None:
        """A lane has done with the frame's bytes, well or not."""
        frame.senders -= 1
        if not self.keeps:
            frame.settled = True
        self._free(frame)

    def acknowledged(self, channel: ChannelId, count: int) -> None:
        """The channel's next ``count`` frames need not be kept."""
        if not self.keeps:
            return
        frames = self._by_channel[channel]
        for _ in range(count):
            frame = frames.popleft()
            del self._kept[frame.order]
            frame.settled = True
            self._free(frame)

    def lost(self, lane: LaneId) -> None:
        """A lane has broken: whatever it was given and is not acknowledged must be sent again."""
        waiting = {frame.order for frame in self._again}
        again = [frame for frame in self._kept.values() if frame.lane == lane and frame.order not in waiting]
        self._again = deque(sorted((*self._again, *again), key=lambda frame: frame.order))

    def peer_has(self, order: int) -> None:
        """The peer has said that everything below ``order`` has arrived; its acknowledgements may come later."""
        self._again = deque(frame for frame in self._again if frame.order >= order)

    @property
    def waiting(self) -> bool:
        """Whether a frame may have to be sent again."""
        return bool(self._again)

    def next_again(self) -> Outgoing | None:
        """The next frame to send once more, the lowest in cache order first; None where all is well.

        ``leaving`` and ``left`` must follow. Acknowledged in between, it keeps its bytes until then.
        """
        while self._again:
            frame = self._again.popleft()
            if not frame.settled:
                frame.senders += 1
                self.resent += 1
                return frame
        return None

    def _free(self, frame: Outgoing) -> None:
        if frame.settled and not frame.senders:
            self._release(frame)


@unique
class Arrival(Enum):
    """What a frame that arrives is in cache order."""

    NEXT = "next"
    AHEAD = "ahead"  # an earlier one is still on its way, by another lane or for a second time
    AGAIN = "again"  # it is here already


class Inbox(Generic[T]):
    """Frames that arrived before their turn.

    Args:
        repeats: whether a frame may come twice, because its sender cannot know what a lost lane had delivered.
    """

    def __init__(self, *, repeats: bool) -> None:
        self.repeats = repeats
        self.gaps = False
        """Whether a frame may be ahead of its turn: not while there has been one lane, which keeps the order."""
        self.expected = 0
        """Cache order of the next frame; all below have been taken."""
        self.repeated = 0
        """Frames that came again so far."""
        self._held: dict[int, tuple[T, int]] = {}
        self._held_bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def judge(self, order: int, size: int) -> Arrival:
        """What to do with a frame of ``size`` bytes: take it, ``hold`` it or drop it.

        Raises:
            ProtocolViolation: it cannot be this far ahead, or may not come twice.
        """
        if order == self.expected:
            return Arrival.NEXT
        if order < self.expected or order in self._held:
            if not self.repeats:
                raise ProtocolViolation(f"frame {order} in cache order came again, {self.expected} expected")
            self.repeated += 1
            return Arrival.AGAIN
        if not self.gaps:
            raise ProtocolViolation(f"frame {order} in cache order on the only lane, {self.expected} expected")
        if order - self.expected > ORDER_AHEAD_MAX or self._held_bytes + size > REORDER_BYTES_MAX:
            raise ProtocolViolation(f"frame {order} in cache order, {self.expected} expected: too far ahead")
        return Arrival.AHEAD

    def hold(self, order: int, item: T, size: int) -> None:
        """Keep a frame that is ahead until its turn."""
        self._held[order] = (item, size)
        self._held_bytes += size

    def taken(self) -> None:
        """The expected frame was taken."""
        self.expected += 1

    def due(self) -> T | None:
        """The held frame whose turn it is, taken out; None where it has not arrived."""
        found = self._held.pop(self.expected, None)
        if found is None:
            return None
        item, size = found
        self._held_bytes -= size
        return item

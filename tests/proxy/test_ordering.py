"""Frames kept until they are acknowledged, and frames that come before their turn."""

import random
from collections.abc import Iterator

import pytest

from crypto.keys import LaneId
from proxy.errors import ProtocolViolation
from proxy.limits import MIB, ORDER_AHEAD_MAX, REORDER_BYTES_MAX
from proxy.ordering import Arrival, Inbox, Outbox, Outgoing
from proxy.wire import ChannelId

ONE, TWO = LaneId(1), LaneId(2)


class Boxes:
    """An outbox, and which of its frames' buffers have been given back."""

    def __init__(self, *, keeps: bool = True) -> None:
        self.released: list[int] = []
        self.outbox = Outbox(lambda frame: self.released.append(frame.order), keeps=keeps)
        self._orders: Iterator[int] = iter(range(10**6))

    def made(self, channel: int = 0) -> Outgoing:
        """A frame that was made and waits for a lane."""
        frame = Outgoing(next(self._orders), ChannelId(channel), memoryview(b"frame"), None)
        self.outbox.add(frame)
        return frame

    def sent(self, lane: LaneId = ONE, channel: int = 0) -> Outgoing:
        """A frame that has been sent."""
        frame = self.made(channel)
        self.outbox.leaving(frame, lane)
        self.outbox.left(frame)
        return frame

    def again(self, lane: LaneId = TWO) -> list[int]:
        """Send again what has to be: the orders."""
        orders = []
        while (frame := self.outbox.next_again()) is not None:
            self.outbox.leaving(frame, lane)
            self.outbox.left(frame)
            orders.append(frame.order)
        return orders


def test_a_frame_is_kept_until_it_is_acknowledged() -> None:
    boxes = Boxes()
    boxes.sent()
    boxes.sent()
    assert boxes.released == []
    boxes.outbox.acknowledged(ChannelId(0), 1)
    assert boxes.released == [0]
    assert len(boxes.outbox) == 1


def test_without_resume_a_frame_is_forgotten_when_it_has_left() -> None:
    boxes = Boxes(keeps=False)
    boxes.sent()
    assert boxes.released == [0]
    boxes.outbox.lost(ONE)
    assert not boxes.outbox.waiting
    assert len(boxes.outbox) == 0


def test_what_a_lost_lane_had_is_sent_again_in_order_and_nothing_else() -> None:
    boxes = Boxes()
    for lane in (ONE, TWO, ONE, ONE, TWO, ONE):
        boxes.sent(lane)
    boxes.outbox.acknowledged(ChannelId(0), 1)
    boxes.outbox.lost(ONE)
    assert boxes.outbox.waiting
    assert boxes.again() == [2, 3, 5]
    assert boxes.outbox.resent == 3
    boxes.outbox.lost(ONE)
    assert boxes.again() == []
    boxes.outbox.lost(TWO)
    assert boxes.again(ONE) == [1, 2, 3, 4, 5]


def test_what_the_peer_has_is_not_sent_again() -> None:
    boxes = Boxes()
    for _ in range(4):
        boxes.sent()
    boxes.outbox.lost(ONE)
    boxes.outbox.peer_has(2)
    assert boxes.again() == [2, 3]
    assert boxes.released == []


def test_what_is_acknowledged_meanwhile_is_not_sent_again() -> None:
    boxes = Boxes()
    for _ in range(3):
        boxes.sent()
    boxes.outbox.lost(ONE)
    boxes.outbox.acknowledged(ChannelId(0), 2)
    assert boxes.again() == [2]


def test_a_frame_on_its_way_keeps_its_bytes_although_it_is_acknowledged() -> None:
    boxes = Boxes()
    frame = boxes.made()
    boxes.outbox.leaving(frame, ONE)
    boxes.outbox.acknowledged(ChannelId(0), 1)
    assert boxes.released == []
    boxes.outbox.left(frame)
    assert boxes.released == [0]


def test_a_frame_that_waits_for_a_lane_keeps_its_bytes_although_it_is_acknowledged() -> None:
    """A peer may say so before it was sent; and once it is to be sent again, an acknowledgement may come late.

    Its buffer given away, the next frame would be written over it while it is being sealed, and given away once more
    after it has left.
    """
    boxes = Boxes()
    frame = boxes.made()
    boxes.outbox.acknowledged(ChannelId(0), 1)
    assert boxes.released == []
    boxes.outbox.leaving(frame, ONE)
    boxes.outbox.left(frame)
    assert boxes.released == [0]

    boxes.sent()
    boxes.outbox.lost(ONE)
    again = boxes.outbox.next_again()
    assert again is not None
    boxes.outbox.acknowledged(ChannelId(0), 1)
    assert boxes.released == [0]
    boxes.outbox.leaving(again, TWO)
    boxes.outbox.left(again)
    assert boxes.released == [0, 1]


class Traffic:
    """Frames that leave, are lost and are acknowledged in an order drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self.boxes = Boxes()
        self._waiting: list[Outgoing] = []
        self._leaving: list[Outgoing] = []
        self._unacknowledged = {0: 0, 1: 0}
        self.made = 0

    @property
    def held(self) -> set[int]:
        """What somebody reads, or is about to."""
        return {frame.order for frame in (*self._waiting, *self._leaving)}

    def make(self) -> None:
        channel = self._dice.randrange(2)
        self._waiting.append(self.boxes.made(channel))
        self._unacknowledged[channel] += 1
        self.made += 1

    def begin(self) -> None:
        if self._waiting:
            frame = self._waiting.pop(self._dice.randrange(len(self._waiting)))
            self.boxes.outbox.leaving(frame, self._dice.choice([ONE, TWO]))
            self._leaving.append(frame)

    def end(self) -> None:
        if self._leaving:
            self.boxes.outbox.left(self._leaving.pop(self._dice.randrange(len(self._leaving))))

    def lose(self) -> None:
        self.boxes.outbox.lost(self._dice.choice([ONE, TWO]))

    def send_again(self) -> None:
        frame = self.boxes.outbox.next_again()
        if frame is not None:
            self._waiting.append(frame)

    def acknowledge(self, *, everything: bool = False) -> None:
        for channel, count in self._unacknowledged.items():
            some = count if everything else self._dice.randint(0, count)
            if some:
                self.boxes.outbox.acknowledged(ChannelId(channel), some)
                self._unacknowledged[channel] -= some

    def step(self) -> None:
        self._dice.choice([self.make, self.begin, self.end, self.lose, self.send_again, self.acknowledge])()

    def finish(self) -> None:
        """Everything leaves, and is acknowledged."""
        while self.held:
            self.begin()
            self.end()
        self.acknowledge(everything=True)


@pytest.mark.parametrize("seed", range(200))
def test_each_buffer_is_given_back_once_and_none_too_early(seed: int) -> None:
    """Whatever the order in which frames leave, are lost and are acknowledged."""
    traffic = Traffic(seed)
    for _ in range(300):
        traffic.step()
        assert not traffic.held & set(traffic.boxes.released), seed
    traffic.finish()
    assert sorted(traffic.boxes.released) == list(range(traffic.made)), seed
    assert len(traffic.boxes.outbox) == 0


# ---- arrivals


def opened(*, repeats: bool = True, gaps: bool = True) -> Inbox[str]:
    """An inbox."""
    inbox: Inbox[str] = Inbox(repeats=repeats)
    inbox.gaps = gaps
    return inbox


def take(inbox: Inbox[str], order: int, size: int = 1) -> Arrival:
    """A frame arrives, and what is due is taken."""
    arrival = inbox.judge(order, size)
    if arrival is Arrival.NEXT:
        inbox.taken()
        while inbox.due() is not None:
            inbox.taken()
    elif arrival is Arrival.AHEAD:
        inbox.hold(order, f"frame {order}", size)
    return arrival


@pytest.mark.parametrize("seed", range(20))
def test_any_order_is_put_right(seed: int) -> None:
    dice = random.Random(seed)
    orders = [*range(50), *range(0, 50, 3)]
    dice.shuffle(orders)
    inbox = opened()
    arrivals = [take(inbox, order) for order in orders]
    assert inbox.expected == 50
    assert len(inbox) == 0
    assert arrivals.count(Arrival.AGAIN) == inbox.repeated == len(orders) - 50


def test_one_lane_keeps_the_order() -> None:
    inbox = opened(gaps=False)
    with pytest.raises(ProtocolViolation, match="only lane"):
        inbox.judge(1, 1)


@pytest.mark.parametrize("held", [False, True])
def test_nothing_comes_twice_where_nothing_is_sent_again(held: bool) -> None:
    inbox = opened(repeats=False)
    take(inbox, 1 if held else 0)
    with pytest.raises(ProtocolViolation, match="came again"):
        inbox.judge(1 if held else 0, 1)


def test_how_far_ahead_in_frames() -> None:
    inbox = opened()
    assert inbox.judge(ORDER_AHEAD_MAX, 1) is Arrival.AHEAD
    with pytest.raises(ProtocolViolation, match="too far"):
        inbox.judge(ORDER_AHEAD_MAX + 1, 1)


def test_how_far_ahead_in_bytes() -> None:
    inbox = opened()
    for order in range(1, REORDER_BYTES_MAX // MIB + 1):
        assert take(inbox, order, MIB) is Arrival.AHEAD
    with pytest.raises(ProtocolViolation, match="too far"):
        inbox.judge(REORDER_BYTES_MAX // MIB + 1, 1)
    assert take(inbox, 5, MIB) is Arrival.AGAIN  # what is held costs nothing more
    assert take(inbox, 0, MIB) is Arrival.NEXT
    assert inbox.judge(REORDER_BYTES_MAX // MIB + 2, REORDER_BYTES_MAX) is Arrival.AHEAD

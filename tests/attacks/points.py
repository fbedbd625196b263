"""Where on the wire an attack strikes: units named by what a clean session's timeline shows them to be."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from tests.attacks.mitm import Action
from tests.attacks.relays import Outcome
from tests.attacks.wire import ACK, FINAL, HEADER_BYTES, TLS_HEADER_BYTES, Kind, Unit, Way, flip

Which = Callable[[Unit], bool]
FORWARD, BACKWARD = Way.FORWARD, Way.BACKWARD
MESSAGES = {
    FORWARD: ("CHANNEL_OPEN", "FINISH", "the source's close_notify"),
    BACKWARD: ("CHANNEL_OPENED", "FINISHED", "the destination's close_notify"),
}
"""What the ends say on the control connection after ACCEPT, heartbeats apart."""


@dataclass(frozen=True, slots=True)
class Control:
    """What the control connection's TLS records are, as a clean session without heartbeats shows it.

    Args:
        server_flight: records 0 to this - 1 are the destination's part of the handshake, sent before the source's last.
        offer: ordinal of the source's OFFER; what is before it is its part of the handshake.
        accept: ordinal of the destination's ACCEPT; between the flight and it there may be session tickets.
        sizes: bytes of the later records, by name. Heartbeats, which are longer, may shift their ordinals.
    """

    server_flight: int
    offer: int
    accept: int
    sizes: dict[str, int]

    @classmethod
    def of(cls, clean: Outcome) -> "Control":
        """By what was seen of a clean session."""
        first_lane = next(at for at, unit in enumerate(clean.seen) if unit.kind is Kind.LANE)
        records = [unit for unit in clean.seen if unit.what == "tls"]
        before = [unit for unit in clean.seen[:first_lane] if unit.what == "tls"]
        after = [unit for unit in clean.seen[first_lane:] if unit.what == "tls"]
        answer = next(at for at, unit in enumerate(records) if unit.way is FORWARD and unit.index == 1)
        sent, answered = ([len(unit.data) for unit in after if unit.way is way] for way in Way)
        assert len(sent) == len(answered) == len(MESSAGES[FORWARD]), "heartbeats in a clean session"
        return cls(
            server_flight=sum(unit.way is BACKWARD for unit in records[:answer]),
            offer=max(unit.index for unit in before if unit.way is FORWARD),
            accept=max(unit.index for unit in before if unit.way is BACKWARD),
            sizes=dict(zip((*MESSAGES[FORWARD], *MESSAGES[BACKWARD]), (*sent, *answered), strict=True)),
        )

    def message(self, name: str) -> Which:
        """Tells one of the later records."""
        way = FORWARD if name in MESSAGES[FORWARD] else BACKWARD
        last, size = self.offer if way is FORWARD else self.accept, self.sizes[name]
        return lambda unit: unit.what == "tls" and unit.way is way and unit.index > last and len(unit.data) == size


class FlipOnce:
    """Turn one bit of the first unit that is meant.

    Args:
        way: the unit's way.
        which: tells the unit.
        bit: an ordinal, negative from the end; or a fraction of the way from the end of the unit's header to its end.
    """

    def __init__(self, way: Way, which: Which, bit: float) -> None:
        self._way, self._which, self._bit = way, which, bit
        self.done = False

    def __call__(self, unit: Unit) -> Iterable[Action]:
        """See `Attack`."""
        if self.done or unit.way is not self._way or not self._which(unit):
            return (unit.data,)
        self.done = True
        bits = 8 * len(unit.data)
        if isinstance(self._bit, int):
            return (flip(unit.data, self._bit % bits),)
        header = 8 * {"record": HEADER_BYTES, "tls": TLS_HEADER_BYTES}.get(unit.what, 0)
        return (flip(unit.data, header + int(self._bit * (bits - header))),)


def places(seed: str, count: int) -> list[float]:
    """Some fractions for `FlipOnce`, the same each time."""
    random = Random(seed)
    return [random.random() for _ in range(count)]


def tls(index: int) -> Which:
    """The control connection's record of this ordinal."""
    return lambda unit: unit.what == "tls" and unit.index == index


def first_data(unit: Unit) -> bool:
    """The first frame of the stream."""
    return unit.is_data and unit.index <= 2


def middle_ack(unit: Unit) -> bool:
    """The first acknowledgement from the middle of the conversation on: how many there are depends on the timing."""
    return unit.what == "record" and unit.type == ACK and unit.index >= 3


def end(unit: Unit) -> bool:
    """The END frame: the last one."""
    return unit.is_end


def final(unit: Unit) -> bool:
    """The FINAL record."""
    return unit.what == "record" and unit.type == FINAL


def prefix(unit: Unit) -> bool:
    """Magic and token of the first lane."""
    return unit.what == "prefix" and unit.lane == 0


def hello(unit: Unit) -> bool:
    """The first record on the first lane: HELLO one way, LANE_OK the other."""
    return unit.what == "record" and unit.lane == 0 and unit.index == 0

"""Windows over a simulated link: how many bytes are under way, and how long an urgent page waits behind them."""

import heapq
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.flow import Departure, FlightWindow, credit_bytes
from proxy.limits import (
    CHANNELS_MAX,
    CREDIT_BYTES_MAX,
    CREDIT_BYTES_MIN,
    CREDIT_BYTES_SESSION,
    IN_FLIGHT_BYTES_MAX,
    IN_FLIGHT_BYTES_MIN,
    MIB,
)


@dataclass
class Link:
    """A seeded link: one bottleneck that serves frames in order, then a delay there and back, with jitter."""

    bytes_per_second: float
    round_trip_seconds: float
    jitter: float = 0.05
    seed: int = 1
    window: FlightWindow = field(default_factory=FlightWindow)
    now: float = 100.0
    delivered: int = 0
    in_flight_most: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._free_at = self.now
        self._acks: list[tuple[float, int, Departure]] = []
        self._count = 0

    @property
    def product_bytes(self) -> float:
        return self.bytes_per_second * self.round_trip_seconds

    def run(self, seconds: float, frame_bytes: int = MIB) -> "Link":
        """A sender that always has something to send."""
        end = self.now + seconds
        while self.now < end:
            # A channel with nothing of its own under way may always send: its share (Session.room_bytes).
            while self.window.room_bytes >= frame_bytes or not self._acks:
                self.send(frame_bytes)
            self.in_flight_most = max(self.in_flight_most, self.window.in_flight_bytes)
            self.acknowledge()
        return self

    def send(self, size: int) -> None:
        departure = self.window.depart(size, self.now)
        self._free_at = max(self._free_at, self.now) + size / self.bytes_per_second
        delay = self.round_trip_seconds * (1 + self._random.uniform(0, self.jitter))
        heapq.heappush(self._acks, (self._free_at + delay, self._count, departure))
        self._count += 1

    def acknowledge(self) -> None:
        """The next acknowledgement arrives."""
        at, _, departure = heapq.heappop(self._acks)
        self.now = max(self.now, at)
        self.delivered += departure.size
        self.window.arrive(departure, self.now)
        assert IN_FLIGHT_BYTES_MIN // 2 <= self.window.limit_bytes <= IN_FLIGHT_BYTES_MAX
        assert self.window.in_flight_bytes >= 0
        assert self.window.room_bytes >= 0

    def drain(self) -> None:
        while self._acks:
            self.acknowledge()


LINKS = {
    "loopback": (3e9, 0.0001),
    "10 Gb/s in a rack": (1.25e9, 0.0005),
    "10 Gb/s between cities": (1.25e9, 0.010),
    "1 Gb/s between countries": (125e6, 0.050),
    "100 Mb/s around the world": (12.5e6, 0.300),
    "1 Mb/s": (125e3, 0.050),
}


@pytest.fixture(params=LINKS.values(), ids=LINKS.keys())
def link(request: pytest.FixtureRequest) -> Link:
    return Link(*request.param)


def test_the_window_is_wide_enough_to_fill_the_link(link: Link) -> None:
    link.run(20)
    before = link.delivered
    link.run(20)
    wanted = 0.9 * link.bytes_per_second * 20
    if link.product_bytes > IN_FLIGHT_BYTES_MAX / 2:
        wanted *= IN_FLIGHT_BYTES_MAX / 2 / link.product_bytes
    assert link.delivered - before >= wanted


def test_the_window_is_no_wider_than_twice_the_bandwidth_delay_product(link: Link) -> None:
    """An urgent page waits behind what is under way: at no time in a long migration may that grow on its own."""
    slack = 1.25  # jitter, and the bottleneck's time for the frame itself
    frame_seconds = MIB / link.bytes_per_second
    bound = max(IN_FLIGHT_BYTES_MIN, 2 * slack * (link.product_bytes + frame_seconds * link.bytes_per_second))
    link.run(120 if link.bytes_per_second < 1e9 else 60)
    assert link.in_flight_most <= min(IN_FLIGHT_BYTES_MAX, bound)


def test_a_stuck_channel_does_not_keep_the_window_narrow() -> None:
    """What its hypervisor does not take stays under way: no delay can be measured anew, and the old one must do."""
    link = Link(125e6, 0.050)
    link.run(5)
    link.window.depart(IN_FLIGHT_BYTES_MIN, link.now)
    narrow = 0.0
    end = link.now + 60
    while link.now < end:
        before = link.now
        link.run(0.01)
        narrow += link.now - before if link.window.limit_bytes < IN_FLIGHT_BYTES_MIN else 0.0
    assert narrow < 15


def test_it_begins_at_its_floor_and_knows_nothing() -> None:
    window = FlightWindow()
    assert (window.limit_bytes, window.room_bytes) == (IN_FLIGHT_BYTES_MIN, IN_FLIGHT_BYTES_MIN)
    assert (window.in_flight_bytes, window.delay_seconds) == (0, 0.0)


def test_it_shrinks_again_when_the_link_slows() -> None:
    link = Link(1.25e9, 0.020)
    link.run(5)
    assert link.window.limit_bytes > 16 * MIB
    link.bytes_per_second = 12.5e6
    link.run(30)
    assert link.window.limit_bytes == IN_FLIGHT_BYTES_MIN


def test_a_path_that_grows_longer_is_noticed() -> None:
    link = Link(125e6, 0.010)
    link.run(5)
    link.round_trip_seconds = 0.150
    link.run(60)
    before = link.delivered
    link.run(10)
    assert link.delivered - before >= 0.8 * 125e6 * 10


def test_an_idle_link_and_a_ping() -> None:
    link = Link(1.25e9, 0.001)
    for _ in range(50):
        link.send(1)
        link.drain()
        link.now += 60
    assert link.window.in_flight_bytes == 0
    assert link.window.limit_bytes == IN_FLIGHT_BYTES_MIN


def test_a_clock_that_does_not_move_does_no_harm() -> None:
    window = FlightWindow()
    for _ in range(100):
        window.arrive(window.depart(MIB, 5.0), 5.0)
    assert (window.in_flight_bytes, window.limit_bytes) == (0, IN_FLIGHT_BYTES_MIN)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4 * MIB), st.floats(0, 100)), max_size=200))
def test_never_negative_and_within_its_limits(steps: list[tuple[bool, int, float]]) -> None:
    window, now, under_way = FlightWindow(), 0.0, []
    for departs, size, elapsed in steps:
        now += elapsed
        if departs:
            under_way.append(window.depart(size, now))
        elif under_way:
            window.arrive(under_way.pop(0), now)
        assert window.in_flight_bytes == sum(departure.size for departure in under_way)
        assert window.room_bytes >= 0
        assert IN_FLIGHT_BYTES_MIN // 2 <= window.limit_bytes <= IN_FLIGHT_BYTES_MAX


def test_a_seed_gives_the_same_simulation_again() -> None:
    first, second = (Link(125e6, 0.05, seed=7).run(5) for _ in range(2))
    assert (first.now, first.delivered) == (second.now, second.delivered)
    assert Link(125e6, 0.05, seed=8).run(5).now != first.now


# ------------------------------------------------------------------ credit


@pytest.mark.parametrize("channels", range(CHANNELS_MAX + 1))
def test_credit_is_a_share_with_floor_and_ceiling(channels: int) -> None:
    credit = credit_bytes(channels)
    assert CREDIT_BYTES_MIN <= credit <= CREDIT_BYTES_MAX
    assert credit_bytes(channels + 1) <= credit
    if channels and credit > CREDIT_BYTES_MIN:
        assert credit * channels <= CREDIT_BYTES_SESSION
    assert credit * max(1, channels) <= max(CREDIT_BYTES_SESSION, CHANNELS_MAX * CREDIT_BYTES_MIN)

"""A simulated migration: frames of made content through an encoder of cores and a link, in simulated time.

The encoder's figures are those measured over real streams, bent by a seeded amount for each machine and each regime and
by noise for each frame, so that an adapter that trusts its own starting figures is found out.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from chunking.adapt import Adapter
from chunking.costs import Encoded
from chunking.link import Departure
from chunking.regime import Regime

FRAME_BYTES = 4 << 20
QUEUE_FRAMES = 4  # encoded ahead of the link
WINDOW_BYTES_MIN = 4 << 20
MBIT = 1e6 / 8

PLAN = {Regime.DEDUP: 0.53e-9, **dict.fromkeys(list(Regime)[2:], 0.58e-9)}
PRESS = {
    Regime.DEDUP: 0.2e-9,
    Regime.DELTA: 0.2e-9,
    Regime.FAST: 1.40e-9,
    Regime.LIGHT: 2.23e-9,
    Regime.FIRM: 3.59e-9,
    Regime.BEST: 31.8e-9,
}
DEPTH = {Regime.FAST: 1.0, Regime.LIGHT: 1.74, Regime.FIRM: 1.86, Regime.BEST: 1.98}


class Content(NamedTuple):
    """Shares of one frame: new of the stream, packed of new (with deltas), compressed of packed (in FAST)."""

    new: float
    packed: float
    ratio: float


ZEROS = Content(0.0, 1.0, 1.0)
NOISE = Content(1.0, 1.0, 1.0)
TEXT = Content(1.0, 1.0, 0.5)
GUEST = Content(0.75, 1.0, 0.5)
COPIES = Content(0.05, 1.0, 0.5)
DELTAS = Content(0.9, 0.1, 0.6)


@dataclass
class Machine:
    """How an encoder really performs; ``seed`` makes it another."""

    seed: int
    cores: int = 2
    bend: float = 0.25
    noise: float = 0.1
    hindered: float = 0.0
    pace: float = field(init=False)

    def __post_init__(self) -> None:
        dice = random.Random(self.seed)
        self.pace = math.exp(dice.uniform(-0.5, 0.7))
        self._press = {r: s * self.pace * math.exp(dice.uniform(-self.bend, self.bend)) for r, s in PRESS.items()}
        self._depth = {r: d * math.exp(dice.uniform(-0.1, 0.1)) for r, d in DEPTH.items()}
        self._noise = random.Random(self.seed + 1)

    def encode(self, regime: Regime, content: Content) -> Encoded:
        if regime is Regime.RAW:
            return Encoded(regime, FRAME_BYTES, FRAME_BYTES, FRAME_BYTES, FRAME_BYTES, 0.0, 0.0)
        new = int(content.new * FRAME_BYTES)
        packed = int(new * content.packed) if regime >= Regime.DELTA else new
        ratio = content.ratio ** self._depth[regime] if regime >= Regime.FAST else 1.0
        body = int(packed * ratio + 0.002 * FRAME_BYTES)
        plan = PLAN[regime] * self.pace * FRAME_BYTES * self._jitter()
        return Encoded(regime, FRAME_BYTES, new, packed, body, plan, self._press[regime] * packed * self._jitter())

    def _jitter(self) -> float:
        hindered = 10.0 if self._noise.random() < self.hindered else 1.0
        return hindered * math.exp(self._noise.gauss(0.0, self.noise))


class Run(NamedTuple):
    """What came of a simulated migration: seconds, wire bytes, the regime of each frame."""

    seconds: float
    wire_bytes: int
    regimes: list[Regime]


def migrate(
    contents: Iterable[Content],
    link: Callable[[float], float],
    machine: Machine,
    *,
    adapter: Adapter | None = None,
    fixed: Regime = Regime.RAW,
    delay_seconds: float = 0.0002,
) -> Run:
    """Send frames of ``contents`` over a link of ``link(now)`` bytes a second, by an adapter or in a fixed regime."""
    events: list[tuple[float, int, Callable[[float], None]]] = []
    order = count()
    cores = [0.0] * machine.cores
    chains = deque([0.0] * machine.cores)
    departed: deque[float] = deque([0.0] * QUEUE_FRAMES, maxlen=QUEUE_FRAMES)
    flights: deque[tuple[float, int]] = deque()
    in_flight = wire = 0
    planned = wire_free = left = end = 0.0
    regimes = []

    def at(now: float, what: Callable[[float], None]) -> None:
        heapq.heappush(events, (now, next(order), what))

    def work(ready: float, seconds: float) -> float:
        core = min(range(machine.cores), key=cores.__getitem__)
        cores[core] = max(cores[core], ready) + seconds
        return cores[core]

    for content in contents:
        start = max(planned, departed[0], min(cores) if fixed or adapter else 0.0)
        while events and events[0][0] <= start:
            now, _, what = heapq.heappop(events)
            what(now)
        regime = adapter.choose(FRAME_BYTES) if adapter else fixed
        regimes.append(regime)
        frame = machine.encode(regime, content)
        if regime is Regime.RAW:
            planned = ready = start
        else:
            planned = work(start, frame.plan_seconds)
            pressed = work(max(planned, chains[-1] if regime is Regime.BEST else chains[0]), frame.press_seconds)
            chains.popleft()
            chains.append(pressed)
            ready = pressed
        ready = max(ready, left)
        if adapter and regime is not Regime.RAW:
            at(ready, lambda _, frame=frame: adapter.encoded(frame))
        # The window: what is under way stays below twice what the link holds.
        leave = ready
        while flights and in_flight + FRAME_BYTES > max(2 * link(leave) * delay_seconds, WINDOW_BYTES_MIN):
            done, size = flights.popleft()
            in_flight -= size
            leave = max(leave, done)
        size = frame.body_bytes
        wire_free = max(wire_free, leave) + size / link(leave)
        end = wire_free + delay_seconds
        flights.append((end, FRAME_BYTES))
        in_flight += FRAME_BYTES
        wire += size
        left = leave
        departed.append(leave)
        if adapter:
            if leave > ready:
                at(ready, lambda now: adapter.waiting(True, now))
                at(leave, lambda now: adapter.waiting(False, now))
            at(leave, lambda now, size=size, end=end: at(end, _acknowledge(adapter, adapter.sent(size, now))))
    return Run(end, wire, regimes)


def _acknowledge(adapter: Adapter, departure: Departure) -> Callable[[float], None]:
    return lambda now: adapter.acknowledged(departure, now)


def mixed(seed: int, frames: int, kinds: tuple[Content, ...], run_max: int) -> Iterator[Content]:
    """Bursts: runs of up to ``run_max`` frames of one kind after another."""
    dice = random.Random(seed)
    left = frames
    while left > 0:
        run = min(left, dice.randint(1, run_max))
        yield from [dice.choice(kinds)] * run
        left -= run

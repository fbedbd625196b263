"""How long streams would take over links that this machine does not have, from what encoding really costs here.

Pieces are encoded one after the other on one core; each takes the CPU time that it is measured to take. Encoded frames
wait for the link, a few of them at most, as in the relay; the link carries one at a time at its rate. So a stream takes
what the slower of the two takes. Sockets, sealing and decoding are left out: it is the choice of an encoding that is
judged here, on hosts with cores to spare for the rest.

`auto` and `pages` are the relay's own: its adapter is told of everything at the time it would happen, and chooses.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import zstandard
from blake3 import blake3

from bench.codecs import AHEAD, BLOCK_BYTES, LENGTH_BYTES
from bench.corpus import Stream, pieces
from chunking.adapt import Adapter, Pin
from chunking.costs import Encoded
from chunking.encoder import Encoder
from chunking.limits import CACHE_BYTES_DEFAULT
from chunking.link import Departure
from chunking.pages import PAGE_BYTES, WORD_BYTES, Spans
from chunking.regime import Regime
from crypto.records import OVERHEAD_BYTES
from proxy.wire import FRAME_HEADER_BYTES

RATES_GBIT: Final = (0.1, 1.0, 10.0, 25.0)
OPAQUE, PAGES, BEST, AUTO, ZSTD_1, ZSTD_3 = "opaque", "pages", "best", "auto", "zstd -1", "zstd -3"
WAYS: Final = (OPAQUE, AUTO, PAGES, BEST, ZSTD_1, ZSTD_3)
SLOWER_MAX: Final = 1.05  # auto, against opaque
_FRAME_BYTES: Final = FRAME_HEADER_BYTES + OVERHEAD_BYTES
_BITS: Final = 8
_GIGA: Final = 1_000_000_000


class Step(NamedTuple):
    """One frame: its bytes on the wire, and the CPU time that making it took."""

    wire_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ModelSample:
    """All streams by one way over one link, in seconds, each through a pair that has seen nothing."""

    way: str
    gbit_per_s: float
    guest_bytes: int
    seconds: float


class _Line:
    """The encoder's clock and the link's."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self.now = 0.0
        self._starts: list[float] = []
        self.free_at = 0.0

    def make_room(self) -> None:
        """Wait until no more than a few frames wait for the link."""
        self._starts = [start for start in self._starts if start > self.now]
        if len(self._starts) > AHEAD:
            self.now = self._starts[-AHEAD - 1]

    def put(self, step: Step) -> tuple[float, float]:
        """A frame has been made; when it starts on the link, and when it is through."""
        self.now += step.seconds
        start = max(self.now, self.free_at)
        self.free_at = start + step.wire_bytes / self._rate
        self._starts.append(start)
        return start, self.free_at


def replay(steps: Iterable[Step], gbit_per_s: float) -> float:
    """The seconds that frames take whose making does not depend on the link."""
    line = _Line(gbit_per_s * _GIGA / _BITS)
    for step in steps:
        line.make_room()
        line.put(step)
    return max(line.now, line.free_at)


def _timed(work: Callable[[], int]) -> Step:
    start_s = time.thread_time()
    size = work()
    return Step(size, time.thread_time() - start_s)


def page_steps(stream: Stream, regime: Regime) -> list[Step]:
    """The stream in one regime."""
    encoder, hasher = Encoder(CACHE_BYTES_DEFAULT, 1), blake3()
    return [
        # mypy cannot infer the defaults of a lambda, which keep the values of this turn.
        _timed(lambda raw=raw, spans=spans: _encode(encoder, hasher, raw, spans, regime)[0])  # type: ignore[misc]
        for raw, spans in pieces(stream.read())
    ]


def zstd_steps(stream: Stream, level: int) -> list[Step]:
    """The stream in blocks of 1 MiB."""
    compressor, data = zstandard.ZstdCompressor(level=level), stream.read()
    return [
        # As above: defaults of a lambda.
        _timed(lambda at=at: LENGTH_BYTES + len(compressor.compress(data[at : at + BLOCK_BYTES])))  # type: ignore[misc]
        for at in range(0, len(data), BLOCK_BYTES)
    ]


def _encode(
    encoder: Encoder, hasher: blake3, raw: memoryview, spans: Spans, regime: Regime
) -> tuple[int, Encoded | None]:
    hasher.update(raw)
    hasher.digest()
    if regime is Regime.RAW:
        return _FRAME_BYTES + len(raw), None
    start_s = time.thread_time()
    plan = encoder.plan(raw, spans, regime)
    planned_s = time.thread_time()
    body = encoder.press(plan)
    pressed_s = time.thread_time()
    if body is None:
        return _FRAME_BYTES + len(raw), None
    other = plan.header.other + WORD_BYTES * plan.header.words
    told = Encoded(
        regime,
        raw_bytes=len(raw),
        new_bytes=PAGE_BYTES * plan.header.new + other,
        packed_bytes=plan.delta_bytes + plan.literal_bytes + other,
        body_bytes=len(body),
        plan_seconds=planned_s - start_s,
        press_seconds=pressed_s - planned_s,
    )
    return _FRAME_BYTES + len(body), told


def adapt(stream: Stream, gbit_per_s: float, pin: Pin) -> float:
    """The seconds that the stream takes where the adapter chooses."""
    adapter, encoder, hasher = Adapter(workers=1, pin=pin), Encoder(CACHE_BYTES_DEFAULT, 1), blake3()
    line = _Line(gbit_per_s * _GIGA / _BITS)
    events: list[tuple[float, int, Callable[[float], None]]] = []
    for number, (raw, spans) in enumerate(pieces(stream.read())):
        line.make_room()
        while events and events[0][0] <= line.now:
            at, _, event = heapq.heappop(events)
            event(at)
        adapter.fed(len(raw), 0.0)  # the hypervisor is never waited for
        regime, told = adapter.choose(len(raw)), list[Encoded | None]()

        def work(raw: memoryview = raw, spans: Spans = spans, regime: Regime = regime) -> int:
            size, encoded = _encode(encoder, hasher, raw, spans, regime)
            told.append(encoded)  # noqa: B023 (called at once)
            return size

        step = _timed(work)
        start, end = line.put(step)
        leave, arrive = _passage(adapter, step.wire_bytes, told[0])
        heapq.heappush(events, (start, 2 * number, leave))
        heapq.heappush(events, (end, 2 * number + 1, arrive))
    return max(line.now, line.free_at)


def _passage(
    adapter: Adapter, wire_bytes: int, told: Encoded | None
) -> tuple[Callable[[float], None], Callable[[float], None]]:
    """What the adapter hears when a frame leaves, and when it is through and acknowledged."""
    departures: list[Departure] = []

    def leave(now: float) -> None:
        departures.append(adapter.sent(wire_bytes, now))
        adapter.waiting(True, now)

    def arrive(now: float) -> None:
        adapter.waiting(False, now)
        if told is not None:
            adapter.encoded(told)
        adapter.acknowledged(departures[0], now)

    return leave, arrive


def measure_way(way: str, streams: Sequence[Stream], rates: Sequence[float] = RATES_GBIT) -> list[ModelSample]:
    """One way over links of all rates."""
    seconds = dict.fromkeys(rates, 0.0)
    for stream in streams:
        if way in {AUTO, PAGES}:
            for rate in rates:
                seconds[rate] += adapt(stream, rate, Pin(way))
            continue
        if way in {ZSTD_1, ZSTD_3}:
            steps = zstd_steps(stream, int(way.rpartition("-")[2]))
        else:
            steps = page_steps(stream, Regime.RAW if way == OPAQUE else Regime.BEST)
        for rate in rates:
            seconds[rate] += replay(steps, rate)
    guest_bytes = sum(stream.guest_bytes for stream in streams)
    return [ModelSample(way, rate, guest_bytes, spent) for rate, spent in seconds.items()]


def to_json(samples: Iterable[ModelSample]) -> list[dict[str, Any]]:
    """As they are."""
    return [asdict(sample) for sample in samples]

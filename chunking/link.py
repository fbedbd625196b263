"""How fast the link is, told from acknowledgements: measured where it held frames up, bounded below where it did not.

While frames wait for the link, what is acknowledged a second is the link's rate. While the link waits for frames, that
is only a lower bound; a better one is each frame's own way, its bytes over the time from leaving to acknowledgement.
A link that became faster while it is idle is found out only by giving it more to carry, which chunking/adapt.py does.
Sans-IO.
"""

from collections import deque
from typing import Final, NamedTuple

_SAMPLE_SECONDS: Final = 0.01  # shortest time a rate is measured over: acknowledgements come in bursts
_BUSY_SHARE: Final = 0.5  # of a sample's time that frames waited: above it the link was the bottleneck
_IN_FLIGHT_BYTES_MIN: Final = 128 * 1024  # with less under way a wait is for the delay, not for the link's rate
_SAMPLES: Final = 5  # of a busy link, the second best of which counts: rates are taken too low more often than too high


class Departure(NamedTuple):
    """What is remembered of a frame on its way: its bytes on the wire, and when it left in seconds."""

    wire_bytes: int
    at: float


class LinkRate:
    """The rate of one session's link. Times in seconds, sizes in wire bytes."""

    def __init__(self) -> None:
        self.bytes_per_second = 0.0
        """The estimate; 0 before anything was acknowledged."""
        self.measured = False
        """Whether the link was ever the bottleneck, so that the estimate is more than a bound."""
        self.bottleneck = False
        """Whether it was in the last sample."""
        self.samples = 0
        self._in_flight = self._peak = 0
        self._waiting = False
        self._waiting_since = 0.0
        self._carrying_since = 0.0
        self._start: float | None = None
        self._acknowledged = 0
        self._waited = 0.0
        self._carried = 0.0
        self._before = (0, 0.0)
        """Bytes acknowledged in the last sample, and its seconds."""
        self._rates: deque[float] = deque(maxlen=_SAMPLES)

    def waiting(self, waits: bool, now: float) -> None:
        """Frames wait for the window or the lane from now on, or do no longer."""
        if self._waiting:
            self._waited += max(0.0, now - self._waiting_since)
        self._waiting, self._waiting_since = waits, now

    def sent(self, wire_bytes: int, now: float) -> Departure:
        """A frame of ``wire_bytes`` leaves."""
        if not self._in_flight:
            self._carrying_since = now
        self._in_flight += wire_bytes
        self._peak = max(self._peak, self._in_flight)
        if self._start is None:
            self._start = now
        return Departure(wire_bytes, now)

    def acknowledged(self, departure: Departure, now: float) -> None:
        """That frame was acknowledged."""
        self._carried += max(0.0, now - self._carrying_since)
        self._carrying_since = now
        self._in_flight -= departure.wire_bytes
        self._acknowledged += departure.wire_bytes
        took = now - departure.at
        if took > 0 and not self._waiting:
            self._bound(departure.wire_bytes / took)
        if self._start is not None and now - self._start >= _SAMPLE_SECONDS:
            self._close_sample(now - self._start, now)

    def _close_sample(self, elapsed: float, now: float) -> None:
        self.waiting(self._waiting, now)
        self.samples += 1
        self.bottleneck = self._waited >= _BUSY_SHARE * elapsed and self._peak >= _IN_FLIGHT_BYTES_MIN
        if self.bottleneck:
            self._measure(self._acknowledged / max(self._carried, self._waited))
        else:
            # Together with the sample before: what arrived in a pause of ours is acknowledged all at once after it.
            before, took = self._before
            self._bound((before + self._acknowledged) / (took + elapsed))
        self._before = (self._acknowledged, elapsed)
        self._start, self._acknowledged, self._peak = now, 0, self._in_flight
        self._waited = self._carried = 0.0

    def _measure(self, rate: float) -> None:
        if not self.measured:
            self.measured = True
            self._rates.clear()
        self._rates.append(rate)
        self.bytes_per_second = sorted(self._rates)[-2 if len(self._rates) > 2 else -1]

    def _bound(self, rate: float) -> None:
        if rate > self.bytes_per_second:
            self.bytes_per_second = rate
            self._rates.clear()
            self._rates.append(rate)

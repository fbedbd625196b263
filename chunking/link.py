"""How fast the link is, told from acknowledgements: measured where it held frames up, bounded below where it did not.

While frames wait for the link, what is acknowledged a second is the link's rate. While the link waits for frames, that
is only a lower bound; a better one is each frame's own way, its bytes over the time from leaving to acknowledgement.
Where the link stays idle the estimate is raised a little now and then, so that a link that became faster is found out;
each time that proves wrong, the next attempt comes later. Sans-IO.
"""

from typing import Final, NamedTuple

RATE_BYTES_PER_SECOND_MAX: Final = 1e11  # 800 Gb/s: beyond any link, so that raising it ends
_SAMPLE_SECONDS: Final = 0.01  # shortest time a rate is measured over: acknowledgements come in bursts
_BUSY_SHARE: Final = 0.5  # of a sample's time that frames waited: above it the link was the bottleneck
_IDLE_SHARE: Final = 0.1  # below it the link waited for frames
_WEIGHT: Final = 0.3  # of a new sample in the mean
_JUMP: Final = 1.5  # a rate so many times off the mean is news when it comes twice, not noise
_RISE: Final = 1.5  # how far the estimate of an idle link is raised at a time
_PATIENCE_MIN: Final = 3  # frames acknowledged on an idle link before its estimate is raised
_PATIENCE_MAX: Final = 256  # the same after attempts that proved wrong


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
        self._in_flight = 0
        self._waiting = False
        self._waiting_since = 0.0
        self._carrying_since = 0.0
        self._start: float | None = None
        self._acknowledged = 0
        self._frames = 0
        self._waited = 0.0
        self._carried = 0.0
        self._off = 0  # samples in a row that were far off: positive above, negative below
        self._idle = 0
        self._patience = _PATIENCE_MIN
        self._raised_from = 0.0

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
        if self._start is None:
            self._start = now
        return Departure(wire_bytes, now)

    def acknowledged(self, departure: Departure, now: float) -> None:
        """That frame was acknowledged."""
        self._carried += max(0.0, now - self._carrying_since)
        self._carrying_since = now
        self._in_flight -= departure.wire_bytes
        self._acknowledged += departure.wire_bytes
        self._frames += 1
        took = now - departure.at
        if took > 0 and not self._waiting:
            self._bound(departure.wire_bytes / took)
        if self._start is not None and now - self._start >= _SAMPLE_SECONDS:
            self._close_sample(now - self._start, now)

    def _close_sample(self, elapsed: float, now: float) -> None:
        self.waiting(self._waiting, now)
        busy = self._waited / elapsed
        if busy >= _BUSY_SHARE:
            self._measure(self._acknowledged / max(self._carried, self._waited))
        else:
            self._bound(self._acknowledged / elapsed)
            if busy <= _IDLE_SHARE:
                self._rest(self._frames)
        self._start, self._acknowledged, self._frames = now, 0, 0
        self._waited = self._carried = 0.0

    def _measure(self, rate: float) -> None:
        self._idle = 0
        if self._raised_from:
            wrong = rate < self._raised_from * _RISE**0.5
            self._patience = min(2 * self._patience, _PATIENCE_MAX) if wrong else _PATIENCE_MIN
        if self._raised_from or not self.measured:
            self.bytes_per_second, self.measured = rate, True
            self._raised_from, self._off = 0.0, 0
            return
        if rate > self.bytes_per_second * _JUMP:
            self._off = max(1, self._off + 1)
        elif rate < self.bytes_per_second / _JUMP:
            self._off = min(-1, self._off - 1)
        else:
            self._off = 0
        if abs(self._off) >= 2:
            self.bytes_per_second, self._off, self._patience = rate, 0, _PATIENCE_MIN
        elif not self._off:
            self.bytes_per_second += _WEIGHT * (rate - self.bytes_per_second)

    def _bound(self, rate: float) -> None:
        if rate > self.bytes_per_second:
            self.bytes_per_second = min(rate, RATE_BYTES_PER_SECOND_MAX)
            if self._raised_from:
                self._raised_from, self._patience = 0.0, _PATIENCE_MIN

    def _rest(self, frames: int) -> None:
        """Frames passed and none had to wait: perhaps the link is faster than it seems."""
        self._idle += frames
        if self._idle < self._patience:
            return
        self._idle = 0
        self._raised_from = self._raised_from or self.bytes_per_second
        self.bytes_per_second = min(self.bytes_per_second * _RISE, RATE_BYTES_PER_SECOND_MAX)

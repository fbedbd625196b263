"""Chooses how much work each frame gets, so that a migration is done soonest. Sans-IO.

Encoding and sending are a pipeline: a stream's time is that of its slower half. In each regime a byte of the stream
costs the encoder time (the serial part, and the parallel part over the workers) and the link time (wire bytes over the
link's rate); the regime whose slower half is quickest is chosen. RAW costs no encoder time, so on a link faster than
the encoder nothing is encoded, and no migration becomes slower than one that is sent plainly by more than what finding
out costs. Where regimes are as good as equal DELTA, or the nearest to it, is preferred: it costs little and remembers
pages, which RAW does not, and pages that come again pay for that.
"""

from enum import StrEnum, unique
from typing import Final

from chunking.costs import Cost, Encoded, EncoderCosts
from chunking.link import Departure, LinkRate
from chunking.regime import Regime

START: Final = Regime.FAST  # before anything is known: its first frame tells of all others
_EQUAL: Final = 1.01  # times so near one another are as good as equal
_GAIN: Final = 1.04  # a change must promise so much
_STEADY_FRAMES: Final = 3  # ... for so many frames
_GAIN_CLEAR: Final = 1.5  # ... or so much, at once
_IDLE_WORK_FRAMES: Final = 16  # for so many frames work that gains nothing is done before it is dropped
_SMALL_BYTES: Final = 64 * 1024  # smaller frames tell nothing, and are not worth a change
PROBE_FRAMES_MIN: Final = 64  # at most one frame of so many is a probe: 1.6 %
_PROBE_FRAMES_MAX: Final = 512  # after probes that changed nothing
_PROBE_BYTES_MIN: Final = 1024 * 1024  # a frame to be judged by
_PROBE_TIME_SHARE: Final = 0.01  # of the time the stream takes may go into probes
_PROBE_CREDIT_SECONDS_MAX: Final = 1.0
_PROBE_HOPE: Final = 0.85  # a probe must be able to save so much, if its regime is better than it seems


@unique
class Pin(StrEnum):
    """What the operator leaves to the choice."""

    AUTO = "auto"
    OPAQUE = "opaque"
    PAGES = "pages"
    BEST = "best"


_ALLOWED: Final = {
    Pin.AUTO: tuple(Regime),
    Pin.OPAQUE: (Regime.RAW,),
    Pin.PAGES: (Regime.FAST, Regime.LIGHT, Regime.FIRM, Regime.BEST),
    Pin.BEST: (Regime.BEST,),
}


class Adapter:
    """The choice of one session's sending side.

    Tell it of the link by ``link`` (frames that leave, wait and are acknowledged) and of each encoded frame by
    ``encoded``; ask ``choose`` before each frame. Reports may come frames later, as they do in a pipeline.

    Args:
        workers: cores that may encode at once.
        pin: what may be chosen.
    """

    def __init__(self, *, workers: int = 1, pin: Pin = Pin.AUTO) -> None:
        self.link = LinkRate()
        self.costs = EncoderCosts()
        self.regime = START if START in _ALLOWED[pin] else _ALLOWED[pin][0]
        """The regime in force, probes aside."""
        self._workers = workers
        self._allowed = _ALLOWED[pin]
        self._better: Regime | None = None
        self._better_frames = 0
        self._probes: set[Regime] = set()
        self._probe_interval = PROBE_FRAMES_MIN
        self._since_probe = 0
        self._probe_credit_seconds = 0.0

    def choose(self, raw_bytes: int) -> Regime:
        """The regime of the next frame, of ``raw_bytes`` of the stream."""
        if len(self._allowed) == 1 or raw_bytes < _SMALL_BYTES or not self.link.bytes_per_second:
            return self.regime
        seconds = {regime: self._seconds_per_byte(self.costs.cost(regime), regime) for regime in self._allowed}
        self._settle(seconds)
        return self._probe(seconds, raw_bytes) or self.regime

    def encoded(self, frame: Encoded) -> None:
        """A frame was encoded; those of RAW need not be reported."""
        rare = frame.regime is not self.regime and frame.regime in self._probes
        self._probes.discard(frame.regime)
        self.costs.observe(frame, rare=rare)

    def sent(self, wire_bytes: int, now: float) -> Departure:
        """A frame leaves; hand what is returned to ``acknowledged``."""
        return self.link.sent(wire_bytes, now)

    def acknowledged(self, departure: Departure, now: float) -> None:
        """That frame was acknowledged."""
        self.link.acknowledged(departure, now)

    def waiting(self, waits: bool, now: float) -> None:
        """Encoded frames wait for the window or a lane from now on, or do no longer."""
        self.link.waiting(waits, now)

    def _seconds_per_byte(self, cost: Cost, regime: Regime) -> float:
        return max(self._encoder_seconds(cost, regime), cost.wire / self.link.bytes_per_second)

    def _encoder_seconds(self, cost: Cost, regime: Regime) -> float:
        workers = 1 if regime is Regime.BEST else self._workers  # one context chain
        together = (cost.plan_seconds + cost.press_seconds) / self._workers
        return max(cost.plan_seconds, cost.press_seconds / workers, together)

    def _settle(self, seconds: dict[Regime, float]) -> None:
        """Change to a better regime once it promised to be one for long enough."""
        least = min(seconds.values())
        equals = [regime for regime in self._allowed if seconds[regime] <= least * _EQUAL]
        best = min(equals, key=lambda regime: (abs(regime - Regime.DELTA), -regime))
        gain = seconds[self.regime] / seconds[best]
        if best is self.regime or (gain < _GAIN and best > self.regime):
            self._better, self._better_frames = None, 0
            return
        if best is not self._better:
            self._better, self._better_frames = best, 0
        self._better_frames += 1
        wanted = 1 if gain >= _GAIN_CLEAR else _STEADY_FRAMES if gain >= _GAIN else _IDLE_WORK_FRAMES
        if self._better_frames >= wanted:
            self.regime, self._better, self._better_frames = best, None, 0
            self._probe_interval = PROBE_FRAMES_MIN

    def _probe(self, seconds: dict[Regime, float], raw_bytes: int) -> Regime | None:
        """Another regime for this one frame, where it may turn out to be better and its cost has been saved up."""
        current = seconds[self.regime]
        self._since_probe += 1
        saved = self._probe_credit_seconds + _PROBE_TIME_SHARE * current * raw_bytes
        self._probe_credit_seconds = min(saved, _PROBE_CREDIT_SECONDS_MAX)
        if self._since_probe < self._probe_interval or raw_bytes < _PROBE_BYTES_MIN:
            return None
        hopes = self._hopes(seconds)
        if not hopes:
            return None
        regime = min(hopes, key=lambda candidate: hopes[candidate])
        cost = self.costs.cost(regime)
        busy = cost.plan_seconds + cost.press_seconds
        excess = (max(busy, cost.wire / self.link.bytes_per_second) - current) * raw_bytes
        if excess > self._probe_credit_seconds:
            return None
        self._probe_credit_seconds -= max(0.0, excess)
        self._since_probe = 0
        self._probe_interval = min(2 * self._probe_interval, _PROBE_FRAMES_MAX)
        self._probes.add(regime)
        return regime

    def _hopes(self, seconds: dict[Regime, float]) -> dict[Regime, float]:
        """Regimes worth a probe, and the time a byte could take there at best."""
        current = seconds[self.regime]
        hopes: dict[Regime, float] = {}
        for regime in self._allowed:
            if regime in {self.regime, Regime.RAW}:
                continue
            cost = self.costs.cost(regime)
            if self.regime < Regime.FAST and regime <= Regime.FAST:
                # What is not looked at may have become anything: as good as all zeros.
                hope = cost.plan_seconds
            elif abs(regime - self.regime) == 1:
                hope = seconds[regime] * _PROBE_HOPE
            else:
                continue
            if hope < current * _PROBE_HOPE or (regime > self.regime and hope < current):
                hopes[regime] = hope
        return hopes

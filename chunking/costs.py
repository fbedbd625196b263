"""What encoding costs and saves in each regime, learnt from the frames that pass. Sans-IO.

Two things change all the time and for all regimes alike: how much of the stream is new (neither zero nor seen before)
and how well that compresses. They are followed by means over the last frames. How the regimes compare with one another
changes slowly: it starts from measured figures and is corrected whenever frames in two regimes follow on each other.
So a phase of zero pages makes no regime look better than another, and a regime that was not used for long is still
judged by what passes now. And because what passes now may change with the next frame, costs are told for two contents:
that of the last frames, and that of the last hundred or so.
"""

import math
from typing import Final, NamedTuple

from chunking.regime import Regime

# Measured over real streams on one core; only a start, and all relative to one another.
PLAN_SECONDS_PER_BYTE: Final = {Regime.DEDUP: 0.5e-9, Regime.DELTA: 0.6e-9}  # of the stream
PRESS_SECONDS_PER_BYTE: Final = {  # of what is left to compress
    Regime.FAST: 1.4e-9,
    Regime.LIGHT: 2.3e-9,
    Regime.FIRM: 3.6e-9,
    Regime.BEST: 32e-9,
}
_COPY_SECONDS_PER_BYTE: Final = 0.2e-9  # regimes that compress nothing copy it
# Compressed size over size is (that of FAST) to the power of: what does not shrink at all shrinks in no regime.
DEPTH: Final = {Regime.FAST: 1.0, Regime.LIGHT: 1.7, Regime.FIRM: 1.85, Regime.BEST: 1.97}
_NEW: Final = 0.5  # share of new bytes, before anything was seen
_NEW_MIN: Final = 0.1  # ... over longer: however many pages repeat now, others will come
_PACK_RATIO: Final = 0.5  # of FAST, before anything was seen
_TABLES_RATIO: Final = 0.002  # of the stream: kinds, slots and references

_WEIGHT: Final = 0.25  # of a new frame in a mean
_WEIGHT_LONG: Final = 1 / 64  # the same for the longer mean
_OUTLIER: Final = 3.0  # a frame that took so many times the mean was hindered by others: it counts as no more
_CORRECTION: Final = 0.5  # of a new comparison of two regimes
_COMPARED_FRAMES: Final = 4  # behind a change of regime: content is still the same, so that the two compare
_FORGET: Final = 1 / 512  # of what comparisons of depth taught, a frame: other content has another depth
_DEPTH_STEP: Final = 4.0  # a depth beyond FAST is at most so many times off what it starts from
_LOG_RATIO_SEEN: Final = -0.05  # content that shrinks less says nothing of depth
_OBSERVED_BYTES_MIN: Final = 64 * 1024  # below, fixed costs prevail


class Encoded(NamedTuple):
    """One frame as it was encoded.

    Args:
        regime: how.
        raw_bytes: of the stream.
        new_bytes: of pages that were neither zero nor references, whole (4096 each), and of all other bytes.
        packed_bytes: of deltas, literals and other bytes: what compression was given, or would be.
        body_bytes: of the frame's body.
        plan_seconds: that the serial part took.
        press_seconds: that the parallel part took.
    """

    regime: Regime
    raw_bytes: int
    new_bytes: int
    packed_bytes: int
    body_bytes: int
    plan_seconds: float
    press_seconds: float


class Cost(NamedTuple):
    """Of one byte of the stream: bytes on the wire, seconds of the serial part, seconds of the parallel part."""

    wire: float
    plan_seconds: float
    press_seconds: float


class EncoderCosts:
    """Means over the frames of one session, and the comparison of regimes."""

    def __init__(self) -> None:
        self.new = _NEW  # new bytes a stream byte, of the last frames
        self.new_long = _NEW  # the same, over longer
        self._delta = 1.0  # packed bytes a new byte, with deltas
        self._plan = dict(PLAN_SECONDS_PER_BYTE)
        self._plan_seen: set[Regime] = set()
        self._pace = 0.0  # log of press seconds over the figures above
        self._pace_of = dict.fromkeys(PRESS_SECONDS_PER_BYTE, 0.0)
        self._log_ratio = math.log(_PACK_RATIO)  # log of packed size over size in FAST
        self._depth = dict(DEPTH)
        self._last: Regime | None = None
        self._since_change = 0
        self._seen = False
        self._seen_new = False

    def observe(self, frame: Encoded, *, rare: bool = False) -> None:
        """Learn from a frame that the engine encoded.

        Args:
            rare: it is one of few that stand for many, so it counts more.
        """
        if frame.regime is Regime.RAW or frame.raw_bytes < _OBSERVED_BYTES_MIN:
            return
        weight = 0.5 if rare else _WEIGHT
        new_bytes = min(frame.new_bytes, frame.raw_bytes)
        share = new_bytes / frame.raw_bytes
        self.new = _mean(self.new, share, weight if self._seen else 1.0)
        self.new_long = max(_NEW_MIN, _mean(self.new_long, share, _WEIGHT_LONG))
        self._seen = True
        self._learn_plan(frame, weight)
        if new_bytes < _OBSERVED_BYTES_MIN:
            return
        if frame.regime >= Regime.DELTA:
            self._delta = _mean(self._delta, min(1.0, frame.packed_bytes / new_bytes), weight)
        if frame.regime >= Regime.FAST and frame.packed_bytes >= _OBSERVED_BYTES_MIN:
            self._learn_press(frame, weight)

    def cost(self, regime: Regime, new: float | None = None) -> Cost:
        """What a byte of the stream would cost in ``regime`` if ``new`` of it were new; as it is now by default."""
        new = self.new if new is None else new
        if regime is Regime.RAW:
            return Cost(1.0, 0.0, 0.0)
        if regime is Regime.DEDUP:
            return Cost(new + _TABLES_RATIO, self._plan[regime], new * _COPY_SECONDS_PER_BYTE)
        packed = new * self._delta
        plan = self._plan[Regime.DELTA]
        if regime is Regime.DELTA:
            return Cost(packed + _TABLES_RATIO, plan, packed * _COPY_SECONDS_PER_BYTE)
        press = PRESS_SECONDS_PER_BYTE[regime] * math.exp(self._pace + self._pace_of[regime])
        ratio = math.exp(self._log_ratio * self._depth[regime])
        return Cost(packed * ratio + _TABLES_RATIO, plan, packed * press)

    def _learn_plan(self, frame: Encoded, weight: float) -> None:
        kind = min(frame.regime, Regime.DELTA)
        seconds = frame.plan_seconds / frame.raw_bytes
        if kind in self._plan_seen:
            seconds = min(seconds, _OUTLIER * self._plan[kind])
            self._plan[kind] = _mean(self._plan[kind], seconds, weight)
            return
        # The first of its kind also tells how fast this machine is, and so of the other kind.
        for other in PLAN_SECONDS_PER_BYTE:
            if other not in self._plan_seen:
                self._plan[other] = seconds * PLAN_SECONDS_PER_BYTE[other] / PLAN_SECONDS_PER_BYTE[kind]
        self._plan_seen.add(kind)

    def _learn_press(self, frame: Encoded, weight: float) -> None:
        regime = frame.regime
        seconds = max(frame.press_seconds, 1e-9) / frame.packed_bytes
        pace = math.log(seconds / PRESS_SECONDS_PER_BYTE[regime])
        # A body longer than what it packs is possible, and says: it does not shrink.
        body = max(1.0, frame.body_bytes - _TABLES_RATIO * frame.raw_bytes)
        log_ratio = min(0.0, math.log(body / frame.packed_bytes))
        first, self._seen_new = not self._seen_new, True
        if self._last is not None and regime is not self._last:
            self._since_change = 0
        if not first:
            pace = min(pace, self._pace + self._pace_of[regime] + math.log(_OUTLIER))
        compares = not first and self._last is not None and self._since_change < _COMPARED_FRAMES
        self._since_change += 1
        self._last = regime
        if compares:
            self._pace_of[regime] = _mean(self._pace_of[regime], pace - self._pace, _CORRECTION)
            self._learn_depth(regime, log_ratio)
        weight = 1.0 if first else weight
        self._pace = _mean(self._pace, pace - self._pace_of[regime], weight)
        self._log_ratio = _mean(self._log_ratio, log_ratio / self._depth[regime], weight)
        for other, depth in DEPTH.items():
            self._depth[other] = _mean(self._depth[other], depth, _FORGET)

    def _learn_depth(self, regime: Regime, log_ratio: float) -> None:
        """Content that shrinks more than expected in one regime will in all that are deeper than FAST."""
        if regime is Regime.FAST or self._log_ratio > _LOG_RATIO_SEEN:
            return
        expected, found = self._depth[regime] - 1.0, log_ratio / self._log_ratio - 1.0
        factor = min(max(found / expected, 1 / _DEPTH_STEP), _DEPTH_STEP) ** _CORRECTION
        for other, start in DEPTH.items():
            depth = (self._depth[other] - 1.0) * factor
            self._depth[other] = 1.0 + min(max(depth, (start - 1.0) / _DEPTH_STEP), (start - 1.0) * _DEPTH_STEP)


def _mean(mean: float, value: float, weight: float) -> float:
    return mean + weight * (value - mean)

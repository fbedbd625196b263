"""Chooses how much work each frame gets, so that a migration is done soonest. Sans-IO.

Encoding and sending are a pipeline: a stream's time is that of its slower half. In each regime a byte of the stream
costs the encoder time (the serial part, and the parallel part over the workers) and the link time (wire bytes over the
link's rate); the regime whose slower half is quickest is chosen. RAW costs no encoder time, so on a link faster than
the encoder nothing is encoded, and no migration becomes slower than one that is sent plainly by more than what finding
out costs. Where regimes are as good as equal DELTA, or the nearest to it, is preferred: it costs little and remembers
pages, which RAW does not, and pages that come again pay for that. On links so slow that even FAST costs next to
nothing it is FAST, which sees at once when content begins to compress.
"""

from enum import StrEnum, unique
from typing import Final

from chunking.costs import Encoded, EncoderCosts
from chunking.link import Departure, LinkRate
from chunking.regime import Regime

START: Final = Regime.LIGHT  # before anything is known: on a slow link less would be sent for good
_EQUAL: Final = 1.01  # times so near one another are as good as equal
_WATCHFUL: Final = 0.5  # of the time a byte takes: FAST is preferred where its encoder needs no more
_GAIN: Final = 1.04  # a change must promise so much
_STEADY_FRAMES: Final = 3  # ... for so many frames
_GAIN_CLEAR: Final = 1.5  # ... or so much, at once
_DRIFT_FRAMES: Final = 16  # ... or, towards what is preferred among equals, for so many
_PLAIN_FRAMES: Final = 8  # sent as they are, from one thought to the next
_SMALL_BYTES: Final = 64 * 1024  # smaller frames tell nothing, and are not worth a change
PROBE_FRAMES_MIN: Final = 64  # at most one frame of so many is a probe: 1.6 %
_PROBE_FRAMES_MAX: Final = 512  # after probes that cost time and changed nothing
_PROBE_BYTES_MIN: Final = 1024 * 1024  # a frame to be judged by
_PROBE_TIME_SHARE: Final = 0.01  # of the time the stream takes may go into finding out
_CREDIT_SECONDS: Final = 0.15  # for that at the start: the link is not known
_CREDIT_SECONDS_MAX: Final = 4.0  # saved up for that
_PROBE_HOPE: Final = 0.7  # a regime may take so much of the time it seems to; it is probed if it would be best then
_LINK_HOPE: Final = 2.0  # an idle link may be so many times faster than it seems
_LINK_HOPE_UNKNOWN: Final = 4.0  # the same before it was ever the bottleneck
_TRIAL_FRAMES_MIN: Final = 4  # that go at once where a link may be faster; their cost must have been saved up
_TRIAL_FRAMES_MAX: Final = 32
_TRIAL_SAMPLES: Final = 2  # of the link, that settle it
_TRIAL_INTERVAL_MIN: Final = 128  # frames from one trial of a measured link to the next
_TRIAL_INTERVAL_MAX: Final = 1024  # the same after trials that were in vain
_TRIAL_SUCCESS: Final = 1.2  # the link proved so many times faster

_FED_WEIGHT: Final = 0.5  # of a new frame in the hypervisor's pace
_EASY: Final = 0.5  # of its time may go into work that gains none: the rest is left to the guest
_EASY_REGIMES: Final = (Regime.FAST, Regime.LIGHT)  # less saves too little to ask, more saves little more


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
        self._frames = 0
        self._seen_at = dict.fromkeys(Regime, 0)
        self._probe_interval = PROBE_FRAMES_MIN
        self._since_probe = PROBE_FRAMES_MIN  # the first may come at once
        self._credit_seconds = _CREDIT_SECONDS
        self._trial_frames = 0
        self._trial_samples = 0
        self._trial_cost = 0.0
        self._trial_interval = _TRIAL_INTERVAL_MIN
        self._trial_link = 0.0
        self._since_trial = _TRIAL_INTERVAL_MIN
        self._passed = 0
        """Frames since the last one that was thought about."""
        self._fed = 0.0
        """Seconds a stream byte that the hypervisor takes, while it is what everybody waits for; else 0."""

    def choose(self, raw_bytes: int) -> Regime:
        """The regime of the next frame, of ``raw_bytes`` of the stream."""
        if len(self._allowed) == 1 or raw_bytes < _SMALL_BYTES:
            return self.regime
        easy = self._easy()
        if easy is not None:
            self.regime, self._better, self._better_frames, self._trial_frames = easy, None, 0, 0
            return easy
        if not self.link.bytes_per_second:
            return self.regime
        self._passed += 1
        if self.regime is Regime.RAW and self._trial_frames <= 0 and self._passed < _PLAIN_FRAMES:
            return Regime.RAW  # where the link is that fast, thinking about each frame costs, too
        passed, self._passed = self._passed, 0
        raw_bytes *= passed
        seconds = self._seconds(self.link.bytes_per_second)
        saved = self._credit_seconds + _PROBE_TIME_SHARE * seconds[self.regime] * raw_bytes
        self._credit_seconds = min(saved, _CREDIT_SECONDS_MAX)
        self._since_probe += passed
        self._since_trial += passed
        if self._on_trial(raw_bytes):
            return self.regime
        self._settle(seconds)
        if self._try_lighter(seconds, raw_bytes):
            return self.regime
        probe = self._probe_link(seconds, raw_bytes)
        if probe is None:
            probe = self._probe(seconds, raw_bytes)
        return self.regime if probe is None else probe

    def encoded(self, frame: Encoded) -> None:
        """A frame was encoded; those of RAW need not be reported."""
        self._frames += 1
        self._seen_at[frame.regime] = self._frames
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

    def fed(self, raw_bytes: int, seconds: float) -> None:
        """So many bytes came from the hypervisor.

        Args:
            raw_bytes: of the stream.
            seconds: that it took for them, where it was what everybody waited for; else 0.
        """
        self._fed += _FED_WEIGHT * (seconds / raw_bytes - self._fed) if seconds else -self._fed

    def _easy(self) -> Regime | None:
        """The most that encoder and link do in less time than the hypervisor takes: saving bytes costs no time then."""
        if not self._fed or not self.link.bytes_per_second:
            return None
        seconds = self._seconds(self.link.bytes_per_second)
        keeping = [r for r in _EASY_REGIMES if r in self._allowed and seconds[r] <= self._fed * _EASY]
        return max(keeping, default=None)

    def _seconds(self, link_bytes_per_second: float) -> dict[Regime, float]:
        """The time a byte takes in each regime, between what the stream is now and what it was for longer."""
        contents = (self.costs.new, self.costs.new_long)
        return {
            regime: sum(
                max(self._encoder_seconds(regime, new), self.costs.cost(regime, new).wire / link_bytes_per_second)
                for new in contents
            )
            / len(contents)
            for regime in self._allowed
        }

    def _encoder_seconds(self, regime: Regime, new: float | None = None) -> float:
        cost = self.costs.cost(regime, new)
        workers = 1 if regime is Regime.BEST else self._workers  # one context chain
        together = (cost.plan_seconds + cost.press_seconds) / self._workers
        return max(cost.plan_seconds, cost.press_seconds / workers, together)

    def _settle(self, seconds: dict[Regime, float]) -> None:
        """Change to a better regime once it promised to be one for long enough."""
        best = self._best(seconds)
        if best > self.regime and not self.link.bottleneck:
            best = self.regime  # the encoder is: more work gains nothing, whatever the link seems to be
        gain = seconds[self.regime] / seconds[best]
        if best is self.regime or (gain < _GAIN and best > max(self.regime, Regime.FAST)):
            self._better, self._better_frames = None, 0
            return
        if best is not self._better:
            self._better, self._better_frames = best, 0
        self._better_frames += 1
        wanted = 1 if gain >= _GAIN_CLEAR else _STEADY_FRAMES if gain >= _GAIN else _DRIFT_FRAMES
        if self._better_frames >= wanted:
            self.regime, self._better, self._better_frames = best, None, 0
            self._probe_interval = PROBE_FRAMES_MIN

    def _best(self, seconds: dict[Regime, float]) -> Regime:
        least = min(seconds.values())
        equals = [regime for regime in self._allowed if seconds[regime] <= least * _EQUAL]
        watchful = Regime.FAST in equals and self._encoder_seconds(Regime.FAST) <= least * _WATCHFUL
        favourite = Regime.FAST if watchful else Regime.DELTA
        return min(equals, key=lambda regime: (abs(regime - favourite), -regime))

    def _try_lighter(self, seconds: dict[Regime, float], raw_bytes: int) -> bool:
        """Give an idle link more to carry, where that gains if it is faster than it seems, and costs little if not."""
        if self.link.bottleneck or self.regime is self._allowed[0] or raw_bytes < _PROBE_BYTES_MIN:
            return False
        hope = _LINK_HOPE if self.link.measured else _LINK_HOPE_UNKNOWN
        hoped = self._seconds(self.link.bytes_per_second * hope)
        best = self._best(hoped)
        if best >= self.regime or hoped[self.regime] < hoped[best] * _GAIN:
            return False
        cost = (seconds[best] - seconds[self.regime]) * raw_bytes
        if self.link.measured:
            if self._since_trial < self._trial_interval or cost * _TRIAL_FRAMES_MIN > self._credit_seconds:
                return False
            self._since_trial = 0
            proved = self.link.bytes_per_second > _TRIAL_SUCCESS * self._trial_link
            self._trial_interval = _TRIAL_INTERVAL_MIN if proved else min(2 * self._trial_interval, _TRIAL_INTERVAL_MAX)
            self._trial_link = self.link.bytes_per_second
        self.regime = best
        self._better, self._better_frames = None, 0
        self._trial_frames, self._trial_samples = _TRIAL_FRAMES_MAX, self.link.samples + _TRIAL_SAMPLES
        self._trial_cost = max(0.0, cost) / raw_bytes
        return True

    def _probe_link(self, seconds: dict[Regime, float], raw_bytes: int) -> Regime | None:
        """One frame that gives an idle link much to carry; what is sent otherwise is too little to tell its rate."""
        lightest = self._allowed[0]
        if self.link.bottleneck or self.regime is lightest or self._since_probe < self._probe_interval:
            return None
        excess = (self.costs.cost(lightest).wire / self.link.bytes_per_second - seconds[self.regime]) * raw_bytes
        return lightest if self._afford(excess, raw_bytes) else None

    def _afford(self, excess_seconds: float, raw_bytes: int) -> bool:
        """Whether a probe may cost so much more than the frame would; if so it is one."""
        if excess_seconds > self._credit_seconds or raw_bytes < _PROBE_BYTES_MIN:
            return False
        self._since_probe = 0
        if excess_seconds > 0:
            self._credit_seconds -= excess_seconds
            self._probe_interval = min(2 * self._probe_interval, _PROBE_FRAMES_MAX)
        return True

    def _on_trial(self, raw_bytes: int) -> bool:
        if self._trial_frames <= 0:
            return False
        self._trial_frames -= 1
        self._credit_seconds -= self._trial_cost * raw_bytes
        if self.link.samples >= self._trial_samples:
            self._trial_frames = 0
        return self._trial_frames > 0

    def _probe(self, seconds: dict[Regime, float], raw_bytes: int) -> Regime | None:
        """Another regime for this one frame, where it may turn out to be better and its cost has been saved up."""
        if self._since_probe < self._probe_interval:
            return None
        for regime in self._hopes(seconds):
            if self._afford((seconds[regime] - seconds[self.regime]) * raw_bytes, raw_bytes):
                self._probes.add(regime)
                return regime
        return None

    def _hopes(self, seconds: dict[Regime, float]) -> list[Regime]:
        """Regimes worth a probe, the one not seen for longest first."""
        current = seconds[self.regime]
        if self.regime < Regime.FAST:
            # What is not looked at may have become anything, as good as all zeros. FAST tells most; DEDUP costs less.
            looks = (Regime.FAST, Regime.DEDUP) if self.regime is Regime.RAW else (Regime.FAST,)
            return [regime for regime in looks if self.costs.cost(regime).plan_seconds < current]
        near = [regime for regime in self._allowed if regime >= Regime.FAST and abs(regime - self.regime) == 1]
        return sorted((r for r in near if seconds[r] * _PROBE_HOPE < current), key=self._seen_at.__getitem__)

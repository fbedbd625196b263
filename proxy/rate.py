"""A rate limit for one side of a session: a token bucket, sans-IO. Rates in bytes a second.

The bucket saves no more than ``BURST_SECONDS_MAX`` of the rate, so that a session that was idle does not flood the
link. A frame may overdraw it, and makes its sender wait until that is made up for; slow rates want smaller frames.
"""

from typing import Final

BURST_SECONDS_MAX: Final = 0.05  # short beside a round trip of any link worth limiting
FRAME_BYTES_MIN: Final = 16 * 1024  # smaller frames would cost more than they smooth
RATE_MIN: Final = 1024  # bytes a second: below this a session would look dead


class TokenBucket:
    """What one session may send now. It may be overdrawn by a frame, and then makes its sender wait the longer.

    Args:
        rate: bytes a second; None for no limit.
    """

    def __init__(self, rate: float | None = None) -> None:
        self._rate = rate
        self._tokens = 0.0
        self._at: float | None = None

    @property
    def rate(self) -> float | None:
        """Bytes a second; None for no limit."""
        return self._rate

    @property
    def frame_bytes(self) -> int | None:
        """How long a frame should be at most, so that the rate holds over short times too; None for any."""
        return None if self._rate is None else max(FRAME_BYTES_MIN, int(self._rate * BURST_SECONDS_MAX))

    def change(self, rate: float | None, now: float) -> None:
        """Another rate from now on; what was saved or overdrawn under the old one counts for the new."""
        self._refill(now)
        self._rate = None if rate is None else max(float(RATE_MIN), rate)
        self._refill(now)

    def spend(self, size: int, now: float) -> None:
        """``size`` bytes leave."""
        self._refill(now)
        self._tokens -= size

    def wait_seconds(self, now: float) -> float:
        """Seconds until something may leave: 0 where it may now."""
        self._refill(now)
        if self._rate is None or self._tokens > 0:
            return 0.0
        return -self._tokens / self._rate + 1 / self._rate

    def _refill(self, now: float) -> None:
        elapsed = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        if self._rate is None:
            self._tokens = 0.0
            return
        most = max(1.0, self._rate * BURST_SECONDS_MAX)
        self._tokens = min(most, self._tokens + elapsed * self._rate)

"""The token bucket: what leaves over any stretch of time is what the rate allows, plus one burst."""

from hypothesis import given
from hypothesis import strategies as st

from proxy.rate import BURST_SECONDS_MAX, FRAME_BYTES_MIN, RATE_MIN, TokenBucket


def test_without_a_limit_nothing_waits() -> None:
    bucket = TokenBucket()
    bucket.spend(10**12, now=0.0)
    assert bucket.wait_seconds(0.0) == 0.0
    assert bucket.frame_bytes is None


@given(
    rate=st.floats(RATE_MIN, 1e10),
    frames=st.lists(st.integers(1, 2**20), min_size=1, max_size=200),
    idle=st.lists(st.floats(0, 0.5), min_size=200, max_size=200),
)
def test_over_any_time_no_more_than_the_rate_a_burst_and_a_frame(
    rate: float, frames: list[int], idle: list[float]
) -> None:
    bucket, now, sent = TokenBucket(rate), 100.0, 0
    for size, pause in zip(frames, idle, strict=False):
        now += pause
        wait = bucket.wait_seconds(now)
        assert wait >= 0
        now += wait
        allowed = rate * (now - 100.0) + rate * BURST_SECONDS_MAX + 2
        assert sent <= allowed * (1 + 1e-9), "more had left than the rate allows when the next frame was let go"
        bucket.spend(size, now)
        sent += size


def test_a_frame_that_overdraws_is_made_up_for() -> None:
    bucket = TokenBucket(1000.0 * RATE_MIN)
    bucket.spend(2000 * RATE_MIN, now=0.0)
    assert 1.9 < bucket.wait_seconds(0.0) < 2.1
    assert bucket.wait_seconds(3.0) == 0.0


def test_a_change_takes_effect_at_once_and_keeps_the_debt() -> None:
    bucket = TokenBucket(1e6)
    bucket.spend(3_000_000, now=0.0)
    bucket.change(1e7, now=0.0)
    assert 0.25 < bucket.wait_seconds(0.0) < 0.31
    bucket.change(None, now=0.0)
    assert bucket.wait_seconds(0.0) == 0.0
    bucket.change(1.0, now=0.0)
    assert bucket.rate == RATE_MIN
    assert bucket.frame_bytes == FRAME_BYTES_MIN


def test_a_clock_that_stands_still_gives_nothing() -> None:
    bucket = TokenBucket(1e6)
    bucket.spend(1_000_000, now=5.0)
    assert bucket.wait_seconds(5.0) == bucket.wait_seconds(4.0)

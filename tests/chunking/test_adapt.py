"""The choice of regimes, in simulated migrations: never slower than sending plainly, and near the best fixed regime.

The time that finding out may cost in all is allowed for once a stream: a few frames until the first acknowledgement,
one frame that measures an idle link, and round trips.
"""

import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunking.adapt import PROBE_FRAMES_MIN, START, Adapter, Pin
from chunking.costs import Encoded, EncoderCosts
from chunking.link import LinkRate
from chunking.regime import Regime
from tests.chunking.pipeline import (
    COPIES,
    DELTAS,
    FRAME_BYTES,
    GUEST,
    MBIT,
    NOISE,
    TEXT,
    ZEROS,
    Content,
    Machine,
    Run,
    migrate,
    mixed,
)

FRAMES = 384
KINDS = (ZEROS, TEXT, NOISE, COPIES, DELTAS)
STREAMS = {
    "zeros": (ZEROS,) * FRAMES,
    "noise": (NOISE,) * FRAMES,
    "text": (TEXT,) * FRAMES,
    "guest": (GUEST,) * FRAMES,
    "copies": (COPIES,) * FRAMES,
    "deltas": (DELTAS,) * FRAMES,
    "bursts": tuple(mixed(3, FRAMES, KINDS, 20)),
    "phases": tuple(mixed(4, FRAMES, KINDS, 150)),
    "zeros, then text": (ZEROS,) * (FRAMES // 2) + (TEXT,) * (FRAMES // 2),
    "noise, then text": (NOISE,) * (FRAMES // 2) + (TEXT,) * (FRAMES // 2),
}
LINKS_MBIT = (30, 100, 300, 1_000, 2_500, 10_000, 25_000, 40_000)
START_SECONDS = 0.05  # the first frames, encoded before anything of the link is known
LINK_FRAMES = 2  # that measure an idle link; only regimes that leave it idle need them
ROUND_TRIPS = 4
NEAR = 1.15


def steady(mbit: float) -> Callable[[float], float]:
    return lambda _: mbit * MBIT


@cache
def fixed(stream: str, mbit: int, machine: tuple[int, int], delay: float) -> dict[Regime, Run]:
    return {
        regime: migrate(STREAMS[stream], steady(mbit), Machine(*machine), fixed=regime, delay_seconds=delay)
        for regime in Regime
    }


def adapted(stream: str, mbit: int, machine: tuple[int, int], delay: float) -> Run:
    adapter = Adapter(workers=machine[1])
    return migrate(STREAMS[stream], steady(mbit), Machine(*machine), adapter=adapter, delay_seconds=delay)


# ------------------------------------------------------------------ whole migrations


@pytest.mark.parametrize("mbit", LINKS_MBIT)
@pytest.mark.parametrize("stream", STREAMS)
def test_never_slower_than_plain_and_near_the_best(stream: str, mbit: int) -> None:
    for machine in ((1, 1), (2, 2), (3, 4)):
        runs, run = fixed(stream, mbit, machine, 0.0002), adapted(stream, mbit, machine, 0.0002)
        best = min(other.seconds for other in runs.values())
        assert run.seconds <= 1.05 * runs[Regime.RAW].seconds + START_SECONDS, machine
        idle = runs[Regime.DEDUP].wire_bytes < 0.2 * runs[Regime.RAW].wire_bytes
        idle_seconds = idle * LINK_FRAMES * FRAME_BYTES / (mbit * MBIT)
        assert run.seconds <= 1.25 * best + START_SECONDS + idle_seconds, machine
        if len(set(STREAMS[stream])) == 1:
            assert run.seconds <= NEAR * best + START_SECONDS + idle_seconds, machine


@pytest.mark.parametrize("mbit", [mbit for mbit in LINKS_MBIT if mbit <= 10_000])
@pytest.mark.parametrize("stream", STREAMS)
def test_neither_over_a_long_way(stream: str, mbit: int) -> None:
    """20 ms: all news of the link come late.

    Where next to nothing is sent, the link's rate cannot be told from how long that takes, and to send more only to
    find out would cost a slow link seconds: then the encoder's own pace is the bound.
    """
    delay = 0.02
    runs, run = fixed(stream, mbit, (2, 2), delay), adapted(stream, mbit, (2, 2), delay)
    silent = runs[Regime.DEDUP].wire_bytes < 0.6 * runs[Regime.RAW].wire_bytes
    bound = max(runs[Regime.RAW].seconds, runs[Regime.LIGHT].seconds if silent else 0.0)
    assert run.seconds <= 1.05 * bound + START_SECONDS + ROUND_TRIPS * delay


@pytest.mark.parametrize("mbit", LINKS_MBIT)
def test_frames_that_others_hinder_do_not_mislead_it(mbit: int) -> None:
    """On a busy machine one frame in thirty takes ten times as long."""
    contents = STREAMS["guest"]
    runs = [migrate(contents, steady(mbit), Machine(1, 2, hindered=1 / 30), fixed=regime) for regime in Regime]
    run = migrate(contents, steady(mbit), Machine(1, 2, hindered=1 / 30), adapter=Adapter(workers=2))
    assert run.seconds <= 1.05 * runs[Regime.RAW].seconds + START_SECONDS
    assert run.seconds <= 1.2 * min(other.seconds for other in runs) + START_SECONDS


def test_each_regime_is_reached_by_some_link() -> None:
    most = {
        Counter(adapted(stream, mbit, (1, 2), 0.0002).regimes).most_common(1)[0][0]
        for stream in ("text", "guest", "copies", "deltas")
        for mbit in LINKS_MBIT
    }
    assert most == set(Regime)


def test_a_slower_link_gets_more_work() -> None:
    most = [Counter(adapted("guest", mbit, (1, 2), 0.0002).regimes).most_common(1)[0][0] for mbit in LINKS_MBIT]
    assert all(slower >= faster for slower, faster in pairwise(most)), most
    assert (most[0], most[-1]) == (Regime.BEST, Regime.RAW)


def test_it_converges_within_a_few_frames() -> None:
    for mbit, wanted in ((30, Regime.BEST), (40_000, Regime.RAW)):
        run = adapted("text", mbit, (1, 2), 0.0002)
        assert run.regimes[0] is START
        assert Counter(run.regimes[16:48]).most_common(1)[0][0] is wanted


def test_all_zero_pages_do_not_fool_it() -> None:
    """Behind a phase of zeros, where each regime looks perfect, text goes at what the link wants at once."""
    run = adapted("zeros, then text", 300, (1, 2), 0.0002)
    behind = run.regimes[FRAMES // 2 + 16 :]
    assert Counter(behind).most_common(1)[0][0] >= Regime.FIRM
    assert sum(regime < Regime.FAST for regime in behind) <= 4


@pytest.mark.parametrize(("before", "after"), [(100, 10_000), (10_000, 100), (1_000, 40_000), (40_000, 300)])
@pytest.mark.parametrize("delay", [0.0002, 0.01])
def test_a_link_that_changes_midway(before: int, after: int, delay: float) -> None:
    contents = (GUEST,) * 2 * FRAMES
    plain = migrate(contents, steady(before), Machine(1, 2), delay_seconds=delay)
    turn = plain.seconds / 8

    def link(now: float) -> float:
        return (before if now < turn else after) * MBIT

    runs = [migrate(contents, link, Machine(1, 2), fixed=regime, delay_seconds=delay) for regime in Regime]
    run = migrate(contents, link, Machine(1, 2), adapter=Adapter(workers=2), delay_seconds=delay)
    assert run.seconds <= 1.05 * runs[Regime.RAW].seconds + START_SECONDS + ROUND_TRIPS * delay
    assert run.seconds <= NEAR * min(other.seconds for other in runs) + START_SECONDS + ROUND_TRIPS * delay


content = st.builds(
    Content,
    st.sampled_from([0.0, 0.01, 0.2, 0.7, 1.0]),
    st.sampled_from([0.05, 0.4, 1.0]),
    st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(content, st.integers(1, 200)), min_size=1, max_size=6),
    st.lists(st.sampled_from(LINKS_MBIT), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_never_slower_than_plain_whatever_comes(
    phases: list[tuple[Content, int]], links: list[int], cores: int, seed: int
) -> None:
    contents = [kind for kind, frames in phases for _ in range(frames)]
    size = len(contents) * FRAME_BYTES
    step = size / (sum(links) / len(links) * MBIT) / len(links)

    def link(now: float) -> float:
        return links[min(int(now / step), len(links) - 1)] * MBIT

    plain = migrate(contents, link, Machine(seed, cores))
    run = migrate(contents, link, Machine(seed, cores), adapter=Adapter(workers=cores))
    # Where the link changes, up to a second sample of a slower or faster one is taken at the old estimate.
    changes = sum(FRAME_BYTES * 4 / (min(pair) * MBIT) for pair in pairwise(links))
    assert (
        run.seconds <= 1.05 * plain.seconds + START_SECONDS + LINK_FRAMES * FRAME_BYTES / (min(links) * MBIT) + changes
    )


# ------------------------------------------------------------------ probes, pins, restraint


@pytest.mark.parametrize("mbit", [300, 2_500, 10_000, 40_000])
def test_probes_are_few(mbit: int) -> None:
    chosen = []

    class Watched(Adapter):
        def choose(self, raw_bytes: int) -> Regime:
            regime = super().choose(raw_bytes)
            chosen.append(regime is not self.regime)
            return regime

    migrate((TEXT,) * 2 * FRAMES, steady(mbit), Machine(1, 2), adapter=Watched(workers=2))
    assert sum(chosen) <= 2 + len(chosen) / PROBE_FRAMES_MIN
    assert sum(chosen) <= 0.02 * len(chosen) + 2


@pytest.mark.parametrize("mbit", LINKS_MBIT)
def test_noise_does_not_make_it_waver(mbit: int) -> None:
    """Each change of level costs a compressor its window."""
    run = migrate((TEXT,) * FRAMES, steady(mbit), Machine(1, 2, noise=0.3), adapter=Adapter(workers=2))
    changes = sum(before is not after for before, after in pairwise(run.regimes))
    assert changes <= 0.08 * FRAMES


@pytest.mark.parametrize(
    ("pin", "allowed"),
    [(Pin.OPAQUE, {Regime.RAW}), (Pin.BEST, {Regime.BEST}), (Pin.PAGES, set(Regime) - {0, 1, 2})],
)
@pytest.mark.parametrize("mbit", [30, 40_000])
def test_pins(pin: Pin, allowed: set[Regime], mbit: int) -> None:
    run = migrate((TEXT,) * 64, steady(mbit), Machine(1, 2), adapter=Adapter(workers=2, pin=pin))
    assert set(run.regimes) <= allowed
    if pin is Pin.PAGES:
        assert run.regimes[-1] is (Regime.BEST if mbit == 30 else Regime.FAST)


def test_small_frames_change_nothing() -> None:
    """An idle session sends a few bytes at a time: nothing is learnt from them, and nothing is tried on them."""
    adapter = Adapter()
    before = adapter.costs.cost(Regime.BEST)
    dice = random.Random(1)
    for step in range(1000):
        regime = adapter.choose(dice.randint(1, 1000))
        assert regime is START
        adapter.encoded(Encoded(regime, 1000, 1000, 1000, 1100, 1.0, 1.0))
        adapter.acknowledged(adapter.sent(1100, step), step + 0.5)
    assert adapter.costs.cost(Regime.BEST) == before


# ------------------------------------------------------------------ what it leans on


def test_a_busy_link_is_measured_and_an_idle_one_bounded() -> None:
    link = LinkRate()
    now = 0.0
    for _ in range(10):  # 1 MB every 10 ms, and nothing waits: a bound
        departure = link.sent(1_000_000, now)
        link.acknowledged(departure, now + 0.005)
        now += 0.01
    assert not link.measured
    assert link.bytes_per_second == pytest.approx(200e6)
    link.waiting(True, now)
    for _ in range(10):
        departure = link.sent(1_000_000, now)
        now += 0.02
        link.acknowledged(departure, now)
    assert link.measured
    assert link.bottleneck
    assert link.bytes_per_second == pytest.approx(50e6, rel=0.05)


def test_odd_samples_of_a_link_are_no_news_until_they_prevail() -> None:
    link, now = LinkRate(), 0.0
    link.waiting(True, now)

    def pass_(seconds: float) -> None:
        nonlocal now
        departure = link.sent(1_000_000, now)
        now += seconds
        link.acknowledged(departure, now)

    for _ in range(5):
        pass_(0.02)
    for seconds in (0.5, 0.5, 0.01):  # a stall, and what had piled up behind it
        pass_(seconds)
        assert link.bytes_per_second == pytest.approx(50e6)
    for _ in range(4):
        pass_(0.5)
    assert link.bytes_per_second == pytest.approx(2e6)


def test_what_is_acknowledged_after_a_pause_makes_no_faster_link() -> None:
    """A machine that does other things for a while hears all at once what came in that time."""
    link, now = LinkRate(), 0.0
    for _ in range(20):  # 25 MB/s, and nothing waits
        departure = link.sent(100_000, now)
        now += 0.004
        link.acknowledged(departure, now)
    assert link.bytes_per_second == pytest.approx(25e6, rel=0.01)
    for _ in range(5):
        departures = [link.sent(100_000, now + 0.004 * number) for number in range(25)]
        link.acknowledged(departures[0], now + 0.1)
        for number, departure in enumerate(departures[1:]):
            link.acknowledged(departure, now + 0.1 + 0.0005 * number)
        now += 0.12
    assert link.bytes_per_second < 30e6


def test_a_trial_is_over_as_soon_as_it_has_failed() -> None:
    """Also where nothing is encoded in it, and each frame is not thought about otherwise."""
    adapter, now = Adapter(), 0.0

    def pass_(wire_bytes: int, seconds: float) -> None:
        nonlocal now
        departure = adapter.sent(wire_bytes, now)
        now += seconds
        adapter.acknowledged(departure, now)

    for _ in range(5):
        # An encoder that does 200 MB/s, and halves; its link never has to be waited for.
        adapter.encoded(Encoded(Regime.LIGHT, 4 << 20, 4 << 20, 4 << 20, 2 << 20, 0.02, 0.02))
        pass_(2 << 20, 0.012)
    assert adapter.choose(4 << 20) is Regime.RAW
    assert adapter.choose(4 << 20) is Regime.RAW
    adapter.waiting(True, now)
    for _ in range(5):
        pass_(4 << 20, 0.16)
    assert adapter.link.bytes_per_second == pytest.approx(26e6, rel=0.05)
    assert adapter.choose(4 << 20) is not Regime.RAW


def test_zero_pages_teach_nothing_of_compression() -> None:
    costs = EncoderCosts()
    for _ in range(20):
        costs.observe(Encoded(Regime.FAST, FRAME_BYTES, FRAME_BYTES, FRAME_BYTES, FRAME_BYTES // 3, 0.002, 0.008))
    text = costs.cost(Regime.BEST)
    for _ in range(200):
        costs.observe(Encoded(Regime.FAST, FRAME_BYTES, 0, 0, 100, 0.002, 0.0))
    assert costs.cost(Regime.BEST).wire < 0.01
    for _ in range(20):
        costs.observe(Encoded(Regime.FAST, FRAME_BYTES, FRAME_BYTES, FRAME_BYTES, FRAME_BYTES // 3, 0.002, 0.008))
    assert costs.cost(Regime.BEST).wire == pytest.approx(text.wire, rel=0.02)


def test_what_does_not_shrink_shrinks_in_no_regime() -> None:
    costs = EncoderCosts()
    for _ in range(20):
        costs.observe(Encoded(Regime.FAST, FRAME_BYTES, FRAME_BYTES, FRAME_BYTES, FRAME_BYTES + 999, 0.002, 0.004))
    assert all(costs.cost(regime).wire == pytest.approx(1.0, abs=0.01) for regime in Regime)


@given(
    st.lists(
        st.builds(
            Encoded,
            st.sampled_from(Regime),
            st.integers(0, FRAME_BYTES),
            st.integers(0, 2 * FRAME_BYTES),
            st.integers(0, 2 * FRAME_BYTES),
            st.integers(0, 2 * FRAME_BYTES),
            st.floats(0, 10),
            st.floats(0, 10),
        ),
        max_size=30,
    )
)
def test_costs_stay_finite_whatever_is_reported(frames: list[Encoded]) -> None:
    costs = EncoderCosts()
    for frame in frames:
        costs.observe(frame)
    for regime in Regime:
        cost = costs.cost(regime)
        assert 0 <= cost.wire <= 1.1
        assert 0 <= cost.plan_seconds < 1
        assert 0 <= cost.press_seconds < float("inf")

"""Links that are modelled: the arithmetic of a pipeline, and the relay's own adapter in it."""

from pathlib import Path

import pytest

from bench.corpus import make_random, stream_at
from bench.linkmodel import AUTO, WAYS, Step, adapt, measure_way, replay
from chunking.adapt import Pin

GBIT_BYTES = 125_000_000


def test_a_slow_link_takes_what_its_bytes_take() -> None:
    steps = [Step(GBIT_BYTES, 0.25)] * 4
    assert replay(steps, 1.0) == pytest.approx(0.25 + 4.0)
    assert replay(steps, 0.5) == pytest.approx(0.25 + 8.0)


def test_a_fast_link_waits_for_the_encoder() -> None:
    steps = [Step(GBIT_BYTES, 0.25)] * 4
    assert replay(steps, 100.0) == pytest.approx(1.0 + 0.01)
    assert replay([], 1.0) == 0


def test_the_encoder_runs_ahead_by_a_few_frames_only() -> None:
    # Without an end to running ahead the slow frame would be made while the link carries those before it.
    steps = [Step(GBIT_BYTES, 0.0)] * 8 + [Step(1, 4.0)]
    assert replay(steps, 1.0) > 8.5
    assert replay(steps[-3:], 1.0) < 6.5


def test_the_adapter_compresses_what_a_slow_link_would_carry_longer(tmp_path: Path) -> None:
    path = tmp_path / "zeros"
    made = make_random(tmp_path / "random", 24)
    text = bytearray(made.read())
    for at in range(0, len(text) - 4096, 4096):
        text[at + 2048 : at + 4096] = bytes(2048)  # some headers go with it: what is left is still a stream of bytes
    path.write_bytes(text)
    stream = stream_at("half zeros", path)
    plain_s = stream.bytes / (0.01 * GBIT_BYTES)
    assert adapt(stream, 0.01, Pin.AUTO) < 0.9 * plain_s
    assert adapt(stream, 0.01, Pin.OPAQUE) == pytest.approx(plain_s, rel=0.05)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_has_a_time_at_every_rate(way: str, tmp_path: Path) -> None:
    stream = make_random(tmp_path / "random", 5)
    samples = measure_way(way, [stream], rates=(0.1, 10.0))
    assert [(sample.way, sample.gbit_per_s) for sample in samples] == [(way, 0.1), (way, 10.0)]
    assert samples[0].seconds > 0.9 * stream.bytes / (0.1 * GBIT_BYTES)
    assert samples[1].seconds < samples[0].seconds
    assert samples[0].guest_bytes == stream.guest_bytes


def test_auto_is_among_them() -> None:
    assert AUTO in WAYS

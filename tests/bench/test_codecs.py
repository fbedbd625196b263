"""Our engine and its peers as the bench runs them: what goes in comes out, and all that would be sent is counted."""

from pathlib import Path

import pytest

from bench.budget import Budget
from bench.codecs import METHODS, PEERS, Chunks, Pages, ZstdBlocks, check
from bench.corpus import IDLE_A, IDLE_B, QEMU_A, Stream, make_random, unpack
from bench.engine import EngineSample, cores, engine_rows, measure_engine, measure_parallel, speed_ups
from bench.measure import GiB
from bench.processes import BenchError
from chunking.limits import FRAME_BODY_SLACK_BYTES
from chunking.regime import Regime
from tests.bench.canned import engine
from tests.bench.small import small_corpus
from tests.bench.told import Told


@pytest.fixture
def streams(tmp_path: Path) -> dict[str, Stream]:
    found, _ = unpack(small_corpus(tmp_path / "shared"), tmp_path, (IDLE_A, IDLE_B, QEMU_A))
    return {**found, "random": make_random(tmp_path / "random", 9)}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_every_stream_back(name: str, streams: dict[str, Stream]) -> None:
    for stream in streams.values():
        codec = METHODS[name].make()
        data = stream.read()
        size = codec.encode(data)
        check(codec.decode(), data)
        assert 0 < size <= stream.bytes + (stream.bytes // 4096 + 10) * 48 + FRAME_BODY_SLACK_BYTES
        if name in {"dedup", "delta", "raw"} or stream.name == "random":
            continue
        assert size < stream.bytes


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("zstd") and name != "raw"])
def test_what_remembers_sends_little_of_a_stream_that_comes_again(name: str, streams: dict[str, Stream]) -> None:
    codec, data = METHODS[name].make(), streams["random"].read()
    first = codec.encode(data)
    second = codec.encode(data)
    assert second < first / 20


def test_what_does_not_remember_sends_all_of_it_again(streams: dict[str, Stream]) -> None:
    codec, data = ZstdBlocks(1), streams[QEMU_A].read()
    assert codec.encode(data) == codec.encode(data)


@pytest.mark.parametrize("chains", [2, 3])
@pytest.mark.parametrize("regime", [Regime.RAW, Regime.FAST, Regime.FIRM])
def test_threads_make_the_same_of_a_stream(regime: Regime, chains: int, streams: dict[str, Stream]) -> None:
    for stream in streams.values():
        codec, data = Pages(regime, chains=chains), stream.read()
        codec.encode(data)
        check(codec.decode(), data)


def test_another_stream_is_an_error() -> None:
    codec = Chunks(64, 256, 1024)
    codec.encode(memoryview(b"some bytes"))
    with pytest.raises(BenchError, match="otherwise"):
        check(codec.decode(), memoryview(b"some other bytes"))


def test_speeds_are_of_guest_memory_and_of_whole_turns(streams: dict[str, Stream]) -> None:
    captured = [streams[IDLE_A], streams[QEMU_A]]
    outcome = measure_engine(captured, ["pages", PEERS[0]], 2, budget=Budget(60), teller=Told())
    assert [sample.method for sample in outcome.samples] == ["pages", PEERS[0]] * 2
    for sample in outcome.samples:
        assert sample.guest_bytes == sum(stream.guest_bytes for stream in captured)
        assert set(sample.ratios) == {IDLE_A, QEMU_A}
        assert sample.encode_s > 0
        assert sample.decode_s > 0
        assert sample.wire_bytes < sample.stream_bytes
    row = engine_rows([engine("pages", 0.5, 0.25), engine("pages", 0.5, 0.2)])["pages"]
    assert row.encode_gib_per_s.median == pytest.approx(2)
    assert (row.decode_gib_per_s.least, row.decode_gib_per_s.greatest) == (pytest.approx(4), pytest.approx(5))
    assert row.encode_cpu_s_per_gib.median == pytest.approx(0.5)
    assert row.ratio.median == pytest.approx(1 / 8)


def test_two_cores_are_held_against_one(streams: dict[str, Stream]) -> None:
    outcome = measure_parallel([streams[QEMU_A]], 1, budget=Budget(60), teller=Told())
    assert set(speed_ups(engine_rows(outcome.samples))) == {"FAST", "FIRM"}
    samples: list[EngineSample] = [engine("FAST, 1 core, 1 chain", 3, 2), engine("FAST, 2 cores, 2 chains", 2, 2)]
    assert speed_ups(engine_rows(samples)) == {"FAST": (pytest.approx(1.5), pytest.approx(1.0))}
    assert speed_ups(engine_rows(samples[1:])) == {}
    assert samples[0].guest_bytes == GiB


def test_cores_are_given_back() -> None:
    import os

    before = os.sched_getaffinity(0)
    with cores(2):
        assert len(os.sched_getaffinity(0)) == min(2, len(before))
    assert os.sched_getaffinity(0) == before

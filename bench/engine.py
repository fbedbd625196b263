"""How fast streams are encoded and decoded on one core, and what two bring: in this process, nothing else in the way.

GiB are of guest memory: 4096 bytes for each page record of a stream, QEMU's markers of zero pages included. A method's
sample is its way through all streams, each with a fresh codec, so that its median is of whole turns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

from bench.budget import Budget, Outcome, Teller, interleave
from bench.codecs import METHODS, Codec, Pages, check
from bench.corpus import Stream
from bench.measure import GiB
from bench.spread import Spread
from chunking.regime import Regime

PARALLEL: Final = {"1 core, 1 chain": 1, "2 cores, 2 chains": 2}


@dataclass(frozen=True, slots=True)
class EngineSample:
    """One method's way through all streams.

    Args:
        method: its name.
        round: from 1.
        guest_bytes, stream_bytes: of all streams.
        wire_bytes: that they became.
        encode_s, decode_s: time.
        encode_cpu_s, decode_cpu_s: CPU time of this process.
        ratios: wire bytes over stream bytes, by stream.
    """

    method: str
    round: int
    guest_bytes: int
    stream_bytes: int
    wire_bytes: int
    encode_s: float
    decode_s: float
    encode_cpu_s: float
    decode_cpu_s: float
    ratios: dict[str, float]


@dataclass(frozen=True, slots=True)
class EngineRow:
    """A method over all rounds."""

    ratio: Spread
    encode_gib_per_s: Spread
    decode_gib_per_s: Spread
    encode_cpu_s_per_gib: Spread
    decode_cpu_s_per_gib: Spread


@dataclass(slots=True)
class _Clocks:
    seconds: float = 0.0
    cpu_s: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - start_s
        self.cpu_s += time.process_time() - start_cpu_s


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Keep this thread, and those that it starts meanwhile, on so many cores."""
    if count == 1:
        yield  # one thread never has more, and the scheduler knows best which
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure_method(name: str, codecs: Iterable[tuple[Stream, Codec]], number: int) -> EngineSample:
    """One way through the streams.

    Raises:
        BenchError: a stream did not come back as it was.
    """
    encoding, decoding = _Clocks(), _Clocks()
    guest = stream_bytes = wire = 0
    ratios = {}
    for stream, codec in codecs:
        data = stream.read()
        with encoding.running():
            size = codec.encode(data)
        with decoding.running():
            codec_digest = codec.decode()
        check(codec_digest, data)
        guest, stream_bytes, wire = guest + stream.guest_bytes, stream_bytes + stream.bytes, wire + size
        ratios[stream.name] = size / stream.bytes
    return EngineSample(
        method=name,
        round=number,
        guest_bytes=guest,
        stream_bytes=stream_bytes,
        wire_bytes=wire,
        encode_s=encoding.seconds,
        decode_s=decoding.seconds,
        encode_cpu_s=encoding.cpu_s,
        decode_cpu_s=decoding.cpu_s,
        ratios=ratios,
    )


def measure_engine(
    streams: Sequence[Stream], names: Sequence[str], rounds: int, *, budget: Budget, teller: Teller
) -> Outcome[EngineSample]:
    """Methods over all streams, on one core, interleaved."""

    def act(item: str, number: int) -> EngineSample:
        return measure_method(item, ((stream, METHODS[item].make()) for stream in streams), number)

    return interleave(names, act, rounds=rounds, budget=budget, teller=teller)


def measure_parallel(
    streams: Sequence[Stream], rounds: int, *, budget: Budget, teller: Teller
) -> Outcome[EngineSample]:
    """Regimes FAST and FIRM on one core in one thread, and on two with two chains as the relay has them."""
    items = {
        f"{regime.name}, {text}": (regime, count) for regime in (Regime.FAST, Regime.FIRM)
        for text, count in PARALLEL.items()
    }  # fmt: skip

    def act(item: str, number: int) -> EngineSample:
        regime, count = items[item]
        with cores(count):
            return measure_method(item, ((stream, Pages(regime, chains=count)) for stream in streams), number)

    return interleave(list(items), act, rounds=rounds, budget=budget, teller=teller)


def engine_rows(samples: Iterable[EngineSample]) -> dict[str, EngineRow]:
    """A row a method, in the order first met."""
    by_name: dict[str, list[EngineSample]] = {}
    for sample in samples:
        by_name.setdefault(sample.method, []).append(sample)
    return {
        name: EngineRow(
            ratio=Spread.over(sample.wire_bytes / sample.stream_bytes for sample in of),
            encode_gib_per_s=Spread.over(sample.guest_bytes / GiB / sample.encode_s for sample in of),
            decode_gib_per_s=Spread.over(sample.guest_bytes / GiB / sample.decode_s for sample in of),
            encode_cpu_s_per_gib=Spread.over(sample.encode_cpu_s * GiB / sample.guest_bytes for sample in of),
            decode_cpu_s_per_gib=Spread.over(sample.decode_cpu_s * GiB / sample.guest_bytes for sample in of),
        )
        for name, of in by_name.items()
    }


def speed_ups(rows: dict[str, EngineRow]) -> dict[str, tuple[float, float]]:
    """By regime: how many times as fast two cores encode and decode as one."""
    found = {}
    one, two = PARALLEL
    for name, row in rows.items():
        regime, _, what = name.partition(", ")
        base = rows.get(f"{regime}, {one}")
        if what == two and base is not None:
            found[regime] = (
                row.encode_gib_per_s.median / base.encode_gib_per_s.median,
                row.decode_gib_per_s.median / base.decode_gib_per_s.median,
            )
    return found


def outcome_json(outcome: Outcome[EngineSample]) -> dict[str, Any]:
    """All of it."""
    return {**outcome.to_json(), "samples": [asdict(sample) for sample in outcome.samples]}

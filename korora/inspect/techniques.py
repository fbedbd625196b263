"""What each technique makes of the stream: the page engine in every regime, and zstd alone beside it.

The engine's decisions are the same in every regime from DELTA on, so they are taken once; each regime then compresses
them in a context chain of its own, as it would alone.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, Self, TypeVar

import numpy as np
import zstandard
from numpy.typing import NDArray

from chunking.encoder import Encoder, Plan
from chunking.frame import PageKind
from chunking.pages import PAGE_BYTES, Spans
from chunking.regime import Regime

_T = TypeVar("_T")
_PLAIN_LEVELS: Final = (1, 3)
_COMPRESSING: Final = (Regime.DELTA, Regime.FAST, Regime.LIGHT, Regime.FIRM, Regime.BEST)
_WORDS: Final = {
    Regime.DEDUP: "and duplicates by reference",
    Regime.DELTA: "and changed words of pages sent again",
    Regime.FAST: "and zstd, as quick as it gets",
    Regime.LIGHT: "and zstd, quick",
    Regime.FIRM: "and zstd, moderate",
    Regime.BEST: "and zstd, thorough, one long window",
}


@dataclass(slots=True)
class Technique:
    """What one technique did.

    Args:
        name: stable, for scripts.
        words: for people.
        wire_bytes: that it would send; records, acknowledgements and TLS not counted.
        cpu_seconds: that it took, all threads together.
    """

    name: str
    words: str
    wire_bytes: int = 0
    cpu_seconds: float = 0.0


class Techniques:
    """All techniques side by side, piece by piece.

    Args:
        cache_bytes: of the page cache, as of a relay's session.
        best: whether to try the slow high levels.
        workers: threads that compress side by side.
    """

    def __init__(self, cache_bytes: int, *, best: bool, workers: int) -> None:
        regimes = [regime for regime in _COMPRESSING if best or regime is not Regime.BEST]
        self._dedup = Encoder(cache_bytes, 1)
        self._encoder = Encoder(cache_bytes, len(regimes))
        self._chains = {regime: chain for chain, regime in enumerate(regimes)}
        self._plain = {level: zstandard.ZstdCompressor(level=level).compressobj() for level in _PLAIN_LEVELS}
        self._pool = ThreadPoolExecutor(workers, "inspect")
        self.raw = Technique("raw", "as it is")
        self.zero = Technique("zero", "without zero pages")
        self.regimes = {regime: Technique(regime.name.lower(), _WORDS[regime]) for regime in [Regime.DEDUP, *regimes]}
        self.plain = {level: Technique(f"zstd-{level}", f"zstd -{level} alone") for level in _PLAIN_LEVELS}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def all(self) -> list[Technique]:
        """In the order in which they save."""
        return [self.raw, *self.plain.values(), self.zero, *self.regimes.values()]

    def add(self, piece: memoryview, spans: Spans) -> NDArray[np.int64]:
        """The next piece, which ``spans`` describes whole; returns its pages by ``PageKind``."""
        jobs = [self._pool.submit(self._compress_plain, level, piece) for level in _PLAIN_LEVELS]
        jobs.append(self._pool.submit(self._encode_dedup, piece, spans))
        plan, seconds = _timed(lambda: self._encoder.plan(piece, spans, Regime.DELTA))
        jobs += [self._pool.submit(self._press, plan, regime, seconds) for regime in self._chains]
        kinds = np.bincount(plan.kinds, minlength=len(PageKind))
        self.raw.wire_bytes += len(piece)
        self.zero.wire_bytes += len(piece) - PAGE_BYTES * int(kinds[PageKind.ZERO]) + (len(plan.kinds) + 7) // 8
        for job in jobs:
            job.result()
        return kinds

    def finish(self) -> None:
        """The stream has ended."""
        for level, stream in self._plain.items():
            self.plain[level].wire_bytes += len(stream.flush())

    def _compress_plain(self, level: int, piece: memoryview) -> None:
        out, seconds = _timed(lambda: self._plain[level].compress(piece))
        self.plain[level].wire_bytes += len(out)
        self.plain[level].cpu_seconds += seconds

    def _encode_dedup(self, piece: memoryview, spans: Spans) -> None:
        plan, seconds = _timed(lambda: self._dedup.plan(piece, spans, Regime.DEDUP))
        self._count(self._dedup, plan, self.regimes[Regime.DEDUP], seconds)

    def _press(self, plan: Plan, regime: Regime, seconds: float) -> None:
        own = replace(plan, regime=regime, chain=self._chains[regime])
        self._count(self._encoder, own, self.regimes[regime], seconds)

    def _count(self, encoder: Encoder, plan: Plan, technique: Technique, seconds: float) -> None:
        technique.cpu_seconds += seconds
        if not plan.kept:  # no page in it: a relay sends it as it is
            technique.wire_bytes += plan.raw_bytes
            return
        body, more = _timed(lambda: encoder.press(plan))
        technique.wire_bytes += plan.raw_bytes if body is None else len(body)
        technique.cpu_seconds += more


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    began = time.thread_time()
    done = work()
    return done, time.thread_time() - began

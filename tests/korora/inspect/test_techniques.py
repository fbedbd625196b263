"""What is said of a regime is what a relay in that regime would send."""

import numpy as np
import pytest

from chunking.encoder import Encoder
from chunking.pages import Spans
from chunking.regime import Regime
from korora.inspect.techniques import Techniques

PAGE = 4096
CACHE = 256 * PAGE


def pieces(count: int) -> list[tuple[bytes, Spans]]:
    """Zero pages, duplicates, little changed ones and new ones, that compress and that do not."""
    dice = np.random.default_rng(5)
    pool = dice.integers(0, 255, (40, PAGE), np.uint8)
    pool[20:, :3000] = 65
    made = []
    for _ in range(count):
        pfns = dice.choice(200, 64, replace=False).astype(np.uint64)
        data = pool[dice.integers(0, 40, 64)].copy()
        data[:10] = 0
        data[30:, :8] = dice.integers(0, 255, (34, 8), np.uint8)
        raw = b"record!!" + data.tobytes()
        runs = np.array([[8, 0, 64]], np.uint32)
        made.append((raw, Spans(len(raw), runs, pfns, np.empty(0, np.uint64), big_endian=False)))
    return made


@pytest.mark.parametrize("regime", list(Regime)[1:], ids=lambda regime: regime.name)
def test_as_one_relay_alone_would_send(regime: Regime) -> None:
    alone = Encoder(CACHE, 1)
    wire = 0
    with Techniques(CACHE, best=True, workers=3) as techniques:
        for raw, spans in pieces(6):
            techniques.add(memoryview(raw), spans)
            body = alone.press(alone.plan(memoryview(raw), spans, regime))
            assert body is not None
            wire += len(body)
        techniques.finish()
        assert techniques.regimes[regime].wire_bytes == wire


def test_raw_and_zero() -> None:
    made = pieces(3)
    with Techniques(CACHE, best=False, workers=1) as techniques:
        kinds = sum(techniques.add(memoryview(raw), spans) for raw, spans in made)
        total = sum(len(raw) for raw, _ in made)
        assert techniques.raw.wire_bytes == total
        assert techniques.zero.wire_bytes == total - int(kinds[0]) * PAGE + 3 * 64 // 8
        assert Regime.BEST not in techniques.regimes
        assert [each.name for each in techniques.all][:4] == ["raw", "zstd-1", "zstd-3", "zero"]

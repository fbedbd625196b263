"""The ladder's arithmetic, and that each rung really does its work; no figure is held against anything."""

from pathlib import Path

import pytest

from bench import rungs
from bench.budget import Budget, Outcome
from bench.ladder import (
    ITEMS,
    LADDER,
    PAIR,
    LadderPlan,
    LadderResult,
    LadderSample,
    measure_ladder,
    measure_rung,
)
from bench.measure import GiB
from bench.rungs import PIECE_BYTES, Pieces
from tests.bench.told import Told

PIECES = Pieces(4 * PIECE_BYTES)
COSTS = {
    "memcpy": 0.05, "blake3": 0.2, "seal": 0.1, "open": 0.1, "frame": 0.5, "loopback": 0.3, "lane": 0.6, "pair": 2.0,
}  # fmt: skip


def sample(item: str, number: int, cost: float) -> LadderSample:
    """A GiB at this many CPU seconds, a second to the GiB."""
    return LadderSample(item, number, GiB, 1.0, cost)


def result_of(costs: dict[str, float]) -> LadderResult:
    """Three rounds, the middle one of which has these costs; warm data costs half."""
    samples = [
        sample(item, number, cost * factor * (0.5 if item.endswith("warm") else 1))
        for number, factor in ((1, 0.5), (2, 1.0), (3, 9.0))
        for item in ITEMS
        if (cost := costs.get(item.split()[0])) is not None
    ]
    return LadderResult(Outcome(samples, 3, 3))


@pytest.mark.parametrize("item", [item for item in ITEMS if item != PAIR])
def test_a_rung_counts_bytes_and_time(item: str) -> None:
    measured = measure_rung(item, 1, 0.0, PIECES)
    assert measured.item == item
    assert measured.bytes > 0
    assert measured.seconds > 0
    assert measured.cpu_s > 0


def test_cold_data_is_every_piece_in_turn_and_warm_one_for_ever() -> None:
    cold, warm = PIECES.cold(), PIECES.warm()
    seen = [next(cold) for _ in range(PIECES.count + 1)]
    assert len({id(piece) for piece in seen[:-1]}) == PIECES.count == 4
    assert seen[-1] is seen[0]
    assert next(warm) is next(warm)


def test_the_frame_rung_checks_digests() -> None:
    # The receiver compares: were the piece altered between the ends, the rung itself would fail.
    with rungs.frame(PIECES.cold()) as act:
        assert act() == PIECE_BYTES - rungs.FRAME_HEADER_BYTES


def test_opening_goes_on_after_its_records_are_used_up() -> None:
    with rungs.unseal(PIECES.cold(), 2) as act:
        assert sum(act() for _ in range(5)) == 5 * PIECE_BYTES


def test_a_rung_adds_what_is_beyond_its_parts() -> None:
    rows = result_of(COSTS).rows()
    assert list(rows) == list(ITEMS)
    # Parts of a lane: seal cold 0.1, open warm 0.05, loopback cold 0.3.
    lane = rows["lane cold"]
    assert lane.parts_s_per_gib == pytest.approx(0.45)
    assert lane.adds_s_per_gib == pytest.approx(0.15)
    # Of a pair: lane 0.6, frame 0.5, loopback 0.3.
    assert rows[PAIR].adds_s_per_gib == pytest.approx(0.6)
    # A warm frame is made of warm digests only.
    assert rows["frame warm"].parts_s_per_gib == pytest.approx(0.2)
    assert rows["frame cold"].parts_s_per_gib == pytest.approx(0.3)
    assert rows["memcpy cold"].parts_s_per_gib is None


def test_without_a_part_nothing_is_said_about_what_is_added() -> None:
    rows = result_of({name: cost for name, cost in COSTS.items() if name != "loopback"}).rows()
    assert rows["lane cold"].adds_s_per_gib is None
    assert rows["frame cold"].adds_s_per_gib is not None


def test_every_rung_has_a_line_even_one_left_out() -> None:
    result = result_of({name: cost for name, cost in COSTS.items() if name != "pair"})
    result.outcome.left_out[PAIR] = "korora: no identity"
    lines = [line for line in result.to_markdown() if line.startswith("|")]
    assert len(lines) == 2 + len(LADDER)
    assert len({line.count("|") for line in lines}) == 1
    assert "left out: korora: no identity" in lines[-1]
    assert "| 0.450 | 0.150 |" in lines[-2]


def test_parts_are_rungs_that_are_measured() -> None:
    assert {part for rung in LADDER for part in rung.parts} <= set(ITEMS)


def test_a_ladder_without_time_says_so(tmp_path: Path) -> None:
    plan = LadderPlan(rounds=2, slice_s=0.0, pair_bytes=PIECE_BYTES, block_bytes=2 * PIECE_BYTES)
    result = measure_ladder(plan, tmp_path, budget=Budget(0.0), teller=Told())
    assert result.rows() == {}
    assert set(result.outcome.left_out) == set(ITEMS)
    assert result.outcome.cut

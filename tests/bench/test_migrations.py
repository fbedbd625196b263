"""QEMU's migration beside ours: the figures' arithmetic, what happens without QEMU, and one small real move each."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from bench.budget import Budget, Outcome
from bench.measure import GiB
from bench.migrations import (
    VARIANTS,
    MigrationPlan,
    MigrationResult,
    MigrationSample,
    build_rig,
    measure_migrations,
    migrate,
)
from korora.demo.errors import EXIT_SETUP, DemoError
from tests.bench.told import Told

SAMPLE = MigrationSample(
    variant="tcp",
    round=1,
    total_ms=500,
    downtime_ms=40,
    setup_ms=1,
    transferred_bytes=GiB // 2,
    mbps=9000.0,
    passes=3,
    qemu_cpu_s=1.0,
    relay_cpu_s=0.0,
)
PLAN = MigrationPlan(rounds=3, filled_mib=512)


def test_throughput_and_cost_are_of_what_qemu_transferred() -> None:
    assert SAMPLE.gib_per_s == pytest.approx(1.0)
    assert replace(SAMPLE, relay_cpu_s=0.5).cpu_s_per_gib == pytest.approx(3.0)


def test_a_variant_is_a_row_of_medians_beside_plain_tcp() -> None:
    samples = [replace(SAMPLE, round=number, total_ms=total) for number, total in ((1, 500), (2, 400), (3, 9000))]
    samples += [replace(one, variant="korora", total_ms=750, relay_cpu_s=0.5) for one in samples]
    outcome = Outcome(samples, 3, 3, left_out={"tls": "QEMU | said no"})
    result = MigrationResult("QEMU 10.0, tcg", PLAN, outcome)
    assert result.rows()["tcp"].total_ms.median == 500
    lines = [line for line in result.to_markdown() if line.startswith("|")]
    assert lines[2].startswith("| tcp | 500 (400–9000) | 1.00 | 40 (40–40) | 512 | 9000 | 1.00 (1.00–1.00) | – |")
    assert lines[3].startswith("| korora | 750 (750–750) | 1.50 |")
    assert "| 0.50 (0.50–0.50) | 3.00 |" in lines[3]
    assert "left out: QEMU / said no" in lines[4]
    assert len({line.count("|") for line in lines}) == 1


def test_the_guest_is_larger_than_what_fills_it_and_has_little_to_do() -> None:
    assert PLAN.spec.static_mib == 512
    assert PLAN.spec.memory_mib - PLAN.spec.static_mib >= 96
    assert PLAN.spec.blocks + PLAN.spec.words < 10


def test_without_qemu_all_are_left_out_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KORORA_KERNEL", str(tmp_path / "absent"))
    told = Told()
    result = measure_migrations(PLAN, tmp_path, budget=Budget(60), teller=told)
    assert set(result.outcome.left_out) == set(VARIANTS)
    assert all("no kernel for the guest" in reason for reason in result.outcome.left_out.values())
    assert result.rows() == {}
    assert "left out" in "\n".join(result.to_markdown())
    assert "no kernel for the guest" in told.warnings[0]


@pytest.mark.e2e
@pytest.mark.timeout(180)
async def test_a_small_guest_moves_each_way(tmp_path: Path) -> None:
    plan = MigrationPlan(rounds=1, filled_mib=4)
    try:
        rig = await build_rig(plan, tmp_path, 60)
    except DemoError as error:
        if error.exit_code != EXIT_SETUP or os.environ.get("CI"):
            raise
        pytest.skip(f"{error}; {error.remedy}")
    for name in ("tls", "korora multifd"):
        sample = await asyncio.wait_for(migrate(rig, VARIANTS[name], 1), 60)
        assert sample.variant == name
        assert sample.transferred_bytes > plan.filled_mib * 1024**2
        assert sample.total_ms > 0
        assert sample.qemu_cpu_s > 0
        assert (sample.relay_cpu_s > 0) == VARIANTS[name].relays

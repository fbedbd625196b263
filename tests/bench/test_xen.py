"""The Xen section: what counts as a silence, and what is written of the rounds."""

import asyncio
from pathlib import Path

import pytest

from bench import xen
from bench.budget import Budget, Outcome
from bench.processes import BenchError
from bench.xen import Ear, XenPlan, XenResult, XenSample, measure_xen
from tests.bench.told import Told
from tests.e2e.xen.rig import RigAbsent


def ear(*heard: tuple[int, float]) -> Ear:
    """One that has heard these numbers at these times."""
    return Ear(heard=dict(heard))


def test_the_longest_silence_is_one_that_ended_after_the_start() -> None:
    assert ear((1, 0.0), (2, 9.0), (3, 10.0), (4, 12.0)).longest_silence(9.5) == 2.0


def test_one_number_may_be_divided_between_two_consoles() -> None:
    assert ear((1, 10.0), (3, 11.0), (4, 11.1)).longest_silence(0.0) == 1.0


def test_a_guest_that_has_not_counted_on_is_no_sample() -> None:
    with pytest.raises(BenchError, match="not counted on"):
        ear((1, 10.0), (4, 11.0)).longest_silence(0.0)


async def test_heartbeats_are_heard_whichever_host_they_come_from() -> None:
    async with Ear() as listening:
        lines = [b"oken line\nHB 7 t=1.00 written=1 checked=1 bad=0\n", b"HB 8 t=1.02 written=1 checked=1 bad=0\n"]
        for line in lines:
            _, writer = await asyncio.open_connection("127.0.0.1", listening.port)
            writer.write(line)
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        await listening.wait(2, 5.0)
        assert sorted(listening.heard) == [7, 8]


def test_the_table_has_medians_and_what_was_left_out() -> None:
    samples = [XenSample("socat", number, 9.0 + number, 100.0 * number, number << 20) for number in (1, 2, 3)]
    outcome = Outcome(samples=samples, rounds=3, planned=3, left_out={"ssh": "no sshd"})
    result = XenResult(XenPlan(3), outcome)
    text = "\n".join(result.to_markdown())
    assert "| socat | 11.0 (10.0–12.0) | 200 (100–300) | 2.0 (1.0–3.0) |" in text
    assert "| ssh | left out: no sshd |" in text
    assert result.to_json()["rows"]["socat"]["wire_mib"]["median"] == 2.0


def test_without_hosts_everything_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: Path) -> None:
        raise RigAbsent("there is no image")

    monkeypatch.setattr(xen, "build_rig", absent)
    told = Told()
    result = measure_xen(XenPlan(3), tmp_path, budget=Budget(10), teller=told)
    assert result.rows() == {}
    assert set(result.outcome.left_out.values()) == {"there is no image"}
    assert any("there is no image" in line for line in told.warnings)

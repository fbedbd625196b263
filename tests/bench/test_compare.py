"""Runs of different machines are never compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.compare import compare, load_run, refuse_if_different
from bench.processes import BenchError
from bench.report import to_json
from tests.bench.canned import canned_run


def run_of(**changes: Any) -> dict[str, Any]:
    """A run as its file has it."""
    document: dict[str, Any] = json.loads(json.dumps(to_json(canned_run(**changes))))
    return document


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cpu", "Another CPU (6/1/2)"),
        ("cores", 4),
        ("caches", "L1 32K"),
        ("memory_mib", 2048),
        ("virtualisation", "kvm"),
        ("governor", "powersave"),
        ("kernel", "6.2"),
        ("congestion_control", "bbr"),
    ],
)
def test_another_machine_or_set_up_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(BenchError, match=f"cannot be compared: {field} "):
        compare(run_of(), run_of(**{field: value}))


@pytest.mark.parametrize(("field", "value"), [("network", "private"), ("gib", 0.75), ("guest_mib", 64)])
def test_other_settings_are_refused(field: str, value: object) -> None:
    with pytest.raises(BenchError, match=f"{field} "):
        compare(run_of(), run_of(settings={field: value}))


def test_a_run_that_does_not_say_its_machine_is_refused() -> None:
    silent = run_of()
    del silent["machine"]["cpu"]
    with pytest.raises(BenchError, match="cpu None and None"):
        refuse_if_different(silent, silent)


def test_every_difference_is_named() -> None:
    with pytest.raises(BenchError, match=r"cores 2 and 8; kernel '6\.1' and '5\.10'"):
        compare(run_of(), run_of(cores=8, kernel="5.10"))


def test_one_machine_may_be_compared_with_itself() -> None:
    table = compare(run_of(), run_of(factor=3.0, revision="ba9876543210", python="3.12.0", load_before="2.00"))
    assert "| peers | korora | gib_per_s | 1.500 | 4.500 | 3.00 | apart |" in table
    assert "| qemu | tls | total_ms | 1500.000 | 1500.000 | 1.00 | overlap |" in table
    assert "Newer: 2026-01-01 00:00 UTC, revision ba9876543210, Python 3.12.0, load 2.00" in table


def test_what_only_one_run_has_is_left_out() -> None:
    shorter = run_of()
    del shorter["sections"]["qemu"]
    assert "| qemu |" not in compare(shorter, run_of())


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema": "korora-bench-1"}'])
def test_what_is_no_run_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(BenchError, match=r"--json wrote"):
        load_run(path)


def test_the_command_refuses_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    here.write_text(json.dumps(run_of()))
    there.write_text(json.dumps(run_of(cpu="Another CPU")))
    assert main(["--compare", str(here), str(there)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "bench: these runs cannot be compared: cpu 'A CPU (6/1/1)' and 'Another CPU'" in captured.err
    assert main(["--compare", str(here), str(here)]) == 0
    assert "overlap" in capsys.readouterr().out
    assert main(["--compare", str(here), str(tmp_path / "absent.json")]) == 2
    assert "absent.json: No such file" in capsys.readouterr().err

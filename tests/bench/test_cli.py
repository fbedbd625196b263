"""The command: what is asked for, how long it may take, what it leaves behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench.budget import Budget, Outcome
from bench.cli import SECTIONS, USUAL, parse
from bench.peers import PEERS
from bench.processes import REPOSITORY
from bench.streams import StreamsResult

needs_socat = pytest.mark.skipif(shutil.which("socat") is None, reason="socat is not installed")
LITTLE = ("--rounds", "1", "--gib", "0.004", "--pings", "5", "--setups", "2")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=REPOSITORY, check=False, capture_output=True, text=True, timeout=55,
    )  # fmt: skip


def test_a_whole_run_stays_below_sixteen_minutes_and_a_quick_one_near_three() -> None:
    full, quick = parse([]), parse(["--quick"])
    assert full.only == quick.only == list(USUAL) == [name for name in SECTIONS if name != "xen"]
    assert full.peers == list(PEERS)
    # Start-up, and what the last measurement of the last section overruns, have the rest.
    assert sum(full.budgets_s.values()) <= 15.5 * 60
    assert sum(quick.budgets_s.values()) <= 3.25 * 60
    # What unpacks before the budget begins, and the measurement that overruns it, have the rest of 6 minutes and of 1.
    assert full.budgets_s["pages"] <= 5.8 * 60
    assert quick.budgets_s["pages"] <= 55
    assert (full.rounds, full.gib, full.guest_mib) == (5, 2.0, 512)
    assert (quick.rounds, quick.gib, quick.guest_mib) == (2, 0.75, 128)


def test_what_is_said_goes_before_quick() -> None:
    options = parse(["--quick", "--rounds", "7", "--only", "qemu,ladder"])
    assert options.rounds == 7
    assert options.only == ["ladder", "qemu"]
    assert set(options.budgets_s) == {"ladder", "qemu"}


def test_minutes_are_divided_among_the_sections() -> None:
    options = parse(["--minutes", "2", "--only", "ladder,peers"])
    assert sum(options.budgets_s.values()) == pytest.approx(120)
    default = parse(["--only", "ladder,peers"]).budgets_s
    assert options.budgets_s["ladder"] / options.budgets_s["peers"] == pytest.approx(
        default["ladder"] / default["peers"]
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--peers", "carrier-pigeon"],
        ["--peers", ""],
        ["--only", "ladders"],
        ["--rounds", "0"],
        ["--gib", "0"],
        ["--guest-mib", "0"],
        ["--minutes", "0"],
        ["--json", "/nonexistent/directory/file"],
        ["--plot", "/nonexistent/directory/file"],
        ["--compare", "only-one"],
    ],
)
def test_a_usage_error_is_said_before_anything_is_measured(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


@needs_socat
def test_the_command_writes_all_three_files(tmp_path: Path) -> None:
    written, table, picture = tmp_path / "run.json", tmp_path / "run.md", tmp_path / "run.png"
    done = bench(
        "--only", "peers", "--peers", "direct,socat", *LITTLE,
        "--json", str(written), "--markdown", str(table), "--plot", str(picture),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == table.read_text()
    document = json.loads(written.read_text())
    assert [sample["peer"] for sample in document["sections"]["peers"]["samples"]] == ["direct", "socat"]
    assert document["machine"]["cores"] >= 1
    assert "bench: peers: round 1 of 1: socat" in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert done.stderr.splitlines()[-1] == f"bench: {written}, {table}, {picture}"


def test_results_go_where_nobody_commits_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (REPOSITORY / ".gitignore").read_text().count("bench/results/") == 1
    assert command.RESULTS == REPOSITORY / "bench" / "results"
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    files = command.destinations(parse(["--json", str(tmp_path / "mine.json")]))
    assert files["json"] == tmp_path / "mine.json"
    assert files["md"].parent == files["png"].parent == tmp_path / "results"
    assert (tmp_path / "results").is_dir()


def test_a_section_that_overran_takes_it_from_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, float] = {}
    now = 0.0

    def measure(name: str, options: Any, progress: Any, scratch: Path, budget: Budget) -> StreamsResult:
        nonlocal now
        given[name] = budget.seconds
        now += {"ladder": 20.0, "peers": 50.0, "lanes": 0.0}[name]
        return StreamsResult(name, "", 1, Outcome())

    monkeypatch.setattr(command, "measure_section", measure)
    monkeypatch.setattr(command.time, "monotonic", lambda: now)
    options = parse(["--only", "ladder,peers,lanes"])
    options.budgets_s = {"ladder": 10.0, "peers": 100.0, "lanes": 30.0}
    assert list(command.measure_all(options)) == ["ladder", "peers", "lanes"]
    assert given == {"ladder": 10.0, "peers": 90.0, "lanes": 70.0}


def test_check_fails_where_nothing_can_be_judged(tmp_path: Path) -> None:
    done = bench(
        "--only", "peers", "--peers", "direct", *LITTLE, "--check", "--json", str(tmp_path / "j"),
        "--markdown", str(tmp_path / "m"), "--plot", str(tmp_path / "p"),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr


def test_a_run_without_time_measures_nothing_and_says_so() -> None:
    done = bench("--only", "sessions", "--minutes", "1e-9", *LITTLE)
    assert done.returncode == 70, done.stderr
    assert "bench: sessions: Cut after 0 of 1 rounds" in done.stderr
    assert done.stderr.endswith("bench: nothing could be measured\n")

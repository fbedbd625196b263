"""The bench of receipts measures every step at every length, and leaves nothing on the disk."""

import json
from pathlib import Path

from bench.receipts import STEPS, main


def test_every_step_is_measured_at_every_length(tmp_path: Path) -> None:
    told: list[str] = []
    assert main(["--entries", "1", "40", "--rounds", "3", "--json", "--folder", str(tmp_path)], tell=told.append) == 0
    results = json.loads(told[0])
    assert list(results) == ["1", "40"]
    for result in results.values():
        assert list(result) == list(STEPS)
        assert all(step["median"] > 0 and step["p90"] > 0 for step in result.values())
    assert list(tmp_path.iterdir()) == []


def test_it_is_a_table_for_people(tmp_path: Path) -> None:
    told: list[str] = []
    main(["--entries", "1", "--rounds", "2", "--folder", str(tmp_path)], tell=told.append)
    assert told[0].splitlines()[0] == "| step | 1 entries |"
    assert len(told[0].splitlines()) == len(STEPS) + 2

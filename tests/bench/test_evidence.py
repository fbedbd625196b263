"""The bench of evidence measures whole sessions of each variant, and leaves nothing on the disk."""

import json
from pathlib import Path

from bench.evidence import VARIANTS, main


def test_each_variant_is_measured(tmp_path: Path) -> None:
    told: list[str] = []
    assert main(["--rounds", "2", "--json", "--folder", str(tmp_path)], tell=told.append) == 0
    results = json.loads(told[0])
    assert list(results) == [*VARIANTS, "sync"]
    assert all(value > 0 for value in results.values())
    assert list(tmp_path.iterdir()) == []


def test_it_is_a_table_for_people(tmp_path: Path) -> None:
    told: list[str] = []
    main(["--rounds", "1", "--folder", str(tmp_path)], tell=told.append)
    assert len(told[0].splitlines()) == len(VARIANTS) + 3

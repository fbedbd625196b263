"""The bench of preflight measures every step, and how much longer an OFFER gets."""

import json

from bench.preflight import WORDS, main


def test_every_step_is_measured() -> None:
    told: list[str] = []
    assert main(["--rounds", "3", "--json"], tell=told.append) == 0
    results = json.loads(told[0])
    assert list(results) == list(WORDS)
    assert all(0 < step["median"] <= step["max"] for step in results.values())


def test_it_is_a_table_for_people() -> None:
    told: list[str] = []
    main(["--rounds", "2"], tell=told.append)
    assert len(told) == len(WORDS) + 2
    assert int(told[-1].split()[3]) > 100

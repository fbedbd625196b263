"""The bench of a vTPM's hand-over measures every step, and leaves nothing running."""

import json

import pytest

from bench.vtpm import STEPS, main


@pytest.mark.parametrize("options", [(), ("--carried",)], ids=["moved", "carried"])
def test_every_step_is_measured(options: tuple[str, ...]) -> None:
    told: list[str] = []
    assert main(["--rounds", "2", "--json", *options], tell=told.append) == 0
    results = json.loads(told[0])
    assert list(results) == list(STEPS)
    assert all(0 < step["median"] <= step["max"] for step in results.values())


def test_it_is_a_table_for_people() -> None:
    told: list[str] = []
    main(["--rounds", "2"], tell=told.append)
    assert len(told) == len(STEPS) + 1

"""The test of the model: with anything wrong in the table, or about what it stands in, spin finds what goes wrong.

found.json says which search finds it; `python -m tests.model.survey` writes that. A mutant that none finds is in
``EQUIVALENT`` with the reason, and stays one: if a search comes to find it, that reason has fallen.
"""

import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.model.equivalent import EQUIVALENT, ORDER_ONLY
from tests.model.generate import promela
from tests.model.mutants import named
from tests.model.spin import Budget, environment_names
from tests.model.survey import CHEAP, SECONDS_MAX, cases, is_about_a_record, recorded
from tests.model.whims import AT_ONCE, KINDS, Kind, by_itself

FOUND: Final = recorded()
CASES: Final = cases()
MISTAKES: Final = [
    name
    for name in (*(mutant.name for mutant in named()), *environment_names())
    if name in FOUND and FOUND[name].budget in CHEAP
]
REST: Final = [name for name in FOUND if name not in MISTAKES]
# Of the rest a normal run takes a few: others after each change of the table, and the same ones until then.
SEED: Final = zlib.crc32(promela().encode())
SAMPLE: Final = random.Random(SEED).sample(REST, min(10, len(REST)))


@pytest.mark.timeout(SECONDS_MAX + 650)
@pytest.mark.parametrize("name", [*MISTAKES, *SAMPLE])
def test_a_mistake_is_found(name: str, model: Path) -> None:
    assert CASES[name].search(model, FOUND[name].budget).error


@pytest.mark.slow
@pytest.mark.timeout(SECONDS_MAX + 650)
@pytest.mark.parametrize("name", [name for name in REST if name not in SAMPLE])
def test_every_mistake_is_found(name: str, model: Path) -> None:
    assert CASES[name].search(model, FOUND[name].budget).error


@pytest.mark.timeout(SECONDS_MAX + 650)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_called_equivalent_is(kind: Kind, equivalent: Mapping[Kind, Path]) -> None:
    """All at once, and in every mixture: see ``whims``."""
    assert kind.search(equivalent[kind], CHEAP[0]).error == ""


@pytest.mark.slow
@pytest.mark.timeout(SECONDS_MAX + 650)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", AT_ONCE[1:], ids=str)
def test_what_is_called_equivalent_is_in_longer_searches(
    kind: Kind, budget: Budget, equivalent: Mapping[Kind, Path]
) -> None:
    assert kind.search(equivalent[kind], budget).error == ""


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS_MAX + 650)
@pytest.mark.parametrize("name", EQUIVALENT)
def test_what_is_called_equivalent_is_by_itself(name: str, model: Path) -> None:
    for budget in by_itself(name):
        assert CASES[name].search(model, budget).error == "", f"{budget}: not because {EQUIVALENT[name]}"


def test_everything_is_found_or_there_is_a_reason_why_not() -> None:
    assert {*FOUND} | {*EQUIVALENT} == {*CASES}
    assert not {*FOUND} & {*EQUIVALENT}
    assert all(EQUIVALENT.values())


def test_a_record_that_is_missing_or_late_has_a_consequence() -> None:
    """It does not only break the rule that a record comes first: something goes wrong by it, but for ``ORDER_ONLY``."""
    by_the_rule = {name for name, row in FOUND.items() if is_about_a_record(name) and not row.budget.outcomes}
    assert by_the_rule == ORDER_ONLY

"""The test of the model: with anything wrong in the table, or about what it stands in, spin finds what goes wrong.

A mutant that it cannot find is in ``EQUIVALENT`` with the reason, and stays one: if a search comes to find it, that
reason has fallen.
"""

from pathlib import Path

import pytest

from tests.model.equivalent import EQUIVALENT, ORDER_ONLY
from tests.model.mutants import NEEDS, named, of_entries
from tests.model.spin import Budget, Found, environment_names, search

SECONDS_MAX = 200.0  # one search; a hundredth of it on two quiet cores, a tenth for the slow ones
FIRST = Budget(1)
LADDER = (FIRST, Budget(1, late=1), Budget(1, where="qemu"), Budget(1, where="localhost"))

NAMED = {mutant.name: number for number, mutant in enumerate(named(), 1)}
ENTRIES = {mutant.name: number for number, mutant in enumerate(of_entries(), 1)}
ASSUMPTIONS = environment_names()


def climb(binary: Path, mutant: int) -> Found:
    """Search with more and more going wrong, until something is found."""
    found = Found(0, "")
    for budget in LADDER:
        found = search(binary, budget, mutant=mutant, seconds=SECONDS_MAX)
        if found.error:
            break
    return found


def quick(name: str) -> bool:
    """Whether the first budget is enough."""
    return name not in NEEDS and name not in EQUIVALENT


@pytest.mark.timeout(SECONDS_MAX + 650)
@pytest.mark.parametrize("name", [name for name in NAMED if quick(name)])
def test_a_mistake_is_found(name: str, model: Path) -> None:
    assert search(model, FIRST, mutant=NAMED[name], seconds=SECONDS_MAX).error


@pytest.mark.timeout(SECONDS_MAX + 650)
@pytest.mark.parametrize("name", [name for name in ASSUMPTIONS if name not in NEEDS])
def test_an_assumption_that_does_not_hold_is_found(name: str, model: Path) -> None:
    assert search(model, FIRST, without=ASSUMPTIONS[name], seconds=SECONDS_MAX).error


@pytest.mark.slow
@pytest.mark.timeout(SECONDS_MAX + 650)
@pytest.mark.parametrize("name", NEEDS)
def test_what_needs_more_to_go_wrong_is_found_then(name: str, model: Path) -> None:
    found = search(model, NEEDS[name], mutant=NAMED.get(name, 0), without=ASSUMPTIONS.get(name, 0), seconds=SECONDS_MAX)
    assert found.error


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS_MAX + 650)
@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in EQUIVALENT])
def test_whatever_an_entry_lacks_is_found(name: str, entries: Path) -> None:
    assert climb(entries, ENTRIES[name]).error


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS_MAX + 650)
@pytest.mark.parametrize("name", EQUIVALENT)
def test_what_is_called_equivalent_is(name: str, model: Path, entries: Path) -> None:
    found = climb(model, NAMED[name]) if name in NAMED else climb(entries, ENTRIES[name])
    assert found.error == "", f"not because {EQUIVALENT[name]}"


@pytest.mark.slow
@pytest.mark.timeout(SECONDS_MAX + 650)
@pytest.mark.parametrize("name", [name for name in ENTRIES if ": write last" in name or ": without write" in name])
def test_a_record_that_is_missing_or_late_has_a_consequence(name: str, entries: Path) -> None:
    """It does not only break the rule that a record comes first: something goes wrong by it, but for ``ORDER_ONLY``."""
    found = search(entries, Budget(1, outcomes=True), mutant=ENTRIES[name], seconds=SECONDS_MAX)
    assert bool(found.error) is (name not in ORDER_ONLY)


def test_reasons_are_given_for_what_there_is() -> None:
    known = {*NAMED, *ENTRIES}
    assert known >= {*EQUIVALENT, *ORDER_ONLY}
    assert {*NAMED, *ASSUMPTIONS} >= {*NEEDS}
    assert all([*EQUIVALENT.values(), *ORDER_ONLY.values()])
    assert sum(map(quick, NAMED)) >= 25

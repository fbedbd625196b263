"""spin searches docs/model/handover.pml with the table as it is, and finds nothing.

`make model` searches longer and prints what it has met.
"""

from pathlib import Path

import pytest

from tests.model.generate import Mutant
from tests.model.mutants import chatter
from tests.model.runs import DEEP, QUICK, Run
from tests.model.spin import LIVELOCK, Budget, search

QUICK_SECONDS_MAX = 240.0  # a tenth of it on two quiet cores
DEEP_SECONDS_MAX = 1500.0


@pytest.mark.timeout(QUICK_SECONDS_MAX + 1250)
@pytest.mark.parametrize("run", QUICK, ids=str)
def test_nothing_goes_wrong(run: Run, model: Path, livelocks: Path) -> None:
    found = search(
        livelocks if run.livelocks else model, run.budget, livelocks=run.livelocks, seconds=QUICK_SECONDS_MAX
    )
    assert found.error == ""
    assert found.states > run.states_min
    print(f"{run}: {found.states} states")


@pytest.mark.slow
@pytest.mark.timeout(DEEP_SECONDS_MAX + 1250)
@pytest.mark.parametrize("run", DEEP, ids=str)
def test_nothing_goes_wrong_in_a_longer_search(run: Run, model: Path, livelocks: Path) -> None:
    found = search(livelocks if run.livelocks else model, run.budget, livelocks=run.livelocks, seconds=DEEP_SECONDS_MAX)
    assert found.error == ""
    assert found.states > run.states_min


@pytest.mark.timeout(QUICK_SECONDS_MAX + 650)
def test_relays_that_answer_each_other_for_ever_are_found(livelocks: Path) -> None:
    talks: Mutant = chatter()
    found = search(livelocks, Budget(0), mutant=1, livelocks=True, seconds=QUICK_SECONDS_MAX)
    assert found.error.startswith(LIVELOCK), talks.name

"""Many mutants at once: any of them, at any moment, and another for each event.

Every run of each is a run of that, so one search that finds nothing says it of all of them, and of all their mixtures.
It does not say it where an entry is left out whose event comes only as long as it means something.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from proxy.handover.table import Event, Side, Step
from tests.model.equivalent import EQUIVALENT, ORDER_ONLY
from tests.model.generate import Key, Mutant, promela
from tests.model.mutants import all_mutants
from tests.model.spin import Budget, Found, build, search
from tests.model.survey import CHEAP, SECONDS_MAX

_AWAITED: Final = (Event.GAVE_UP, Event.TOOK, Event.LOST, Event.RUN_HERE, Event.GIVE_UP)


def alone(names: Collection[str]) -> list[str]:
    """Which of these mutants have to be searched for one by one, whatever goes wrong."""
    return [
        mutant.name
        for mutant in all_mutants()
        if mutant.name in names
        and any(step is None and event in _AWAITED for (_, event), step in mutant.entries.items())
    ]


def by_itself(name: str) -> tuple[Budget, ...]:
    """What a mutant that is called equivalent is searched with, by itself."""
    return CHEAP if alone([name]) else tuple(budget for budget in CHEAP if budget.late)


def whims(names: Collection[str]) -> list[Mutant]:
    """Few mutants that have all of these in them: those of one entry are in different ones.

    The binary is told of them as ``len(whims) + 1``.
    """
    layers: dict[Side, list[dict[Key, Step | None]]] = {side: [] for side in Side}
    for mutant in all_mutants():
        if mutant.name not in names:
            continue
        free = [layer for layer in layers[mutant.side] if not {*layer} & {*mutant.entries}]
        if not free:
            free = [{}]
            layers[mutant.side] += free
        free[0].update(mutant.entries)
    return [
        Mutant(f"{side.value}, {number}", side, layer) for side in Side for number, layer in enumerate(layers[side], 1)
    ]


@dataclass(frozen=True, slots=True)
class Kind:
    """Mutants that are all said to change nothing.

    Attributes:
        name: what they are called.
        names: theirs.
        outcomes: whether that is said only of what becomes of it, and not of the order of the records.
    """

    name: str
    names: Collection[str]
    outcomes: bool

    def build(self, folder: Path) -> Path:
        """A binary that has all of them; see ``spin.build``."""
        return build(folder, promela(whims(self.names)))

    def search(self, binary: Path, budget: Budget) -> Found:
        """As ``spin.search``, with any of them at any moment."""
        budget = replace(budget, outcomes=self.outcomes)
        return search(binary, budget, whims=len(whims(self.names)) + 1, seconds=SECONDS_MAX)

    def __str__(self) -> str:
        return self.name


# With old words some mixtures of two mutants go wrong, though neither does by itself: those are searched one by one.
AT_ONCE: Final = tuple(budget for budget in CHEAP if not budget.late)

KINDS: Final = (
    Kind("equivalent", frozenset(EQUIVALENT) - {*alone(EQUIVALENT)}, outcomes=False),
    Kind("order only", ORDER_ONLY, outcomes=True),
)

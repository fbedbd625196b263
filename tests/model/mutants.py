"""What could be wrong with proxy/handover/table.py: each entry left out, each of its actions left out or too late.

`named` are mistakes that somebody might make with the best intentions; several were made.
"""

from collections.abc import Iterator
from typing import Final

from proxy.handover.table import TABLES, Action, Event, Side, State, Step
from tests.model.generate import Key, Mutant

S: Final = Side.SOURCE
D: Final = Side.DESTINATION


def _name(side: Side, key: Key, what: str) -> str:
    return f"{side.value} {key[0].value} {key[1].value}: {what}"


def _of_entry(side: Side, key: Key, step: Step) -> Iterator[Mutant]:
    yield Mutant(_name(side, key, "ignored"), side, {key: None})
    for action in step.actions:
        rest = tuple(other for other in step.actions if other is not action)
        yield Mutant(_name(side, key, f"without {action.value}"), side, {key: Step(step.state, rest)})
        if action is Action.WRITE and rest:
            yield Mutant(_name(side, key, "write last"), side, {key: Step(step.state, (*rest, action))})


def of_entries() -> tuple[Mutant, ...]:
    """All that can be left out of one entry, or be too late in it."""
    return tuple(
        mutant for side, table in TABLES.items() for key, step in table.items() for mutant in _of_entry(side, key, step)
    )

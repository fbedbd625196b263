"""Writes proxy/handover/table.py down in Promela: `python -m tests.model.generate` makes docs/model/table.pml anew.

The model's two relays know no rule but those of that file. What is written is the table as it stands, or with a list
of mutants in it, one of which the variable `mutant` of the model switches on (0: none).
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from proxy.handover.table import HEARD, TABLES, Action, Event, Side, State, Step

OUTPUT: Final = Path(__file__).parents[2] / "docs" / "model" / "table.pml"
ACTION_BITS: Final = 4  # a step's actions are packed into one number, the first in the lowest bits
ACTIONS_MAX: Final = 4  # 16 bits
HEADER: Final = """\
/* Written by `python -m tests.model.generate` from proxy/handover/table.py; tests/model holds it against that. */
"""

_PREFIX: Final = {Side.SOURCE: "s", Side.DESTINATION: "d"}

Key = tuple[State, Event]


class Mutant(NamedTuple):
    """One thing wrong with one side's table: entries that are others, or (None) not there."""

    name: str
    side: Side
    entries: Mapping[Key, Step | None]


class _Row(NamedTuple):
    """An entry of the written table, and when it counts."""

    event: Event
    step: Step
    condition: str  # of the variable `mutant`; empty: always


def packed(actions: Sequence[Action]) -> str:
    """A step's actions as one number, in Promela.

    Raises:
        ValueError: more actions than the model has room for.
    """
    if len(actions) > ACTIONS_MAX:
        raise ValueError(f"{len(actions)} actions in one step; the model has room for {ACTIONS_MAX}")
    return " | ".join(
        f"({action.name} << {place * ACTION_BITS})" if place else action.name for place, action in enumerate(actions)
    )


def _rows(side: Side, state: State, mutants: Sequence[Mutant]) -> Iterator[_Row]:
    table = TABLES[side]
    for event in Event:
        key = (state, event)
        changed = [
            (number, mutant.entries[key])
            for number, mutant in enumerate(mutants, 1)
            if mutant.side is side and key in mutant.entries
        ]
        if key in table:
            yield _Row(event, table[key], _but([number for number, _ in changed]))
        for number, step in changed:
            if step is not None:
                yield _Row(event, step, f"mutant == {number}")


def _step(side: Side, mutants: Sequence[Mutant]) -> Iterator[str]:
    """What a side does about an event: its new state, and its actions into what it has to do."""
    me = _PREFIX[side]
    yield f"inline {side.value}_step(event)"
    yield "{"
    yield "    if"
    for state in State:
        rows = list(_rows(side, state, mutants))
        if not rows:
            continue
        yield f"    :: {me}_state == {state.name} ->"
        yield "        if"
        for row in rows:
            condition = f" && {row.condition}" if row.condition else ""
            todo = f"; {me}_todo = {packed(row.step.actions)}" if row.step.actions else ""
            yield f"        :: event == {row.event.name}{condition} -> {me}_state = {row.step.state.name}{todo}"
        yield "        :: else"
        yield "        fi"
    yield "    :: else"
    yield "    fi"
    yield "}"


def _heeds(side: Side, mutants: Sequence[Mutant]) -> str:
    """Whether an event means anything to a side, as it stands."""
    me = _PREFIX[side]
    terms = []
    for state in State:
        for event in Event:
            given = (state, event) in TABLES[side]
            # Only mutants that take the entry away, or bring it, make a difference here.
            unlike = [
                number
                for number, mutant in enumerate(mutants, 1)
                if mutant.side is side
                and (state, event) in mutant.entries
                and (mutant.entries[state, event] is None) is given
            ]
            if given or unlike:
                conditions = [f"(event) == {event.name}", f"{me}_state == {state.name}"]
                conditions += [_but(unlike)] if given and unlike else [_one_of(unlike)] if unlike else []
                terms.append(" && ".join(conditions))
    return f"#define {side.value.upper()}_HEEDS(event) ( \\\n    " + " || \\\n    ".join(terms) + ")"


def _but(numbers: Sequence[int]) -> str:
    """That none of these mutants is switched on; they are in order."""
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"(mutant < {numbers[0]} || mutant > {numbers[-1]})"
    return " && ".join(f"mutant != {number}" for number in numbers)


def _one_of(numbers: Sequence[int]) -> str:
    """That one of these mutants is switched on."""
    return "(" + " || ".join(f"mutant == {number}" for number in numbers) + ")"


def promela(mutants: Sequence[Mutant] = ()) -> str:
    """Both sides' tables, the names of states, events and actions, and what is heard of whom."""
    lines = [HEADER]
    for first, names in ((0, State), (1, Event), (1, Action)):
        lines += [f"#define {member.name} {number}" for number, member in enumerate(names, first)]
        lines.append("")
    words = "".join(f"(state) == {state.name} -> {event.name} : (" for state, event in HEARD.items())
    lines += [f"#define WORD(state) ({words}0{')' * len(HEARD)})", ""]
    for side in Side:
        lines += [*_step(side, mutants), "", _heeds(side, mutants), ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Write the file.

    Returns:
        exit code.
    """
    OUTPUT.write_text(promela(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

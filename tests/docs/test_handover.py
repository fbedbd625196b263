"""docs/handover.md has the table, the assumptions and the searches that there are.

`.venv/bin/python -m tests.docs.test_handover` writes the two tables and the assumptions anew.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from proxy.handover.table import TABLES, Event, Side, State
from tests.model.mutants import all_mutants
from tests.model.runs import DEEP, QUICK
from tests.model.spin import MODEL

PATH: Final = Path(__file__).parents[2] / "docs" / "handover.md"
TABLE_HEAD: Final = "| stands in | learns | comes to | and does |\n| --- | --- | --- | --- |\n"
ASSUMPTIONS_HEAD: Final = "| assumption | in words |\n| --- | --- |\n"
PEER: Final = "peer_"


def events(names: Sequence[Event]) -> str:
    """Some events: the peer's words in italics."""
    own = [event.value.replace("_", " ") for event in names if not event.value.startswith(PEER)]
    words = [f"*{event.value.removeprefix(PEER)}*" for event in names if event.value.startswith(PEER)]
    return ", ".join(own + words)


def table(side: Side) -> str:
    """One side's table: a line for all events that lead to the same."""
    lines = []
    for state in State:
        rows = {event: TABLES[side][state, event] for event in Event if (state, event) in TABLES[side]}
        for step in dict.fromkeys(rows.values()):
            same = [event for event, other in rows.items() if other == step]
            leads = "" if step.state is state else step.state.name
            does = ", ".join(action.value for action in step.actions)
            lines.append(f"| {state.name} | {events(same)} | {leads} | {does} |\n")
    return TABLE_HEAD + "".join(lines)


def assumptions() -> str:
    """What handover.pml says that the relays' surroundings owe to the table."""
    text = (MODEL / "handover.pml").read_text(encoding="utf-8")
    section = text.partition("tests/model takes each away. */")[2].partition("#define NO_RECORD")[0]
    found = re.findall(r"^#define (\w+) \d+ +/\* (.+) \*/$", section, re.MULTILINE)
    return ASSUMPTIONS_HEAD + "".join(f"| {name} | {words} |\n" for name, words in found)


def parts() -> dict[str, str]:
    """What has to stand in the page, by the first words before it."""
    return {
        "### Source\n\n": table(Side.SOURCE),
        "### Destination\n\n": table(Side.DESTINATION),
        "taken away:\n\n": assumptions(),
    }


@pytest.mark.parametrize("before", list(parts()))
def test_the_tables_are_the_codes(before: str) -> None:
    page = PATH.read_text(encoding="utf-8")
    assert page.count(before) == 1
    assert page.partition(before)[2].partition("\n\n")[0].rstrip("\n") == parts()[before].rstrip("\n")


def test_every_search_has_its_figures() -> None:
    rows = re.findall(
        r"^\| (.+?)( \*)? \| ([\d,]+) \| \d+ \| nothing \|$", PATH.read_text(encoding="utf-8"), re.MULTILINE
    )
    states = {name: int(count.replace(",", "")) for name, _, count in rows}
    runs = {str(run): run for run in (*QUICK, *DEEP)}
    assert {str(run) for run in QUICK} <= set(states) <= set(runs)
    for name, count in states.items():
        # A search that loses a tenth of its states has lost its way: then its figure is old, or its floor is.
        assert count > runs[name].states_min > 0.8 * count, name
    assert {name for name, quick, _ in rows if quick} == {str(run) for run in QUICK}


def test_it_counts_the_mutants() -> None:
    count = len(all_mutants())
    assert f"{count} tables with one thing wrong" in PATH.read_text(encoding="utf-8")


def main() -> int:
    """Write the parts into the page."""
    page = PATH.read_text(encoding="utf-8")
    for before, part in parts().items():
        head, mark, rest = page.partition(before)
        page = head + mark + part.rstrip("\n") + "\n" + rest[rest.find("\n\n") + 1 if "\n\n" in rest else len(rest) :]
    PATH.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which search finds which mutant: tests/model/found.json, and `python -m tests.model.survey`, which writes it anew.

A case that was found before is searched for in the same way first; then, and for all others, more and more goes
wrong. What no search finds is printed: it belongs into equivalent.py, with the reason, or the model has a gap, or an
excuse that nobody needs.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final, NamedTuple

from tests.model.equivalent import EQUIVALENT
from tests.model.excuses import numbers
from tests.model.generate import promela
from tests.model.mutants import all_mutants
from tests.model.spin import FOREVER, Budget, Found, build, environment_names, search

RECORD: Final = Path(__file__).with_name("found.json")
SECONDS_MAX: Final = 600.0  # one search; a tenth of it or less on two quiet cores
CHEAP: Final = (Budget(1), Budget(1, where="qemu"), Budget(1, where="localhost"), Budget(1, late=1))
LADDER: Final = (
    *CHEAP,
    Budget(2),
    Budget(2, where="qemu"),
    Budget(2, where="localhost"),
    Budget(1, late=FOREVER),
    Budget(2, late=1),
)


class Case(NamedTuple):
    """Something that is wrong, by its number, else 0: a mutant of the table; an assumption or an excuse less."""

    mutant: int = 0
    without: int = 0

    def search(self, binary: Path, budget: Budget) -> Found:
        """As ``spin.search``."""
        return search(binary, budget, mutant=self.mutant, without=self.without, seconds=SECONDS_MAX)


class Row(NamedTuple):
    """What found a case: the search, and the steps of the run that it found."""

    budget: Budget
    depth: int


def cases() -> Mapping[str, Case]:
    """Everything that is to be found, by name."""
    mutants = {mutant.name: Case(mutant=number) for number, mutant in enumerate(all_mutants(), 1)}
    less = {**environment_names(), **numbers()}
    return {**mutants, **{name: Case(without=number) for name, number in less.items()}}


def is_about_a_record(name: str) -> bool:
    """Whether a mutant has a record left out or too late: then it is asked what becomes of that."""
    return name.endswith((": without write", ": write last"))


def ladder(name: str) -> tuple[Budget, ...]:
    """The searches for a case, in their order."""
    if not is_about_a_record(name):
        return LADDER
    return (*(replace(budget, outcomes=True) for budget in (*CHEAP, Budget(2))), *LADDER)


def recorded() -> Mapping[str, Row]:
    """What found.json says."""
    told = json.loads(RECORD.read_text(encoding="utf-8"))
    return {name: Row(Budget(**row["search"]), row["depth"]) for name, row in told.items()}


def write(rows: Mapping[str, Row]) -> None:
    """Into found.json, a line each, in the order of ``cases``."""
    lines = []
    for name in cases():
        if name in rows:
            row = {"search": asdict(rows[name].budget), "depth": rows[name].depth}
            lines.append(f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(row)}")
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def survey(binary: Path, known: Mapping[str, Row], skipped: Collection[str]) -> Iterator[tuple[str, Row]]:
    """Search for every case that is not skipped: for all of them as before, then with more and more going wrong.

    Yields:
        its name, and what found it, as soon as it is found.
    """
    everything = {name: case for name, case in cases().items() if name not in skipped}
    open_cases = {name: [*([known[name].budget] if name in known else []), *ladder(name)] for name in everything}
    while open_cases:
        for name, budgets in list(open_cases.items()):
            budget = budgets.pop(0)
            found = everything[name].search(binary, budget)
            if found.error:
                yield name, Row(budget, found.depth)
            if found.error or not budgets:
                del open_cases[name]


def main() -> int:
    """Write the file as it grows, and print what has not been found.

    Returns:
        exit code: 1 if something has not been found that equivalent.py does not have, or the other way round.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.model.survey", description=__doc__)
    parser.add_argument("--new", action="store_true", help="only what is neither in found.json nor in equivalent.py")
    options = parser.parse_args()
    known = recorded() if RECORD.exists() else {}
    rows = {**known} if options.new else {}
    skipped = {*known, *EQUIVALENT} if options.new else set()
    with tempfile.TemporaryDirectory() as folder:
        for name, row in survey(build(Path(folder), promela(all_mutants())), known, skipped):
            rows[name] = row
            write({**known, **rows})
            print(f"{name}: {row.budget}", flush=True)
    write(rows)
    wrong = {*cases()} - {*rows} ^ {*EQUIVALENT}
    print("\n".join(f"{name}: {'found' if name in rows else 'not found'}" for name in sorted(wrong)))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

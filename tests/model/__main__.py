"""Searches the model and prints what it has met: `python -m tests.model [--quick]`, or `make model`.

First the table as it is; then each mutant of it, and each assumption and excuse taken away.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tests.model.equivalent import EQUIVALENT
from tests.model.generate import promela
from tests.model.mutants import all_mutants
from tests.model.runs import DEEP, QUICK
from tests.model.spin import Found, SpinFailed, build, missing_tools, search
from tests.model.survey import cases, recorded
from tests.model.whims import AT_ONCE, KINDS, by_itself

SECONDS_MAX: Final = 3600.0  # one search
SETUP_EXIT: Final = 2


def _builds(folder: Path) -> dict[bool, Path]:
    """The binaries, by whether they look for runs that never end."""
    made = {}
    for livelocks in (False, True):
        place = folder / ("livelocks" if livelocks else "assertions")
        place.mkdir()
        made[livelocks] = build(place, promela(() if livelocks else all_mutants()), livelocks=livelocks)
    return made


def _wrong_mutants(binary: Path) -> Iterator[str]:
    """Those that are not found as found.json says, or are found although they are called equivalent."""
    known = recorded()
    for name, case in cases().items():
        if name in known:
            if not case.search(binary, known[name].budget).error:
                yield f"not found: {name}"
        elif name not in EQUIVALENT:
            yield f"no search is known to find: {name}"
        elif any(case.search(binary, budget).error for budget in by_itself(name)):
            yield f"found, and was called equivalent: {name}"


def _found_after_all(folder: Path) -> Iterator[str]:
    """What is found by those that are said to change nothing, all at once."""
    for kind in KINDS:
        place = folder / kind.name.replace(" ", "-")
        place.mkdir()
        binary = kind.build(place)
        for budget in AT_ONCE:
            if kind.search(binary, budget).error:
                yield f"{kind}: {budget} finds something"


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, and print.

    Returns:
        exit code: 0 if all holds, 1 if something does not, 2 if the tools are not there.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only what every test run searches, and no mutants")
    options = parser.parse_args(arguments)
    missing = missing_tools()
    if missing:
        print(f"not installed: {missing}; `make system` installs them", file=sys.stderr)
        return SETUP_EXIT
    failed = False
    with tempfile.TemporaryDirectory() as name:
        binaries = _builds(Path(name))
        print("| what may go wrong | states | seconds | found |\n| --- | --- | --- | --- |", flush=True)
        for run in QUICK if options.quick else (*QUICK, *DEEP):
            began = time.monotonic()
            try:
                found = search(binaries[run.livelocks], run.budget, livelocks=run.livelocks, seconds=SECONDS_MAX)
            except SpinFailed as error:
                found = Found(0, str(error).splitlines()[0])
            seconds = time.monotonic() - began
            failed = failed or bool(found.error)
            what = f"{run} *" if run in QUICK else str(run)
            print(f"| {what} | {found.states:,} | {seconds:.0f} | {found.error or 'nothing'} |", flush=True)
        if not options.quick:
            print(
                f"\n{len(cases())} mutants, assumptions and excuses, {len(EQUIVALENT)} of them equivalent", flush=True
            )
            for told in (*_wrong_mutants(binaries[False]), *_found_after_all(Path(name))):
                failed = True
                print(told, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Searches the model and prints what it has met: `python -m tests.model [--quick]`, or `make model`."""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.model.generate import promela
from tests.model.runs import DEEP, QUICK
from tests.model.spin import Found, SpinFailed, build, missing_tools, search

SECONDS_MAX: Final = 3600.0  # one search
SETUP_EXIT: Final = 2


def _builds(folder: Path) -> dict[bool, Path]:
    """The binaries, by whether they look for runs that never end."""
    made = {}
    for livelocks in (False, True):
        place = folder / ("livelocks" if livelocks else "assertions")
        place.mkdir()
        made[livelocks] = build(place, promela(), livelocks=livelocks)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, and print.

    Returns:
        exit code: 0 if all holds, 1 if something does not, 2 if the tools are not there.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only what every test run searches")
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
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

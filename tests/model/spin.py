"""Builds docs/model/handover.pml with spin and a C compiler, and lets it search.

One binary has every mutant, both hypervisors and any number of faults in it: which counts is said by its environment.
A second one looks for runs that never end, which needs another search.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.model.excuses import optional

MODEL: Final = Path(__file__).parents[2] / "docs" / "model"
# One process has no order to reduce, and its states are small: to compress them takes longer than to search. MiB
COMMON: Final = ("-O2", "-DNOFAIR", "-DNOREDUCE", "-DMEMLIM=6000")
BUILD_SECONDS_MAX: Final = 600.0
DEPTH_MAX: Final = 100_000  # steps of one run; a longer one is reported as an error
LIVELOCK: Final = "non-progress cycle"
_CUT_SHORT: Final = ("max search depth", "out of memory", "-DMEMLIM bound", "VECTORSZ")


@dataclass(frozen=True, slots=True)
class Budget:
    """What may go wrong in one run, and where it takes place.

    Attributes:
        faults: how many things go wrong.
        late: how many words are heard late or twice; FOREVER: any, as often as it likes.
        where: "xl", "qemu" or "localhost".
        outcomes: whether only what becomes of it counts, and not the order of the records.
    """

    faults: int
    late: int = 0
    where: str = "xl"
    outcomes: bool = False

    def environment(self) -> dict[str, str]:
        """For the binary."""
        told = {"FAULTS": str(self.faults), "LATE": str(self.late)}
        if self.where != "xl":
            told[self.where.upper()] = "1"
        if self.outcomes:
            told["OUTCOMES"] = "1"
        return told

    def __str__(self) -> str:
        late = "old words without end" if self.late == FOREVER else f"{self.late} old words"
        return f"{self.where}, {self.faults} faults, {late}" + (", outcomes only" if self.outcomes else "")


FOREVER: Final = 255


@dataclass(frozen=True, slots=True)
class Found:
    """What a search has found.

    Attributes:
        states: how many different ones it has met.
        error: what it stopped at, as the binary says it; empty if all holds in all states.
        depth: how many steps led there; 0 if nothing was found.
    """

    states: int
    error: str
    depth: int = 0


class SpinFailed(Exception):
    """spin, the compiler or the search itself failed: nothing is known of the model."""


def missing_tools() -> str:
    """What is not installed; empty if all is there."""
    return ", ".join(tool for tool in ("spin", "gcc") if shutil.which(tool) is None)


def build(folder: Path, table: str, *, livelocks: bool = False) -> Path:
    """Make a binary in ``folder``.

    Args:
        folder: empty, and this binary's own.
        table: table.pml, as tests.model.generate writes it.
        livelocks: look for runs that never end, where otherwise assertions are looked for.

    Raises:
        SpinFailed: it cannot be made.
    """
    model = optional((MODEL / "handover.pml").read_text(encoding="utf-8"))
    (folder / "handover.pml").write_text(model, encoding="utf-8")
    (folder / "table.pml").write_text(table, encoding="utf-8")
    binary = folder / "pan"
    kind = "-DNP" if livelocks else "-DSAFETY"
    for command in (["spin", "-a", "-DCHOSEN", "handover.pml"], ["gcc", *COMMON, kind, "-w", "-o", "pan", "pan.c"]):
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=BUILD_SECONDS_MAX, check=False
            )
        except subprocess.TimeoutExpired:
            raise SpinFailed(f"{command[0]} took more than {BUILD_SECONDS_MAX:.0f} s") from None
        if done.returncode or not (binary if command[0] == "gcc" else folder / "pan.c").exists():
            raise SpinFailed(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return binary


def search(
    binary: Path,
    budget: Budget,
    *,
    mutant: int = 0,
    without: int = 0,
    whims: int = 0,
    livelocks: bool = False,
    seconds: float,
) -> Found:
    """Let a binary search.

    Args:
        binary: of ``build``.
        budget: what may go wrong.
        mutant: the number of a mutant of its table; 0: none.
        without: the number of an assumption that does not hold, or of an excuse that does not count; 0: all do.
        whims: if not 0, any mutant below that number counts, and another for each event.
        livelocks: as ``build`` was told.
        seconds: how long it may take.

    Raises:
        SpinFailed: it did not end, or its search was not exhaustive although it found nothing.
    """
    chosen = {"MUTANT": str(mutant), "WITHOUT": str(without), "WHIMS": str(whims)}
    environment = {**os.environ, **budget.environment(), **chosen}
    command = [str(binary), f"-m{DEPTH_MAX}", "-b", "-n", *(["-l"] if livelocks else [])]
    try:
        with tempfile.TemporaryDirectory() as folder:  # it leaves its trail where it runs
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
            )
    except subprocess.TimeoutExpired:
        raise SpinFailed(f"{budget}: no end in {seconds:.0f} s") from None
    return read(done.stdout + done.stderr)


def read(told: str) -> Found:
    """What a binary says of its search.

    Raises:
        SpinFailed: the search was cut short, or it says nothing of it.
    """
    errors = re.search(r"errors: (\d+)$", told, re.MULTILINE)
    states = re.search(r"^ *([\d.e+]+) states, stored", told, re.MULTILINE)
    if not errors or not states or any(sign in told for sign in _CUT_SHORT):
        raise SpinFailed(f"the search says: {told[-2000:]}")
    error = re.search(r"^pan:\d+: (.*?)(?: \(at depth (\d+)\))?$", told, re.MULTILINE)
    if bool(int(errors[1])) is not bool(error) or (not error and "Search not completed" in told):
        raise SpinFailed(f"the search says: {told[-2000:]}")
    return Found(int(float(states[1])), error[1] if error else "", int(error[2] or 0) if error else 0)


def environment_names() -> Mapping[str, int]:
    """The assumptions of handover.pml that can be taken away, by their numbers."""
    text = (MODEL / "handover.pml").read_text(encoding="utf-8")
    section = text.split("tests/model takes each away. */", 1)[1].split("#define NO_RECORD", 1)[0]
    return {name: int(number) for name, number in re.findall(r"^#define (\w+) (\d+)", section, re.MULTILINE)}

"""`python -m bench.preflight`: what it costs to look at both hosts before a session, and how much longer an OFFER gets.

This host is both: it is read, its facts are put into an OFFER and taken out of it, and judged. Without xl and the
network, which a session's part has neither of.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from bench.steps import Summary, summarise, tell_all
from korora.preflight.agent import open_surveyor
from proxy.control import MessageReader, Offer, encode

ROUNDS: Final = 500
WORDS: Final = {"read": "this host read", "said": "into an OFFER and out of it", "judge": "the other one judged"}
OFFER: Final = Offer(
    version=1, session=bytes(16), suites=(1,), codecs=(0,), egress="default", lanes=1, resume_seconds=30
)


def measure(state: Path, rounds: int) -> tuple[Summary, int]:
    """Milliseconds of each step, and by how many bytes facts make an OFFER longer."""
    surveyor = open_surveyor("on", state)
    if surveyor is None:
        raise AssertionError("preflight is on")
    surveyor.facts()  # what does not change is read once a process
    found: dict[str, list[float]] = {step: [] for step in WORDS}
    more = 0
    for _ in range(rounds):
        marks = [time.perf_counter()]
        own = surveyor.facts()
        marks.append(time.perf_counter())
        message = encode(msgspec.structs.replace(OFFER, host=own))
        [said] = MessageReader().feed(message)
        marks.append(time.perf_counter())
        if not isinstance(said, Offer):
            raise TypeError("an OFFER is one")
        surveyor.judge(own, said.host, departing=False)
        marks.append(time.perf_counter())
        more = len(message) - len(encode(OFFER))
        for step, before, after in zip(WORDS, marks, marks[1:], strict=False):
            found[step].append(1e3 * (after - before))
    return summarise(found), more


def main(argv: Sequence[str] | None = None, *, tell: Callable[[str], object] = print) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.preflight", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="korora-bench-") as scratch:
        summary, more = measure(Path(scratch), max(2, options.rounds))
    tell_all(summary, WORDS, tell, digits=3, as_json=options.json)
    if not options.json:
        tell(f"an OFFER has {more} bytes more")
    return 0


if __name__ == "__main__":
    sys.exit(main())

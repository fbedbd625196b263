"""`python -m bench.vtpm`: what moving a vTPM adds to a machine's hand-over, with two real swtpm and no network between.

With --carried: what it adds to verify one that QEMU carries in its stream. The machine is suspended from the first step
to the last but one. Every ledger line and file is flushed to the disk.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, TypeVar

from bench.steps import Summary, summarise, tell_all
from korora.agents.vtpm.carrier import Agent, Places
from korora.agents.vtpm.rehearsal import Keys
from korora.agents.vtpm.swtpm import Swtpm
from korora.log import LogFormat, LogLevel, configure
from proxy.streams.vtpm import CarriedPart, CarriedVtpm
from proxy.vtpm import Carrier

T = TypeVar("T")
ROUNDS: Final = 20
UUID: Final = "0f9c2f1e-0000-4000-8000-00000000abcd"
START_SECONDS_MAX: Final = 10.0
STEPS: Final = ("depart", "arrive", "check", "part", "release", "given", "whole")
WORDS: Final = {
    "depart": "source: read, rehearsed, written down, wrapped",
    "arrive": "destination: unwrapped, rehearsed, written down, kept, loaded",
    "check": "source: the proof",
    "part": "source: stopped",
    "release": "destination: started",
    "given": "source: emulator ended, state removed",
    "whole": "all of it, one after the other",
}

CARRIED_WORDS: Final = {
    "depart": "source: rehearsed, written down, wrapped",
    "arrive": "destination: unwrapped, rehearsed, written down",
    "part": "source: nothing",
    "release": "destination: written down",
    "given": "source: written down",
}


@contextmanager
def _emulator(folder: Path, key: Path) -> Iterator[Swtpm]:
    state = folder / UUID
    state.mkdir(parents=True)
    process = subprocess.Popen(
        [
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}"),
            *("--ctrl", f"type=unixio,path={state}/c", "--server", f"type=unixio,path={state}/s"),
            *("--migration-key", f"file={key},format=binary,mode=aes-256-cbc"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        emulator = Swtpm(state / "c")
        deadline = time.monotonic() + START_SECONDS_MAX
        while not emulator.listens and time.monotonic() < deadline:
            time.sleep(0.005)
        yield emulator
    finally:
        process.kill()
        process.wait(START_SECONDS_MAX)


def _sides(stack: ExitStack, scratch: Path, *, carried: bool) -> tuple[Carrier, Carrier]:
    """The source's carrier and the destination's, with whatever emulators they need."""
    key = scratch / "key"
    key.write_bytes(secrets.token_bytes(32))
    keys = Keys(f"file={key},format=binary,mode=aes-256-cbc")
    agents = []
    for host in ("alpha", "beta"):
        places = Places(f"{scratch / host}/{{uuid}}/c", f"{scratch / host}/{{uuid}}", keys)
        agents.append(Agent(places, scratch / host / "relay", verifying=keys))
    session = os.urandom(16).hex()
    emulator = stack.enter_context(_emulator(scratch / "alpha", key))
    emulator.start()
    if not carried:
        stack.enter_context(_emulator(scratch / "beta", key))
        return agents[0].of(session, "beta"), agents[1].of(session, "alpha")
    permanent, volatile = (CarriedPart(blob.flags, blob.data) for blob in emulator.export())
    leaving, arriving = agents[0].verifier(session, "beta"), agents[1].verifier(session, "alpha")
    for side in (leaving, arriving):
        side.saw(CarriedVtpm(permanent, volatile, CarriedPart(0, b"")))
    return leaving, arriving


def _once(scratch: Path, *, carried: bool) -> dict[str, float]:
    with ExitStack() as stack:
        leaving, arriving = _sides(stack, scratch, carried=carried)
        recipient = arriving.recipient()
        took: dict[str, float] = {}

        def timed(step: str, work: Callable[[], T]) -> T:
            began = time.perf_counter()
            done = work()
            took[step] = 1e3 * (time.perf_counter() - began)
            return done

        wrapped = timed("depart", lambda: leaving.depart(UUID, recipient))
        proof = timed("arrive", lambda: arriving.arrive(UUID, wrapped))
        timed("check", lambda: leaving.check(UUID, proof))
        timed("part", lambda: leaving.part(UUID))
        timed("release", lambda: arriving.release(UUID))
        timed("given", lambda: leaving.given(UUID))
        return took | {"whole": sum(took.values())}


def measure(rounds: int, *, carried: bool = False) -> Summary:
    """Milliseconds of each step: median, ninth decile, and the most."""
    found: dict[str, list[float]] = {step: [] for step in STEPS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="korora-bench-") as folder:
            for step, value in _once(Path(folder), carried=carried).items():
                found[step].append(value)
    return summarise(found)


def main(argv: Sequence[str] | None = None, *, tell: Callable[[str], object] = print) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.vtpm", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--carried", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    configure(LogFormat.CONSOLE, LogLevel.WARNING)
    result = measure(max(2, options.rounds), carried=options.carried)
    words = WORDS | (CARRIED_WORDS if options.carried else {})
    tell_all(result, words, tell, digits=1, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

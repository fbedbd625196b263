"""`python -m bench.attestation`: what attestation adds to a session, with a swtpm as each host's TPM.

Both hosts' whole part is timed, as `proxy.shell.attesting` does it: the challenge, the destination's quote, its
judgement, the source's quote, its judgement; without the network between them. Both read their reference files anew.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from bench.steps import Summary, summarise, tell_all
from bench.tpms import soft_tpm
from crypto.attestation.binding import Binding, Side
from crypto.attestation.reference import render
from crypto.keys import SessionId
from korora import enrolment
from korora.agents.vtpm.tcti import Tpm
from korora.platform import HostPlatform

ROUNDS: Final = 50
STEPS: Final = ("demands", "quote", "judge", "whole")
WORDS: Final = {
    "demands": "one reference read",
    "quote": "one quote of eight PCRs, the TPM opened and closed",
    "judge": "one judgement",
    "whole": "all of both hosts, one after the other",
}


def _enrolled(folder: Path, host: str, tpm: Tpm) -> None:
    now = datetime.now(UTC)
    tpm.keep()
    asked, pending = enrolment.ask(enrolment.request(tpm), enrolment.PCRS_DEFAULT, None, now)
    made = enrolment.conclude(host, pending, enrolment.answer(tpm, asked), now)
    enrolment.put(folder / f"{host}.toml", render(made).encode())


def measure(scratch: Path, rounds: int) -> Summary:
    """Milliseconds of each step: median, ninth decile, and the most."""
    found: dict[str, list[float]] = {step: [] for step in STEPS}
    with ExitStack() as stack:
        tpms = {host: Tpm(stack.enter_context(soft_tpm(scratch / host)).tcti) for host in ("alpha", "beta")}
        for host, tpm in tpms.items():
            _enrolled(scratch / "known", host, tpm)
        hosts = {
            host: HostPlatform(tpm, scratch / "known", state=scratch / f"state-{host}") for host, tpm in tpms.items()
        }
        for _ in range(rounds):
            began = time.perf_counter()
            for judge, judged, side in (("alpha", "beta", Side.DESTINATION), ("beta", "alpha", Side.SOURCE)):
                binding = Binding(os.urandom(32), SessionId(os.urandom(16)), side, os.urandom(32))
                marks = [time.perf_counter()]
                demand = hosts[judge].demands(judged)
                if demand is None:
                    raise AssertionError("nothing is demanded")
                marks.append(time.perf_counter())
                evidence = hosts[judged].attest(binding, demand.wanted)
                marks.append(time.perf_counter())
                hosts[judge].appraise(judged, evidence, binding, demand)
                marks.append(time.perf_counter())
                for step, before, after in zip(STEPS, marks, marks[1:], strict=False):
                    found[step].append(1e3 * (after - before))
            found["whole"].append(1e3 * (time.perf_counter() - began))
    return summarise(found)


def main(argv: Sequence[str] | None = None, *, tell: Callable[[str], object] = print) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.attestation", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="korora-bench-") as scratch:
        result = measure(Path(scratch), options.rounds)
    tell_all(result, WORDS, tell, digits=2, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

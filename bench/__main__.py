"""`python -m bench`: the opaque relay pair beside its peers, interleaved, in one run."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from bench import machine, report
from bench.measure import GiB, Plan, Sample, measure
from bench.network import enter_private_network
from bench.peers import PEERS
from bench.processes import BenchError, adopt_orphans
from bench.work import measure_work

EXIT_MISSED = 1
EXIT_USAGE = 2
EXIT_FAILED = 70


class Progress:
    """One line that follows the run: rewritten on a terminal, a plain line a step elsewhere."""

    def __init__(self, steps: int) -> None:
        """`steps` is how many measurements there will be."""
        self._console = Console(stderr=True)
        self._status = self._console.status("bench") if self._console.is_terminal else None
        self._steps = steps
        self._done = 0
        self._start_s = time.monotonic()
        if self._status is not None:
            self._status.start()

    def step(self, what: str) -> None:
        """Say what is being measured now."""
        self._done += 1
        text = f"bench: {self._done}/{self._steps} {what} ({time.monotonic() - self._start_s:.0f} s)"
        if self._status is not None:
            self._status.update(text)
        else:
            sys.stderr.write(text + "\n")

    def warn(self, message: str) -> None:
        """A line that stays."""
        self._console.print(f"bench: {message}", highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Take the line away."""
        if self._status is not None:
            self._status.stop()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the relay pair beside its peers: throughput, CPU, memory, round trip, set-up.",
        epilog="Peers: " + ", ".join(PEERS) + ". Exit codes: 0 done; 1 a target missed (--check); 2 usage; 70 nothing "
        "could be measured. Run it on a machine with nothing else to do.",
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds (default 5)")
    parser.add_argument("--gib", type=float, default=2.0, metavar="N", help="stream a round, in GiB (default 2)")
    parser.add_argument("--pings", type=int, default=2000, metavar="N", help="round trips a round (default 2000)")
    parser.add_argument("--setups", type=int, default=8, metavar="N", help="fresh sessions a round (default 8)")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="A,B", help="only these (default all)")
    parser.add_argument("--quick", action="store_true", help="about a minute: 2 rounds of 0.75 GiB")
    parser.add_argument(
        "--network",
        choices=("host", "private"),
        default="host",
        help="host: as this machine is; private: a namespace of its own with loss-based congestion control (root)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample and the machine's metadata")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table (it is printed in any case)")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.gib, options.pings, options.setups = 2, 0.75, 1000, 10
    options.peers = [name.strip() for name in options.peers.split(",") if name.strip()]
    unknown = [name for name in options.peers if name not in PEERS]
    if unknown or not options.peers:
        parser.error(f"unknown peer {', '.join(unknown)}; choose from {', '.join(PEERS)}")
    if options.rounds < 1 or options.pings < 1 or options.setups < 1 or not 0 < options.gib <= 64:
        parser.error("--rounds, --pings and --setups are at least 1, --gib is above 0 and at most 64")
    for path in (options.json, options.markdown):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path.parent}: no such directory; make it first")
    return options


def measure_patiently(name: str, round_number: int, plan: Plan, scratch: Path, progress: Progress) -> Sample:
    """One peer's round; a failure is tried once more, because a port can be lost to somebody else on the machine.

    Raises:
        BenchError: it failed twice.
    """
    try:
        return measure(PEERS[name], round_number, plan, scratch)
    except BenchError as error:
        progress.warn(f"{error}; once more")
        return measure(PEERS[name], round_number, plan, scratch)


def measure_all(options: argparse.Namespace, left_out: dict[str, str]) -> list[Sample]:
    """All rounds; a peer that fails is left out from then on, with its reason, and its earlier samples with it."""
    plan = Plan(stream_bytes=int(options.gib * GiB), pings=options.pings, setups=options.setups)
    names = [name for name in options.peers if name not in left_out]
    samples: list[Sample] = []
    progress = Progress(options.rounds * len(names))
    try:
        for name, reason in left_out.items():
            progress.warn(f"{name}: {reason}, or leave it out with --peers; left out")
        with tempfile.TemporaryDirectory(prefix="korora-bench-") as scratch:
            for round_number in range(1, options.rounds + 1):
                for name in names:
                    if name in left_out:
                        continue
                    progress.step(f"round {round_number}: {name}")
                    try:
                        samples.append(measure_patiently(name, round_number, plan, Path(scratch), progress))
                    except BenchError as error:
                        left_out[name] = str(error)
                        progress.warn(f"{error}; {name} is left out")
    finally:
        progress.stop()
    return [sample for sample in samples if sample.peer not in left_out]


def _stop(number: int, _frame: FrameType | None) -> None:
    """A signal ends the run the ordinary way, so that every context closes and nothing stays behind."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit code says how it went."""
    options = parse(argv)
    signal.signal(signal.SIGTERM, _stop)
    adopt_orphans()
    load_before = machine.load_average()
    left_out = {name: reason for name in options.peers if (reason := PEERS[name].missing())}
    try:
        if options.network == "private":
            enter_private_network()
        samples = measure_all(options, left_out)
    except BenchError as error:
        sys.stderr.write(f"bench: {error}\n")
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if not samples:
        sys.stderr.write("bench: nothing could be measured\n")
        return EXIT_FAILED
    settings = {
        "rounds": options.rounds,
        "gib": options.gib,
        "pings": options.pings,
        "setups": options.setups,
        "network": options.network,
    }
    run = report.Run(machine.describe(load_before), settings, left_out, samples, measure_work())
    table = report.to_markdown(run)
    sys.stdout.write(table)
    try:
        if options.markdown is not None:
            options.markdown.write_text(table)
        if options.json is not None:
            options.json.write_text(json.dumps(report.to_json(run)) + "\n")
    except OSError as error:
        sys.stderr.write(f"bench: {error.filename}: {error.strerror}; name another file\n")
        return EXIT_USAGE
    results = report.judge(report.summarise(samples))
    if options.check and not (results and all(result.met for result in results)):
        return EXIT_MISSED
    return 0


if __name__ == "__main__":
    sys.exit(main())

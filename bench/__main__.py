"""`python -m bench`: the cost ladder, the peers, lanes, sessions, QEMU's migrations and pages, in one run."""

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
from typing import Any

from bench import machine, report
from bench.budget import Budget
from bench.cli import (
    EXIT_FAILED,
    EXIT_MISSED,
    EXIT_USAGE,
    LADDER,
    LANES,
    PAGES,
    PEERS_SECTION,
    RESULTS,
    SESSIONS,
    XEN,
    parse,
)
from bench.compare import compare, load_run
from bench.comparison import PeersResult, judge, measure_peers
from bench.ladder import LadderPlan, measure_ladder
from bench.measure import GiB, Plan
from bench.migrations import MigrationPlan, measure_migrations
from bench.network import enter_private_network
from bench.pages import QUICK_PAGES, PagesPlan, measure_pages
from bench.plot import write_plot
from bench.processes import BenchError, adopt_orphans
from bench.progress import Progress
from bench.report import Result
from bench.streams import StreamsPlan, measure_lanes, measure_sessions
from bench.xen import XenPlan, measure_xen


def measure_section(
    name: str, options: argparse.Namespace, progress: Progress, scratch: Path, budget: Budget
) -> Result:
    """One section within its time, its files in a new directory `scratch`."""
    total_bytes = int(options.gib * GiB)
    scratch.mkdir()
    progress.section(name)
    if name == LADDER:
        plan = LadderPlan(options.rounds, options.slice_s, total_bytes)
        return measure_ladder(plan, scratch, budget=budget, teller=progress)
    if name == PEERS_SECTION:
        amounts = Plan(stream_bytes=total_bytes, pings=options.pings, setups=options.setups)
        return measure_peers(options.peers, amounts, options.rounds, scratch, budget=budget, teller=progress)
    if name == LANES:
        return measure_lanes(StreamsPlan(options.rounds, total_bytes), scratch, budget=budget, teller=progress)
    if name == SESSIONS:
        return measure_sessions(StreamsPlan(options.rounds, total_bytes), scratch, budget=budget, teller=progress)
    if name == PAGES:
        own = Budget(min(budget.left_s, options.budgets_s[PAGES]))  # what others left is not for more rounds of this
        return measure_pages(QUICK_PAGES if options.quick else PagesPlan(), scratch, budget=own, teller=progress)
    if name == XEN:
        return measure_xen(XenPlan(options.rounds), scratch, budget=budget, teller=progress)
    return measure_migrations(MigrationPlan(options.rounds, options.guest_mib), scratch, budget=budget, teller=progress)


def measure_all(options: argparse.Namespace) -> dict[str, Result]:
    """The sections asked for, one after the other.

    Each may use what those before it left of their time, and has the less where they overran theirs: so the whole run
    keeps its time.
    """
    progress = Progress()
    results: dict[str, Result] = {}
    start_s, granted_s = time.monotonic(), 0.0
    try:
        with tempfile.TemporaryDirectory(prefix="korora-bench-") as scratch:
            for name in options.only:
                granted_s += options.budgets_s[name]
                budget = Budget(granted_s - (time.monotonic() - start_s))
                results[name] = measure_section(name, options, progress, Path(scratch) / name, budget)
        return results
    finally:
        progress.stop()


def destinations(options: argparse.Namespace) -> dict[str, Path]:
    """Where JSON, tables and picture go: as told, otherwise into the results' folder under the time."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    named = {"json": options.json, "md": options.markdown, "png": options.plot}
    if None in named.values():
        RESULTS.mkdir(exist_ok=True)
    return {ending: path or RESULTS / f"{stamp}.{ending}" for ending, path in named.items()}


def write_all(run: report.Run, table: str, files: dict[str, Path]) -> None:
    """Write the three files; without matplotlib there are two, and a word about it.

    Raises:
        BenchError: a file cannot be written.
    """
    document: dict[str, Any] = report.to_json(run)
    for ending, content in (("json", json.dumps(document) + "\n"), ("md", table)):
        try:
            files[ending].write_text(content)
        except OSError as error:
            raise BenchError(f"{error.filename}: {error.strerror}; name another file") from error
    write_plot(document, files["png"])


def _stop(number: int, _frame: FrameType | None) -> None:
    """A signal ends the run the ordinary way, so that every context closes and nothing stays behind."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; the exit code says how it went."""
    options = parse(argv)
    signal.signal(signal.SIGTERM, _stop)
    try:
        if options.compare is not None:
            older, newer = map(load_run, options.compare)
            sys.stdout.write(compare(older, newer))
            return 0
        adopt_orphans()
        start, start_s = machine.Start.now(), time.monotonic()
        if options.network == "private":
            enter_private_network()
        sections = measure_all(options)
    except BenchError as error:
        sys.stderr.write(f"bench: {error}\n")
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if not any(section.rows() for section in sections.values()):
        sys.stderr.write("bench: nothing could be measured\n")
        return EXIT_FAILED
    settings = {
        name: getattr(options, name) for name in ("rounds", "gib", "pings", "setups", "guest_mib", "network", "quick")
    }
    settings |= {"seconds": round(time.monotonic() - start_s, 1), "budgets_s": options.budgets_s}
    run = report.Run(machine.describe(start), settings, sections)
    table = report.to_markdown(run)
    sys.stdout.write(table)
    files = destinations(options)
    try:
        write_all(run, table, files)
    except BenchError as error:
        sys.stderr.write(f"bench: {error}\n")
        return EXIT_USAGE
    sys.stderr.write(f"bench: {', '.join(map(str, files.values()))}\n")
    peers = sections.get(PEERS_SECTION)
    results = judge(peers.rows()) if isinstance(peers, PeersResult) else []
    if options.check and not (results and all(result.met for result in results)):
        return EXIT_MISSED
    return 0


if __name__ == "__main__":
    sys.exit(main())

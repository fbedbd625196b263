"""The command line: what to measure, for how long, and where the results go."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.peers import PEERS
from bench.processes import REPOSITORY

EXIT_MISSED: Final = 1
EXIT_USAGE: Final = 2
EXIT_FAILED: Final = 70

LADDER: Final = "ladder"
PEERS_SECTION: Final = "peers"
LANES: Final = "lanes"
SESSIONS: Final = "sessions"
QEMU: Final = "qemu"
PAGES: Final = "pages"
XEN: Final = "xen"
SECTIONS: Final = (LADDER, PEERS_SECTION, LANES, SESSIONS, QEMU, PAGES, XEN)
USUAL: Final = SECTIONS[:-1]  # two emulated hosts take minutes, and what `make system` builds for them

# Seconds for each section; the usual ones and their start-up stay below sixteen minutes, and --quick about three.
BUDGETS_S: Final = {
    LADDER: 50.0,
    PEERS_SECTION: 215.0,
    LANES: 70.0,
    SESSIONS: 85.0,
    QEMU: 140.0,
    PAGES: 345.0,
    XEN: 600.0,
}
QUICK_BUDGETS_S: Final = {
    LADDER: 12.0,
    PEERS_SECTION: 42.0,
    LANES: 20.0,
    SESSIONS: 24.0,
    QEMU: 34.0,
    PAGES: 55.0,
    XEN: 240.0,
}
RESULTS: Final = REPOSITORY / "bench" / "results"
GIB_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything: the full run's, or --quick's."""

    rounds: int
    gib: float
    pings: int
    setups: int
    guest_mib: int
    slice_s: float


FULL: Final = Size(rounds=5, gib=2.0, pings=2000, setups=8, guest_mib=512, slice_s=0.3)
QUICK: Final = Size(rounds=2, gib=0.75, pings=1000, setups=5, guest_mib=128, slice_s=0.1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with every default filled in."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the relay pair: what each step costs, beside its peers, by lanes and sessions, "
        "QEMU's and Xen's migrations through it, and page-aware encoding. Run it on a machine with nothing else to do.",
        epilog="Peers: "
        + ", ".join(PEERS)
        + ". Exit codes: 0 done; 1 a target missed (--check); 2 usage, or runs that "
        "may not be compared; 70 nothing could be measured.",
    )
    parser.add_argument(
        "--only",
        default=",".join(USUAL),
        metavar="A,B",
        help=f"sections, of {', '.join(SECTIONS)} (default all but {XEN})",
    )
    parser.add_argument("--quick", action="store_true", help="about three minutes: less of everything")
    parser.add_argument("--rounds", type=int, metavar="N", help="interleaved rounds of each section (default 5)")
    parser.add_argument("--gib", type=float, metavar="N", help="stream of a measurement, in GiB (default 2)")
    parser.add_argument("--pings", type=int, metavar="N", help="peers: round trips a round (default 2000)")
    parser.add_argument("--setups", type=int, metavar="N", help="peers: fresh sessions a round (default 8)")
    parser.add_argument("--guest-mib", type=int, metavar="N", help="qemu: random memory of the guest (default 512)")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="A,B", help="peers: only these (default all)")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="stretch or shrink all sections' times together (default: 15, with --quick 3.1)",
    )
    parser.add_argument(
        "--network",
        choices=("host", "private"),
        default="host",
        help="host: as this machine is; private: a namespace of its own with loss-based congestion control (root)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="every sample and the machine's metadata")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables (they are printed in any case)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the picture, a PNG")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target of the peers is missed")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("OLDER", "NEWER"),
        help="measure nothing: two runs' JSON side by side, refused unless both are of one machine in one state",
    )
    options = parser.parse_args(argv)
    size = QUICK if options.quick else FULL
    for name in ("rounds", "gib", "pings", "setups", "guest_mib"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(size, name))
    options.slice_s = size.slice_s
    options.only = _names(parser, options.only, SECTIONS, "section")
    options.peers = _names(parser, options.peers, tuple(PEERS), "peer")
    if min(options.rounds, options.pings, options.setups, options.guest_mib) < 1 or not 0 < options.gib <= GIB_MAX:
        parser.error(
            f"--rounds, --pings, --setups and --guest-mib are at least 1, --gib is above 0 and at most {GIB_MAX}"
        )
    budgets = QUICK_BUDGETS_S if options.quick else BUDGETS_S
    if options.minutes is not None and options.minutes <= 0:
        parser.error("--minutes is above 0")
    stretch = 1.0 if options.minutes is None else options.minutes * 60 / sum(budgets[name] for name in options.only)
    options.budgets_s = {name: budgets[name] * stretch for name in options.only}
    for path in (options.json, options.markdown, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path.parent}: no such directory; make it first")
    return options


def _names(parser: argparse.ArgumentParser, text: str, known: Sequence[str], what: str) -> list[str]:
    """A list divided by commas, each of `known`, in the order of that."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        parser.error(f"unknown {what} {', '.join(unknown)}; choose from {', '.join(known)}")
    return [name for name in known if name in names]

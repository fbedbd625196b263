"""`python -m bench.receipts`: what receipts cost a session, beside the disk's own time, with logs of several lengths.

The log is filled with one receipt many times over, and indexed at once; then a receipt is signed by both, appended, the
head signed, its consistency with the head before proven, and that proof checked and remembered, again and again. What
the disk takes to sync as many bytes is measured beside it, in the same folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from nacl.signing import SigningKey

from crypto.receipts.dsse import Envelope, countersign, encode, keyid, sign, verify
from crypto.receipts.log import ENTRIES, ReceiptLog
from crypto.receipts.peers import PeerHeads
from crypto.receipts.statement import Heads, Machine, Party, Predicate, Stage, build

SIZES: Final = (1, 1_000, 100_000)  # entries
ROUNDS: Final = 60
NAMES: Final = ("alpha", "beta")
STEPS: Final = ("sign", "append", "head", "proof", "check", "fsync")
WORDS: Final = {
    "sign": "statement built, signed by both, verified by one",
    "append": "one receipt appended and synced",
    "head": "the head signed and kept",
    "proof": "the head signed again, with a proof of consistency",
    "check": "that checked and remembered",
    "fsync": "one write and sync of as many bytes, nothing else",
}


class Clock:
    """Seconds of each step, round by round."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {step: [] for step in STEPS}

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Count what happens within to a step."""
        start = time.perf_counter()
        yield
        self.seconds[step].append(time.perf_counter() - start)

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """Median and ninth decile of each step."""
        return {
            step: {
                "median": round(1000 * statistics.median(all_of_it), 3),
                "p90": round(1000 * statistics.quantiles(all_of_it, n=10)[-1], 3),
            }
            for step, all_of_it in self.seconds.items()
        }


def receipt(keys: Sequence[SigningKey], head: str) -> Envelope:
    """A receipt as large as one of a session of four channels, signed by both."""
    predicate = Predicate(
        stage=Stage.TRANSFER,
        session="5e" * 16,
        source=Party(NAMES[0], "aa" * 32, 0),
        destination=Party(NAMES[1], "bb" * 32),
        vm=Machine("guest", "6b1f0e8a-0000-4000-8000-000000000001"),
        started="2026-01-02T03:04:05.678+00:00",
        heads=Heads(head, head),
    )
    digests = {
        f"channel/{number}/{way}": {"blake3": "cd" * 32} for number in range(4) for way in ("forward", "backward")
    }
    envelope = sign(build(predicate, digests), keys[0])
    known = {keyid(keys[0].verify_key): keys[0].verify_key}
    verify(envelope, known, required=list(known))
    return countersign(envelope, keys[1])


def measure(folder: Path, entries: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each step, with a log of so many entries."""
    keys = [SigningKey(bytes([number]) * 32) for number in (1, 2)]
    log, peers, clock = ReceiptLog(folder / "log"), PeerHeads(folder / "peer"), Clock()
    text = log.checkpoint(NAMES[0], keys[0])
    line = encode(receipt(keys, text)) + b"\n"
    (folder / "log" / ENTRIES).write_bytes(line * entries)
    log.head()  # indexes them
    peers.check(NAMES[0], keys[0].verify_key, log.checkpoint(NAMES[0], keys[0]))
    beside = os.open(folder / "beside", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for _ in range(rounds):
            with clock.timed("sign"):
                envelope = receipt(keys, text)
            with clock.timed("append"):
                log.append(envelope)
            with clock.timed("head"):
                text = log.checkpoint(NAMES[0], keys[0])
            asked = peers.known(NAMES[0])
            with clock.timed("proof"):
                shown, proofs = log.prove(tuple(one.head.size for one in asked), NAMES[0], keys[0])
            with clock.timed("check"):
                peers.check(NAMES[0], keys[0].verify_key, shown, asked, proofs)
            with clock.timed("fsync"):
                os.write(beside, line)
                os.fsync(beside)
    finally:
        os.close(beside)
    return clock.milliseconds()


def table(results: dict[int, dict[str, dict[str, float]]]) -> str:
    """Medians, and the ninth decile in brackets, in milliseconds."""
    head = "| step | " + " | ".join(f"{entries:,} entries" for entries in results) + " |\n| --- |"
    rows = [head + " --- |" * len(results)]
    for step in STEPS:
        cells = (f"{result[step]['median']:.2f} ({result[step]['p90']:.2f})" for result in results.values())
        rows.append(f"| {WORDS[step]} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None, *, tell: Callable[[str], object] = print) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.receipts", description=__doc__)
    parser.add_argument("--entries", type=int, nargs="+", default=SIZES, metavar="N", help="lengths of the log")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--folder", type=Path, help="on which disk [default: the one for temporary files]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    results = {}
    for entries in options.entries:
        with tempfile.TemporaryDirectory(prefix="korora-bench-", dir=options.folder) as scratch:
            results[entries] = measure(Path(scratch), entries, options.rounds)
    tell(json.dumps(results) if options.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

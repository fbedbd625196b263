"""The pair under more than one stream or lane: throughput by `--lanes` and by concurrent sessions.

The sessions are open and each has carried a mebibyte before anything is timed, so that handshakes are out. Beside the
throughput stands how busy the machine was: where all cores are, more lanes or sessions cannot bring more, whatever the
relays could do elsewhere. The same total goes through however many sessions there are.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench.budget import Budget, Outcome, Teller, interleave
from bench.daemon import start_daemons
from bench.measure import (
    ANSWER_TIMEOUT_S,
    NS_PER_S,
    SETTLE_S,
    STREAM_TIMEOUT_S_PER_GIB,
    GiB,
    Load,
)
from bench.peers import Target, start_pair
from bench.processes import BenchError, MachineTime, ProcessTree, cpu_clock_s
from bench.spread import Spread, median_of, number_text, spread_text, table

LANES: Final = (1, 2, 4, 8)
SESSIONS: Final = (1, 2, 4, 16)
PRIME_BYTES: Final = 1024 * 1024  # of each session, before anything is timed
PRIME_TIMEOUT_S: Final = 30.0  # for all handshakes, on however busy a machine
REPORT: Final = "send.json"  # of `korora send`
REPORT_PATIENCE_S: Final = 5.0  # for a relay to write its report after its hypervisor has gone
REPORT_POLL_S: Final = 0.02
SPEED_UP_MIN: Final = 1.5  # of two sessions over one, where the machine allows

StartRelays = Callable[[ProcessTree, Target, int, Path], list[int]]
"""Starts relays for so many sessions or lanes, and returns the port to connect to for each stream.

The path is a directory of this round, for reports and the like.
"""


@dataclass(frozen=True, slots=True)
class StreamsPlan:
    """How much goes through in all, however many streams it is divided among."""

    rounds: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class StreamsSample:
    """One round of one number of lanes or sessions.

    Args:
        count: lanes or sessions asked for.
        round: of the section, from 1.
        bytes: timed, all streams together.
        seconds: from the first source's start to the last byte at the sink.
        relay_cpu_s: all relays together.
        load_cpu_s: sources and sink.
        busy_cores: mean of the whole machine, others included.
        stolen_cores: mean that the hypervisor gave to others.
        memory_largest_kib: peak of the largest relay.
        processes: relays.
        lanes_used: as the session's report says; None where there is none.
    """

    count: int
    round: int
    bytes: int
    seconds: float
    relay_cpu_s: float
    load_cpu_s: float
    busy_cores: float
    stolen_cores: float
    memory_largest_kib: int
    processes: int
    lanes_used: int | None

    @property
    def gib_per_s(self) -> float:
        """Throughput of all streams together."""
        return self.bytes / GiB / self.seconds


@dataclass(frozen=True, slots=True)
class StreamsRow:
    """One number of lanes or sessions over all rounds."""

    gib_per_s: Spread
    speed_up: float | None
    cpu_s_per_gib: Spread
    relay_cores: Spread
    load_cores: Spread
    busy_cores: Spread
    stolen_cores: Spread
    memory_largest_mib: float
    processes: int
    lanes_used: int | None


def start_lanes(tree: ProcessTree, target: Target, lanes: int, reports: Path) -> list[int]:
    """A pair with so many lanes, for one stream."""
    return [start_pair(tree, target, options=("--lanes", str(lanes)), report=reports / REPORT)]


def measure_streams(
    start: StartRelays,
    directory: Path,
    *,
    count: int,
    streams: int,
    number: int,
    total_bytes: int,
    reports: bool = False,
) -> StreamsSample:
    """One round: `total_bytes` over `streams` streams through relays started by `start` for `count`.

    The identities are made in `directory` and used again by further rounds. With `reports` the relays are expected to
    leave one, which says how many lanes were used.

    Raises:
        BenchError: a relay does not start, stalls, or loses bytes.
    """
    each_bytes = max(total_bytes // streams, 2 * PRIME_BYTES)
    timeout_s = ANSWER_TIMEOUT_S + STREAM_TIMEOUT_S_PER_GIB * total_bytes / GiB
    with (
        tempfile.TemporaryDirectory(prefix="streams-", dir=directory) as scratch,
        Load("sink", "--bytes", str(each_bytes), "--count", str(streams)) as sink,
        ProcessTree("korora", Path(scratch)) as tree,
        contextlib.ExitStack() as stack,
    ):
        target = Target(sink.hear("listening", ANSWER_TIMEOUT_S)["port"], directory)
        ports = start(tree, target, count, Path(scratch))
        arguments = ("--bytes", str(each_bytes), "--prime", str(PRIME_BYTES))
        sources = [stack.enter_context(Load("source", "--to", f"127.0.0.1:{port}", *arguments)) for port in ports]
        _all(sources, "filled", ANSWER_TIMEOUT_S, tree)
        _release(sources)
        _all(sources, "primed", PRIME_TIMEOUT_S, tree)
        time.sleep(SETTLE_S)  # for the first mebibytes to arrive, and for what relays do after a handshake
        loads = [sink.pid, *(source.pid for source in sources)]
        relay_s, load_s, machine = tree.cpu_s(), _cpu(loads), MachineTime.now()
        _release(sources)
        sent = _all(sources, "sent", timeout_s, tree)
        received = sink.hear("received", timeout_s, tree)
        relay_s, load_s = tree.cpu_s() - relay_s, _cpu(loads) - load_s
        passed = MachineTime.now().since(machine)
        memory = tree.memory()
        if received["bytes"] != each_bytes * streams:
            raise BenchError(f"korora: {received['bytes']} of {each_bytes * streams} bytes arrived")
        _release([*sources, sink])
        lanes_used = _lanes_used(Path(scratch) / REPORT) if reports else None
    start_ns = min(answer["start_ns"] for answer in sent)
    cores = os.cpu_count() or 1
    return StreamsSample(
        count=count,
        round=number,
        bytes=(each_bytes - PRIME_BYTES) * streams,
        seconds=(received["last_ns"] - start_ns) / NS_PER_S,
        relay_cpu_s=relay_s,
        load_cpu_s=load_s,
        busy_cores=cores * passed.busy_s / passed.total_s if passed.total_s else 0.0,
        stolen_cores=cores * passed.stolen_s / passed.total_s if passed.total_s else 0.0,
        memory_largest_kib=max((item.peak_kib for item in memory), default=0),
        processes=len(memory),
        lanes_used=lanes_used,
    )


def _all(loads: Sequence[Load], event: str, timeout_s: float, tree: ProcessTree) -> list[dict[str, Any]]:
    """Hear the same of each."""
    deadline = time.monotonic() + timeout_s
    return [load.hear(event, max(0.0, deadline - time.monotonic()), tree) for load in loads]


def _release(loads: Sequence[Load]) -> None:
    """Let each go on."""
    for load in loads:
        load.release()


def _cpu(pids: Sequence[int]) -> float:
    """CPU seconds of these processes."""
    return sum(cpu_clock_s(pid) for pid in pids)


def _lanes_used(report: Path) -> int | None:
    """What the session's report says about lanes; None if there is none in time."""
    deadline = time.monotonic() + REPORT_PATIENCE_S
    while not report.exists():
        if time.monotonic() > deadline:
            return None
        time.sleep(REPORT_POLL_S)
    try:
        lanes: int = json.loads(report.read_text())["lanes"]
    except (OSError, ValueError, KeyError):
        return None
    return lanes


def measure_lanes(plan: StreamsPlan, directory: Path, *, budget: Budget, teller: Teller) -> StreamsResult:
    """One stream over 1, 2, 4 and 8 lanes."""

    def act(item: str, number: int) -> StreamsSample:
        return measure_streams(
            start_lanes,
            directory,
            count=int(item),
            streams=1,
            number=number,
            total_bytes=plan.total_bytes,
            reports=True,
        )

    outcome = interleave([str(n) for n in LANES], act, rounds=plan.rounds, budget=budget, teller=teller)
    return StreamsResult("lanes", "one `korora send`, one `korora receive`", os.cpu_count() or 1, outcome)


def measure_sessions(plan: StreamsPlan, directory: Path, *, budget: Budget, teller: Teller) -> StreamsResult:
    """1, 2, 4 and 16 sessions at once, through a daemon at each end."""

    def act(item: str, number: int) -> StreamsSample:
        return measure_streams(
            start_daemons, directory, count=int(item), streams=int(item), number=number, total_bytes=plan.total_bytes
        )

    outcome = interleave([str(n) for n in SESSIONS], act, rounds=plan.rounds, budget=budget, teller=teller)
    return StreamsResult("sessions", "one `korora serve` at each end", os.cpu_count() or 1, outcome)


@dataclass(frozen=True, slots=True)
class StreamsResult:
    """Throughput by lanes or by sessions.

    Args:
        kind: "lanes" or "sessions".
        relays: which processes carried them, for people.
        cores: of the machine.
        outcome: the samples.
    """

    kind: str
    relays: str
    cores: int
    outcome: Outcome[StreamsSample]

    def rows(self) -> dict[str, StreamsRow]:
        """A row a number, in the order measured."""
        by_count: dict[int, list[StreamsSample]] = {}
        for sample in self.outcome.samples:
            by_count.setdefault(sample.count, []).append(sample)
        one = Spread.of([sample.gib_per_s for sample in by_count.get(1, [])])
        return {str(count): _row(samples, one) for count, samples in by_count.items()}

    def to_json(self) -> dict[str, Any]:
        """Rows and samples."""
        return {
            **self.outcome.to_json(),
            "relays": self.relays,
            "rows": {name: asdict(row) for name, row in self.rows().items()},
            "samples": [asdict(sample) for sample in self.outcome.samples],
        }

    def to_markdown(self) -> list[str]:
        """A table, and what it says about two over one."""
        rows = self.rows()
        head = [
            self.kind, "GiB/s", "÷ one", "CPU-s/GiB of the relays", "cores: relays", "source and sink",
            f"whole machine, of {self.cores}", "stolen", "largest relay, MiB",
        ]  # fmt: skip
        if self.kind == "lanes":
            head.append("lanes used")
        cells = []
        for name, row in rows.items():
            cell = [
                name,
                spread_text(row.gib_per_s, 2),
                number_text(row.speed_up, 2),
                spread_text(row.cpu_s_per_gib, 2),
                number_text(median_of(row.relay_cores), 2),
                number_text(median_of(row.load_cores), 2),
                number_text(median_of(row.busy_cores), 2),
                number_text(median_of(row.stolen_cores), 2),
                f"{row.memory_largest_mib:.0f}",
            ]
            if self.kind == "lanes":
                cell.append("?" if row.lanes_used is None else str(row.lanes_used))
            cells.append(cell)
        for name, reason in self.outcome.left_out.items():
            cells.append([name, f"left out: {reason}", *[""] * (len(head) - 2)])
        title = f"### By {self.kind}"
        return [title, "", f"{self.relays}; {self.outcome.text()}", "", *table(head, cells), *self._verdict(rows)]

    def _verdict(self, rows: dict[str, StreamsRow]) -> list[str]:
        """What two sessions brought over one, and whether there was anything left to bring it from."""
        if self.kind != "sessions" or "2" not in rows or "1" not in rows:
            return []
        two, one = rows["2"].speed_up, rows["1"]
        if two is None:
            return []
        text = f"2 sessions carry {two:.2f} times as much as one on {self.cores} cores (to reach: ≥ {SPEED_UP_MIN}, "
        text += "where the machine allows): "
        if two >= SPEED_UP_MIN:
            return ["", text + "**met**."]
        busy = one.busy_cores.median
        room = self.cores / busy if busy else float(self.cores)
        text += f"**missed**; one kept {busy:.2f} of them busy, all processes counted, "
        if room < SPEED_UP_MIN:
            return ["", text + f"so there was room for {room:.2f} times at most: this machine does not allow it."]
        return ["", text + f"so there was room for {room:.2f} times."]


def _row(samples: Sequence[StreamsSample], one: Spread | None) -> StreamsRow:
    """Medians of one number's samples; `one` is the throughput of a single lane or session."""
    speed = Spread.over(sample.gib_per_s for sample in samples)
    return StreamsRow(
        gib_per_s=speed,
        speed_up=None if one is None else speed.median / one.median,
        cpu_s_per_gib=Spread.over(sample.relay_cpu_s * GiB / sample.bytes for sample in samples),
        relay_cores=Spread.over(sample.relay_cpu_s / sample.seconds for sample in samples),
        load_cores=Spread.over(sample.load_cpu_s / sample.seconds for sample in samples),
        busy_cores=Spread.over(sample.busy_cores for sample in samples),
        stolen_cores=Spread.over(sample.stolen_cores for sample in samples),
        memory_largest_mib=max(sample.memory_largest_kib for sample in samples) / 1024,
        processes=max(sample.processes for sample in samples),
        lanes_used=min((s.lanes_used for s in samples if s.lanes_used is not None), default=None),
    )

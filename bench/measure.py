"""Measure one peer once: a stream through it, pings through an idle session, fresh sessions set up.

The load at both ends (`bench.load`) runs in processes of its own that are never counted. CPU time is the difference
between a reading when the relays say they are ready and one when the last byte has arrived, with every connection still
open: start-up is out, handshakes are in, and no process has ended in between unseen.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from bench.peers import Peer, Target
from bench.processes import REPOSITORY, BenchError, ProcessTree

GiB: Final = 1024**3
NS_PER_S: Final = 1_000_000_000
ANSWER_TIMEOUT_S: Final = 20.0  # for a load process to start, connect or finish a short task
STREAM_TIMEOUT_S_PER_GIB: Final = 30.0  # below 34 MiB/s a relay is taken for hung
PING_TIMEOUT_S: Final = 60.0
SETUP_TIMEOUT_S: Final = 120.0
CLOSE_TIMEOUT_S: Final = 3.0
SETTLE_S: Final = 0.3  # between the relays' start and the first reading, for what they do after saying ready


@dataclass(frozen=True, slots=True)
class Sample:
    """What one round said about one peer; absent figures are None (direct has no relay to count)."""

    peer: str
    round: int
    bytes: int
    seconds: float
    gib_per_s: float
    cpu_s_per_gib: float | None
    memory_kib: dict[str, int]
    source_cpu_s_per_gib: float
    sink_cpu_s_per_gib: float
    ping_ns: list[int] = field(default_factory=list)
    setup_ns: list[int] = field(default_factory=list)


class Load:
    """One process of `bench.load`, spoken to in lines."""

    def __init__(self, role: str, *arguments: str) -> None:
        """Start the role."""
        self._role = role
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.load", role, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def hear(self, event: str, timeout_s: float, tree: ProcessTree | None = None) -> dict[str, Any]:
        """Wait for the next line, which must report `event`.

        Raises:
            BenchError: the time is over, the process ended, it reports something else, or a relay of `tree` died.
        """
        stdout = self._process.stdout
        assert stdout is not None  # noqa: S101 (made with a pipe)
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise BenchError(f"{self._role}: no word of `{event}` within {timeout_s:.0f} s")
            if not select.select([stdout], [], [], min(left_s, 1.0))[0]:
                if tree is not None:
                    tree.check_alive()
                continue
            piece = os.read(stdout.fileno(), 1024 * 1024)
            if not piece:
                raise BenchError(f"{self._role}: ended before `{event}`")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if answer.get("event") != event:
            if tree is not None:
                tree.check_alive()
            raise BenchError(f"{self._role}: {answer.get('error', answer.get('event'))}")
        return answer

    def release(self) -> None:
        """Let it go on: a line on its standard input."""
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 (made with a pipe)
        try:
            stdin.write(b"\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise BenchError(f"{self._role}: ended too early") from error

    def close(self) -> None:
        """End it, kindly first, and reap it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything one round takes."""

    stream_bytes: int
    pings: int
    setups: int


def measure_stream(peer: Peer, round_number: int, total_bytes: int, directory: Path) -> Sample:
    """Send one stream through the peer; see the module for what is counted."""
    timeout_s = ANSWER_TIMEOUT_S + STREAM_TIMEOUT_S_PER_GIB * total_bytes / GiB
    with (
        Load("sink", "--bytes", str(total_bytes)) as sink,
        ProcessTree(peer.name, directory) as tree,
    ):
        port = peer.start(tree, Target(sink.hear("listening", ANSWER_TIMEOUT_S)["port"], directory))
        with Load("source", "--to", f"127.0.0.1:{port}", "--bytes", str(total_bytes)) as source:
            source.hear("filled", ANSWER_TIMEOUT_S)
            time.sleep(SETTLE_S)
            cpu_ready_s = tree.cpu_s()
            source.release()
            sent = source.hear("sent", timeout_s, tree)
            received = sink.hear("received", timeout_s, tree)
            cpu_s = tree.cpu_s() - cpu_ready_s
            memory = tree.memory()
            if received["bytes"] != total_bytes:
                raise BenchError(f"{peer.name}: {received['bytes']} of {total_bytes} bytes arrived")
            source.release()
            sink.release()
    gib = total_bytes / GiB
    seconds = (received["last_ns"] - sent["start_ns"]) / NS_PER_S
    return Sample(
        peer=peer.name,
        round=round_number,
        bytes=total_bytes,
        seconds=seconds,
        gib_per_s=gib / seconds,
        cpu_s_per_gib=cpu_s / gib if memory else None,
        memory_kib={f"{index} {item.command}": item.peak_kib for index, item in enumerate(memory)},
        source_cpu_s_per_gib=sent["cpu_s"] / gib,
        sink_cpu_s_per_gib=received["cpu_s"] / gib,
    )


def measure_pings(peer: Peer, count: int, directory: Path) -> list[int]:
    """One-byte round trips in nanoseconds through one idle session, warm-up left out."""
    with Load("echo") as echo, ProcessTree(peer.name, directory) as tree:
        port = peer.start(tree, Target(echo.hear("listening", ANSWER_TIMEOUT_S)["port"], directory))
        with Load("ping", "--to", f"127.0.0.1:{port}", "--count", str(count)) as ping:
            samples: list[int] = ping.hear("pinged", PING_TIMEOUT_S, tree)["samples_ns"]
            return samples


def measure_setups(peer: Peer, count: int, directory: Path) -> list[int]:
    """Time in nanoseconds from connecting to the first byte back, for fresh sessions of relays that stay up."""
    with Load("echo") as echo, ProcessTree(peer.name, directory) as tree:
        target = Target(echo.hear("listening", ANSWER_TIMEOUT_S)["port"], directory, fresh_sessions=True)
        port = peer.start(tree, target)
        with Load("setup", "--to", f"127.0.0.1:{port}", "--count", str(count)) as setup:
            samples: list[int] = setup.hear("set-up", SETUP_TIMEOUT_S, tree)["samples_ns"]
            return samples


def measure(peer: Peer, round_number: int, plan: Plan, directory: Path) -> Sample:
    """All of one peer's figures of one round.

    Raises:
        BenchError: the peer does not start, stalls, or loses bytes.
    """
    with tempfile.TemporaryDirectory(prefix=f"{peer.name}-", dir=directory) as scratch:
        logs = Path(scratch)
        sample = measure_stream(peer, round_number, plan.stream_bytes, logs)
        sample.ping_ns.extend(measure_pings(peer, plan.pings, logs))
        sample.setup_ns.extend(measure_setups(peer, plan.setups, logs))
        return sample

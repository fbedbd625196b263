"""Streams through a real pair: `korora send` and `korora receive`, every byte between them counted.

The wire bytes are the session's report's: TLS and lanes both ways, headers of frames and records, acknowledgements and
all. Each pair has a content store at each end, empty unless the run follows another (`Pair.copy_of`). The time is the
report's too: from the session's start to its end, so that starting programs is out, handshake and hand-over are in.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.corpus import Stream
from bench.peers import LOOPBACK, await_ready, make_identities
from bench.processes import BenchError, ProcessTree, free_ports, peak_memory

SESSION_TIMEOUT_S: Final = 90.0  # 100 Mb/s carry a GiB in that time
POLL_S: Final = 0.02  # how often memory is looked at: what grows later than that before the end is not seen
SOURCE: Final = "exec:cat {}; exec >&-; cat > /dev/null"  # a hypervisor that ends its stream, and hears the answer
SINK: Final = "exec:cat > /dev/null"
ANSWERING_SINK: Final = "exec:printf yes; cat > /dev/null"  # as xl's receiver does; a saved guest has none
KORORA: Final = (sys.executable, "-m", "korora")


@dataclass(frozen=True, slots=True)
class Ends:
    """Where the two relays run.

    Args:
        address: that the destination listens on.
        here, there: what stands before a command to run it on the source's or the destination's host.
    """

    address: str = LOOPBACK
    here: tuple[str, ...] = ()
    there: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PairSample:
    """One session.

    Args:
        item: which, as the section calls it.
        stream: which went through.
        encode: how.
        round: from 1.
        stream_bytes, guest_bytes: of it.
        forward_bytes, backward_bytes: on the wire.
        seconds: of the session.
        encode_s, decode_s: that the page engines worked, threads added up.
        pages: by kind.
        sender_kib, receiver_kib: peak memory.
    """

    item: str
    stream: str
    encode: str
    round: int
    stream_bytes: int
    guest_bytes: int
    forward_bytes: int
    backward_bytes: int
    seconds: float
    encode_s: float
    decode_s: float
    pages: dict[str, int]
    sender_kib: int
    receiver_kib: int

    @property
    def ratio(self) -> float:
        """Bytes on the wire, both ways, over the stream's."""
        return (self.forward_bytes + self.backward_bytes) / self.stream_bytes


@dataclass(frozen=True, slots=True)
class Pair:
    """Two hosts with an identity and a state folder each.

    Args:
        identities: of the host that the first migration leaves, and the other.
        states: theirs.
    """

    identities: tuple[Path, Path]
    states: tuple[Path, Path]

    @classmethod
    def fresh(cls, directory: Path, scratch: Path) -> Pair:
        """Two hosts that have seen nothing; identities are made in ``directory`` once, states in ``scratch``."""
        return cls(make_identities(directory), (scratch / "here", scratch / "there"))

    def copy_of(self, scratch: Path) -> Pair:
        """Two hosts that have seen what these have."""
        states = (scratch / "here", scratch / "there")
        for old, new in zip(self.states, states, strict=True):
            shutil.copytree(old, new)
        return Pair(self.identities, states)

    def turned(self) -> Pair:
        """The same hosts, for the way back."""
        return Pair(self.identities[::-1], self.states[::-1])


def carry(item: str, stream: Stream, encode: str, pair: Pair, number: int, *, ends: Ends | None = None) -> PairSample:
    """One stream through one pair, from its start to its end.

    Raises:
        BenchError: a relay does not start, does not end well or in time, or what arrived is something else.
    """
    ends = ends or Ends()
    [port] = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="wire-") as folder, ProcessTree("korora", Path(folder)) as tree:
        reports = Path(folder) / "send.json", Path(folder) / "receive.json"
        common = ("--once", "--resume-timeout", "0", "--log-level", "warning")
        receive = tree.spawn(
            [
                *ends.there, *KORORA, "receive", "--listen", f"{ends.address}:{port}", "--to",
                ANSWERING_SINK if stream.answered else SINK,
                "--identity", str(pair.identities[1]), "--state", str(pair.states[1]),
                "--report", str(reports[1]), *common,
            ],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        await_ready(receive, tree, "receive")
        send = tree.spawn(
            [
                *ends.here, *KORORA, "send", "--from", SOURCE.format(shlex.quote(str(stream.path))),
                "--peer", f"{ends.address}:{port}", "--identity", str(pair.identities[0]),
                "--state", str(pair.states[0]), "--report", str(reports[0]), "--encode", encode, *common,
            ],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        peaks = _until_ended({"send": send, "receive": receive}, item)
        source, destination = (_report(path) for path in reports)
    if source["digest_blake3"] != destination["digest_blake3"] or source["bytes_in"]["forward"] != stream.bytes:
        raise BenchError(f"{item}: what arrived is not what was sent")
    return PairSample(
        item=item,
        stream=stream.name,
        encode=encode,
        round=number,
        stream_bytes=stream.bytes,
        guest_bytes=stream.guest_bytes,
        forward_bytes=source["bytes_wire"]["forward"],
        backward_bytes=source["bytes_wire"]["backward"],
        seconds=source["seconds"],
        encode_s=source["codec_seconds"],
        decode_s=destination["codec_seconds"],
        pages=source["pages"],
        sender_kib=peaks["send"],
        receiver_kib=peaks["receive"],
    )


def _until_ended(processes: Mapping[str, subprocess.Popen[bytes]], item: str) -> dict[str, int]:
    """Wait for both; the peak memory of each in KiB."""
    peaks = dict.fromkeys(processes, 0)
    deadline = time.monotonic() + SESSION_TIMEOUT_S
    while any(process.poll() is None for process in processes.values()):
        if time.monotonic() > deadline:
            raise BenchError(f"{item}: the session did not end within {SESSION_TIMEOUT_S:.0f} s")
        for name, process in processes.items():
            memory = peak_memory(process.pid)
            peaks[name] = max(peaks[name], 0 if memory is None else memory.peak_kib)
            if process.returncode:
                raise BenchError(f"{item}: korora {name} ended with code {process.returncode}")
        time.sleep(POLL_S)
    codes = {name: process.returncode for name, process in processes.items()}
    if any(codes.values()):
        raise BenchError(f"{item}: the relays ended with {codes}")
    return peaks


def _report(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path.name}: {error}") from error
    return report

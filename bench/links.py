"""A link of a given rate between two hosts on this machine: two network namespaces, a veth pair, a token bucket.

It needs root and iproute2. Nothing of the machine's own network is touched, and a namespace takes its links and queues
with it when it goes. The connections have the congestion control that new namespaces get here.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.processes import BenchError
from bench.wire import Ends

COMMAND_TIMEOUT_S: Final = 20.0
NAMESPACES: Final = Path("/run/netns")
NAME: Final = "kbench"
ADDRESSES: Final = ("192.0.2.1", "192.0.2.2")  # RFC 5737: for documentation, so nobody's
PREFIX_BITS: Final = 30
INTERFACE: Final = "veth0"
BURST_BYTES_MIN: Final = 128 * 1024  # longer than the longest segment that TCP hands to a link at once
BURST_SECONDS: Final = 0.002  # at higher rates: what timers of the kernel can be late
QUEUE_MILLISECONDS: Final = 50  # what waits for the bucket before it is dropped
MBIT: Final = 1_000_000


@contextmanager
def link(bits_per_second: int | None = None) -> Iterator[Ends]:
    """Two hosts and the link between them; all gone afterwards.

    Args:
        bits_per_second: each way; None for as fast as it goes.

    Raises:
        BenchError: they cannot be had here.
    """
    _sweep()
    run = f"{NAME}-{os.getpid()}-{secrets.token_hex(3)}"
    names = (f"{run}-a", f"{run}-b")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", INTERFACE, "netns", names[0], "type", "veth", "peer", "name", INTERFACE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/{PREFIX_BITS}", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", interface, "up")
            if bits_per_second is not None:
                burst = max(BURST_BYTES_MIN, int(bits_per_second / 8 * BURST_SECONDS))
                bucket = ("rate", f"{bits_per_second}bit", "burst", str(burst), "latency", f"{QUEUE_MILLISECONDS}ms")
                _run("tc", "-n", name, "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *bucket)
        here, there = (("ip", "netns", "exec", name) for name in names)
        yield Ends(ADDRESSES[1], here, there)
    finally:
        for name in names:
            if (NAMESPACES / name).exists():
                _ip("netns", "delete", name)


def missing() -> str:
    """Why there can be no such link here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with link(MBIT):
            return ""
    except BenchError as error:
        return str(error)


def _sweep() -> None:
    """Remove what a run that was killed has left."""
    for namespace in NAMESPACES.glob(f"{NAME}-*-*-?"):
        if not Path(f"/proc/{namespace.name.split('-')[1]}").exists():
            _ip("netns", "delete", namespace.name)


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{' '.join(words)}: {error}") from None
    if done.returncode:
        raise BenchError(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")

"""Two hosts on one machine: two network namespaces joined by a veth pair that can lose, limit and be unplugged.

    with two_hosts() as (here, there, link):
        link.lose(30)                           of a thousand packets, each way
        sock = here.socket()                    a socket of that host, used from this process

It needs root, iproute2 and, for losses, nftables. `missing()` says what is not there. Nothing of the machine's own
network is touched, and nothing is left behind: a namespace takes its links, rules and queues with it when it goes.
"""

import asyncio
import ctypes
import json
import os
import secrets
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

COMMAND_SECONDS_MAX: Final = 20.0
CLONE_NEWNET: Final = 0x40000000  # setns(2)
NAMESPACES: Final = Path("/run/netns")
NAME: Final = "kchaos"
PREFIX_BITS: Final = 30
ADDRESSES: Final = ("192.0.2.1", "192.0.2.2")  # RFC 5737: for documentation, so nobody's
INTERFACE: Final = "veth0"
TABLE: Final = "korora_chaos"
PER_MILLE: Final = 1000
LATENCY_MILLISECONDS: Final = 50  # what a limited link queues before it drops


class NamespaceError(Exception):
    """A command for namespaces, links, rules or queues failed."""


@dataclass(frozen=True, slots=True)
class Host:
    """One of the two."""

    name: str
    address: str

    @property
    def command(self) -> tuple[str, ...]:
        """What stands before a command to run it on this host."""
        return ("ip", "netns", "exec", self.name)

    def socket(self) -> socket.socket:
        """A TCP socket of this host. Namespaces belong to threads, and a socket to that of its birth."""
        made: list[socket.socket] = []
        failed: list[OSError] = []

        def make() -> None:
            with (NAMESPACES / self.name).open("rb") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                    failed.append(OSError(ctypes.get_errno(), "setns"))
                    return
            made.append(socket.socket())

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return made[0]


class Link:
    """What joins the two hosts.

    Args:
        hosts: both.
    """

    def __init__(self, *hosts: Host) -> None:
        self._hosts = hosts

    def lose(self, per_mille: int) -> None:
        """Drop so many of a thousand packets at random, each way."""
        for host in self._hosts:
            _run(
                *host.command,
                *("nft", "-f", "-"),
                words=f"""
                table inet {TABLE} {{
                    chain arriving {{
                        type filter hook input priority 0;
                        iifname "{INTERFACE}" numgen random mod {PER_MILLE} < {per_mille} counter drop
                    }}
                }}
                """,
            )

    def lost(self) -> int:
        """How many packets that has dropped so far."""
        total = 0
        for host in self._hosts:
            listed = json.loads(_run(*host.command, "nft", "-j", "list", "table", "inet", TABLE))
            total += sum(counter["packets"] for counter in _counters(listed))
        return total

    def limit(self, bits_per_second: int) -> None:
        """A token bucket at each end: more than that waits, and is dropped after 50 ms."""
        burst = max(16 * 1024, bits_per_second // 8 // 100)
        for host in self._hosts:
            queue = ("rate", f"{bits_per_second}bit", "burst", str(burst), "latency", f"{LATENCY_MILLISECONDS}ms")
            _run("tc", "-n", host.name, "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *queue)

    @asynccontextmanager
    async def unplugged(self, seconds: float) -> AsyncIterator[None]:
        """Take the link down for so long."""
        host = self._hosts[0]
        await asyncio.to_thread(_run, "ip", "-n", host.name, "link", "set", INTERFACE, "down")
        try:
            yield
            await asyncio.sleep(seconds)
        finally:
            await asyncio.to_thread(_run, "ip", "-n", host.name, "link", "set", INTERFACE, "up")


def missing() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nft", "nftables")):
        if shutil.which(program) is None:
            return f"there is no {program}: install {package} (make system)"
    try:
        with _pair() as hosts:
            link = Link(*hosts)
            link.lose(1)
            link.limit(10**9)
    except NamespaceError as error:
        return f"this machine does not allow them: {error}"
    return None


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host, Link]]:
    """Two hosts and their link; all gone afterwards.

    Raises:
        NamespaceError: see `missing`.
    """
    with _pair() as (here, there):
        yield here, there, Link(here, there)


@contextmanager
def _pair() -> Iterator[tuple[Host, Host]]:
    _sweep()
    run = f"{NAME}-{os.getpid()}-{secrets.token_hex(3)}"  # two runs at once meet nowhere
    hosts = tuple(Host(f"{run}-{side}", address) for side, address in zip("ab", ADDRESSES, strict=True))
    here, there = hosts
    try:
        for host in hosts:
            _run("ip", "netns", "add", host.name)
        ends = ("netns", here.name, "type", "veth", "peer", "name", INTERFACE, "netns", there.name)
        _run("ip", "link", "add", INTERFACE, *ends)
        for host in hosts:
            _run("ip", "-n", host.name, "address", "add", f"{host.address}/{PREFIX_BITS}", "dev", INTERFACE)
            # Else a "packet" here is 64 KiB, and what is lost of a hundred is a handful.
            _run("ip", "-n", host.name, "link", "set", INTERFACE, "gso_max_segs", "1")
            for interface in ("lo", INTERFACE):
                _run("ip", "-n", host.name, "link", "set", interface, "up")
        yield here, there
    finally:
        for host in hosts:
            if (NAMESPACES / host.name).exists():
                _run("ip", "netns", "delete", host.name)


def _sweep() -> None:
    """Remove what a run that was killed has left."""
    for namespace in NAMESPACES.glob(f"{NAME}-*-*-?"):
        if not Path(f"/proc/{namespace.name.split('-')[1]}").exists():
            _run("ip", "netns", "delete", namespace.name)


def _run(*words: str, **options: Any) -> str:
    try:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            words,
            input=options.get("words"),
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS_MAX,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NamespaceError(f"{' '.join(words)}: {error}") from None
    if done.returncode:
        raise NamespaceError(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _counters(listed: Any) -> Iterator[dict[str, int]]:
    """Every counter in what nft lists."""
    if isinstance(listed, dict):
        for key, value in listed.items():
            if key == "counter":
                yield value
            else:
                yield from _counters(value)
    elif isinstance(listed, list):
        for value in listed:
            yield from _counters(value)

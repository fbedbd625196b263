"""`python -m bench.evidence`: what policy, certification and receipts cost a whole session, beside one without them.

Two relays in one process carry short sessions over loopback, one after the other, by turns: plain; with a policy and
the Clark–Wilson monitor at both ends; with receipts of both as well. A session's time is from the hypervisor's
connection to the end of both relays' work on it. What one write and sync of a receipt's length takes on the same disk
stands beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import uvloop

from crypto.identity import Identity
from crypto.pki import Authority as CertificateAuthority
from crypto.tls import PeerRules, TlsConfig, TlsRole
from korora.authority import Office
from korora.notary import Notary
from korora.policy.file import PolicyFile
from proxy.endpoints.sockets import TcpEgress, TcpIngress, listen_tcp
from proxy.errors import EXIT_DONE
from proxy.shell.destination import Destination, DestinationRunner, Terms
from proxy.shell.source import Peer, Source

ROUNDS: Final = 60
STREAM_BYTES: Final = 64 * 1024
READ_BYTES: Final = 1024 * 1024
RECEIPT_BYTES: Final = 3500  # of one receipt of both, as they are
VARIANTS: Final = ("plain", "policy", "policy and receipts")
POLICY: Final = (
    "".join(
        f'[[rule]]\nname = "deny-{number}"\neffect = "deny"\npeer = ["other-{number}-*"]\nvm = ["web-{number}-*"]\n'
        for number in range(19)
    )
    + '[[rule]]\nname = "the-others"\neffect = "allow"\npeer = ["alpha", "beta"]\n'
)


@dataclass(frozen=True)
class Host:
    """One of the two, and who has a say there."""

    identity: Identity
    folder: Path

    def office(self, variant: str) -> Office | None:
        """Who has a say; nobody in a plain session."""
        if variant == VARIANTS[0]:
            return None
        path = self.folder / "policy.toml"
        path.write_text(POLICY)
        path.chmod(0o600)
        return Office(self.identity.name, PolicyFile(path), self.folder)

    def notary(self, variant: str) -> Notary | None:
        """Who signs, in the last variant."""
        return Notary(self.identity, self.folder) if variant == VARIANTS[2] else None


class Pair:
    """Two relays and two hypervisors of one variant."""

    def __init__(self, variant: str, source: Host, destination: Host) -> None:
        self._hypervisor = socket.create_server(("127.0.0.1", 0))
        self._hypervisor.setblocking(False)
        self._ingress = TcpIngress("127.0.0.1", 0, "tcp:127.0.0.1:0")
        self._listener = listen_tcp("127.0.0.1", 0, "127.0.0.1:0")
        port = self._hypervisor.getsockname()[1]
        self._notaries = source.notary(variant), destination.notary(variant)
        self._over = asyncio.Event()
        terms = Terms(resume_seconds=0, authority=destination.office(variant), notary=self._notaries[1])
        self._destination = Destination(
            TlsConfig(destination.identity, TlsRole.SERVER, PeerRules()),
            {"default": TcpEgress("127.0.0.1", port, f"tcp:127.0.0.1:{port}")},
            self._listener,
            terms=terms,
            begin=self._begin,
            failed=_failed,
        )
        self._source = Source(
            TlsConfig(source.identity, TlsRole.CLIENT, PeerRules()),
            Peer("127.0.0.1", self._listener.getsockname()[1], resume_seconds=0),
            self._ingress,
            authority=source.office(variant),
            notary=self._notaries[0],
        )
        self._serving = asyncio.get_running_loop().create_task(self._destination.serve())

    async def open(self) -> None:
        """Ready for sessions."""
        await self._ingress.open()

    async def _begin(self, runner: DestinationRunner) -> None:
        await runner.run()
        self._over.set()

    async def session(self, stream: bytes) -> float:
        """One migration of these bytes; its seconds."""
        loop = asyncio.get_running_loop()
        self._over.clear()
        began = time.perf_counter()
        near = socket.socket()
        near.setblocking(False)
        await loop.sock_connect(near, ("127.0.0.1", int(self._ingress.label.rpartition(":")[2])))
        report = self._source.new_report()
        carried = loop.create_task(self._source.session(await self._ingress.accept(), report))
        far, _ = await loop.sock_accept(self._hypervisor)
        with near, far:
            far.setblocking(False)
            sending = loop.create_task(_send(near, stream))
            while await loop.sock_recv(far, READ_BYTES):
                pass
            await sending
            far.shutdown(socket.SHUT_WR)
            await carried
            await self._over.wait()
        seconds = time.perf_counter() - began
        report.exit_code, report.outcome = EXIT_DONE, "done"
        return seconds

    async def close(self) -> None:
        """End it."""
        self._serving.cancel()
        with suppress(asyncio.CancelledError):
            await self._serving
        await self._ingress.close()
        self._listener.close()
        self._hypervisor.close()


async def _send(near: socket.socket, stream: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(near, stream)
    near.shutdown(socket.SHUT_WR)


def _failed(error: Exception) -> None:
    raise error


async def measure(folder: Path, rounds: int, stream_bytes: int = STREAM_BYTES) -> dict[str, float]:
    """Median milliseconds of each variant's session of so many bytes, and of one sync."""
    stream = bytes(stream_bytes)
    now = datetime.now(UTC)
    authority = CertificateAuthority.create(folder / "ca", now=now)
    hosts = []
    for name in ("alpha", "beta"):
        directory = authority.issue(name, out=folder / f"{name}.identity", now=now).directory
        state = folder / f"{name}.state"
        state.mkdir(mode=0o700)
        hosts.append(Host(Identity.load(directory, now=now), state))
    pairs = {variant: Pair(variant, *hosts) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in (*VARIANTS, "sync")}
    try:
        for pair in pairs.values():
            await pair.open()
            await pair.session(stream)  # what is made once is made
        for _ in range(rounds):
            for variant, pair in pairs.items():
                seconds[variant].append(await pair.session(stream))
            seconds["sync"].append(synced(folder / "beside"))
    finally:
        for pair in pairs.values():
            await pair.close()
    return {name: round(1000 * statistics.median(each), 2) for name, each in seconds.items()}


def synced(path: Path) -> float:
    """Seconds for a write and sync of as many bytes as a receipt has."""
    began = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, bytes(RECEIPT_BYTES))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return time.perf_counter() - began


def table(results: dict[str, float]) -> str:
    """Medians, and what each adds to a plain session."""
    rows = ["| session | ms | more than plain |", "| --- | --- | --- |"]
    rows += [f"| {name} | {results[name]:.1f} | {results[name] - results[VARIANTS[0]]:.1f} |" for name in VARIANTS]
    return "\n".join([*rows, f"| one sync of {RECEIPT_BYTES} bytes | {results['sync']:.1f} | |"])


def main(argv: Sequence[str] | None = None, *, tell: Callable[[str], object] = print) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.evidence", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument("--mib", type=int, help="of each session: what costs by the byte shows [default: 64 KiB]")
    parser.add_argument("--folder", type=Path, help="on which disk [default: the one for temporary files]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    with (
        tempfile.TemporaryDirectory(prefix="korora-bench-", dir=options.folder) as scratch,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        results = runner.run(
            measure(Path(scratch), options.rounds, options.mib * 1024**2 if options.mib else STREAM_BYTES)
        )
    tell(json.dumps(results) if options.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""xl's migrations beside each other: the same guest moves between two real Xen hosts over ssh, plain socat, and Kororā.

The hosts are the tests' (tests/e2e/xen), emulated, one processor each; every migration loads both anew from files. The
clock is this machine's: from starting `xl migrate` to its end. The guest counts aloud every few milliseconds, what it
says is passed on as it comes, and the longest silence between two numbers is the downtime. Bytes are counted on the
way between the hosts, in both directions, everything included.
"""

from __future__ import annotations

import asyncio
import itertools
import shlex
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from bench.budget import Budget, Outcome, Teller, interleave
from bench.processes import BenchError
from bench.spread import Spread, spread_text, table
from tests.e2e.xen.agent import AgentError
from tests.e2e.xen.daemons import serve_peers, served_host
from tests.e2e.xen.host import CONSOLES, GATEWAY, Guest, XenHost
from tests.e2e.xen.rig import Pair, RigAbsent, XenRig, build_rig, pair

MiB: Final = 1024 * 1024
BEAT_MS: Final = 20  # what the guest's counting can tell of a silence
GUEST: Final = Guest("g1", "pv", memory_mib=96, test_mib=16, rate=50, beat_ms=BEAT_MS)
SETTLE_SECONDS: Final = 3.0  # of counting before, with all else started
AFTER_BEATS: Final = 50  # heard at the destination before a migration counts
MIGRATION_SECONDS: Final = 240.0
READ_BYTES: Final = 256 * 1024
SSH_PORT, SOCAT_PORT = 22, 8002

# In each dom0: passes on what the guest's console says, as it comes. Polls, as Python has no inotify.
_LISTENER: Final = """
import os, socket, sys, time
out = socket.create_connection((sys.argv[1], int(sys.argv[2])))
files = {}
for path in sys.argv[3:]:
    files[path] = None
while True:
    for path, fd in files.items():
        if fd is None:
            try:
                files[path] = fd = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            os.lseek(fd, 0, os.SEEK_END)
        data = os.read(fd, 65536)
        if data:
            out.sendall(data)
    time.sleep(0.01)
"""


@dataclass(frozen=True, slots=True)
class XenPlan:
    """How many rounds."""

    rounds: int


@dataclass(frozen=True, slots=True)
class XenSample:
    """One migration."""

    variant: str
    round: int
    total_s: float
    downtime_ms: float
    wire_bytes: int


@dataclass(frozen=True, slots=True)
class XenRow:
    """One way over all rounds."""

    total_s: Spread
    downtime_ms: Spread
    wire_mib: Spread


@dataclass(slots=True)
class Ear:
    """When which number was heard, on whichever host."""

    heard: dict[int, float] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0
    _server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        """Begin to listen."""
        self._server = await asyncio.start_server(self._listen, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """End that."""
        if self._server is not None:
            self._server.close()

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                words = line.split()
                if len(words) == 6 and words[0].endswith(b"HB") and words[1].isdigit():
                    self.heard.setdefault(int(words[1]), time.monotonic())
                    self.changed.set()
        except OSError:
            pass  # the host has ended
        finally:
            writer.close()

    async def wait(self, at_least: int, seconds: float) -> None:
        """Until so many numbers have been heard. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while len(self.heard) < at_least:
                self.changed.clear()
                await self.changed.wait()

    def longest_silence(self, since: float) -> float:
        """Seconds between one number and the next, the longest of those that ended after `since`.

        Raises:
            BenchError: the guest has not counted on.
        """
        numbers = sorted(self.heard)
        # One line, at most, is divided between the two consoles.
        if numbers[-1] - numbers[0] + 1 - len(numbers) > 1:
            raise BenchError("the guest has not counted on")
        times = [self.heard[number] for number in numbers]
        return max(after - before for before, after in itertools.pairwise(times) if after > since)


class Way:
    """A TCP way to a host's port that counts; either end may speak first.

    Args:
        port: where the host's port is reached.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.bytes = 0
        """In both directions."""
        self.port = 0
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        """Begin to carry."""
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0, limit=READ_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """End that."""
        if self._server is not None:
            self._server.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, onward = await asyncio.open_connection("127.0.0.1", self._target, limit=READ_BYTES)
        await asyncio.gather(self._pump(reader, onward), self._pump(there, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(READ_BYTES):
                self.bytes += len(data)
                writer.write(data)
                await writer.drain()
            writer.write_eof()
        except OSError:
            writer.close()


@dataclass(frozen=True, slots=True)
class Ready:
    """Two hosts with everything started for one way.

    Args:
        two: the hosts.
        command: of `xl migrate`, to be typed on host a.
        crossed: how many bytes have gone from one host to the other, and back.
    """

    two: Pair
    command: list[str]
    crossed: Callable[[], int]


Prepare = Callable[[XenRig, AsyncExitStack], Awaitable[Ready]]


async def _way(stack: AsyncExitStack, host: XenHost, port: int) -> Way:
    return await stack.enter_async_context(Way(host.ports[port]))


async def _ssh(rig: XenRig, stack: AsyncExitStack) -> Ready:
    """As xl does by itself, with keys of this migration; ciphers are ssh's own choice."""
    two = await stack.enter_async_context(pair(rig, GUEST))
    for host, path in ((two.a, "/root/.ssh/id_ed25519"), (two.b, "/run/sshd/key")):
        await host.check(["mkdir", "-p", str(Path(path).parent)])
        await host.check(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path])
    public = await two.a.agent.get("/root/.ssh/id_ed25519.pub") or b""
    await two.b.agent.put("/root/.ssh/authorized_keys", public)
    words = ["-o", "UsePAM=no", "-o", "StrictModes=no", "-o", "UseDNS=no", "-h", "/run/sshd/key", "-f", "/dev/null"]
    await two.b.spawn("sshd", ["/usr/sbin/sshd", "-D", *words])
    await two.b.listening(SSH_PORT)
    way = await _way(stack, two.b, SSH_PORT)
    ssh = f"ssh -p {way.port} -o StrictHostKeyChecking=accept-new"
    await two.a.check([*shlex.split(ssh), GATEWAY, "true"])
    before = way.bytes
    return Ready(two, ["xl", "migrate", "-s", ssh, GUEST.name, GATEWAY], lambda: way.bytes - before)


async def _socat(rig: XenRig, stack: AsyncExitStack) -> Ready:
    """Nothing encrypted, nobody authenticated."""
    two = await stack.enter_async_context(pair(rig, GUEST))
    listen = ["socat", "-b262144", "-t3600", f"TCP-LISTEN:{SOCAT_PORT},reuseaddr", "EXEC:xl migrate-receive"]
    await two.b.spawn("receiver", listen)
    await two.b.listening(SOCAT_PORT)
    way = await _way(stack, two.b, SOCAT_PORT)
    carrier = f"socat -b262144 -,ignoreeof TCP:{GATEWAY}:{way.port}"
    return Ready(two, ["xl", "migrate", "-s", "", GUEST.name, carrier], lambda: way.bytes)


async def _korora(rig: XenRig, stack: AsyncExitStack, *, encode: str = "auto") -> Ready:
    """A daemon at each end, as docs/xen.md sets it up; nothing stored of the guest yet."""
    files = [await served_host(rig, on, who) for on, who in zip((GUEST, None), rig.identities, strict=True)]
    two = await stack.enter_async_context(pair(rig, GUEST, (files[0], files[1])))
    await serve_peers(two, xl=f'encode = "{encode}"\n')
    did = two.to_b.proxy.did  # the other way is for b's own migrations
    command = ["xl", "migrate", "-s", "", GUEST.name, "korora xl destination"]
    return Ready(two, command, lambda: did.forward_bytes + did.backward_bytes)


VARIANTS: Final[dict[str, tuple[Prepare, str]]] = {
    "socat": (_socat, "plain socat at both ends: nothing encrypted or authenticated"),
    "ssh": (_ssh, "xl's own default: `xl migrate g1 HOST`"),
    "korora": (_korora, "`korora xl`, daemons at both ends"),
    "korora pages": (partial(_korora, encode="pages"), 'the same, `encode = "pages"`: fewer bytes at any price'),
}


@asynccontextmanager
async def _prepared(rig: XenRig, variant: str) -> AsyncIterator[tuple[Ready, Ear]]:
    """Hosts, way and ears."""
    async with Ear() as ear, AsyncExitStack() as stack:
        ready = await VARIANTS[variant][0](rig, stack)
        paths = [f"{CONSOLES}/guest-{GUEST.name}{end}.log" for end in ("", "--incoming")]
        for host in ready.two.hosts:
            await host.spawn("listener", ["python3.11", "-I", "-c", _LISTENER, GATEWAY, str(ear.port), *paths])
        await ear.wait(int(SETTLE_SECONDS * 1000 / BEAT_MS), MIGRATION_SECONDS)
        yield ready, ear


async def migrate(rig: XenRig, variant: str, number: int) -> XenSample:
    """Move the guest once.

    Raises:
        BenchError: it did not arrive, or not whole.
        AgentError, TimeoutError: a host does not do what it should.
    """
    async with _prepared(rig, variant) as (ready, ear):
        start = time.monotonic()
        done = await ready.two.a.run(ready.command, MIGRATION_SECONDS)
        total_s = time.monotonic() - start
        if done.rc != 0:
            raise BenchError(f"{variant}: xl migrate ended with {done.rc}: {done.err.strip().splitlines()[-1:]}")
        await ear.wait(len(ear.heard) + AFTER_BEATS, MIGRATION_SECONDS)
        found = [(where, domain.name, domain.runs) for where, domain in await ready.two.domains()]
        if found != [("b", GUEST.name, True)]:
            raise BenchError(f"{variant}: afterwards there is {found}")
        return XenSample(variant, number, total_s, ear.longest_silence(start) * 1000, ready.crossed())


def measure_xen(plan: XenPlan, directory: Path, *, budget: Budget, teller: Teller) -> XenResult:
    """All ways, interleaved. Where there are no Xen hosts, all are left out with the reason."""
    try:
        rig = build_rig(directory)
    except RigAbsent as error:
        teller.warn(f"{error}; left out")
        left_out = dict.fromkeys(VARIANTS, str(error))
        return XenResult(plan, Outcome(planned=plan.rounds, left_out=left_out))

    def act(item: str, number: int) -> XenSample:
        try:
            return asyncio.run(migrate(rig, item, number))
        except (AgentError, TimeoutError, OSError, AssertionError) as error:
            raise BenchError(f"{item}: {str(error) or type(error).__name__}"[:500]) from error

    return XenResult(plan, interleave(list(VARIANTS), act, rounds=plan.rounds, budget=budget, teller=teller))


@dataclass(frozen=True, slots=True)
class XenResult:
    """The migrations of one run."""

    plan: XenPlan
    outcome: Outcome[XenSample]

    def rows(self) -> dict[str, XenRow]:
        """A row a way, in the order first met."""
        by_name: dict[str, list[XenSample]] = {}
        for sample in self.outcome.samples:
            by_name.setdefault(sample.variant, []).append(sample)
        return {name: _row(samples) for name, samples in by_name.items()}

    def to_json(self) -> dict[str, Any]:
        """Rows and samples."""
        return {
            **self.outcome.to_json(),
            "guest": asdict(GUEST),
            "rows": {name: asdict(row) for name, row in self.rows().items()},
            "samples": [asdict(sample) for sample in self.outcome.samples],
        }

    def to_markdown(self) -> list[str]:
        """A table, total time first."""
        about = (
            f"Xen 4.17, two emulated hosts of one processor; a {GUEST.kind.upper()} guest of {GUEST.memory_mib} MiB "
            f"that changes {GUEST.rate} pages a second of {GUEST.test_mib} MiB and counts every {BEAT_MS} ms; "
        )
        cells = [
            [
                name,
                spread_text(row.total_s, 1),
                spread_text(row.downtime_ms, 0),
                spread_text(row.wire_mib, 1),
                VARIANTS[name][1],
            ]
            for name, row in self.rows().items()
        ]
        head = ("", "total s", "downtime ms", "MiB on the wire", "how")
        for name, reason in self.outcome.left_out.items():
            cells.append([name, f"left out: {reason}", *[""] * (len(head) - 2)])
        return ["### Xen migrations", "", about + self.outcome.text(), "", *table(head, cells)]


def _row(samples: list[XenSample]) -> XenRow:
    """Medians of one way's samples."""
    return XenRow(
        total_s=Spread.over(sample.total_s for sample in samples),
        downtime_ms=Spread.over(sample.downtime_ms for sample in samples),
        wire_mib=Spread.over(sample.wire_bytes / MiB for sample in samples),
    )

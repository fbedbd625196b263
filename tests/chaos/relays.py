"""A pair of relays as processes, with the chaos proxy between them, and what /proc says of each.

async with standing(hosts, plan=only(Kind.LANE, Plan(forward=Faults(reset_at=MIB)))) as pair:
    ends = await pair.talk(Talk(seed=1, forward_bytes=8 * MIB, backward_bytes=0))
    assert await pair.codes() == (6, 6)
"""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.attacks.processes import Hosts, Relay
from tests.chaos.faults import Chooser, calm
from tests.chaos.load import LOOPBACK, MIB, Backend, Ends, MakeSocket, Talk, talk_through
from tests.chaos.namespaces import Host
from tests.chaos.proxy import ChaosProxy

FORGETFUL: Final = ("--store-bytes", "0", "--page-cache", str(8 * MIB))
"""What is said follows from its seed: stored, it would be over before anything can befall it the second time. The cache
is small, so that what a relay holds shows what it should not."""

VERDICT_SECONDS_MAX: Final = 40.0  # after a talk is over, for both relays to say how it went
LEVEL_SECONDS_MAX: Final = 10.0  # for descriptors and threads to come back to where they were
LEVEL_POLL_SECONDS: Final = 0.05
REST_LOOKS: Final = 10  # that find a relay's memory the same: what a session held is collected beside the loop
POOL_THREADS: Final = min(32, (os.cpu_count() or 1) + 4)  # asyncio.to_thread's, made one by one as they are needed
RESTING_THREADS_MAX: Final = 1 + POOL_THREADS + 4 + 1  # the loop's, that pool, libuv's four, the store's writer
DOCUMENTED_CODES: Final = frozenset({0, 3, 4, 5, 6, 7, 130, 143})
"""What a session may end with; 2 would be a fault of the test, 70 one of the relay."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process holds at one moment."""

    rss_kib: int
    peak_kib: int
    threads: int
    descriptors: int
    cpu_seconds: float


def usage(pid: int) -> Usage:
    """Read it from /proc.

    Raises:
        FileNotFoundError, ProcessLookupError: there is no such process.
    """
    folder = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
    # user and system time, in ticks of 10 ms, stand behind the name, which may hold anything
    times = (folder / "stat").read_text().rpartition(")")[2].split()
    return Usage(
        rss_kib=int(status["VmRSS"].split()[0]),
        peak_kib=int(status["VmHWM"].split()[0]),
        threads=int(status["Threads"]),
        descriptors=len(list((folder / "fd").iterdir())),
        cpu_seconds=(int(times[11]) + int(times[12])) / 100,
    )


class Watched(Relay):
    """A relay whose sessions can be waited for and whose use of the machine can be read."""

    @property
    def usage(self) -> Usage:
        """What it holds now."""
        return usage(self.process.pid)

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        """The log events that ended a session, in order."""
        return [event for event in self.events if event.get("event") in {"session done", "session failed"}]

    @property
    def codes(self) -> list[int]:
        """The exit codes of the sessions so far."""
        return [int(event.get("exit_code", 0)) for event in self.verdicts]

    async def told(
        self, matches: Callable[[dict[str, Any]], bool], *, since: int = 0, seconds: float = VERDICT_SECONDS_MAX
    ) -> dict[str, Any]:
        """The first log event that matches, from the one of that number on.

        Raises:
            TimeoutError: there is none within `seconds`.
        """
        async with asyncio.timeout(seconds):
            while True:
                for event in self.events[since:]:
                    if matches(event):
                        return event
                since = len(self.events)
                assert self.process.returncode is None, (self.process.returncode, self.lines)
                self._told.clear()
                await self._told.wait()

    async def judged(self, count: int) -> list[int]:
        """The exit codes of its sessions, once there are `count`."""
        async with asyncio.timeout(VERDICT_SECONDS_MAX):
            while len(self.verdicts) < count:
                assert self.process.returncode is None, (self.process.returncode, self.lines)
                self._told.clear()
                await self._told.wait()
        return self.codes

    async def at_rest(self) -> Usage:
        """What it holds once that does not change any more.

        Raises:
            TimeoutError: it goes on changing.
        """
        alike, now = 0, self.usage
        async with asyncio.timeout(LEVEL_SECONDS_MAX):
            while alike < REST_LOOKS:
                await asyncio.sleep(LEVEL_POLL_SECONDS)
                before, now = now, self.usage
                alike = alike + 1 if now.rss_kib == before.rss_kib else 0
        return now

    async def level(self, before: Usage, *, descriptors: int = 0) -> None:
        """Until it holds no more than before, but for so many; of threads, no more than any relay at rest ever has.

        Raises:
            AssertionError: it still does after a while.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + LEVEL_SECONDS_MAX
        while True:
            now = self.usage
            if now.descriptors <= before.descriptors + descriptors and now.threads <= RESTING_THREADS_MAX:
                return
            assert loop.time() < end, f"{self._arguments[0]} holds {now}, before it held {before}"
            await asyncio.sleep(LEVEL_POLL_SECONDS)


@dataclass(slots=True)
class Standing:
    """Two relays that take one session after another, what lies between them, and the destination's hypervisor."""

    send: Watched
    receive: Watched
    proxy: ChaosProxy
    """Carries nothing where the relays reach each other by a network of their own."""
    backend: Backend
    port: int
    """Where the source's hypervisor connects."""
    folder: Path
    make: MakeSocket = socket.socket
    """Makes the source's hypervisor's sockets."""
    sessions: int = 0

    async def talk(self, talk: Talk) -> Ends:
        """Have one talk; it begins a session, or joins the one that is open."""
        return await talk_through(self.port, self.backend, talk, make=self.make)

    async def session(self, *talks: Talk) -> tuple[list[Ends], tuple[int, int]]:
        """One session of these talks, all at once, to its end: their ends, and the exit codes, the source's first."""
        tasks: list[asyncio.Task[Ends]] = []
        async with asyncio.TaskGroup() as group:
            tasks += [group.create_task(self.talk(talk)) for talk in talks]
        codes = await self.codes()
        await self.backend.idle()
        return [task.result() for task in tasks], codes

    async def codes(self) -> tuple[int, int]:
        """Both exit codes of the next session to end, the source's first."""
        self.sessions += 1
        source, destination = await asyncio.gather(
            *(relay.judged(self.sessions) for relay in (self.send, self.receive))
        )
        assert "Traceback" not in "\n".join(self.send.lines + self.receive.lines)
        return source[self.sessions - 1], destination[self.sessions - 1]

    def reports(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both reports of the last session, the source's first."""
        source, destination = ((self.folder / f"{name}.json").read_text() for name in ("send", "receive"))
        return json.loads(source), json.loads(destination)


def receiver(hosts: Hosts, backend: Backend, *words: str | Path, address: str = LOOPBACK) -> Watched:
    """`korora receive` for that hypervisor."""
    where = ("--listen", f"{address}:0", "--to", f"tcp:127.0.0.1:{backend.port}")
    return Watched("receive", *where, "--identity", hosts.beta, "--name", "alpha", *FORGETFUL, *words)


def sender(hosts: Hosts, peer_port: int, *words: str | Path, address: str = LOOPBACK) -> Watched:
    """`korora send` to that port."""
    where = ("--from", "tcp:127.0.0.1:0", "--peer", f"{address}:{peer_port}")
    return Watched("send", *where, "--identity", hosts.alpha, "--name", "beta", *FORGETFUL, *words)


@asynccontextmanager
async def standing(
    hosts: Hosts,
    folder: Path,
    *,
    plan: Chooser = calm,
    seed: int = 0,
    resume_seconds: int = 0,
    lanes: int = 1,
    encode: str = "auto",
) -> AsyncIterator[Standing]:
    """A pair that stays up; everything of it is gone afterwards.

    Args:
        hosts: identities.
        folder: where the reports of its last session are written.
        plan: what happens to the connections between the relays.
        seed: of the chances among that.
        resume_seconds: how long a loss is borne with.
        lanes: how many the session has.
        encode: how much work frames may get.
    """
    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(Backend())
        patience = ("--resume-timeout", str(resume_seconds), "--lanes", str(lanes))
        receive = receiver(hosts, backend, "--report", folder / "receive.json", *patience)
        await stack.enter_async_context(receive)
        proxy = ChaosProxy(("127.0.0.1", await receive.listening()), seed=seed, plan=plan)
        await stack.enter_async_context(proxy)
        send = sender(hosts, proxy.port, "--report", folder / "send.json", *patience, "--encode", encode)
        await stack.enter_async_context(send)
        yield Standing(send, receive, proxy, backend, await send.listening(), folder)


@asynccontextmanager
async def apart(
    hosts: Hosts, folder: Path, here: Host, there: Host, *, resume_seconds: int = 0
) -> AsyncIterator[Standing]:
    """The same, each relay and its hypervisor on a host of its own, with that network between them.

    Args:
        hosts: identities.
        folder: where the reports of its last session are written.
        here: the source's host.
        there: the destination's.
        resume_seconds: how long a loss is borne with.
    """
    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(Backend(there.socket))
        patience = ("--resume-timeout", str(resume_seconds))
        receive = receiver(hosts, backend, "--report", folder / "receive.json", *patience, address=there.address)
        receive.command = (*there.command, *receive.command)
        await stack.enter_async_context(receive)
        port = await receive.listening()
        send = sender(hosts, port, "--report", folder / "send.json", *patience, address=there.address)
        send.command = (*here.command, *send.command)
        await stack.enter_async_context(send)
        proxy = await stack.enter_async_context(ChaosProxy())
        yield Standing(send, receive, proxy, backend, await send.listening(), folder, here.socket)

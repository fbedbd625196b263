"""Two hosts, one machine, two relays that may be killed at any moment, and the two ends of xl that talk through them.

A relay that is killed goes on for a while as a program, but nothing it does counts any more: its journal takes no line,
its hypervisor hears no command, its connections carry nothing. Then its tasks are cancelled and its locks are free, as
when a process has died. What happens when is said by moments: ``source write voted before``, ``destination start
after``, ``source xl go``; a test lets something happen at one of them.
"""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pytest

from crypto.tls import TlsConfig
from proxy.control import Word
from proxy.endpoints.base import Egress
from proxy.endpoints.sockets import TcpEgress, TcpIngress, listen_tcp
from proxy.handover.record import Record
from proxy.handover.table import Side, State
from proxy.hypervisors.base import CopyState
from proxy.paging import PagingTerms
from proxy.shell import errand, guard, orders, party, recovery, runner, xl_guard
from proxy.shell.contact import Contact
from proxy.shell.destination import Destination, DestinationRunner, Terms
from proxy.shell.guard import Approval
from proxy.shell.handovers import Handovers, Toolstack
from proxy.shell.journal import Journal
from proxy.shell.source import Peer, Source
from proxy.vtpm import Carriers
from tests.proxy.shell.hosted import (
    DestinationXl,
    Host,
    Life,
    MortalConnection,
    MortalJournal,
    SourceXl,
    World,
    XlEgress,
)
from tests.proxy.support import OPAQUE, Ended, Hypervisors, Middle, over_tcp, run, until

SETTLE_SECONDS_MAX = 10.0
STORY_SECONDS_MAX = 60.0
Lie = Literal["prepared", "voted", "committed", "done", "aborted", "doubt", "unknown"]
Story = Callable[["Hosts"], Coroutine[Any, Any, None]]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that give real hypervisors and networks their time are of no use here."""
    for module, name, seconds in (
        (errand, "ERRAND_PAUSE_SECONDS_MIN", 0.005),
        (errand, "ERRAND_PAUSE_SECONDS_MAX", 0.02),
        (guard, "RECOVERY_SECONDS", 0.05),
        (errand, "ERRAND_SECONDS_MAX", 0.3),
        (orders, "ORDER_POLL_SECONDS", 0.01),
        (recovery, "RESTART_SECONDS_MAX", 0.0),
        (party, "HYPERVISOR_PAUSE_SECONDS", 0.001),
        (party, "RESUMED_SECONDS_MAX", 0.02),
        (runner, "ABORT_SECONDS_MAX", 0.1),
        (xl_guard, "HYPERVISOR_PAUSE_SECONDS", 0.001),
        (xl_guard, "_POLL_SECONDS", 0.001),
    ):
        monkeypatch.setattr(module, name, seconds)


# ------------------------------------------------------------------ relays


class Hosts:
    """Both relays on one loopback, each with its own journal; ``hosts`` makes one."""

    def __init__(
        self, folder: Path, client: TlsConfig, server: TlsConfig, *, resume_seconds: int = 0, approvals: Any = None
    ) -> None:
        self.world = World()
        self.middle = Middle()
        self.hypervisors: Hypervisors = over_tcp()
        self._folder, self.client, self.server = folder, client, server
        self._resume_seconds = resume_seconds
        self.approvals: dict[Side, list[Approval]] = approvals or {}
        self.lives: dict[Side, Life] = {}
        self.handovers: dict[Side, Handovers] = {}
        self.tasks: dict[Side, list[asyncio.Task[Any]]] = {side: [] for side in Side}
        self.cuts: list[asyncio.Task[None]] = []
        self.ended: dict[Side, Ended] = {}
        self.counted: Counter[Side] = Counter()
        """How often a side's hand-over was told to have ended."""
        self.arriving: list[DestinationRunner] = []
        self.destination: Destination | None = None
        self.departing: Source | None = None
        self.killed: set[Side] = set()
        """Those that are dead now; ``mortal`` have been."""
        self.mortal: set[Side] = set()
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Any] = []
        self.xl: list[asyncio.Task[None]] = []
        self.source_xl: SourceXl | None = None
        self.destination_xl: DestinationXl | None = None

    def begin(self, side: Side) -> Life:
        """A new process of a relay, on the journal that its host has."""
        life = self.lives[side] = Life(side, self.world)
        self.killed.discard(side)
        journal = MortalJournal(self._folder / side.value, life)
        self.handovers[side] = Handovers(
            journal,
            self.toolstack(life),
            self.approvals.get(side, ()),
            ended=lambda record: self.counted.update([record.side]),
            vtpms=self.vtpms(life),
        )
        if side is Side.DESTINATION:
            self._listen(life)
        return life

    # ---- what is of xl, and else where for another hypervisor

    kind: Literal["xl", "qmp"] = "xl"
    monitors: Mapping[Side, str] = MappingProxyType({})
    required: frozenset[Side] = frozenset()
    """Who takes no session that is unguarded."""
    paging: PagingTerms = OPAQUE

    def toolstack(self, life: Life) -> Toolstack:
        return lambda kind, monitor: Host(life)

    def vtpms(self, life: Life) -> Carriers | None:
        """Who moves vTPMs along; here nobody."""
        return None

    def egress(self, inner: TcpEgress, life: Life) -> Egress:
        return XlEgress(inner, life)

    async def begin_ends(self) -> list[Coroutine[Any, Any, None]]:
        """The source's hypervisor connects; both are to run."""

        async def receive() -> None:
            self.destination_xl = DestinationXl(self.world, await self.hypervisors.accept())
            await self.destination_xl.run()

        self.source_xl = SourceXl(self.world, await self.hypervisors.connect())
        return [self.source_xl.run(), receive()]

    # ----

    def _listen(self, life: Life) -> None:
        listener = listen_tcp("127.0.0.1", 0, "127.0.0.1:0")
        self._listeners.append(listener)
        port = listener.getsockname()[1]
        if self.middle.target:
            self.middle.target = port
        else:
            self.middle.start(port)
        self.middle.silent = self.middle.refuses = False
        inner = self.hypervisors.egress
        assert isinstance(inner, TcpEgress)

        async def carry(runner: DestinationRunner) -> None:
            self.arriving.append(runner)
            task = asyncio.current_task()
            assert task is not None
            self.tasks[Side.DESTINATION].append(task)
            self.ended[Side.DESTINATION] = await _outcome(runner.run(), runner.report)

        destination = self.destination = Destination(
            self.server,
            {"default": self.egress(inner, life)},
            listener,
            terms=Terms(
                resume_seconds=self._resume_seconds,
                paging=self.paging,
                handovers=self.handovers[life.side],
                monitors={"default": monitor} if (monitor := self.monitors.get(life.side)) else {},
                guarded=frozenset({"default"} if life.side in self.required else ()),
            ),
            begin=carry,
            failed=lambda error: None,
        )
        self.tasks[life.side].append(self._loop.create_task(destination.serve()))

    @property
    def peer(self) -> Peer:
        return Peer(
            "127.0.0.1",
            self.middle.port,
            handover=self.kind,
            guarded=Side.SOURCE in self.required,
            resume_seconds=self._resume_seconds,
            paging=self.paging,
            one_channel=self.kind == "xl",
        )

    async def migrate(self) -> None:
        """Both relays begin, and xl migrates the machine through them."""
        self.begin(Side.DESTINATION)
        life = self.begin(Side.SOURCE)
        ingress = self.hypervisors.ingress
        assert isinstance(ingress, TcpIngress)
        await ingress.open()
        source = self.departing = Source(
            self.client,
            self.peer,
            ingress,
            handovers=self.handovers[Side.SOURCE],
            monitor=self.monitors.get(Side.SOURCE, ""),
        )
        await source.ready()

        async def depart() -> None:
            report = source.new_report()
            first = MortalConnection(await ingress.accept(), life)
            self.ended[Side.SOURCE] = await _outcome(source.session(first, report), report)

        self.tasks[Side.SOURCE].append(self._loop.create_task(depart()))
        self.xl = [self._loop.create_task(work) for work in await self.begin_ends()]

    # ---- what happens to them

    def kill(self, side: Side) -> None:
        """A relay's process is gone: from this moment on, whichever thread it comes in."""
        self.lives[side].dead = True
        self.middle.silent = self.middle.refuses = True
        self.killed.add(side)
        self.mortal.add(side)
        self.soon(lambda: self.cuts.append(self._loop.create_task(self.cut())))

    async def bury(self, side: Side) -> None:
        """Take what is left of a killed relay out of the loop."""
        await until(lambda: self.cuts)
        await asyncio.gather(*self.cuts)
        tasks, self.tasks[side] = self.tasks[side], []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if side is Side.DESTINATION and self.destination is not None:
            await self.destination.close()  # whoever was being greeted has a socket, too
        for connection in self.lives[side].connections:
            await connection.abort()
        await until(lambda: not self._locked(side))

    def _locked(self, side: Side) -> bool:
        folder = self._folder / side.value / "handover"
        paths = {str(path) for path in folder.glob("*.journal")}
        open_now = set()
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                open_now.add(os.readlink(f"/proc/self/fd/{number}"))
        return bool(paths & open_now)

    def soon(self, work: Callable[[], None]) -> None:
        """Do ``work`` in the loop, whichever thread this is."""
        self._loop.call_soon_threadsafe(work)

    async def cut(self) -> None:
        """Every connection between the relays is lost."""
        self.middle.silent = True
        for number in (*self.middle.living(lanes=False), *self.middle.living(lanes=True)):
            await self.middle.cut(number, reset=True)

    def lose(self, *, mend: bool = False) -> None:
        """The network is gone, until ``mend``; or only what was under way in it."""
        self.middle.silent = self.middle.refuses = True

        async def cut() -> None:
            await self.cut()
            if mend:
                self.mend()

        self.soon(lambda: self.cuts.append(self._loop.create_task(cut())))

    def mend(self) -> None:
        self.middle.silent = self.middle.refuses = False

    def contact(self, record: Record) -> Contact:
        return Contact(self.client, self.peer)

    async def recover(self, side: Side) -> list[Record]:
        """One round of a relay's recovery; what stays unsettled."""
        await self.handovers[side].recover(self.contact)
        return self.handovers[side].unsettled()

    async def until_left(self) -> None:
        """Until both sessions that live have ended, or wait for what only the other side can tell them."""
        await until(lambda: all(self._left(side) for side in Side if side not in self.killed))

    def _left(self, side: Side) -> bool:
        if side in self.ended:
            return True
        runners = [self.departing.current if self.departing else None] if side is Side.SOURCE else self.arriving
        guards = [one.guard for one in runners if one is not None and one.guard is not None]
        return bool(guards) and all(one.detached for one in guards)

    async def settle(self) -> None:
        """Whoever was killed comes back, and both recover until nothing is left to be done."""
        for side in sorted(self.killed, key=lambda one: one.value):
            await self.bury(side)
            self.begin(side)
        self.mend()
        left: list[Record] = []
        deadline = self._loop.time() + SETTLE_SECONDS_MAX
        while self._loop.time() < deadline:
            over = all(side in self.ended or side in self.mortal for side in Side)
            left = [*await self.recover(Side.SOURCE), *await self.recover(Side.DESTINATION)]
            if over and not left:
                self.check_counted()
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"left: {left}; {' · '.join(self.world.story)}")

    def check_counted(self) -> None:
        """Each end was told once; by a process that died as it wrote it down, perhaps not at all."""
        for side in Side:
            ends = sum(record.state in (State.DONE, State.ABORTED) for record in self.journal(side))
            allowed = {ends, ends - 1} if side in self.mortal else {ends}
            assert self.counted[side] in allowed, (side, self.counted, self.world.story)

    def states(self) -> dict[Side, State]:
        """Where each side's journal stands."""
        return {side: record.state for side in Side for record in self.journal(side)}

    def journal(self, side: Side) -> list[Record]:
        return Journal(self._folder / side.value).records()

    async def close(self) -> None:
        for side in Side:
            if side in self.lives:
                self.lives[side].dead = True
        self.middle.silent = self.middle.refuses = True
        await self.cut()
        tasks = [*self.xl, *self.cuts, *(task for side in Side for task in self.tasks[side])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.hypervisors.ingress.close()
        await self.middle.close()
        self.hypervisors.close()
        for listener in self._listeners:
            listener.close()


async def _outcome(work: Coroutine[Any, Any, None], report: Any) -> Ended:
    ended = Ended(report)
    try:
        await work
    except Exception as error:  # noqa: BLE001 - whatever it is, the test will look at it
        ended.error = error
    return ended


@asynccontextmanager
async def hosts(folder: Path, client: TlsConfig, server: TlsConfig, **options: Any) -> AsyncIterator[Hosts]:
    """Both hosts, and nothing of them afterwards."""
    made = Hosts(folder, client, server, **options)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
def tell(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> Callable[..., None]:
    """Runs a story on two hosts."""

    def run_it(story: Story, **options: Any) -> None:
        async def whole() -> None:
            async with hosts(tmp_path, client_tls, server_tls, **options) as both:
                await story(both)
                assert not both.world.wrong

        run(whole(), STORY_SECONDS_MAX)

    return run_it


def lie(both: Hosts, side: Side, *words: Lie, times: int = 1) -> None:
    """A relay says what is not so, besides what it does."""

    def begin() -> None:
        runner = both.departing.current if side is Side.SOURCE and both.departing else both.arriving[0]
        assert runner is not None

        async def say() -> None:
            for word in words * times:
                await runner.say(Word(word))

        both.xl.append(asyncio.get_running_loop().create_task(say()))

    both.soon(begin)


async def both_ended(both: Hosts) -> None:
    await until(lambda: len(both.ended) == 2)


def order(both: Hosts, first: str, second: str) -> None:
    story = both.world.story
    assert story.index(first) < story.index(second), story


async def turned_back(both: Hosts) -> None:
    """The machine runs at its source, nothing is left at the destination, both journals say so."""
    await both.settle()
    assert both.world.copies == {Side.SOURCE: CopyState.RUNNING, Side.DESTINATION: CopyState.ABSENT}, both.world.story
    assert set(both.states().values()) == {State.ABORTED}

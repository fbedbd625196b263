"""Two hosts with real daemons and the stand-in for xl, and one guest for each moment, all in the middle of a hand-over.

What is done to a daemon hits all of them at once, each where it stands; what is done to a guest's network or to its xl
hits each alone. Afterwards every one of them has to have come to its end.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from proxy.handover.record import Record
from proxy.shell.journal import Journal
from tests.attacks.wire import Kind
from tests.chaos.proxy import ChaosProxy
from tests.korora.daemon.support import Host, Site
from tests.korora.handover.moments import MOMENTS, Moment
from tests.standins.xen_host import XenHost

RESUME_SECONDS = 4  # less is lost to nothing but a busy machine
SETTINGS = f"[limits]\nresume_timeout = {RESUME_SECONDS}\ndrain_timeout = 1\n"
AT_ONCE = 4  # migrations that begin together
STEP_SECONDS = 40.0  # what takes two has this long on a busy machine
STOP_SECONDS_MAX = 60.0
POLL_SECONDS = 0.02
PAGES = 512
FACTS_BYTES_MIN = 256  # of a destination's facts; a heartbeat has fewer

Case = tuple[Moment, str]


class Side:
    """One host: its xl, its daemon, its journal."""

    def __init__(self, site: Site, name: str, folder: Path) -> None:
        self.name = name
        self.xen = XenHost(folder / name)
        self.socket = folder / f"{name}.xl"
        self.daemon: Host = site.host(name, workers=1, settings=SETTINGS)
        self.daemon.egress("default", "xl:")

    def meet(self, other: "Side") -> None:
        """Set up to send to the other one."""
        self.daemon.peer(other.name, other.daemon.address)
        self.daemon.tables.append(f'[xl]\nsocket = "{self.socket}"\nany_address = true\nsessions_max = 64\n')

    def start(self) -> None:
        """Start the daemon."""
        self.daemon.start(env={"PATH": self.xen.env["PATH"]})

    def signal(self, number: signal.Signals) -> None:
        """To all of the daemon's processes."""
        assert self.daemon.process is not None
        os.killpg(self.daemon.process.pid, number)

    def kill(self) -> None:
        """All of the daemon is gone."""
        self.signal(signal.SIGKILL)
        assert self.daemon.process is not None
        assert self.daemon.process.stdout is not None
        self.daemon.process.wait()
        self.daemon.process.stdout.close()
        self.daemon.process = None

    def stop(self) -> None:
        """The daemon is told to stop, as by a service manager, and has ended."""
        assert self.daemon.process is not None
        assert self.daemon.process.stdout is not None
        self.daemon.process.send_signal(signal.SIGTERM)
        self.daemon.process.wait(STOP_SECONDS_MAX)
        self.daemon.process.stdout.close()
        self.daemon.process = None

    @property
    def records(self) -> list[Record]:
        """All that its journal has."""
        return Journal(self.daemon.state).records()

    def stands(self, guest: str) -> str:
        """Where the newest hand-over of a guest stands here."""
        records = [record for record in self.records if record.vm.name == guest]
        return records[-1].state.value if records else ""


@dataclass
class Crossing:
    """A guest, its network, and its migration.

    Args:
        guest: its name.
        moment: where it is to be held.
        harm: what is to be done to it alone.
        proxy: the network between its two relays.
        origin, goal: where it leaves and where it is to arrive.
    """

    guest: str
    moment: Moment
    harm: str
    proxy: ChaosProxy
    origin: Side
    goal: Side
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    xl: "subprocess.Popen[bytes] | None" = None
    errors: Path = Path()

    @property
    def said(self) -> str:
        """What xl and its transport have said."""
        return self.errors.read_text()

    @property
    def holder(self) -> int:
        """The process id of its `korora xl`."""
        return next(pid for pid in _with_words(b"korora", b"xl", b"--daemon") if str(self.proxy.port) in _words(pid))


class Scene:
    """Both hosts and all guests; ``scene`` makes one."""

    def __init__(self, folder: Path, site: Site, cases: Iterable[Case]) -> None:
        self.folder = folder
        self.alpha, self.beta = Side(site, "alpha", folder), Side(site, "beta", folder)
        self.alpha.meet(self.beta)
        self.beta.meet(self.alpha)
        self._turns = asyncio.Semaphore(AT_ONCE)
        target = ("127.0.0.1", self.beta.daemon.port)
        self.crossings = [
            Crossing(f"g{number}", moment, harm, ChaosProxy(target), self.alpha, self.beta)
            for number, (moment, harm) in enumerate(cases, 1)
        ]

    # ---- on the way

    async def begin(self) -> None:
        """All guests leave alpha, and come to their moments."""
        for one in self.crossings:
            self.alpha.xen.create(one.guest, one.uuid, pages=PAGES)
        await asyncio.gather(asyncio.to_thread(self.alpha.start), asyncio.to_thread(self.beta.start))
        await asyncio.gather(*(self._hold(one) for one in self.crossings))
        await asyncio.gather(*(self._bring(one) for one in self.crossings))  # quickly: a way that is stalled is missed

    def _step(self, one: Crossing) -> tuple[Side, str]:
        """Where its xl is held."""
        moment = one.moment
        side, step = (one.origin, moment.source) if moment.source else (one.goal, moment.destination)
        return side, f"{step}@{one.guest}"

    async def _hold(self, one: Crossing) -> None:
        side, step = self._step(one)
        side.xen.fault(step, "hold")
        async with self._turns:
            self.migrate(one, f"127.0.0.1:{one.proxy.port}")
            await self.until(lambda: side.xen.reached(step), f"{one.guest} never came to {step}")

    async def _bring(self, one: Crossing) -> None:
        moment = one.moment
        if moment.stall is not None:
            if moment.facts:
                one.proxy.stall_behind(Kind.CONTROL, moment.stall, FACTS_BYTES_MIN)
            else:
                one.proxy.stall(ways=(moment.stall,), swallow=False)
            side, step = self._step(one)
            side.xen.heal(step)
        await self.until(lambda: self.stands(one.guest) == moment.stands, f"{one.guest} is not {moment.name}")

    async def move(self, one: Crossing) -> None:
        """Migrate a guest, with nothing to disturb it."""
        async with self._turns:
            self.migrate(one, one.goal.daemon.address)
            await self.until(lambda: one.xl is None or one.xl.poll() is not None, f"{one.guest}: xl does not end")

    def migrate(self, one: Crossing, address: str) -> None:
        """Let xl migrate a guest."""
        origin = one.origin
        one.errors = self.folder / f"{one.guest}.{origin.name}.err"
        command = f"{sys.executable} -m korora xl --daemon {origin.socket} {address}"
        with one.errors.open("ab") as errors:
            one.xl = subprocess.Popen(
                [origin.xen.program, "migrate", "-s", "", one.guest, command],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )

    def go_on(self, *some: Crossing) -> None:
        """Nobody, or none of these, is held any more."""
        for one in some or self.crossings:
            side, step = self._step(one)
            side.xen.heal(step)

    def mend(self) -> None:
        """The network carries everything again."""
        for one in self.crossings:
            one.proxy.heal()

    # ---- how it stands

    def stands(self, guest: str) -> tuple[str, str]:
        """Both journals."""
        return self.alpha.stands(guest), self.beta.stands(guest)

    async def until(self, condition: Callable[[], object], what: str, seconds: float = STEP_SECONDS) -> None:
        """Ask again and again."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():  # noqa: ASYNC110 - what is asked for comes from other processes
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise AssertionError(f"{what}\n{self.story()}") from None

    def story(self) -> str:
        """What may explain a failure."""
        lines = [f"{self.alpha.xen.states} | {self.beta.xen.states}"]
        for side in (self.alpha, self.beta):
            lines += [f"--- {side.name}"]
            for record in side.records:
                entries = [f"{entry.at[14:23]} {entry.state} ({entry.why})" for entry in record.entries]
                lines += [f"{record.vm.name} {record.head.side} settled={record.settled}: {' · '.join(entries)}"]
            lines += side.daemon.log().splitlines()[-60:]
        lines += [f"--- {one.guest}, {one.moment.name}, {one.harm}\n{one.said}" for one in self.crossings]
        return "\n".join(lines)

    def settled(self) -> bool:
        """Whether nothing is left to be done anywhere, and every xl has ended."""
        return all(one.xl is None or one.xl.poll() is not None for one in self.crossings) and all(
            record.settled for side in (self.alpha, self.beta) for record in side.records
        )

    def where(self, guest: str) -> str:
        """On which host exactly one copy of a guest runs, under its name, with no other copy anywhere."""
        found = [
            (side.name, name, state)
            for side in (self.alpha, self.beta)
            for name, state in side.xen.states.items()
            if re.fullmatch(rf"{guest}(--.*)?", name)
        ]
        assert [(name, state) for _, name, state in found] == [(guest, "running")], (found, self.story())
        return found[0][0]

    def check_never_two(self) -> None:
        """At no time two copies of one guest ran, over both hosts."""
        for one in self.crossings:
            events = sorted(
                event for side in (self.alpha, self.beta) for event in side.xen.runs if event[1] == one.uuid
            )
            together = list(accumulate(change for *_, change in events))
            assert max(together) == 1, (one.guest, events, self.story())

    async def close(self) -> None:
        """Nothing is left of it."""
        for one in self.crossings:
            if one.xl is not None:
                with suppress(StopIteration):
                    os.kill(one.holder, signal.SIGKILL)
                one.xl.kill()
                one.xl.wait()
        for side in (self.alpha, self.beta):
            if side.daemon.process is not None:
                await asyncio.to_thread(side.kill)
            side.xen.end()


@asynccontextmanager
async def scene(
    folder: Path,
    cases: Iterable[Case] = tuple((moment, "") for moment in MOMENTS),
    prepare: Callable[[Scene], object] = lambda _: None,
) -> AsyncIterator[Scene]:
    """Every guest is at its moment.

    Args:
        folder: an empty one.
        cases: the moments, and what is to be done there to that guest alone; all moments, and nothing.
        prepare: what is to be done before anything begins.
    """
    site = Site(folder)
    made = Scene(folder, site, cases)
    async with AsyncExitStack() as stack:
        stack.callback(site.close)
        for one in made.crossings:
            await stack.enter_async_context(one.proxy)
        stack.push_async_callback(made.close)
        await asyncio.to_thread(prepare, made)
        await made.begin()
        yield made


def _with_words(*words: bytes) -> Iterable[int]:
    """Processes whose command lines have all these words."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if set(words) <= set(path.read_bytes().split(b"\0")):
                yield int(path.parent.name)


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""

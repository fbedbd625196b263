"""One migration between real Xen hosts that something happens to, and what has to be true of every one.

Each has a guest (`Guest.kind` "beat"), which goes from a to b. However it went: the numbers it says, heard on both
hosts, go on without one missing and without one twice, so that there was never a moment with two copies or with older
memory; one copy runs, under its own name, and nothing else is left of it or of the migration; the journals say so,
and xl's exit code. Where it has stayed on a, the next migration is its own again, with what happens to that, so that
retries meet whatever may be left behind; the last of them is left alone, and goes through.
"""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.e2e.xen.agent import Done
from tests.e2e.xen.daemons import (
    DESTINATION,
    PASSING,
    Records,
    check_counts_on,
    records_of,
    serve_again,
    served,
    settled,
)
from tests.e2e.xen.host import Guest, XenHost
from tests.e2e.xen.points import PRELOADED, arm, disarm, reached
from tests.e2e.xen.rig import Pair, XenRig

CARRIER = f"korora xl {DESTINATION}"
COMMAND_SECONDS = 90.0  # for `xl migrate` to end once what happened is over
NOBODY_SECONDS = 10.0
LOOK_SECONDS = 0.3
BEATS = 5  # heard after it all, before the guest is believed
RESUME_SECONDS = 3  # of sessions: how long a cut may last before it ends them
OPAQUE = 'encode = "opaque"\n'  # four MiB need no encoding
LIMITS = f"resume_timeout = {RESUME_SECONDS}\n"
WORKER = r"korora\.daemon\.worker"
RECEIVER = "xl.* migrate-receive"
XL_FAILED = 1


@dataclass(frozen=True)
class Moment:
    """Where a migration is when it happens: what stops there, and on which host ("a" or "b")."""

    host: str
    point: str

    def __str__(self) -> str:
        return f"{self.host} {self.point}"


@dataclass
class Migration:
    """One that is under way, stopped at its moment."""

    two: Pair
    name: str
    at: XenHost
    """Where something has stopped."""
    pid: int
    """What has."""
    command: int
    """`xl migrate`."""
    earlier: frozenset[str]
    """Sessions that its host's journal had before."""
    killed: set[str] = field(default_factory=set)
    """What has been killed, of xl and korora, on the source: its exit code then says nothing."""

    async def go_on(self) -> None:
        """Nothing is stopped any more."""
        await self.at.agent.kill(self.pid, signal.SIGCONT)


Happens = Callable[[Migration], Awaitable[None]]
"""What happens at the moment; when it returns nothing is stopped, and the network is whole."""


# ---- what can happen


def cut(seconds: float) -> Happens:
    """The link between the hosts is gone for so long, and then is there again."""

    async def happens(it: Migration) -> None:
        await it.two.to_b.proxy.blackout(seconds, silence=False)
        await it.go_on()
        await asyncio.sleep(seconds)  # it is the cut that lasts so long

    return happens


def silent(seconds: float) -> Happens:
    """Every packet is lost for so long."""

    async def happens(it: Migration) -> None:
        await it.two.to_b.proxy.blackout(seconds, silence=True)
        await it.go_on()
        await asyncio.sleep(seconds)

    return happens


def frozen(seconds: float) -> Happens:
    """The destination's host stands still for so long."""

    async def happens(it: Migration) -> None:
        await it.two.b.freeze()
        if it.at is not it.two.b:
            await it.go_on()
        await asyncio.sleep(seconds)
        await it.two.b.thaw()
        await it.go_on()

    return happens


def relay_killed(where: str) -> Happens:
    """The process that has the sessions dies; the daemon starts another one."""

    async def happens(it: Migration) -> None:
        host = host_of(it.two, where)
        [worker] = await host.processes(WORKER)
        await host.agent.kill(worker)
        await it.go_on()

    return happens


def daemon_killed(where: str) -> Happens:
    """The daemon dies with all its processes, and is started again."""

    async def happens(it: Migration) -> None:
        host = host_of(it.two, where)
        await host.agent.kill("daemon", group=True)
        await it.go_on()
        await host.ended("daemon")
        await serve_again(host)

    return happens


def xl_killed(where: str) -> Happens:
    """The host's xl that migrates dies."""

    async def happens(it: Migration) -> None:
        if where == "a":
            it.killed.add("xl")
            await it.two.a.agent.kill(it.command)
        else:
            for pid in await it.two.b.processes(RECEIVER):
                await it.two.b.agent.kill(pid)
        await it.go_on()

    return happens


async def carrier_killed(it: Migration) -> None:
    """`korora xl` dies, which holds xl's pipes."""
    it.killed.add("korora")
    [carrier] = await it.two.a.processes("python3.* -m korora xl ")
    await it.two.a.agent.kill(carrier)
    await it.go_on()


# ---- a case


@asynccontextmanager
async def pair_for_cuts(rig: XenRig) -> AsyncIterator[Pair]:
    """Two hosts with daemons, and no guest yet."""
    async with served(rig, None, xl=OPAQUE, limits=LIMITS) as two:
        yield two


async def run_case(two: Pair, name: str, moment: Moment, happens: Happens) -> str:
    """Migrate a guest, let `happens` happen at `moment`, and check everything; where the guest was after it."""
    it = await until(two, name, moment)
    await happens(it)
    return await check_end(two, it)


async def go_through(two: Pair, names: Sequence[str]) -> None:
    """What has stayed on a after all that happened moves now, and nothing happens to it."""
    its = [await start(two, name) for name in names]
    if its:
        assert await check_ends(two, its) == ["b"] * len(its)


async def until(two: Pair, name: str, moment: Moment) -> Migration:
    """Start a migration and bring it to its moment."""
    at = host_of(two, moment.host)
    await arm(at, moment.point)
    it = await start(two, name)
    try:
        it.at, it.pid = at, await reached(at)
    except TimeoutError:
        raise AssertionError(f"{moment} was never reached: {await two.a.agent.state(f'migrate-{name}')}") from None
    return it


async def start(two: Pair, name: str) -> Migration:
    """Type `xl migrate`."""
    earlier = frozenset(record["session"] for record in await records_of(two.a))
    carrier = CARRIER.replace("korora xl", f"korora xl --report /run/{name}.json")
    command = await two.a.spawn(f"migrate-{name}", ["xl", "migrate", "-s", "", name, carrier], env=PRELOADED)
    return Migration(two, name, two.a, command, command, earlier)


async def check_end(two: Pair, it: Migration) -> str:
    """What has to be true once it is over: see above."""
    for host in two.hosts:
        await disarm(host)
    [where] = await check_ends(two, [it])
    return where


async def check_ends(two: Pair, its: Sequence[Migration]) -> list[str]:
    """The same of several that were under way at once."""
    for it in its:
        await two.a.ended(f"migrate-{it.name}", COMMAND_SECONDS)
    records = await settled(two)
    places = [await check_one_copy(two, it.name) for it in its]
    for host in two.hosts:
        await check_nobody(host)
    for it, where in zip(its, places, strict=True):
        check_told(records, it, where, await two.a.agent.state(f"migrate-{it.name}"))
    for it, where in zip(its, places, strict=True):
        if where == "b":
            await two.b.check(["xl", "destroy", it.name])
    return places


async def check_nobody(host: XenHost) -> None:
    """No process of a migration is left; `korora xl` ends a moment after xl, which does not wait for it."""
    end = time.monotonic() + NOBODY_SECONDS
    while left := await host.processes(PASSING):
        assert time.monotonic() < end, (host.name, left, await host.check(["ps", "-o", "pid,args"]))
        await asyncio.sleep(LOOK_SECONDS)


async def check_one_copy(two: Pair, name: str) -> str:
    """One copy, and no trace of another; it has counted on. The host it is on."""
    found = [(host, domain) for host, domain in await two.domains() if domain.name.split("--")[0] == name]
    assert [domain.name for _, domain in found] == [name], found
    [(where, domain)] = found
    assert not domain.paused, found
    assert not domain.suspended, found
    incoming = await two.b.console(f"{name}--incoming")
    if where == "b":
        await check_counts_on([(two.a, name), (two.b, f"{name}--incoming")], BEATS)
        return where
    assert incoming.beats == [], incoming.beats  # a copy that never ran
    await two.a.wait_beat(name, await two.a.counter(name) + BEATS)
    beats = (await two.a.console(name)).beats
    assert [beat.number for beat in beats] == list(range(len(beats)))
    assert not any(beat.bad for beat in beats)
    return where


def check_told(records: Records, it: Migration, where: str, done: Done) -> None:
    """Journals and exit code say what happened."""
    mine = [record for record in records["a"] if record.get("name") == it.name and record["session"] not in it.earlier]
    ends = [record["state"] for record in mine]
    assert ends in (["done"] if where == "b" else ["aborted"], [] if where == "a" else ["done"]), (ends, where)
    sessions = {record["session"] for record in mine}
    theirs = [record["state"] for record in records["b"] if record["session"] in sessions]
    assert theirs in (["done"] if where == "b" else ["aborted"], [] if where == "a" else ["done"]), (theirs, where)
    if not it.killed:
        assert done.rc == (0 if where == "b" else XL_FAILED), (where, done)
        assert ("korora: error: " in done.err) == (where == "a"), done


def host_of(two: Pair, name: str) -> XenHost:
    """Host a or b."""
    return two.a if name == "a" else two.b


# ---- many


@dataclass(frozen=True)
class Case:
    """What happens, when, and where the guest may be afterwards ("a", "b", or either: "ab")."""

    words: str
    moment: Moment
    happens: Happens
    ends: str = "ab"


async def run_all(two: Pair, cases: Sequence[Case], seconds: float) -> None:
    """One after the other in one pair of hosts; the first that goes wrong ends it, with all that is known of it."""
    name = ""
    for number, case in enumerate(cases):
        began = time.monotonic()
        words = f"{case.words} at {case.moment}"
        try:
            async with asyncio.timeout(seconds):
                if not name:
                    name = f"c{number}"
                    await two.a.create(Guest(name, "beat"))
                where = await run_case(two, name, case.moment, case.happens)
            assert where in case.ends, (where, case.ends)
        except Exception as error:
            raise AssertionError(f"{words}: {error!r}") from error
        print(f"{words}: {name} runs on {where} ({time.monotonic() - began:.1f} s)", flush=True)
        if where == "b":
            name = ""
    async with asyncio.timeout(seconds):
        await go_through(two, [name] if name else [])

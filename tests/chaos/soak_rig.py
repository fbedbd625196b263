"""What a soak runs on: two daemons with several ways between them, and a pair of ad hoc relays beside them.

A `Line` is what lies between two hosts: a chaos proxy in a process of its own, and the record of what it was ordered
to do, so that a session that ended badly can be held against what happened to it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from crypto.pki import Authority
from tests.attacks.processes import Hosts
from tests.attacks.wire import Kind, Way
from tests.chaos.daemons import Daemon, configure
from tests.chaos.faults import Faults
from tests.chaos.load import Backend
from tests.chaos.proxy_process import ChaosProcess
from tests.chaos.relays import Usage, Watched, receiver, sender

EXIT_AUTHENTICATION, EXIT_INTEGRITY, EXIT_LOST = 4, 5, 6
BEFORE_ACCEPT: Final = frozenset({EXIT_AUTHENTICATION, EXIT_LOST})
"""What may become of a session that is struck before it has been accepted."""
DAEMON_LANES: Final = (1, 3)
"""Of the daemons' ways, by turns."""
PAIR_LANES: Final = 2
AFTERMATH_SECONDS: Final = 2.0  # a session that begins so soon after a strike may still meet it
VERDICT_SECONDS_MAX: Final = 60.0


@dataclass(slots=True)
class Strike:
    """Something that was done to a line, and what it excuses."""

    what: str
    began: float
    codes: frozenset[int]
    """What an open session may end with because of it."""
    ended: float | None = None


class Line:
    """One chaos proxy and what it has done.

    Args:
        proxy: carries the line.
        patience: `--resume-timeout` of the relays: whether they survive a loss.
    """

    def __init__(self, proxy: ChaosProcess, patience: int) -> None:
        self.proxy = proxy
        self.strikes: list[Strike] = []
        self._lost = frozenset() if patience else frozenset({EXIT_LOST})
        self._loop = asyncio.get_running_loop()

    async def weather(self, forward: Faults, backward: Faults) -> None:
        """Splits, delays, rates: they excuse nothing."""
        await self.proxy.order("weather", forward=asdict(forward), backward=asdict(backward))

    async def reset(self, kind: Kind) -> None:
        """Every open lane, or every control connection."""
        async with self._strike(f"reset {kind.value}", self._lost):
            await self.proxy.order("reset", kind=kind.value)

    async def blackout(self, seconds: float, *, silence: bool) -> None:
        """Nothing passes for a while; a short silence is no loss."""
        async with self._strike("silence" if silence else "blackout", frozenset() if silence else self._lost):
            await self.proxy.order("blackout", seconds=seconds, silence=silence)
            await asyncio.sleep(seconds)

    async def flip(self, way: Way) -> None:
        """One bit of a lane."""
        async with self._strike(f"flip {way.value}", frozenset({EXIT_INTEGRITY})):
            flips = (await self.proxy.order("flip", kind=Kind.LANE.value, way=way.value))["flips"]
            for _ in range(20):
                await asyncio.sleep(0.05)
                if (await self.proxy.order("tell"))["flips"] > flips:
                    break
            await self.proxy.order("calm")

    async def calm(self) -> None:
        """Nothing more happens."""
        await self.proxy.order("calm")

    @asynccontextmanager
    async def _strike(self, what: str, codes: frozenset[int]) -> AsyncIterator[None]:
        strike = Strike(what, self._loop.time(), codes)
        self.strikes.append(strike)
        try:
            yield
        finally:
            strike.ended = self._loop.time()

    def excuses(self, began: float, ended: float, *, accepted: bool) -> frozenset[int]:
        """What a session of that time may have ended with because of what happened to its line."""
        codes: frozenset[int] = frozenset()
        for strike in self.strikes:
            if strike.began <= ended and (strike.ended is None or strike.ended + AFTERMATH_SECONDS >= began):
                codes |= strike.codes
                if not accepted and strike.what != "silence":
                    codes |= BEFORE_ACCEPT
        return codes


@dataclass(eq=False, slots=True)
class Route:
    """One way that virtual machines take, from the source's hypervisor to the destination's."""

    name: str
    port: int
    backend: Backend
    line: Line
    source: Watched
    destination: Watched
    ingress: str | None
    """The daemon's name for it; None where a relay has only one."""
    given: set[int] = field(default_factory=set)

    def _mine(self, event: dict[str, Any]) -> bool:
        return self.ingress is None or (event["role"] == "source" and event["way"] == self.ingress)

    def fresh(self) -> list[dict[str, Any]]:
        """Verdicts of the source that have not been asked for yet; those of sessions that never opened are nobody's."""
        return [event for event in self.source.verdicts if id(event) not in self.given and self._mine(event)]

    def take(self) -> list[dict[str, Any]]:
        """The same, and never again."""
        events = self.fresh()
        self.given |= {id(event) for event in events}
        return events

    async def answer(self, session: str, seconds: float) -> int | None:
        """The destination's exit code of a session; None if it has none within `seconds`."""

        def matches(event: dict[str, Any]) -> bool:
            verdict = event.get("event") in {"session done", "session failed"} and event.get("session") == session
            return verdict and event.get("role", "destination") == "destination"

        try:
            event = await self.destination.told(matches, seconds=seconds)
        except TimeoutError:
            return None
        return int(event.get("exit_code", 0))


@dataclass(slots=True)
class Rig:
    """Everything that runs."""

    routes: list[Route]
    lines: list[Line]
    daemons: list[Daemon]
    relays: dict[str, Watched]
    destination_ports: dict[str, int]
    """Where strangers find the destinations' relays."""
    authority: Authority
    reloading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One at a time: what a SIGHUP was answered with must be known to be its answer."""

    @property
    def usages(self) -> dict[str, Usage]:
        """What every process of the relays holds now."""
        found = {name: relay.usage for name, relay in self.relays.items()}
        for daemon in self.daemons:
            found |= daemon.usages
        return found

    @property
    def ended(self) -> str | None:
        """Which process has ended, or fell over, meanwhile."""
        watched = [*self.relays.items(), *((daemon.name, daemon) for daemon in self.daemons)]
        for name, relay in watched:
            if relay.process.returncode is not None:
                return f"{name} has ended with {relay.process.returncode}: {relay.lines[-3:]}"
            if any("Traceback" in line for line in relay.lines):
                return f"{name} wrote a traceback: {relay.lines[-10:]}"
            for event in relay.events:
                if event.get("event") in {"a worker died", "internal error"}:
                    return f"{name}: {event}"
        return None

    def renew(self, daemon: Daemon) -> None:
        """A new certificate and key, for its next reload."""
        self.authority.issue(daemon.name, out=daemon.host.identity, force=True, now=datetime.now(UTC))


@asynccontextmanager
async def rig(folder: Path, *, ways: int, seed: int, patience: int) -> AsyncIterator[Rig]:
    """All of it; gone afterwards.

    Args:
        folder: for identities, configurations and state.
        ways: of the daemons.
        seed: of the lines.
        patience: `--resume-timeout` and its like.
    """
    async with AsyncExitStack() as stack:
        authority = Authority.create(folder / "ca", now=datetime.now(UTC))
        backends = [await stack.enter_async_context(Backend()) for _ in range(ways + 1)]

        # The daemons: identities of their own, because reloads renew them.
        alpha, beta, ports = configure(authority, folder, backends[:-1], lanes=DAEMON_LANES)
        alpha.settings = beta.settings = f"[limits]\nresume_timeout = {patience}\n"
        receiving = await stack.enter_async_context(Daemon(beta))
        await receiving.serving()
        chaos = await stack.enter_async_context(ChaosProcess(("127.0.0.1", beta.port), seed=seed))
        alpha.peer("beta", f"127.0.0.1:{chaos.port}")
        sending = await stack.enter_async_context(Daemon(alpha))
        await sending.serving()
        line = Line(chaos, patience)
        routes = [
            Route(f"daemons {index}", port, backend, line, sending, receiving, f"vm{index}")
            for index, (port, backend) in enumerate(zip(ports, backends, strict=False))
        ]

        # The pair beside them.
        now = datetime.now(UTC)
        hosts = Hosts(
            *(authority.issue(name, out=folder / f"{name}.pair", now=now).directory for name in ("alpha", "beta"))
        )
        words = ("--resume-timeout", str(patience), "--lanes", str(PAIR_LANES))
        receive = await stack.enter_async_context(receiver(hosts, backends[-1], *words))
        listening = await receive.listening()
        chaos = await stack.enter_async_context(ChaosProcess(("127.0.0.1", listening), seed=seed + 1))
        send = await stack.enter_async_context(sender(hosts, chaos.port, *words))
        other = Line(chaos, patience)
        routes.append(Route("pair", await send.listening(), backends[-1], other, send, receive, None))
        yield Rig(
            routes,
            [line, other],
            [sending, receiving],
            {"send": send, "receive": receive},
            {"beta": beta.port, "receive": listening},
            authority,
        )

"""What happens in a soak: one act after another on each route, drawn from a seed, each with what it must end with."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Final

from crypto.tls import TlsConfig
from tests.attacks.wire import Kind, Way
from tests.chaos.faults import QUIET, Faults
from tests.chaos.flood import Flood, flooding
from tests.chaos.load import KIB, MIB, Ends, Talk, eventually, talk_through
from tests.chaos.soak_rig import VERDICT_SECONDS_MAX, Rig, Route

DONE: Final = frozenset({0})
FAILED: Final = frozenset({7})
REFUSED_HERE: Final = frozenset({7})
SOON_SECONDS: Final = 2.0  # for a verdict that may never come
QUIET_SECONDS: Final = 1.0  # without a further verdict, after which a session that broke has broken all of it
DISTURBANCE_SECONDS_MAX: Final = 10.0  # of waiting for a session to be under way
IDLE_SECONDS: Final = 6.0  # above one heartbeat

During = Callable[[], Awaitable[None]]


class Wrong(AssertionError):
    """A session ended as it must not."""


@dataclass(slots=True)
class Tally:
    """What became of one kind of act."""

    acts: int = 0
    sessions: int = 0
    bytes: int = 0
    seconds: float = 0.0
    codes: dict[str, int] = field(default_factory=dict)


class Actor:
    """Plays acts on one route.

    Args:
        rig: everything.
        route: its own.
        seed: of what it does; its number on top makes the streams' seeds.
        tallies: where it counts.
        stranger: an identity that may shake hands.
    """

    def __init__(self, rig: Rig, route: Route, seed: int, tallies: dict[str, Tally], stranger: TlsConfig) -> None:
        self._rig, self.route, self._stranger = rig, route, stranger
        self.dice = random.Random(f"{seed} {route.name}")
        self._seeds = count(self.dice.randrange(2**40) << 20)
        self._tallies = tallies
        self._loop = asyncio.get_running_loop()
        self.act = "nothing yet"
        self._acts: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "churn": (6, self._churn),
            "tiny": (3, self._tiny),
            "large": (4, self._large),
            "duplex": (4, self._duplex),
            "weather": (4, self._weather),
            "idle": (1, self._idle),
            "abort": (4, self._abort),
            "refuse": (2, self._refuse),
            "flood": (2, self._flood),
            "lanes reset": (
                4,
                lambda: self._struck(lambda: self.route.line.reset(Kind.LANE), self.dice.randint(1, 4)),
            ),
            "control reset": (3, lambda: self._struck(lambda: self.route.line.reset(Kind.CONTROL), 2)),
            "blackout": (2, lambda: self._struck(lambda: self.route.line.blackout(1.0, silence=False), 1)),
            "silence": (2, lambda: self._struck(lambda: self.route.line.blackout(1.0, silence=True), 1)),
            "flip": (3, lambda: self._struck(lambda: self.route.line.flip(self.dice.choice(list(Way))), 1)),
            "reload": (3 if route.ingress else 0, self._reload),
        }

    async def play(self) -> None:
        """One act.

        Raises:
            Wrong, WrongBytes: it did not end as it must.
        """
        names = list(self._acts)
        self.act = self.dice.choices(names, [self._acts[name][0] for name in names])[0]
        tally = self._tallies.setdefault(self.act, Tally())
        tally.acts += 1
        began = self._loop.time()
        await self._acts[self.act][1]()
        tally.seconds += self._loop.time() - began

    # ---- acts

    def _talk(self, forward: int, backward: int) -> Talk:
        return Talk(next(self._seeds), forward, backward)

    async def _churn(self) -> None:
        """Short sessions one after another."""
        for _ in range(self.dice.randint(3, 12)):
            await self.session(self._talk(self.dice.randrange(200 * KIB), self.dice.randrange(100 * KIB)))

    async def _tiny(self) -> None:
        """Writes of a byte or a few."""
        await self.session(replace(self._talk(4000, 4000), writes=(1, 1, 1, 2, 3)))

    async def _large(self) -> None:
        """Far more than the buffers hold."""
        await self.session(self._talk(self.dice.randint(32, 160) * MIB, self.dice.randrange(8 * MIB)))

    async def _duplex(self) -> None:
        """Several channels, both ways at full speed."""
        size = self.dice.randint(1, 8) * MIB
        await self.session(*(self._talk(size, size) for _ in range(self.dice.randint(2, 8))))

    async def _weather(self) -> None:
        """A slow, late or crumbling line."""
        kinds = [
            Faults(split_bytes=self.dice.randint(100, 4000)),
            Faults(delay_seconds=self.dice.uniform(0.001, 0.08), jitter_seconds=0.02),
            Faults(bytes_per_second=self.dice.randint(4, 32) * MIB),
        ]
        faults = [self.dice.choice([*kinds, QUIET]) for _ in range(2)]
        await self.route.line.weather(*faults)
        try:
            await self.session(self._talk(self.dice.randrange(6 * MIB), self.dice.randrange(3 * MIB)))
        finally:
            await self.route.line.calm()

    async def _idle(self) -> None:
        """A migration that its hypervisor has paused."""
        await self.session(self._talk(MIB, MIB), during=lambda: asyncio.sleep(IDLE_SECONDS))

    async def _abort(self) -> None:
        """One of the hypervisors dies in the middle."""
        size = self.dice.randint(1, 16) * MIB
        moment = self.dice.randint(100, size)
        near = self.dice.random() < 0.5
        dies = {"near_dies_at": moment} if near else {"far_dies_at": moment}
        await self.session(replace(self._talk(size, size), **dies), expect=FAILED)  # type: ignore[arg-type]

    async def _refuse(self) -> None:
        """The destination's hypervisor is not there, then throws everybody out, then is there."""
        backend = self.route.backend
        await backend.shut()
        try:
            await self.session(self._talk(MIB, 0), expect=REFUSED_HERE)
        finally:
            backend.open()
        backend.rude = True
        try:
            await self.session(self._talk(MIB, 0), expect=REFUSED_HERE)
        finally:
            backend.rude = False

    async def _flood(self) -> None:
        """Strangers at the destination's port beside a session."""
        port = self.dice.choice(list(self._rig.destination_ports.values()))
        flood = Flood(port, self._stranger, strangers=150, at_once=70, seed=self.dice.randrange(2**20))
        async with flooding(flood):
            await self.session(self._talk(24 * MIB, MIB))

    async def _struck(self, strike: During, times: int) -> None:
        """Something happens to the line while a session runs."""

        async def during() -> None:
            for _ in range(times):
                await strike()
                await asyncio.sleep(self.dice.uniform(0.05, 0.4))

        sizes = [
            (self.dice.randint(2, 20) * MIB, self.dice.randint(0, 8) * MIB) for _ in range(self.dice.randint(1, 3))
        ]
        await self.session(*(self._talk(*size) for size in sizes), during=during)

    async def _reload(self) -> None:
        """Either daemon takes a new configuration, refuses a bad one, or gets a new certificate, beside a session."""
        daemon = self.dice.choice(self._rig.daemons)
        kind = self.dice.choice(["good", "bad", "certificate"])

        async def during() -> None:
            if kind == "certificate":
                self._rig.renew(daemon)
            daemon.host.write()
            if kind == "bad":
                daemon.host.config.write_text(daemon.host.text() + "\n[limits]\n")
            await daemon.reload(good=kind != "bad")

        async with self._rig.reloading:
            await self.session(self._talk(8 * MIB, MIB), during=during)

    # ---- sessions

    async def session(self, *talks: Talk, expect: frozenset[int] = DONE, during: During | None = None) -> None:
        """One session of these talks, held open until `during` is through; check every code and every byte.

        Raises:
            Wrong, WrongBytes: something was not as it must be.
        """
        route = self.route
        began = self._loop.time()
        release = asyncio.Event()
        several = len(talks) > 1 or during is not None
        if several:
            talks = tuple(replace(talk, hold=release) for talk in talks)
        talking = [asyncio.ensure_future(talk_through(route.port, route.backend, talk)) for talk in talks]
        try:
            if several:
                await self._under_way(talks, talking)
                if during is not None:
                    await during()
                release.set()
            ends = await asyncio.gather(*talking)
        finally:
            for task in talking:
                task.cancel()
            await asyncio.gather(*talking, return_exceptions=True)
        await self._judge(ends, began, expect)

    async def _under_way(self, talks: tuple[Talk, ...], talking: "list[asyncio.Task[Ends]]") -> None:
        """Until each channel has said all but its last byte, or something has broken."""
        backend = self.route.backend

        def moving() -> bool:
            if any(task.done() for task in talking):
                return True
            return all(talk.seed in backend.ends for talk in talks)

        await eventually(moving, DISTURBANCE_SECONDS_MAX)

    async def _judge(self, ends: list[Ends], began: float, expect: frozenset[int]) -> None:
        route, tally = self.route, self._tallies[self.act]
        whole = all(end.whole for end in ends)
        told = "; ".join(str(end) for end in ends)
        reached = any(end.far is not None for end in ends)
        await self._verdict(told, needed=whole or reached)
        if not whole:
            await self._settled()
        events = route.take()
        ended = self._loop.time()
        excused = route.line.excuses(began, ended, accepted=reached)
        for event in events:
            source = int(event.get("exit_code", 0))
            destination = await route.answer(event["session"], VERDICT_SECONDS_MAX if reached else SOON_SECONDS)
            tally.sessions += 1
            pair = f"{source}/{'-' if destination is None else destination}"
            tally.codes[pair] = tally.codes.get(pair, 0) + 1
            for code in {source, destination} - {None}:
                if code not in expect | excused | (DONE if excused else frozenset()):
                    words = [*route.source.lines[-2:], *route.destination.lines[-2:]]
                    raise Wrong(
                        f"{pair}, expected {sorted(expect)}, excused {sorted(excused)}: {event}; {told}; {words}"
                    )
            if source == 0 and destination != 0:
                raise Wrong(f"{pair}: the source took for done what was not: {told}")
        codes = {int(event.get("exit_code", 0)) for event in events}
        if codes == {0} and not whole:
            raise Wrong(f"done, and not whole: {told}")
        if any(not (end.whole or end.cut) for end in ends):
            raise Wrong(f"neither whole nor cut: {told}")
        if expect == DONE and not excused and not whole:
            raise Wrong(f"not whole: {codes}; {told}")
        tally.bytes += sum(end.near.said + end.near.heard for end in ends)

    async def _verdict(self, told: str, *, needed: bool) -> None:
        """Until the source has judged, if it must."""
        try:
            await eventually(self.route.fresh, VERDICT_SECONDS_MAX if needed else SOON_SECONDS)
        except TimeoutError:
            if needed:
                events = self.route.source.verdicts[-3:]
                raise Wrong(f"the source never said how it went: {told}; its last verdicts: {events}") from None

    async def _settled(self) -> None:
        """Until no further verdict comes: channels of a session that broke may have begun sessions of their own."""
        seen = -1
        while len(self.route.fresh()) > seen:
            seen = len(self.route.fresh())
            await asyncio.sleep(QUIET_SECONDS)

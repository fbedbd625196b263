"""Sessions that are hit at any moment: whatever happens when, a cut stream never looks whole, and everybody ends.

Each story is drawn from its seed alone; a failure names it, and `story(seed)` tells it again.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from crypto.tls import TlsConfig
from proxy.errors import EXIT_BUG, EXIT_HYPERVISOR, EXIT_LOST, Interrupted, exit_code_of
from proxy.limits import KIB, MIB
from proxy.shell import runner as runner_module
from tests.proxy.support import Hypervisors, Middle, Pair, Wire, over_tcp, relays, run

SEEDS = range(60)
CODES = {0, EXIT_LOST, EXIT_HYPERVISOR, 143}
# A seed's story also depends on how quick the machine is: that is what makes it hit another moment each time.


@dataclass
class End:
    """One hypervisor's end of one channel: what it was to say, what it heard, and how that ended."""

    wire: Wire
    words: bytes
    dice: random.Random
    said: bool = False
    heard: bytearray = field(default_factory=bytearray)
    clean: bool = False
    dead: bool = False

    def __post_init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    async def talk(self) -> None:
        """Say it all in pieces, half-close, and hear to the end meanwhile."""
        self._tasks = [asyncio.create_task(work) for work in (self._say(), self._hear())]
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def die(self) -> None:
        """In the middle of it, as a killed process does."""
        self.dead = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.wire.reset()

    async def _say(self) -> None:
        try:
            position = 0
            while position < len(self.words):
                size = self.dice.choice([1, 100, 4 * KIB, 64 * KIB, 300 * KIB])
                await self.wire.send(self.words[position : position + size])
                position += size
                for _ in range(self.dice.randrange(3)):
                    await asyncio.sleep(0)
            self.wire.shut()
            self.said = True
        except OSError:
            # A reset is told once, here or to who hears: afterwards the socket reads as ended.
            self.dead = True

    async def _hear(self) -> None:
        with suppress(OSError):
            while piece := await self.wire.receive(self.dice.choice([1 * KIB, 64 * KIB, 256 * KIB])):
                self.heard += piece
            self.clean = True


async def nothing(*_: object) -> None:
    """The story in which nothing happens."""


async def strike(dice: random.Random, pair: Pair, middle: Middle, ends: list[tuple[End, End]]) -> str:
    """Hit something, somewhere in the middle of it; what it was."""
    for _ in range(dice.randrange(400)):
        await asyncio.sleep(0)
    near, far = dice.choice(ends)
    blows: dict[str, Callable[[], Awaitable[None] | None]] = {
        "nothing": nothing,
        "source hypervisor dies": near.die,
        "destination hypervisor dies": far.die,
        "source is stopped": lambda: stop(pair.source.current),
        "destination is stopped": lambda: stop(pair.arriving[0] if pair.arriving else None),
        "control is reset": lambda: middle.cut(0, reset=True),
        "lane is reset": lambda: middle.cut(1, reset=True),
        "control ends": lambda: middle.cut(0, reset=False),
        "lane ends": lambda: middle.cut(1, reset=False),
        "both at once": lambda: asyncio.gather(middle.cut(0, reset=True), middle.cut(1, reset=True)),  # type: ignore[dict-item, return-value]
    }
    name = dice.choice(list(blows))
    done = blows[name]()
    if done is not None:
        await done
    return name


def stop(runner: runner_module.Runner | None) -> None:
    if runner is not None:
        runner.stop(Interrupted(15))


async def story(seed: int, client: TlsConfig, server: TlsConfig) -> None:
    dice = random.Random(seed)
    hypervisors: Hypervisors = over_tcp()
    middle = Middle()
    try:
        async with relays(client, server, hypervisors.ingress, hypervisors.egress, peer_port=middle.port) as pair:
            middle.start(pair.port)
            ends = []
            for _ in range(dice.choice([1, 1, 2, 4])):
                near, far = await pair.channel(hypervisors)
                sizes = [dice.choice([0, 1, 1000, 300 * KIB, 3 * MIB]) for _ in range(2)]
                ends.append(
                    tuple(
                        End(wire, dice.randbytes(size), random.Random(seed))
                        for wire, size in zip((near, far), sizes, strict=True)
                    )
                )
            talking = asyncio.gather(*(end.talk() for both in ends for end in both))
            blow = await strike(dice, pair, middle, ends)  # type: ignore[arg-type]
            await talking
            source, destination = await pair.ended()
    finally:
        await middle.close()
        hypervisors.close()
    told = f"seed {seed}: {blow}: {source.error!r} / {destination.error!r}"
    codes = [0 if side.error is None else exit_code_of(side.error) for side in (source, destination)]
    assert set(codes) <= CODES, told
    assert EXIT_BUG not in codes, told
    for near, far in ends:
        for speaker, listener in ((near, far), (far, near)):
            assert speaker.words.startswith(bytes(listener.heard)), f"{told}: bytes that nobody said"
            if listener.clean and not listener.dead:
                assert bytes(listener.heard) == speaker.words, f"{told}: a cut stream that looks whole"
                assert speaker.said, f"{told}: an end that nobody made"
    if codes[0] == 0:
        assert codes[1] == 0, f"{told}: the source took for done what was not"
    if blow == "nothing":
        assert codes == [0, 0], told
    if not codes[1]:
        assert all(end.clean or end.dead for both in ends for end in both), told


@pytest.mark.parametrize("first", range(0, len(SEEDS), 20))
def test_whatever_happens_when(client_tls: TlsConfig, server_tls: TlsConfig, first: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for seed in SEEDS[first : first + 20]:
        run(story(seed, client_tls, server_tls))
    assert len(os.listdir("/proc/self/fd")) <= before + 2

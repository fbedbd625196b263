"""Hypervisors that talk: each end says its words in pieces and hears the other's, whatever happens between them."""

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass, field

from proxy.limits import KIB
from tests.proxy.support import Wire


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

"""Sessions that are hit at any moment: whatever happens when, a cut stream never looks whole, and everybody ends.

Each story is drawn from its seed alone; a failure names it, and `story(seed)` tells it again.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable

import pytest

from crypto.tls import TlsConfig
from proxy.errors import EXIT_BUG, EXIT_HYPERVISOR, EXIT_LOST, Interrupted, exit_code_of
from proxy.limits import KIB, MIB
from proxy.shell import runner as runner_module
from tests.proxy.support import Hypervisors, Middle, Pair, over_tcp, relays, run
from tests.proxy.talk import End

SEEDS = range(60)
CODES = {0, EXIT_LOST, EXIT_HYPERVISOR, 143}
# A seed's story also depends on how quick the machine is: that is what makes it hit another moment each time.


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

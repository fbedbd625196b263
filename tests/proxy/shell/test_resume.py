"""Connections between the relays that break at any moment: the streams stay exact, and nothing comes twice.

Each story is drawn from its seed alone; a failure names it, and `story(seed)` tells it again.
"""

import asyncio
import random
from dataclasses import dataclass

import pytest

from crypto.tls import TlsConfig
from proxy.limits import KIB, MIB
from proxy.report import SessionReport
from tests.proxy.support import Hypervisors, Middle, over_tcp, relays, run
from tests.proxy.talk import End

SECONDS_MAX = 60.0


@dataclass
class Struck:
    """What was cut in one story."""

    lanes: int = 0
    controls: int = 0


async def strike(dice: random.Random, middle: Middle, struck: Struck, *, control: bool, lanes: bool) -> None:
    """Cut something at a random moment, if it is there."""
    await asyncio.sleep(dice.random() * 0.05)
    for _ in range(dice.randrange(50)):
        await asyncio.sleep(0)
    targets = [(True, number) for number in middle.living(lanes=False)] if control else []
    targets += [(False, number) for number in middle.living(lanes=True)] if lanes else []
    if not targets:
        return
    is_control, number = dice.choice(targets)
    if is_control:
        struck.controls += 1
    else:
        struck.lanes += 1
    await middle.cut(number, reset=dice.random() < 0.6)


async def story(
    seed: int, client: TlsConfig, server: TlsConfig, *, cuts: int, control: bool, lanes: bool, refused: float = 0.0
) -> tuple[Struck, SessionReport, SessionReport]:
    dice = random.Random(seed)
    hypervisors: Hypervisors = over_tcp()
    middle = Middle()
    struck = Struck()
    try:
        async with relays(
            client,
            server,
            hypervisors.ingress,
            hypervisors.egress,
            peer_port=middle.port,
            resume_seconds=30,
            lanes=dice.choice([1, 1, 2, 3, 4]),
        ) as pair:
            middle.start(pair.port)
            ends = []
            for _ in range(dice.choice([1, 1, 2, 4])):
                near, far = await pair.channel(hypervisors)
                words = [dice.randbytes(dice.choice([0, 1000, 300 * KIB, 3 * MIB, 24 * MIB])) for _ in range(2)]
                ends.append(
                    [End(wire, said, random.Random(seed)) for wire, said in zip((near, far), words, strict=True)]
                )
            talking = asyncio.gather(*(end.talk() for both in ends for end in both))
            for _ in range(cuts):
                await strike(dice, middle, struck, control=control, lanes=lanes)
            if refused:
                middle.refuses = True
                for number in (*middle.living(lanes=False), *middle.living(lanes=True)):
                    await middle.cut(number, reset=True)
                await asyncio.sleep(refused)
                middle.refuses = False
            await talking
            source, destination = await pair.ended_well()
    finally:
        await middle.close()
        hypervisors.close()
    for near, far in ends:
        assert bytes(far.heard) == near.words, f"seed {seed}: forward"
        assert bytes(near.heard) == far.words, f"seed {seed}: backward"
        assert near.clean, seed
        assert far.clean, seed
    assert source.digest_blake3 == destination.digest_blake3, seed
    print(
        seed,
        struck,
        source.lanes,
        source.lanes_lost,
        destination.lanes_lost,
        source.resumes,
        destination.resumes,
        source.seconds,
    )
    return struck, source, destination


@pytest.mark.parametrize("seed", range(25))
def test_lanes_are_cut_at_random_moments(client_tls: TlsConfig, server_tls: TlsConfig, seed: int) -> None:
    struck, source, destination = run(
        story(seed, client_tls, server_tls, cuts=4, control=False, lanes=True), SECONDS_MAX
    )
    assert source.resumes == destination.resumes == 0
    assert source.lanes_lost <= struck.lanes + source.resumes


@pytest.mark.parametrize("seed", range(100, 112))
def test_control_is_cut_at_random_moments(client_tls: TlsConfig, server_tls: TlsConfig, seed: int) -> None:
    struck, source, destination = run(
        story(seed, client_tls, server_tls, cuts=3, control=True, lanes=False), SECONDS_MAX
    )
    # Either may count one more: an answer to RESUME may be cut as well, and a session that is done is only reported.
    assert source.resumes <= struck.controls
    assert destination.resumes <= struck.controls


@pytest.mark.parametrize("seed", range(200, 212))
def test_anything_is_cut_at_random_moments(client_tls: TlsConfig, server_tls: TlsConfig, seed: int) -> None:
    run(story(seed, client_tls, server_tls, cuts=6, control=True, lanes=True), SECONDS_MAX)


@pytest.mark.parametrize("seed", range(300, 306))
def test_the_network_is_gone_for_a_while(client_tls: TlsConfig, server_tls: TlsConfig, seed: int) -> None:
    _, source, destination = run(
        story(seed, client_tls, server_tls, cuts=1, control=True, lanes=True, refused=0.7), SECONDS_MAX
    )
    assert source.resumes >= 1
    assert destination.resumes >= 1

"""The number of lanes changes while a session runs: every byte arrives, once, whether it may resume or not."""

import asyncio
import random

import pytest

from crypto.tls import TlsConfig
from proxy.limits import MIB
from tests.proxy.support import over_tcp, relays, run
from tests.proxy.talk import End

SECONDS_MAX = 20.0


@pytest.mark.parametrize("resume_seconds", [0, 30])
@pytest.mark.parametrize("seed", range(6))
def test_lanes_are_opened_and_left_in_the_middle(
    client_tls: TlsConfig, server_tls: TlsConfig, seed: int, resume_seconds: int
) -> None:
    async def scenario() -> None:
        hypervisors = over_tcp()
        dice = random.Random(seed)
        try:
            async with relays(
                client_tls,
                server_tls,
                hypervisors.ingress,
                hypervisors.egress,
                resume_seconds=resume_seconds,
                lanes=4,
            ) as pair:
                near, far = await pair.channel(hypervisors)
                ends = [End(wire, dice.randbytes(24 * MIB), random.Random(seed)) for wire in (near, far)]
                talking = asyncio.gather(*(end.talk() for end in ends))
                for count in (1, 4, 1, 3, 1):
                    await asyncio.sleep(0.03)
                    if pair.source.current is not None:
                        pair.source.current.set_lanes(count)
                await talking
                source, destination = await pair.ended_well()
        finally:
            hypervisors.close()
        assert bytes(ends[1].heard) == ends[0].words, seed
        assert bytes(ends[0].heard) == ends[1].words, seed
        assert source.resumes == destination.resumes == 0

    run(scenario(), SECONDS_MAX)

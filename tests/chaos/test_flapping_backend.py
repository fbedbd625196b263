"""The destination's hypervisor refuses, accepts and throws out by turns.

Why: a QEMU that waits with -incoming is started by somebody else, often a moment too late, and dies with its first
failed migration. A relay that remembers the failure, retries where nobody waits any more, or leaks what it had begun,
turns one failed migration into many. Each session must end by its own backend's doing and by nobody else's.
"""

import asyncio
from pathlib import Path

from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.chaos.load import MIB, Talk
from tests.chaos.relays import standing

EXIT_HYPERVISOR = 7
ROUNDS = 5


@on_uvloop
async def test_refusing_accepting_and_throwing_out_by_turns(hosts: Hosts, tmp_path: Path) -> None:
    async with standing(hosts, tmp_path) as pair:
        backend = pair.backend
        ends, codes = await pair.session(Talk(1, MIB, MIB))
        assert codes == (0, 0)
        before = [relay.usage for relay in (pair.send, pair.receive)]
        for turn in range(ROUNDS):
            told = f"round {turn}"
            await backend.shut()
            ends, codes = await pair.session(Talk(10 * turn + 2, MIB, MIB))
            assert codes == (EXIT_HYPERVISOR, EXIT_HYPERVISOR), told
            assert (ends[0].near.ended, ends[0].far) == ("reset", None), told
            backend.open()
            backend.rude = True
            ends, codes = await pair.session(Talk(10 * turn + 3, MIB, MIB))
            assert codes == (EXIT_HYPERVISOR, EXIT_HYPERVISOR), told
            assert (ends[0].near.ended, ends[0].far) == ("reset", None), told
            backend.rude = False
            ends, codes = await pair.session(Talk(10 * turn + 4, MIB, MIB))
            assert codes == (0, 0), told
            assert ends[0].whole, told
        for relay, usage in zip((pair.send, pair.receive), before, strict=True):
            await relay.level(usage)
        assert backend.connections == 1 + 2 * ROUNDS, "each session connects once, and never to look"


@on_uvloop
async def test_only_the_second_channel_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    """A session has one verdict: the first channel is ended with it, by a reset, whatever it has carried so far."""
    async with standing(hosts, tmp_path) as pair:
        first = Talk(1, MIB, MIB, hold=asyncio.Event())
        session = asyncio.ensure_future(pair.session(first))
        await pair.backend.held(first)
        await pair.backend.shut()
        second = await pair.talk(Talk(2, MIB, MIB))
        ends, codes = await session
        assert codes == (EXIT_HYPERVISOR, EXIT_HYPERVISOR)
        assert ends[0].cut, str(ends[0])
        assert (second.near.ended, second.far) == ("reset", None)

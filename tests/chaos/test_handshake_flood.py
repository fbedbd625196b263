"""Hundreds of strangers at the destination's port while a session runs: silent, garbling, half-way and genuine ones.

Why: a handshake costs the server a signature and a key encapsulation, a connection costs it a descriptor, and both
before it knows anything of the peer. Servers that count connections but not those that have not authenticated are
emptied by whoever can reach the port; those that refuse newcomers instead shut the honest ones out.
"""

import asyncio
from pathlib import Path

from crypto.tls import TlsConfig, TlsRole
from proxy.limits import HALF_OPEN_PER_ADDRESS_MAX
from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.attacks.strangers import House, config
from tests.chaos.flood import KINDS, Flood, flooding
from tests.chaos.load import KIB, MIB, Talk, eventually
from tests.chaos.relays import standing

STRANGERS = 1500  # in all, while sessions run
SESSIONS_MIN = 2
AT_ONCE = 120  # above what one address may have half-open
SIZE = 48 * MIB
SLOWDOWN_MAX = 30.0  # the strangers' own work shares this machine's cores: it is 3 to 6 of it
RSS_GROWTH_KIB_MAX = 64 * KIB
DESCRIPTORS_SLACK = 16  # the session's own, and those just being closed


@on_uvloop
async def test_a_session_goes_on_beside_a_flood(hosts: Hosts, tmp_path: Path, client_tls: TlsConfig) -> None:
    loop = asyncio.get_running_loop()
    stranger = config(House(tmp_path / "other").issue("mallory"), TlsRole.CLIENT)
    async with standing(hosts, tmp_path) as pair:
        await pair.session(Talk(1, SIZE, 0))
        began = loop.time()
        ends, codes = await pair.session(Talk(2, SIZE, MIB))
        alone = loop.time() - began
        before = pair.receive.usage
        peak = 0

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, pair.receive.usage.descriptors)
                await asyncio.sleep(0.02)

        flood = Flood(pair.proxy.target[1], client_tls, stranger, strangers=STRANGERS, at_once=AT_ONCE)
        async with flooding(flood) as flowing:
            watching = asyncio.ensure_future(watch())
            await eventually(lambda: flood.came >= AT_ONCE // 2)
            # A session that began before or amid them, and new ones while they last.
            sessions = 0
            while sessions < SESSIONS_MIN or not flowing.done():
                began = loop.time()
                ends, codes = await pair.session(Talk(10 + sessions, SIZE, MIB))
                elapsed = loop.time() - began
                assert codes == (0, 0), pair.send.lines
                assert ends[0].whole
                assert elapsed < SLOWDOWN_MAX * max(alone, 0.1), f"{elapsed:.2f} s, alone {alone:.2f} s"
                sessions += 1
            await flowing
            watching.cancel()
        assert flood.came == STRANGERS
        assert flood.judged == STRANGERS // KINDS
        assert sessions >= SESSIONS_MIN
        assert peak <= before.descriptors + HALF_OPEN_PER_ADDRESS_MAX + DESCRIPTORS_SLACK
        await pair.receive.level(before)
        assert pair.receive.usage.rss_kib - before.rss_kib < RSS_GROWTH_KIB_MAX
        assert pair.receive.process.returncode is None

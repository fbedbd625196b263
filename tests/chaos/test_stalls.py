"""Both halves of every connection stall: nothing arrives any more, and no end is told.

Why: a peer whose host has crashed or whose packets are dropped sends no reset. Without heartbeats a relay waits for
it for hours, and with it a hypervisor whose VM is paused for its last pages.
"""

import asyncio

import pytest

from crypto.tls import TlsConfig
from proxy.errors import EXIT_LOST, exit_code_of
from proxy.limits import HEARTBEATS_MISSED_MAX
from tests.attacks.relays import shorten
from tests.attacks.wire import Kind, Way
from tests.chaos.proxy import ChaosProxy
from tests.proxy.support import over_tcp, relays, run

BEAT_SECONDS = 0.1
WHERE: dict[str, tuple[Kind | None, tuple[Way, ...]]] = {
    "everything": (None, tuple(Way)),
    "everything forward": (None, (Way.FORWARD,)),
    "everything backward": (None, (Way.BACKWARD,)),
    "control": (Kind.CONTROL, tuple(Way)),
}


@pytest.mark.parametrize("swallow", [True, False], ids=["swallowed", "held"])
@pytest.mark.parametrize("where", WHERE)
def test_a_stall_is_noticed_by_heartbeats(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch, where: str, *, swallow: bool
) -> None:
    """Both hypervisors see a reset, not before heartbeats were really missed and not long after."""
    shorten(monkeypatch, HEARTBEAT_SECONDS=BEAT_SECONDS, DRAIN_SECONDS_MAX=0.2)  # nobody answers a farewell

    async def story() -> None:
        loop = asyncio.get_running_loop()
        hypervisors = over_tcp()
        try:
            async with (
                ChaosProxy() as proxy,
                relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress, peer_port=proxy.port) as pair,
            ):
                proxy.target = ("127.0.0.1", pair.port)
                near, far = await pair.channel(hypervisors)
                await near.send(b">")
                assert await far.exactly(1) == b">"
                kind, ways = WHERE[where]
                began = loop.time()
                proxy.stall(kind, ways, swallow=swallow)
                assert await near.broken()
                assert await far.broken()
                assert loop.time() - began >= BEAT_SECONDS * (HEARTBEATS_MISSED_MAX - 1)
                ended = await pair.ended()
                codes = [0 if side.error is None else exit_code_of(side.error) for side in ended]
                assert codes == [EXIT_LOST, EXIT_LOST], ended
        finally:
            hypervisors.close()

    run(story())

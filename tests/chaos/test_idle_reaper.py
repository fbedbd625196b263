"""Strangers that say nothing, or stop in the middle, are let go in time; a session that has nothing to say is not.

Why: an idle limit is what frees a server of dead peers, and what kills a migration that its hypervisor has paused. The
two are told apart by who has authenticated and by heartbeats, never by how long no data came.
"""

import asyncio
import socket

import pytest

from crypto.tls import TlsConfig
from proxy.limits import HEARTBEATS_MISSED_MAX
from tests.attacks.relays import shorten
from tests.attacks.rogue import Control
from tests.proxy.support import over_tcp, relays, run

BEAT_SECONDS = 0.1
HEARTBEATS_MIN = 4
STRANGER_SECONDS = 0.3
AFTER_SECONDS_MAX = 5.0  # a busy machine's; the limits above are what is checked from below
EACH = 5
WORDS = (
    b"",
    b"\x16\x03\x01\x10\x00\x01",  # half a handshake
    b"K",  # a byte of a lane's hello
    b"KRL1" + bytes(15),  # most of one
)


async def closed(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    try:
        while await loop.sock_recv(sock, 65536):
            pass
    except ConnectionResetError:
        return


def test_strangers_go_and_the_session_stays(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = ("FIRST_BYTE_SECONDS_MAX", "HANDSHAKE_SECONDS_MAX", "LANE_HELLO_SECONDS_MAX")
    shorten(monkeypatch, HEARTBEAT_SECONDS=BEAT_SECONDS, **dict.fromkeys(limits, STRANGER_SECONDS))

    async def stranger(port: int, words: bytes) -> float:
        loop = asyncio.get_running_loop()
        with socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", port))
            began = loop.time()
            await loop.sock_sendall(sock, words)
            await closed(sock)
            return loop.time() - began

    async def story() -> None:
        loop = asyncio.get_running_loop()
        hypervisors = over_tcp()
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress) as pair:
                near, far = await pair.channel(hypervisors)
                began = loop.time()
                strangers = (stranger(pair.port, words) for words in WORDS * EACH)
                times = await asyncio.gather(*strangers)
                assert min(times) >= STRANGER_SECONDS * 0.9, "none was thrown out before its time"
                assert max(times) < STRANGER_SECONDS + AFTER_SECONDS_MAX
                # Not a byte of data for so many heartbeats that a peer that missed them would be lost.
                idle = max(HEARTBEATS_MIN, HEARTBEATS_MISSED_MAX + 1) * BEAT_SECONDS
                await asyncio.sleep(max(0.0, began + 2 * idle - loop.time()))
                assert not pair.source_ended.done()
                assert not pair.destination_ended.done()
                await near.send(b"awake")
                assert await far.exactly(5) == b"awake"
                near.shut()
                far.shut()
                assert (await near.to_end(), await far.to_end()) == (b"", b"")
                await pair.ended_well()
        finally:
            hypervisors.close()

    run(story())


def test_whoever_authenticates_and_offers_nothing_is_let_go(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A good certificate alone is no session."""
    shorten(monkeypatch, HANDSHAKE_SECONDS_MAX=STRANGER_SECONDS)

    async def story() -> None:
        loop = asyncio.get_running_loop()
        hypervisors = over_tcp()
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress) as pair:
                with socket.socket() as sock:
                    control = Control(sock, client_tls)
                    await loop.sock_connect(sock, ("127.0.0.1", pair.port))
                    began = loop.time()
                    await control.handshake()
                    await closed(sock)
                    assert STRANGER_SECONDS * 0.9 <= loop.time() - began < STRANGER_SECONDS + AFTER_SECONDS_MAX
                assert len(pair.refused) == 1
        finally:
            hypervisors.close()

    run(story())

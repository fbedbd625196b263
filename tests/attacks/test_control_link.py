"""A control connection whose tasks are cancelled in the middle of a read or a write: not a byte may be lost.

TLS takes a lost byte for forgery. A session that ends cancels its tasks first and tells the peer why afterwards, so a
byte lost on the way would turn each reason into "the control connection failed".
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from crypto.tls import TlsPeer
from proxy.control import Heartbeat
from proxy.errors import PeerAborted
from proxy.shell.link import ControlLink
from tests.attacks.relays import Identities, on_uvloop


@asynccontextmanager
async def links(identities: Identities) -> AsyncIterator[tuple[ControlLink, ControlLink, socket.socket]]:
    """Two ends of one connection, open; and the socket under the first."""
    first, second = socket.socketpair()
    for sock in (first, second):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    here, there = (
        ControlLink(first, TlsPeer(identities.source)),
        ControlLink(second, TlsPeer(identities.destination)),
    )
    try:
        await asyncio.gather(here.handshake(), there.handshake())
        here.mark_open()
        there.mark_open()
        yield here, there, first
    finally:
        here.drop()
        there.drop()


@pytest.mark.parametrize("turns", range(6))
@on_uvloop
async def test_a_cancelled_read_loses_nothing(identities: Identities, turns: int) -> None:
    async with links(identities) as (here, there, _):
        for number in range(3):
            reading = asyncio.create_task(here.receive())
            await asyncio.sleep(0.005)
            await there.send(Heartbeat(number, ()))
            for _ in range(turns):
                await asyncio.sleep(0)
            reading.cancel()
            (result,) = await asyncio.gather(reading, return_exceptions=True)
            if isinstance(result, asyncio.CancelledError):
                async with asyncio.timeout(2.0):
                    result = await here.receive()
            assert result == Heartbeat(number, ())


@on_uvloop
async def test_a_cancelled_write_leaves_no_half_record(identities: Identities) -> None:
    async with links(identities) as (here, there, _):

        async def flood() -> None:
            for number in range(10_000):
                await here.send(Heartbeat(number, ()))

        flooding = asyncio.create_task(flood())
        await asyncio.sleep(0.05)
        assert not flooding.done()
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)

        async def hear_all() -> None:
            for number in range(10_000):
                assert await there.receive() == Heartbeat(number, ())

        hearing = asyncio.create_task(hear_all())
        await here.abort(7, "the guest is gone")
        with pytest.raises(PeerAborted, match="the guest is gone"):
            async with asyncio.timeout(2.0):
                await hearing

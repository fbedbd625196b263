"""The control connection's time-out on one message: a peer that drips holds nothing for long."""

import asyncio
import socket

import pytest

from crypto.tls import TlsConfig, TlsPeer
from proxy.control import Heartbeat, encode
from proxy.errors import PeerLost
from proxy.shell import link as link_module
from proxy.shell.link import ControlLink


async def linked(client_tls: TlsConfig, server_tls: TlsConfig) -> tuple[ControlLink, ControlLink]:
    near, far = socket.socketpair()
    for sock in (near, far):
        sock.setblocking(False)
    source, destination = ControlLink(near, TlsPeer(client_tls)), ControlLink(far, TlsPeer(server_tls))
    await asyncio.gather(source.handshake(), destination.handshake())
    source.mark_open()
    destination.mark_open()
    return source, destination


async def test_a_message_that_drips_in_ends_the_connection(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "CONTROL_SECONDS_MAX", 0.2)
    source, destination = await linked(client_tls, server_tls)
    message = encode(Heartbeat(0, ()))

    async def drip() -> None:
        for byte in message[:-1]:
            source.tls.send(bytes([byte]))
            await source._flush()
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    try:
        with pytest.raises(PeerLost, match="did not end"):
            await destination.receive()
        assert not dripping.done(), "the time-out runs from the message's first byte, not from its last"
    finally:
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        source.drop()
        destination.drop()


async def test_silence_between_messages_is_no_slow_message(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "CONTROL_SECONDS_MAX", 0.05)
    source, destination = await linked(client_tls, server_tls)
    try:
        await source.send(Heartbeat(1, ()))
        assert await destination.receive() == Heartbeat(1, ())
        waiting = asyncio.create_task(destination.receive())
        done, _ = await asyncio.wait({waiting}, timeout=0.2)
        assert not done
        await source.send(Heartbeat(2, ()))
        assert await waiting == Heartbeat(2, ())
    finally:
        source.drop()
        destination.drop()

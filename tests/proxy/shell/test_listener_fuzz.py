"""The destination's one port, met by whatever comes: documented refusals, bounded memory, nothing handed on."""

import asyncio
import gc
import os
import random
import socket
import tracemalloc
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.errors import CryptoError
from crypto.tls import TlsConfig, TlsPeer
from proxy.control import Finish, Offer, encode
from proxy.errors import EXIT_AUTHENTICATION, EXIT_POLICY, RelayError, exit_code_of
from proxy.limits import HALF_OPEN_MAX, HALF_OPEN_PER_ADDRESS_MAX, MIB
from proxy.shell import destination as destination_module
from proxy.shell import greeting
from proxy.wire import LANE_MAGIC
from tests.proxy.support import Pair, Wire, over_tcp, relays, run, together, until

CONNECTION = st.one_of(
    st.lists(st.binary(max_size=300), max_size=4),
    st.binary(max_size=64).map(lambda rest: [LANE_MAGIC + rest]),
    st.binary(max_size=300).map(lambda body: [b"\x16\x03\x01" + len(body).to_bytes(2, "big") + body]),
    st.integers(0, 100_000).map(lambda size: [b"\x16" + bytes(size)]),
    st.sampled_from([[b"GET / HTTP/1.1\r\n\r\n"], [b"SSH-2.0-x\r\n"], [b"\x00"], [b"K"], [b"\x16"], []]),
)


def listening(client: TlsConfig, server: TlsConfig, story: "Any") -> None:
    """A destination that nobody honest talks to; nothing may reach its hypervisor."""

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client, server, hypervisors.ingress, hypervisors.egress) as pair:
                work: Coroutine[Any, Any, None] = story(pair)
                await work
                with pytest.raises(BlockingIOError):
                    hypervisors.listener.accept()
        finally:
            hypervisors.close()

    run(session())


async def dial(pair: Pair) -> Wire:
    wire = Wire(socket.socket())
    await asyncio.get_running_loop().sock_connect(wire.sock, ("127.0.0.1", pair.port))
    return wire


async def knock(pair: Pair, pieces: list[bytes], *, reset: bool = False) -> None:
    """One connection that says this, and is answered by whatever and closed."""
    wire = await dial(pair)
    try:
        with suppress(OSError):
            for piece in pieces:
                await wire.send(piece)
            if reset:
                return
            wire.shut()
            await wire.to_end()
    finally:
        if reset:
            wire.reset()
        else:
            wire.close()


async def still_serves(pair: Pair, hypervisors: "Any") -> None:
    """A legitimate session of the same address goes through."""
    near, far = await hypervisors.channel()
    await near.send(b"guest")
    near.shut()
    assert await far.to_end() == b"guest"
    far.shut()
    assert await near.to_end() == b""
    await pair.ended_well()


@settings(max_examples=60)
@given(connections=st.lists(st.tuples(CONNECTION, st.booleans()), min_size=1, max_size=6))
def test_arbitrary_connections_are_refused_and_an_honest_one_is_not(
    client_tls: TlsConfig, server_tls: TlsConfig, connections: list[tuple[list[bytes], bool]]
) -> None:
    async def session() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress) as pair:
                await together(*(knock(pair, pieces, reset=reset) for pieces, reset in connections))
                await still_serves(pair, hypervisors)
                for error in pair.refused:
                    assert isinstance(error, CryptoError | RelayError)
                    assert exit_code_of(error) == EXIT_AUTHENTICATION
        finally:
            hypervisors.close()

    run(session())


def test_what_is_not_tls_does_not_count(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    """Port scanners, health checks and lost browsers end no `--once`."""

    async def story(pair: Pair) -> None:
        for pieces in (
            [],
            [b"\0"],
            [b"GET / HTTP/1.1\r\n\r\n"],
            [b"K"],
            [LANE_MAGIC + bytes(16)],
            [b"KRL2" + bytes(16)],
        ):
            await knock(pair, pieces)
        assert pair.refused == []
        await knock(pair, [b"\x16\x03\x01\x00\x01x"])
        await until(lambda: pair.refused)

    listening(client_tls, server_tls, story)


def test_a_flood_before_authentication_is_held_in_little_memory(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    """A hundred connections, each with half a megabyte of what might be a handshake, all at once."""
    flood = b"\x16\x03\x01\x40\x00\x01\x00\xff\xff" + bytes(512 * 1024)

    async def story(pair: Pair) -> None:
        await knock(pair, [flood])
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            await together(*(knock(pair, [flood]) for _ in range(100)))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # A read is at most 64 KiB, and a connection that has sent 16 KiB without a name is closed.
        assert peak - before < 100 * 128 * 1024
        assert all(exit_code_of(error) == EXIT_AUTHENTICATION for error in pair.refused)

    listening(client_tls, server_tls, story)


def test_silent_connections_do_not_keep_an_honest_peer_out(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def session() -> None:
        hypervisors = over_tcp()
        silent: list[Wire] = []
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress) as pair:
                silent += [await dial(pair) for _ in range(200)]
                await still_serves(pair, hypervisors)
                assert len(pair.destination._half_open) <= HALF_OPEN_PER_ADDRESS_MAX <= HALF_OPEN_MAX
                assert pair.refused == []
        finally:
            for wire in silent:
                wire.close()
            hypervisors.close()

    run(session())


def test_a_connection_that_says_nothing_is_dropped_in_time(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greeting, "FIRST_BYTE_SECONDS_MAX", 0.1)
    monkeypatch.setattr(destination_module, "HANDSHAKE_SECONDS_MAX", 0.1)

    async def story(pair: Pair) -> None:
        for begun in (b"", b"K", LANE_MAGIC, LANE_MAGIC + bytes(15), b"\x16", b"\x16\x03\x01\x02"):
            wire = await dial(pair)
            await wire.send(begun)
            with suppress(ConnectionResetError):
                assert await wire.to_end() == b""
            wire.close()
        assert [exit_code_of(error) for error in pair.refused] == [EXIT_AUTHENTICATION] * 2

    listening(client_tls, server_tls, story)


def test_connections_leave_no_descriptor_behind(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def story(pair: Pair) -> None:
        dice = random.Random(1)
        for turn in range(2):
            for _ in range(30):
                first = dice.choice([b"\x16", b"K", b"KRL1", b"\x16\x03\x01\x00\x05", b""])
                await knock(pair, [first + dice.randbytes(dice.randrange(200))], reset=dice.random() < 0.3)
            await until(lambda: not pair.destination._tasks)
            if turn == 0:
                before = len(os.listdir("/proc/self/fd"))
        assert len(os.listdir("/proc/self/fd")) <= before

    listening(client_tls, server_tls, story)


# ------------------------------------------------------------------ behind TLS, before ACCEPT


async def greet(pair: Pair, client: TlsConfig, words: bytes) -> bytes:
    """A good certificate, and then these bytes instead of an offer; what was answered."""
    wire, tls = await dial(pair), TlsPeer(client)
    answered = b""
    try:
        while tls.peer is None:
            await wire.send(tls.outgoing())
            tls.receive(await wire.receive())
        tls.send(words)
        await wire.send(tls.outgoing())
        while data := await wire.receive():
            answered += tls.receive(data)
            if tls.closed:
                break
    except (OSError, CryptoError):
        pass
    finally:
        wire.close()
    return answered


@settings(max_examples=40)
@given(
    words=st.one_of(
        st.binary(min_size=4, max_size=400), st.binary(max_size=60).map(lambda b: len(b).to_bytes(4, "big") + b)
    )
)
def test_arbitrary_messages_instead_of_an_offer(client_tls: TlsConfig, server_tls: TlsConfig, words: bytes) -> None:
    async def story(pair: Pair) -> None:
        # Bytes that are only the beginning of a message are waited for: cut the wait short by ending them.
        await greet(pair, client_tls, words + b"\xff\xff\xff\xff")
        await until(lambda: pair.refused)
        (error,) = pair.refused
        assert isinstance(error, CryptoError | RelayError)
        assert exit_code_of(error) == EXIT_AUTHENTICATION

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(destination_module, "HANDSHAKE_SECONDS_MAX", 0.3)
        listening(client_tls, server_tls, story)


@pytest.mark.parametrize(
    ("offer", "code"),
    [
        (Offer(2, bytes(16), (1,), (0,), "default", 1, 30), EXIT_AUTHENTICATION),
        (Offer(1, bytes(16), (99,), (0,), "default", 1, 30), EXIT_AUTHENTICATION),
        (Offer(1, bytes(16), (1,), (99,), "default", 1, 30), EXIT_AUTHENTICATION),
        (Offer(1, bytes(16), (1,), (0,), "another", 1, 30), EXIT_POLICY),
    ],
    ids=["version", "suite", "codec", "egress"],
)
def test_an_offer_that_cannot_be_accepted(
    client_tls: TlsConfig, server_tls: TlsConfig, offer: Offer, code: int
) -> None:
    async def story(pair: Pair) -> None:
        answer = await greet(pair, client_tls, encode(offer))
        assert b"refuse" in answer
        assert [exit_code_of(error) for error in pair.refused] == [code]

    listening(client_tls, server_tls, story)


def test_a_message_before_the_offer(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def story(pair: Pair) -> None:
        answer = await greet(pair, client_tls, encode(Finish()))
        assert b"refuse" in answer
        assert [exit_code_of(error) for error in pair.refused] == [EXIT_AUTHENTICATION]

    listening(client_tls, server_tls, story)


def test_an_offer_of_the_largest_size_is_held_in_little_memory(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def story(pair: Pair) -> None:
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            body = b"\xc1" * (64 * 1024)
            await together(*(greet(pair, client_tls, len(body).to_bytes(4, "big") + body) for _ in range(20)))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak - before < 20 * MIB
        assert [exit_code_of(error) for error in pair.refused] == [EXIT_AUTHENTICATION] * 20

    listening(client_tls, server_tls, story)

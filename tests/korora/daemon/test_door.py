"""The relay port under strangers, and what is refused there by number."""

import asyncio
import socket
import struct
from pathlib import Path

import pytest

from proxy.limits import HALF_OPEN_PER_ADDRESS_MAX
from proxy.wire import LANE_MAGIC, LANE_TOKEN_BYTES
from tests.korora.daemon.support import SECONDS_MAX, Site, echo, exchange, in_thread, until
from tests.korora.daemon.test_reload import refused
from tests.korora.daemon.test_sessions import Pair, pair
from tests.proxy.support import run


def knock(hosts: Pair, words: bytes = b"") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", hosts.beta.port), SECONDS_MAX)
    sock.sendall(words)
    return sock


def turned_away(sock: socket.socket) -> bool:
    """Whether it is closed there, in peace or not."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_strangers_keep_nobody_out(site: Site) -> None:
    """Silent ones, ones that stop half-way and ones that reset: an honest peer of the same address gets in."""
    hosts = pair(site, 1)
    hosts.start()
    strangers = [knock(hosts) for _ in range(2 * HALF_OPEN_PER_ADDRESS_MAX)]
    strangers += [
        knock(hosts, words) for words in (b"\x16", b"K", LANE_MAGIC, b"\x16\x03\x01\x00\x05") for _ in range(9)
    ]
    for number, stranger in enumerate(strangers):
        if number % 5 == 0:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stranger.close()

    async def story() -> None:
        await exchange(*await hosts.machines[0].channel(), b"in spite of", b"them all")

    try:
        run(story(), SECONDS_MAX)
        assert hosts.beta.status()["phase"] == "serving"
        assert "Traceback" not in hosts.beta.log()
    finally:
        hosts.close()
        for stranger in strangers:
            stranger.close()


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        LANE_MAGIC + bytes(LANE_TOKEN_BYTES),
        LANE_MAGIC + b"\x01" + bytes(LANE_TOKEN_BYTES - 1),
        LANE_MAGIC + b"\xff" * LANE_TOKEN_BYTES,
        b"KRS1" + b"\x02" + bytes(LANE_TOKEN_BYTES - 1),
        b"K\0\0\0\0" + bytes(100),
    ],
    ids=["HTTP", "worker 0", "worker 1", "no such worker", "resume", "no magic"],
)
def test_what_fits_nothing_is_closed(beta: Pair, words: bytes) -> None:
    with knock(beta, words) as sock:
        assert turned_away(sock)


@pytest.fixture(scope="module")
def beta(tmp_path_factory: pytest.TempPathFactory) -> "object":
    site = Site(tmp_path_factory.mktemp("site"))
    hosts = pair(site, 1, workers=2)
    hosts.beta.start()
    yield hosts
    hosts.close()
    site.close()


def test_a_half_word_is_closed_when_its_sender_ends(beta: Pair) -> None:
    with knock(beta, b"KRL") as sock:
        sock.shutdown(socket.SHUT_WR)
        assert turned_away(sock)


def test_sessions_max_counts_all_workers(site: Site) -> None:
    hosts = pair(site, 3, workers=2)
    hosts.beta.settings = "sessions_max = 2"
    hosts.start()

    async def story() -> None:
        first, second, third = hosts.machines
        one, two = await first.channel(), await second.channel()
        for ends in (one, two):
            await echo(*ends)
        await refused(third)
        (ended,) = await in_thread(until, lambda: hosts.alpha.status()["finished"])
        assert ended["exit_code"] == 3
        assert "no further session is taken now" in ended["error"]
        await exchange(*one, b"", b"")
        await in_thread(until, lambda: len(hosts.beta.sessions()) == 1)
        await exchange(*await third.channel(), b"now", b"there is room")
        await exchange(*two, b"", b"")

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()


def test_an_egress_of_one_session_at_a_time_is_so_across_workers(site: Site, tmp_path: Path) -> None:
    hosts = pair(site, 2, workers=2)
    target = tmp_path / "guest"
    hosts.beta.tables[1:] = []
    hosts.beta.egress("file", f"file:{target}")
    hosts.beta.egress("vm9", "tcp:127.0.0.1:1")
    hosts.alpha.tables[1:] = [table.replace('egress = "vm', 'egress = "file"\n# "') for table in hosts.alpha.tables[1:]]
    hosts.start()

    async def story() -> None:
        first, second = hosts.machines
        near = await first.connect()
        await near.send(b"guest")
        await in_thread(until, hosts.beta.sessions)
        await refused(second)
        (ended,) = await in_thread(until, lambda: hosts.alpha.status()["finished"])
        assert "the egress 'file' serves one session at a time" in ended["error"]
        near.shut()
        assert await near.receive() == b""
        assert await in_thread(until, target.exists)
        assert target.read_bytes() == b"guest"
        await in_thread(until, lambda: not hosts.beta.sessions())
        near = await second.connect()
        await near.send(b"another")
        near.shut()
        assert await near.receive() == b""
        await in_thread(until, lambda: target.read_bytes() == b"another")
        await asyncio.sleep(0)

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()

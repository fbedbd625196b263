"""Peers that must not be let in, at either end: refused for the right reason, while a session in order is unharmed.

"Nothing is opened" means more than no byte: a destination does not even connect to its hypervisor for a peer that it
has not let in, because a waiting QEMU takes its first connection for the migration.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from crypto.errors import (
    AuthenticationError,
    CertificateExpired,
    CertificateMalformed,
    CertificateRevoked,
    CertificateUntrusted,
    CryptoError,
    GroupRefused,
    PeerCertificateMissing,
    PeerNameMismatch,
    TlsFailure,
)
from crypto.identity import Identity
from crypto.pki import Authority
from crypto.tls import PeerRules, TlsConfig, TlsRole
from proxy.endpoints.files import FileEgress
from proxy.endpoints.sockets import TcpEgress
from proxy.errors import PeerRefused, exit_code_of
from proxy.shell.source import Peer
from tests.attacks.relays import (
    BOUND_SECONDS,
    Receiver,
    Side,
    StubHypervisor,
    bulk,
    conversation,
    noise,
    on_uvloop,
    send,
    shorten,
)
from tests.attacks.rogue import Gone, RogueDestination, RogueSource, dial, message
from tests.attacks.strangers import DAY, House, bare, classical, config, outdated, uri

AUTHENTICATION = 4
CLIENT, SERVER = TlsRole.CLIENT, TlsRole.SERVER


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers do not always close what was closed to them: do not wait 5 s for that each time."""
    shorten(monkeypatch, DRAIN_SECONDS_MAX=0.1)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """The CA of the hosts that belong here."""
    return House(tmp_path_factory.mktemp("house") / "ca")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> House:
    """Another CA, of the same name."""
    return House(tmp_path_factory.mktemp("elsewhere") / "ca")


@pytest.fixture(scope="module")
def guests(house: House, elsewhere: House) -> dict[str, Identity]:
    """Hosts by what is the matter with them; the CRL that alpha and beta load knows of the revocation."""
    guests = {
        "stranger": elsewhere.issue("alpha"),
        "stranger server": elsewhere.issue("beta"),
        "expired": house.issue("alpha", issued=house.now - 3 * DAY, days=1),
        "expired server": house.issue("beta", issued=house.now - 3 * DAY, days=1),
        "unborn": house.issue("alpha", issued=house.now + 2 * DAY),
        "revoked": house.issue("mallory"),
        "other": house.issue("gamma"),
    }
    house.revoke("mallory")
    alpha, beta = house.issue("alpha"), house.issue("beta")
    with_crl = {"alpha": alpha, "beta": beta}
    # What a stranger needs to look at our certificates without complaint of his own.
    for name, identity in guests.items():
        guests[name] = replace(identity, ca=alpha.ca, crl=alpha.crl)
    return guests | with_crl


@asynccontextmanager
async def destination(guests: dict[str, Identity], rules: PeerRules) -> AsyncIterator[tuple[Receiver, StubHypervisor]]:
    """beta, with a session of alpha's under way all the time; it has to end exact."""
    script = (*conversation(rounds=40, size=300), *bulk(1_000_000))
    alpha = config(guests["alpha"], CLIENT, PeerRules(names=frozenset({"beta"})))
    async with (
        asyncio.timeout(BOUND_SECONDS),
        StubHypervisor(script) as hypervisor,
        Receiver(
            config(guests["beta"], SERVER, rules), TcpEgress("127.0.0.1", hypervisor.port, "tcp:egress")
        ) as receiver,
    ):
        here = Side()
        sending = asyncio.create_task(send(alpha, Peer("127.0.0.1", receiver.port, resume_seconds=0), script, here))
        await asyncio.sleep(0)
        yield receiver, hypervisor
        code, error, _ = await sending
        assert code == 0, repr(error)
        assert here.received == b"".join(answer for _, answer in script)
        # The one connection that the hypervisor ever got is that of the session in order.
        assert [bytes(side.received) for side in hypervisor.sides] == [b"".join(say for say, _ in script)]


async def judged(receiver: Receiver) -> BaseException:
    """The reason for which a peer was not let in."""
    async with asyncio.timeout(8.0):
        while not (failures := [error for error in receiver.errors if error is not None]):
            await receiver.news()
    assert len(failures) == 1
    return failures[0]


def names(*accepted: str) -> PeerRules:
    """Whom the destination expects."""
    return PeerRules(names=frozenset(accepted))


def pin(*digests: bytes) -> PeerRules:
    """Which keys the destination expects."""
    return PeerRules(pins=frozenset(digests))


Make = Callable[[House, dict[str, Identity]], TlsConfig]
PRETENDERS: dict[str, tuple[Make, type[BaseException]]] = {
    "another CA": (lambda _, guests: config(guests["stranger"], CLIENT), CertificateUntrusted),
    "expired": (lambda _, guests: config(guests["expired"], CLIENT), CertificateExpired),
    "not valid yet": (lambda _, guests: config(guests["unborn"], CLIENT), CertificateExpired),
    "revoked": (lambda _, guests: config(guests["revoked"], CLIENT), CertificateRevoked),
    "another name": (lambda _, guests: config(guests["other"], CLIENT), PeerNameMismatch),
    "no certificate": (lambda _, guests: bare(guests["alpha"], CLIENT), PeerCertificateMissing),
    "classical group": (lambda _, guests: classical(guests["alpha"], CLIENT), GroupRefused),
    "TLS 1.2": (lambda _, guests: outdated(guests["alpha"], CLIENT), TlsFailure),
    "no name": (lambda house, guests: config(house.forged(guests["alpha"]), CLIENT), CertificateMalformed),
    "two names": (
        lambda house, guests: config(house.forged(guests["alpha"], uri("alpha"), uri("beta")), CLIENT),
        CertificateMalformed,
    ),
    "a name with a path": (
        lambda house, guests: config(house.forged(guests["alpha"], uri("alpha/../root")), CLIENT),
        CertificateMalformed,
    ),
    "a server's certificate only": (
        lambda house, guests: config(
            house.forged(guests["alpha"], uri("alpha"), purposes=(ExtendedKeyUsageOID.SERVER_AUTH,)), CLIENT
        ),
        CertificateUntrusted,
    ),
    "a mail certificate": (
        lambda house, guests: config(
            house.forged(guests["alpha"], uri("alpha"), purposes=(ExtendedKeyUsageOID.EMAIL_PROTECTION,)), CLIENT
        ),
        CertificateUntrusted,
    ),
}


@pytest.mark.parametrize("name", PRETENDERS)
@on_uvloop
async def test_a_source_that_is_not_let_in(house: House, guests: dict[str, Identity], name: str) -> None:
    make, kind = PRETENDERS[name]
    async with destination(guests, names("alpha")) as (receiver, _):
        # TLS 1.3 lets a client finish first: he says his offer, and hears an alert instead of ACCEPT.
        with pytest.raises((Gone, CryptoError)):
            async with RogueSource(make(house, guests), receiver.port) as intruder:
                await intruder.offer()
        error = await judged(receiver)
        assert isinstance(error, kind), repr(error)
        assert exit_code_of(error) == AUTHENTICATION


@on_uvloop
async def test_a_source_whose_key_is_not_pinned(guests: dict[str, Identity]) -> None:
    async with destination(guests, pin(guests["alpha"].spki_sha256)) as (receiver, _):
        with pytest.raises((Gone, CryptoError)):
            async with RogueSource(config(guests["other"], CLIENT), receiver.port) as intruder:
                await intruder.offer()
        assert type(await judged(receiver)) is PeerNameMismatch


HALF_A_HELLO = b"\x16\x03\x01\x05\x68\x01\x00\x05\x64\x03\x03"
TLS_NOISE: dict[str, tuple[bytes, type[BaseException]]] = {
    "noise behind a TLS byte": (b"\x16\x03\x01" + noise(600, 31), TlsFailure),
    "an empty record": (b"\x16\x03\x01\x00\x00" * 3, PeerRefused),
    "an endless handshake message": (
        b"".join(b"\x16\x03\x01\x40\x00" + b"\x01\x01\x00\x00" + bytes(16380) for _ in range(2)),
        TlsFailure,
    ),
    "over 16 KiB before authentication": (b"\x16\x03\x01\x02\x00\x01\x00\x80\x00" + bytes(20_000), TlsFailure),
    "an SSLv2 hello in TLS's clothes": (b"\x16\x00\x02" + bytes(64), TlsFailure),
    "half a hello and away": (HALF_A_HELLO, PeerRefused),
}


@pytest.mark.parametrize("name", TLS_NOISE)
@on_uvloop
async def test_noise_that_looks_like_tls(guests: dict[str, Identity], name: str) -> None:
    said, kind = TLS_NOISE[name]
    async with destination(guests, names("alpha")) as (receiver, _):
        sock = await dial(receiver.port)
        with sock, suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(sock, said)
            sock.shutdown(socket.SHUT_WR)
            while await asyncio.get_running_loop().sock_recv(sock, 4096):
                pass
        error = await judged(receiver)
        assert isinstance(error, kind), repr(error)
        assert exit_code_of(error) == AUTHENTICATION


NOT_TLS = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: beta\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "QEMU": b"QEVM\x00\x00\x00\x03",
    "noise": b"\x00" + noise(70_000, 32),
    "nothing": b"",
    "a lane for nobody": b"KRL1" + noise(16, 33) + bytes(36),
    "a lane's magic and noise": b"KRL1" + noise(100_000, 34),
}


@pytest.mark.parametrize("name", NOT_TLS)
@on_uvloop
async def test_what_is_not_tls_does_not_count(guests: dict[str, Identity], name: str) -> None:
    async with destination(guests, names("alpha")) as (receiver, _):
        sock = await dial(receiver.port)
        with sock, suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(sock, NOT_TLS[name])
            sock.shutdown(socket.SHUT_WR)
            assert await asyncio.get_running_loop().sock_recv(sock, 4096) == b""
    assert receiver.codes == [0]  # the session in order


@on_uvloop
async def test_a_peer_that_stops_in_the_handshake(guests: dict[str, Identity], monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, HANDSHAKE_SECONDS_MAX=0.5)
    async with destination(guests, names("alpha")) as (receiver, _):
        sock = await dial(receiver.port)
        with sock:
            await asyncio.get_running_loop().sock_sendall(sock, HALF_A_HELLO)
            assert type(await judged(receiver)) is PeerRefused


@on_uvloop
async def test_a_peer_that_says_no_offer(guests: dict[str, Identity], monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, HANDSHAKE_SECONDS_MAX=0.5)
    async with (
        destination(guests, names("alpha")) as (receiver, _),
        RogueSource(config(guests["alpha"], CLIENT), receiver.port),
    ):
        error = await judged(receiver)
        assert type(error) is PeerRefused


# ---- crowds


@pytest.mark.parametrize("said", [b"", HALF_A_HELLO, b"KRL1"], ids=["silent", "hello", "lane"])
@on_uvloop
async def test_two_hundred_that_hang_about(guests: dict[str, Identity], said: bytes) -> None:
    """Before, during and after them a session in order gets through; they are bounded, and the oldest make room."""
    loop = asyncio.get_running_loop()
    crowd: list[socket.socket] = []
    try:
        async with destination(guests, names("alpha")) as (receiver, _):
            for _ in range(200):
                sock = await dial(receiver.port)
                crowd.append(sock)
                await loop.sock_sendall(sock, said)
            await asyncio.sleep(0.1)
            waiting = [sock for sock in crowd if not _closed(sock)]
            assert 0 < len(waiting) <= 64
            # Those that were there last are the ones that may still wait.
            assert waiting == crowd[-len(waiting) :]
            alpha = config(guests["alpha"], CLIENT, names("beta"))
            refused, _, _ = await send(
                alpha, Peer("127.0.0.1", receiver.port, resume_seconds=0, egress="none"), conversation()
            )
            assert refused == 3  # it has got through to the policy: authenticated, in spite of the crowd
    finally:
        for sock in crowd:
            sock.close()
    assert sorted(receiver.codes) == [0, 3]


def _closed(sock: socket.socket) -> bool:
    """Whether the relay has closed a connection."""
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


# ---- busy


@on_uvloop
async def test_a_second_session_at_a_busy_egress(guests: dict[str, Identity], tmp_path: Path) -> None:
    """A file takes one at a time: the second is told so (3), the first never notices."""
    target = tmp_path / "guest"
    alpha = config(guests["alpha"], CLIENT, names("beta"))
    async with (
        asyncio.timeout(BOUND_SECONDS),
        Receiver(config(guests["beta"], SERVER, names("alpha")), FileEgress(str(target), f"file:{target}")) as receiver,
        RogueSource(config(guests["alpha"], CLIENT), receiver.port) as first,
    ):
        await first.offer()
        lane = await first.lane()
        await first.channel()
        code, error, here = await send(alpha, Peer("127.0.0.1", receiver.port, resume_seconds=0), conversation())
        assert (code, here.ended) == (3, "reset"), repr(error)
        assert receiver.codes == [3]
        assert (tmp_path / "guest.partial").exists()
        lane.sock.close()
        await first.control.say(message("abort", code=6, reason="enough"))


# ---- the CRL


@on_uvloop
async def test_a_crl_that_expires_while_the_relay_runs(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority = Authority.create(tmp_path / "ca", now=now - 2 * DAY)
    alpha, beta = (authority.issue(name, now=now).directory for name in ("alpha", "beta"))
    # A CRL has whole days to live: this one was signed nearly a day ago.
    authority.publish_crl(now=now - DAY + timedelta(seconds=2), days=1)
    identities = [Identity.load(directory, now=now) for directory in (alpha, beta)]
    script = conversation()
    async with (
        asyncio.timeout(BOUND_SECONDS),
        StubHypervisor(script) as hypervisor,
        Receiver(config(identities[1], SERVER), TcpEgress("127.0.0.1", hypervisor.port, "tcp:egress")) as receiver,
    ):
        where = Peer("127.0.0.1", receiver.port, resume_seconds=0)
        # The source's own CRL is fresh: it is the destination's that runs out.
        authority.publish_crl(now=now)
        source = config(Identity.load(alpha, now=now), CLIENT)
        await asyncio.sleep((now + timedelta(seconds=3.1) - datetime.now(UTC)).total_seconds())
        code, error, here = await send(source, where, script)
        assert (code, here.ended) == (AUTHENTICATION, "reset"), repr(error)
        assert [type(error) for error in receiver.errors] == [CertificateRevoked]
        assert hypervisor.sides == []


# ---- the source's view

SERVERS: dict[str, tuple[Make, type[BaseException]]] = {
    "another CA": (lambda _, guests: config(guests["stranger server"], SERVER), CertificateUntrusted),
    "expired": (lambda _, guests: config(guests["expired server"], SERVER), CertificateExpired),
    "revoked": (lambda _, guests: config(guests["revoked"], SERVER), CertificateRevoked),
    "another name": (lambda _, guests: config(guests["other"], SERVER), PeerNameMismatch),
    "classical group": (lambda _, guests: classical(guests["beta"], SERVER), AuthenticationError),
    "TLS 1.2": (lambda _, guests: outdated(guests["beta"], SERVER), TlsFailure),
    "no name": (lambda house, guests: config(house.forged(guests["beta"]), SERVER), CertificateMalformed),
    "a client's certificate only": (
        lambda house, guests: config(
            house.forged(guests["beta"], uri("beta"), purposes=(ExtendedKeyUsageOID.CLIENT_AUTH,)), SERVER
        ),
        CertificateUntrusted,
    ),
    "the source itself": (lambda _, guests: config(guests["alpha"], SERVER), PeerNameMismatch),
}


@pytest.mark.parametrize("name", SERVERS)
@on_uvloop
async def test_a_destination_that_is_not_talked_to(house: House, guests: dict[str, Identity], name: str) -> None:
    make, kind = SERVERS[name]
    alpha = config(guests["alpha"], CLIENT, names("beta"))
    offers: list[object] = []
    async with asyncio.timeout(BOUND_SECONDS), RogueDestination(make(house, guests)) as rogue:

        async def pretend() -> None:
            _, offer = await rogue.greet()
            offers.append(offer)

        pretending = asyncio.create_task(pretend())
        code, error, here = await send(alpha, Peer("127.0.0.1", rogue.port, resume_seconds=0), conversation())
        pretending.cancel()
        await asyncio.gather(pretending, return_exceptions=True)
    assert (code, here.ended, bytes(here.received)) == (AUTHENTICATION, "reset", b""), repr(error)
    assert isinstance(error, kind), repr(error)
    assert offers == []  # not even the offer was said


@on_uvloop
async def test_a_destination_whose_key_is_not_pinned(guests: dict[str, Identity]) -> None:
    alpha = config(guests["alpha"], CLIENT, pin(guests["alpha"].spki_sha256))
    async with asyncio.timeout(BOUND_SECONDS), RogueDestination(config(guests["beta"], SERVER)) as rogue:
        greeting = asyncio.create_task(rogue.greet())
        code, error, _ = await send(alpha, Peer("127.0.0.1", rogue.port, resume_seconds=0), conversation())
        greeting.cancel()
        await asyncio.gather(greeting, return_exceptions=True)
    assert (code, type(error)) == (AUTHENTICATION, PeerNameMismatch), repr(error)


Act = Callable[[socket.socket], Awaitable[None]]


def says(data: bytes) -> Act:
    """Answers so, whatever it hears, and leaves."""

    async def act(sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_recv(sock, 4096)
        await loop.sock_sendall(sock, data)
        sock.shutdown(socket.SHUT_WR)
        while await loop.sock_recv(sock, 4096):
            pass

    return act


async def leaves(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


async def resets(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    sock.close()


async def stays_silent(_: socket.socket) -> None:
    await asyncio.sleep(BOUND_SECONDS)


STRANGE: dict[str, Act] = {
    "HTTP": says(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "noise": says(noise(5000, 40)),
    "20 KiB of handshake": says(b"\x16\x03\x03\x40\x00\x02\x01\x00\x00" + bytes(20_000)),
    "an alert": says(bytes((21, 3, 3, 0, 2, 2, 40))),
    "a lane": says(b"KRL1" + bytes(52)),
    "leaves": leaves,
    "resets": resets,
    "silent": stays_silent,
}


@pytest.mark.parametrize("name", STRANGE)
@on_uvloop
async def test_a_port_with_somebody_else_behind_it(
    guests: dict[str, Identity], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shorten(monkeypatch, HANDSHAKE_SECONDS_MAX=0.5, DRAIN_SECONDS_MAX=0.2)
    alpha = config(guests["alpha"], CLIENT, names("beta"))
    async with asyncio.timeout(BOUND_SECONDS), RogueDestination(alpha) as stranger:

        async def behave() -> None:
            with suppress(OSError):
                await STRANGE[name](await stranger.accept())

        behaving = asyncio.create_task(behave())
        code, error, here = await send(alpha, Peer("127.0.0.1", stranger.port, resume_seconds=0), conversation())
        behaving.cancel()
        await asyncio.gather(behaving, return_exceptions=True)
    assert (code, here.ended, bytes(here.received)) == (AUTHENTICATION, "reset", b""), repr(error)


@on_uvloop
async def test_a_port_with_nobody_behind_it(guests: dict[str, Identity]) -> None:
    alpha = config(guests["alpha"], CLIENT, names("beta"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens: nobody else can take the port meanwhile
        where = Peer("127.0.0.1", taken.getsockname()[1], resume_seconds=0)
        code, error, here = await send(alpha, where, conversation())
    assert (code, here.ended) == (6, "reset"), repr(error)

"""Invariant 2: whatever ends a session early, both hypervisors and both relays are told, and nothing looks whole."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from crypto.errors import PeerNameMismatch
from crypto.identity import Identity
from crypto.tls import PeerRules, TlsConfig, TlsRole
from proxy.control import Heartbeat, LaneProgress
from proxy.errors import (
    EXIT_AUTHENTICATION,
    EXIT_BUG,
    EXIT_HYPERVISOR,
    EXIT_INTEGRITY,
    EXIT_LOST,
    EXIT_POLICY,
    HypervisorFailed,
    Interrupted,
    PeerAborted,
    PeerLost,
    PeerRefused,
    PeerUnreachable,
    PolicyRefused,
    exit_code_of,
)
from proxy.limits import HEARTBEATS_MISSED_MAX
from proxy.session import Role
from proxy.shell import contact as contact_module
from proxy.shell import linked as linked_module
from proxy.shell.bundle import Bundle
from proxy.shell.channel import Channel
from proxy.shell.link import ControlLink
from proxy.shell.runner import Runner
from proxy.shell.source import SourceRunner
from tests.proxy.support import Ended, Hypervisors, Middle, Pair, Wire, over_tcp, over_unix, relays, run, until

BEAT_SECONDS = 0.25  # three missed are still no hiccup of a busy machine
Story = Callable[[Pair, Wire, Wire], Awaitable[None]]


def tell(client: TlsConfig, server: TlsConfig, hypervisors: Hypervisors, story: Story, **options: int) -> None:
    """A session with one open channel over which one byte has gone, and what happens to it then."""

    async def session() -> None:
        try:
            async with relays(client, server, hypervisors.ingress, hypervisors.egress, **options) as pair:  # type: ignore[arg-type]
                near, far = await pair.channel(hypervisors)
                await near.send(b"!")
                assert await far.exactly(1) == b"!"
                await story(pair, near, far)
        finally:
            hypervisors.close()

    run(session())


def codes(source: Ended, destination: Ended) -> tuple[int, int]:
    """Exit codes of both sides, each of which must have failed."""
    assert source.error is not None
    assert destination.error is not None
    return exit_code_of(source.error), exit_code_of(destination.error)


async def through(middle: Middle, client: TlsConfig, server: TlsConfig, story: Story) -> None:
    hypervisors = over_tcp()
    try:
        async with relays(client, server, hypervisors.ingress, hypervisors.egress, peer_port=middle.port) as pair:
            middle.start(pair.port)
            near, far = await pair.channel(hypervisors)
            await near.send(b"!")
            assert await far.exactly(1) == b"!"
            await story(pair, near, far)
    finally:
        await middle.close()
        hypervisors.close()


# ------------------------------------------------------------------ a hypervisor dies


def test_the_sources_hypervisor_resets(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        near.reset()
        assert await far.broken()
        assert codes(*await pair.ended()) == (EXIT_HYPERVISOR, EXIT_HYPERVISOR)

    tell(client_tls, server_tls, over_tcp(), story)


def test_the_destinations_hypervisor_resets(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        far.reset()
        assert await near.broken()
        source, destination = await pair.ended()
        assert codes(source, destination) == (EXIT_HYPERVISOR, EXIT_HYPERVISOR)
        assert isinstance(source.error, PeerAborted)
        assert isinstance(destination.error, HypervisorFailed)

    tell(client_tls, server_tls, over_tcp(), story)


def test_the_destinations_hypervisor_dies_while_it_is_sent_to(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        async def flood() -> None:
            with suppress(ConnectionResetError, BrokenPipeError):
                while True:
                    await near.send(bytes(1 << 20))

        flooding = asyncio.create_task(flood())
        await far.exactly(1 << 20)
        far.reset()
        await flooding
        assert codes(*await pair.ended()) == (EXIT_HYPERVISOR, EXIT_HYPERVISOR)

    tell(client_tls, server_tls, over_tcp(), story)


def test_one_dead_channel_ends_them_all(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def session() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress) as pair:
                ends = [await pair.channel(hypervisors) for _ in range(4)]
                ends[2][0].reset()
                for number, (near, far) in enumerate(ends):
                    assert await far.broken()
                    assert number == 2 or await near.broken()
                assert codes(*await pair.ended()) == (EXIT_HYPERVISOR, EXIT_HYPERVISOR)
        finally:
            hypervisors.close()

    run(session())


@pytest.mark.parametrize("head", [b"QEVM\0\0\0\3", b"LibxlFmt", b"Xen saved domain, xl format\n \0 \r"])
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_a_known_format_that_ends_before_its_end(
    client_tls: TlsConfig, server_tls: TlsConfig, tmp_path: Path, head: bytes, transport: str
) -> None:
    """A killed QEMU closes its socket as cleanly as a finished one: only the stream itself tells."""

    async def session() -> None:
        hypervisors = over_tcp() if transport == "tcp" else over_unix(tmp_path)
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress) as pair:
                near, far = await pair.channel(hypervisors)
                await near.send(head + b"\x01" * 1000)
                near.shut()
                if transport == "tcp":
                    assert await far.broken()
                assert codes(*await pair.ended()) == (EXIT_HYPERVISOR, EXIT_HYPERVISOR)
                source, _ = await pair.ended()
                assert "before its end" in str(source.error)
                assert source.report.stream_format in {"qemu", "libxl", "xl"}
        finally:
            hypervisors.close()

    run(session())


def test_nobody_listens_at_the_destination(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def session() -> None:
        hypervisors = over_tcp()
        hypervisors.listener.close()
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress) as pair:
                near = await hypervisors.connect()
                assert await near.broken()
                source, destination = await pair.ended()
                assert codes(source, destination) == (EXIT_HYPERVISOR, EXIT_HYPERVISOR)
                assert "cannot connect to the hypervisor" in str(destination.error)
                assert "cannot connect to the hypervisor" in str(source.error), "the source's operator reads why"
        finally:
            hypervisors.close()

    run(session())


# ------------------------------------------------------------------ before ACCEPT


def test_nobody_listens_at_the_peer(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def session() -> None:
        hypervisors = over_tcp()
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress, peer_port=port) as pair:
                near = await hypervisors.connect()
                assert await near.broken()
                source = await pair.source_ended
                assert isinstance(source.error, PeerUnreachable)
                assert exit_code_of(source.error) == EXIT_LOST
        hypervisors.close()

    run(session())


def refused_session(client: TlsConfig, server: TlsConfig, change: Callable[[Pair], None] | None = None) -> Pair:
    """A session that must not begin; the egress must not be touched."""
    kept: list[Pair] = []

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client, server, hypervisors.ingress, hypervisors.egress) as pair:
                kept.append(pair)
                if change is not None:
                    change(pair)
                near = await hypervisors.connect()
                await near.send(b"guest memory")
                assert await near.broken()
                await pair.source_ended
                with pytest.raises(BlockingIOError):
                    hypervisors.listener.accept()
        finally:
            hypervisors.close()

    run(session())
    return kept[0]


def test_a_source_of_another_name(client_tls: TlsConfig, identity_beta: Path) -> None:
    identity = Identity.load(identity_beta, now=datetime.now(UTC))
    server = TlsConfig(identity, TlsRole.SERVER, PeerRules(names=frozenset({"gamma"})))
    pair = refused_session(client_tls, server)
    error = pair.source_ended.result().error
    assert error is not None
    assert exit_code_of(error) == EXIT_AUTHENTICATION
    assert [type(refused) for refused in pair.refused] == [PeerNameMismatch]


def test_a_destination_that_takes_no_session_now(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    def closed(pair: Pair) -> None:
        pair.destination.accepting = False

    pair = refused_session(client_tls, server_tls, closed)
    error = pair.source_ended.result().error
    assert isinstance(error, PolicyRefused)
    assert exit_code_of(error) == EXIT_POLICY
    assert [exit_code_of(refused) for refused in pair.refused] == [EXIT_POLICY]


def test_a_peer_that_is_no_relay(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def session(answer: bytes) -> None:
        hypervisors = over_tcp()
        stranger = socket.create_server(("127.0.0.1", 0))
        stranger.setblocking(False)
        port = stranger.getsockname()[1]
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress, peer_port=port) as pair:
                near = await hypervisors.connect()
                wire = Wire((await asyncio.get_running_loop().sock_accept(stranger))[0])
                await wire.receive()
                await wire.send(answer)
                wire.close()
                assert await near.broken()
                error = (await pair.source_ended).error
                assert error is not None
                assert exit_code_of(error) == EXIT_AUTHENTICATION
        finally:
            hypervisors.close()
            stranger.close()

    for answer in (
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x15\x03\x03\x00\x02\x02\x28",
    ):
        run(session(answer))


def test_a_peer_that_never_answers(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contact_module, "HANDSHAKE_SECONDS_MAX", 0.2)

    async def session() -> None:
        hypervisors = over_tcp()
        silent = socket.create_server(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress, peer_port=port) as pair:
                near = await hypervisors.connect()
                assert await near.broken()
                error = (await pair.source_ended).error
                assert isinstance(error, PeerRefused)
                assert "did not answer" in str(error)
        finally:
            hypervisors.close()
            silent.close()

    run(session())


# ------------------------------------------------------------------ the network dies


@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linked_module, "HEARTBEAT_SECONDS", BEAT_SECONDS)


@pytest.mark.usefixtures("quick_beats")
def test_a_network_that_falls_silent(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    """No FIN, no reset, nothing: three heartbeats missed, and both hypervisors know."""

    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        middle.silent = True
        began = asyncio.get_running_loop().time()
        assert await near.broken()
        assert await far.broken()
        elapsed = asyncio.get_running_loop().time() - began
        assert elapsed >= BEAT_SECONDS * (HEARTBEATS_MISSED_MAX - 1)
        source, destination = await pair.ended()
        assert codes(source, destination) == (EXIT_LOST, EXIT_LOST)
        assert isinstance(source.error, PeerLost)
        assert isinstance(destination.error, PeerLost)
        # The first to give up closes its sockets, and the middle does pass an end on.
        assert "heartbeat" in f"{source.error} {destination.error}"

    middle = Middle()
    run(through(middle, client_tls, server_tls, story))


@pytest.mark.usefixtures("quick_beats")
@pytest.mark.parametrize("mute", list(Role), ids=lambda role: role.value)
def test_one_side_stops_beating(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch, mute: Role
) -> None:
    beat = Runner.beat

    async def muted(self: Runner, link: ControlLink) -> None:
        if self.session.role is not mute:
            await beat(self, link)

    monkeypatch.setattr(Runner, "beat", muted)

    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        assert await near.broken()
        assert await far.broken()
        source, destination = await pair.ended()
        assert codes(source, destination) == (EXIT_LOST, EXIT_LOST)
        heard, silent = (destination, source) if mute is Role.SOURCE else (source, destination)
        assert isinstance(heard.error, PeerLost)
        assert isinstance(silent.error, PeerAborted), "the side that was not heard is told why"

    tell(client_tls, server_tls, over_tcp(), story)


@pytest.mark.usefixtures("quick_beats")
def test_a_paused_migration_may_idle(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    """There is no idle limit on data: many heartbeats long nothing is carried, and then all goes on."""

    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        control = pair.departing.link
        enough = control.received_bytes + 4 * HEARTBEATS_MISSED_MAX * 30
        await until(lambda: control.received_bytes >= enough or pair.source_ended.done())
        await near.send(b"awake")
        assert await far.exactly(5) == b"awake"
        near.shut()
        far.shut()
        assert (await near.to_end(), await far.to_end()) == (b"", b"")
        await pair.ended_well()

    tell(client_tls, server_tls, over_tcp(), story)


@pytest.mark.usefixtures("quick_beats")
def test_a_record_that_claims_more_than_was_sent_is_found_out(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A length raised on the way makes the receiver wait: the next heartbeat shows that nothing more was sent."""

    async def raise_length(self: Middle, origin: socket.socket, target: socket.socket, which: int) -> None:
        del which
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            while data := await loop.sock_recv(origin, 65_536):
                if self.silent and origin is self.links[1][0] and data[0] == 1:
                    data = data[:17] + bytes([data[17] ^ 1]) + data[18:]
                    self.silent = False
                await loop.sock_sendall(target, data)
            target.shutdown(socket.SHUT_WR)

    monkeypatch.setattr(Middle, "_carry", raise_length)

    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        middle.silent = True
        await near.send(b"never arrives")
        assert await far.broken()
        assert await near.broken()
        source, destination = await pair.ended()
        assert codes(source, destination) == (EXIT_INTEGRITY, EXIT_INTEGRITY)
        assert destination.report.bytes_out["forward"] == 1, "only what came before it was handed on"

    middle = Middle()
    run(through(middle, client_tls, server_tls, story))


@pytest.mark.parametrize("which", [0, 1], ids=["control", "lane"])
@pytest.mark.parametrize("how", ["reset", "end"])
def test_a_connection_between_the_relays_breaks(
    client_tls: TlsConfig, server_tls: TlsConfig, which: int, how: str
) -> None:
    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        await middle.cut(which, reset=how == "reset")
        assert await near.broken()
        assert await far.broken()
        assert codes(*await pair.ended()) == (EXIT_LOST, EXIT_LOST)

    middle = Middle()
    run(through(middle, client_tls, server_tls, story))


# ------------------------------------------------------------------ stopped from outside, and bugs of our own


def test_a_signal_tells_everybody(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        pair.departing.stop(Interrupted(15))
        assert await near.broken()
        assert await far.broken()
        assert codes(*await pair.ended()) == (143, EXIT_LOST)

    tell(client_tls, server_tls, over_tcp(), story)


@pytest.mark.parametrize("where", ["acknowledge", "pump", "deliver", "beat", "listen", "until", "settle_channels"])
def test_a_bug_of_ours_fails_closed(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """An error nobody thought of, in any part of a source's session: both hypervisors see a reset, the code is 70."""
    part = next(kind for kind in (Channel, Bundle, Runner) if hasattr(kind, where))
    real = getattr(part, where)

    async def broken(self: Runner | Channel | Bundle, *args: object, **kwargs: object) -> object:
        runner = self._carrier if isinstance(self, Channel) else self._host if isinstance(self, Bundle) else self
        if isinstance(runner, SourceRunner):
            raise LookupError("a bug")
        return await real(self, *args, **kwargs)

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress) as pair:
                monkeypatch.setattr(part, where, broken)
                near = await hypervisors.connect()
                with suppress(OSError):
                    await near.send(b"?")
                    near.shut()
                accepting = asyncio.create_task(hypervisors.accept())
                await asyncio.wait({accepting, pair.destination_ended}, return_when=asyncio.FIRST_COMPLETED)
                if accepting.done():
                    with suppress(OSError):  # it may have been reset already
                        accepting.result().shut()
                    # By the time there is something to settle, both streams have ended well.
                    assert await accepting.result().broken() != (where == "settle_channels")
                accepting.cancel()
                source, destination = await pair.ended()
                assert codes(source, destination) == (EXIT_BUG, EXIT_LOST)
                assert await near.broken() != (where == "settle_channels")
        finally:
            hypervisors.close()

    run(session())


def test_a_failed_session_leaves_no_descriptor_behind(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        near.reset()
        await far.broken()
        await pair.ended()

    tell(client_tls, server_tls, over_tcp(), story)
    before = descriptors()
    for _ in range(3):
        tell(client_tls, server_tls, over_tcp(), story)
    assert descriptors() <= before


def test_heartbeats_carry_lane_progress(client_tls: TlsConfig, server_tls: TlsConfig, quick_beats: None) -> None:
    sent: asyncio.Queue[Heartbeat] = asyncio.Queue()
    real = ControlLink.send

    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        link = pair.departing.link

        async def watching(message: object) -> None:
            if isinstance(message, Heartbeat):
                sent.put_nowait(message)
            await real(link, message)  # type: ignore[arg-type]

        link.send = watching  # type: ignore[method-assign, assignment]
        (lane,) = pair.departing.lanes.values()
        first = await sent.get()
        assert first.lanes == (LaneProgress(lane.id, lane.sent_bytes),)
        assert (await sent.get()).number == first.number + 1
        near.shut()
        far.shut()
        await pair.ended_well()

    tell(client_tls, server_tls, over_tcp(), story)

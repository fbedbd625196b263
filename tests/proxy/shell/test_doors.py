"""A session's doors: what comes to one that is over stays outside, what leaves one leaves nothing behind."""

import asyncio
import fcntl
import gc
import socket
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

import pytest

from crypto.keys import LaneId
from crypto.records import RecordHeader, RecordType
from crypto.tls import TlsConfig, TlsPeer
from proxy.control import Finished, Heartbeat, LaneGrant, LaneRequest, Message
from proxy.endpoints.sockets import dial_tcp
from proxy.errors import (
    EXIT_HYPERVISOR,
    EXIT_LOST,
    HypervisorFailed,
    Interrupted,
    PeerAborted,
    PeerLost,
    exit_code_of,
)
from proxy.shell.destination import DestinationRunner
from proxy.shell.lane import BufferPool, Lane, Record
from proxy.shell.runner import Runner
from proxy.shell.source import SourceRunner
from proxy.shell.waiting import Gate
from proxy.wire import FRAME_HEADER_BYTES, LANE_MAGIC, Ack, ChannelId, pack_acks
from tests.proxy.support import Ended, Hypervisors, Pair, Wire, over_tcp, relays, run, until

SIGNAL = 15
FLOOD_MESSAGES = 1000
TICKS_MIN = FLOOD_MESSAGES // 10
SOON_SECONDS = 5.0  # what takes longer never comes
A_FEW_TURNS = 20
HANDSHAKE_FLIGHTS = 4
Story = Callable[[Pair, Wire, Wire], Awaitable[None]]


def tell(client: TlsConfig, server: TlsConfig, story: Story) -> None:
    """A session with one open channel over which one byte has gone, and what happens to it then."""

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client, server, hypervisors.ingress, hypervisors.egress) as pair:
                near, far = await pair.channel(hypervisors)
                await near.send(b"!")
                assert await far.exactly(1) == b"!"
                async with asyncio.timeout(SOON_SECONDS):
                    await story(pair, near, far)
        finally:
            hypervisors.close()

    run(session())


async def turns() -> None:
    """Some turns of the loop, in which whatever is ready has its say."""
    for _ in range(A_FEW_TURNS):
        await asyncio.sleep(0)


def code(ended: Ended) -> int:
    assert ended.error is not None
    return exit_code_of(ended.error)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What goes, goes by its reference count."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# ------------------------------------------------------------------ a lane comes to a session that is over


async def spare(pair: Pair) -> LaneGrant:
    """One more lane that the source may open."""
    await pair.departing.say(LaneRequest())
    return await pair.departing._granted.get()


def watched(runner: Runner) -> list[bytes]:
    """What is written to the session's hypervisor from now on."""
    written: list[bytes] = []
    connection = runner.channels[min(runner.channels)].connection

    def write(data: memoryview) -> int:
        written.append(bytes(data))
        return len(data)

    connection.write = write  # type: ignore[method-assign]
    return written


def held_open(runner: Runner) -> asyncio.Event:
    """The session's link takes as long to close as the test likes."""
    released, close = asyncio.Event(), runner.link.close

    async def slow() -> None:
        await released.wait()
        await close()

    runner.link.close = slow  # type: ignore[method-assign]
    return released


async def stopped(pair: Pair, far: Wire) -> DestinationRunner:
    """The destination's session has been stopped, and its hypervisor told."""
    (runner,) = pair.arriving
    runner.stop(Interrupted(SIGNAL))
    assert await far.broken()
    return runner


async def put_in(pair: Pair, source: SourceRunner, lane: Lane) -> None:
    """Send the frame that would be the next of channel 0; the connection may have been closed."""
    frame = memoryview(bytearray(FRAME_HEADER_BYTES) + b"INJECTED")
    source.session.senders[min(source.session.senders)].data(frame, source.session.next_order())
    with suppress(PeerLost):
        await lane.send_frame(frame)


async def read_on(lane: Lane) -> None:
    """Take what comes by a lane until it breaks."""
    while True:
        (await lane.receive()).release()


def test_no_token_opens_a_session_that_is_over(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        source, grant = pair.departing, await spare(pair)
        (runner,) = pair.arriving
        lanes, written, released = set(runner.lanes), watched(runner), held_open(runner)
        await stopped(pair, far)
        assert runner.redeem(grant.token) is None
        with pytest.raises(PeerLost):
            await source._say_hello(grant, source.keys)
        assert (set(runner.lanes), written) == (lanes, [])
        released.set()
        assert await near.broken()
        assert [code(ended) for ended in await pair.ended()] == [EXIT_LOST, 128 + SIGNAL]

    tell(client_tls, server_tls, story)


def test_a_lane_whose_hello_outlasts_the_session_is_dropped(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        source, grant = pair.departing, await spare(pair)
        (runner,) = pair.arriving
        lanes, written, released = set(runner.lanes), watched(runner), held_open(runner)
        sealer, opener = source.keys.halves(LaneId(grant.lane))
        lane = Lane(await dial_tcp("127.0.0.1", pair.port), LaneId(grant.lane), sealer, opener, BufferPool())
        try:
            await lane.send_raw(LANE_MAGIC + grant.token)
            await until(lambda: not runner._tokens)  # its token was good
            await stopped(pair, far)
            await lane.send(RecordType.HELLO)
            await put_in(pair, source, lane)
            with pytest.raises(PeerLost):
                await read_on(lane)
        finally:
            lane.drop()
        assert (set(runner.lanes), written) == (lanes, [])
        released.set()
        assert await near.broken()
        await pair.ended()

    tell(client_tls, server_tls, story)


def test_a_lane_that_is_sent_away_leaves_no_descriptor_behind(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor still registered when it is closed is never waited for again under its number."""
    joining: list[tuple[int, asyncio.Task[None] | None]] = []
    real = DestinationRunner.join

    async def join(self: DestinationRunner, sock: socket.socket, lane_id: LaneId) -> None:
        joining.append((sock.fileno(), asyncio.current_task()))
        await real(self, sock, lane_id)

    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        grant = await spare(pair)
        first, second = socket.socketpair()
        monkeypatch.setattr(DestinationRunner, "join", join)
        with await dial_tcp("127.0.0.1", pair.port) as visitor:
            await asyncio.get_running_loop().sock_sendall(visitor, LANE_MAGIC + grant.token)
            await until(lambda: joining)
            await turns()
            fd, task = joining[0]
            assert task is not None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        with first, second, socket.socket(fileno=fcntl.fcntl(first, fcntl.F_DUPFD_CLOEXEC, fd)) as newcomer:
            assert newcomer.fileno() == fd
            newcomer.setblocking(False)
            gate = Gate(fd)
            waiting = asyncio.ensure_future(gate.wait_readable())
            await turns()
            second.send(b"?")
            async with asyncio.timeout(1):
                await waiting
            gate.release()
        near.shut()
        far.shut()
        await pair.ended_well()

    tell(client_tls, server_tls, story)


# ------------------------------------------------------------------ a hypervisor comes to a session that is finished


def test_who_connects_after_the_end_is_the_next_migration(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    finishing, say = asyncio.Event(), DestinationRunner.say
    released = asyncio.Event()

    async def slow(self: DestinationRunner, message: Message) -> None:
        if isinstance(message, Finished):
            finishing.set()
            await released.wait()
        await say(self, message)

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress) as pair:
                async with asyncio.timeout(SOON_SECONDS):
                    await migrations(pair, hypervisors)
        finally:
            hypervisors.close()

    async def migrations(pair: Pair, hypervisors: Hypervisors) -> None:
        near, far = await pair.channel(hypervisors)
        await near.send(b"one")
        near.shut()
        far.shut()
        assert await far.to_end() == b"one"
        await finishing.wait()
        late = await hypervisors.connect()
        await late.send(b"two")
        await turns()
        released.set()
        for report in await pair.ended_well():
            assert (report.channels, report.bytes_in["forward"]) == (1, 3)
        report = pair.source.new_report()
        following = asyncio.create_task(pair.source.session(await hypervisors.ingress.accept(), report))
        try:
            end = await hypervisors.accept()
            assert await end.exactly(3) == b"two"
            late.shut()
            end.shut()
            await following
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        assert report.bytes_in["forward"] == 3

    monkeypatch.setattr(DestinationRunner, "say", slow)
    run(session())


# ------------------------------------------------------------------ who is told, and when


@pytest.mark.parametrize("role", ["source", "destination"])
def test_the_peer_is_told_while_a_hypervisor_is_wound_down(
    client_tls: TlsConfig, server_tls: TlsConfig, role: str
) -> None:
    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        runner: Runner = pair.departing if role == "source" else pair.arriving[0]
        connection = runner.channels[min(runner.channels)].connection
        winding, wound, abort = asyncio.Event(), asyncio.Event(), connection.abort

        async def slow() -> None:
            winding.set()
            await wound.wait()
            await abort()

        connection.abort = slow  # type: ignore[method-assign]
        runner.stop(Interrupted(SIGNAL))
        theirs, ours = (far, near) if role == "source" else (near, far)
        assert await theirs.broken()
        assert winding.is_set()
        wound.set()
        assert await ours.broken()
        stopping, told = (await pair.ended())[:: 1 if role == "source" else -1]
        assert (code(stopping), code(told)) == (128 + SIGNAL, EXIT_LOST)
        assert isinstance(told.error, PeerAborted)

    tell(client_tls, server_tls, story)


@pytest.mark.parametrize("role", [SourceRunner, DestinationRunner])
def test_a_session_that_is_stopped_before_it_runs(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch, role: type[Runner]
) -> None:
    real = Runner.run

    async def stop_first(self: Runner) -> None:
        self.stop(Interrupted(SIGNAL))
        await real(self)

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress) as pair:
                near = await hypervisors.connect()
                async with asyncio.timeout(SOON_SECONDS):
                    assert await near.broken()
                    source, destination = await pair.ended()
                stopping, told = (source, destination) if role is SourceRunner else (destination, source)
                assert (code(stopping), code(told)) == (128 + SIGNAL, EXIT_LOST)
                assert isinstance(stopping.error, Interrupted)
                assert isinstance(told.error, PeerAborted)
                hypervisors.listener.setblocking(False)
                if role is SourceRunner:
                    with pytest.raises(BlockingIOError):  # no channel was ever announced
                        hypervisors.listener.accept()
        finally:
            hypervisors.close()

    monkeypatch.setattr(role, "run", stop_first)
    run(session())


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_an_end_that_does_not_settle_is_aborted(client_tls: TlsConfig, server_tls: TlsConfig, how: str) -> None:
    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        (runner,) = pair.arriving
        channel = runner.channels[min(runner.channels)]
        connection, abort = channel.connection, channel.connection.abort
        settling, seen = asyncio.Event(), []

        async def settle() -> None:
            settling.set()
            if how == "fails":
                raise HypervisorFailed("the disk is full")
            await asyncio.Event().wait()

        async def aborted() -> None:
            seen.append("abort")
            await abort()

        connection.settle, connection.abort = settle, aborted  # type: ignore[method-assign]
        near.shut()
        far.shut()
        await settling.wait()
        if how == "is cancelled":
            assert not channel.settled
            runner.stop(Interrupted(SIGNAL))
        source, destination = await pair.ended()
        assert seen == ["abort"]
        assert code(destination) == (EXIT_HYPERVISOR if how == "fails" else 128 + SIGNAL)
        assert source.error is not None

    tell(client_tls, server_tls, story)


# ------------------------------------------------------------------ a flood starves nobody


class FloodOver(Exception):
    """All of it has come."""


async def ticks_during(flood: Awaitable[None]) -> int:
    """How many turns another task gets while a flood is taken."""
    ticks = 0

    async def ticker() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(ticker())
    try:
        with pytest.raises(FloodOver):
            await flood
    finally:
        ticking.cancel()
    return ticks


def test_a_flood_of_acknowledgements(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        (runner,) = pair.arriving
        (lane,) = runner.lanes.values()
        left = FLOOD_MESSAGES

        class Flood:
            id = lane.id

            async def receive(self) -> Record:
                nonlocal left
                left -= 1
                if left < 0:
                    raise FloodOver
                pool = BufferPool()
                buffer = pool.take()
                buffer[: len(entry)] = entry
                header = RecordHeader(RecordType.ACK, 0, lane.id, 0, 0, len(entry))
                return Record(header, buffer, pool)

        flood: Lane = Flood()  # type: ignore[assignment]
        entry = pack_acks(
            [Ack(ChannelId(0), runner.session.role.sends, 0, runner.session.senders[ChannelId(0)].credit)]
        )
        runner.lanes[lane.id] = flood
        try:
            assert await ticks_during(runner.bundle.receive(flood)) > TICKS_MIN
        finally:
            runner.lanes[lane.id] = lane
        near.shut()
        far.shut()
        await pair.ended_well()

    tell(client_tls, server_tls, story)


def test_a_flood_of_heartbeats(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def story(pair: Pair, near: Wire, far: Wire) -> None:
        (runner,) = pair.arriving
        left = FLOOD_MESSAGES

        class Flood:
            async def receive(self) -> Message:
                nonlocal left
                left -= 1
                if left < 0:
                    raise FloodOver
                return Heartbeat(FLOOD_MESSAGES - left, ())

        assert await ticks_during(runner.listen(Flood())) > TICKS_MIN  # type: ignore[arg-type]
        near.shut()
        far.shut()
        await pair.ended_well()

    tell(client_tls, server_tls, story)


# ------------------------------------------------------------------ what is dropped is gone


@pytest.mark.usefixtures("no_collector")
def test_a_tls_peer_that_is_dropped_is_freed_at_once(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    client, server = TlsPeer(client_tls), TlsPeer(server_tls)
    for _ in range(HANDSHAKE_FLIGHTS):
        server.receive(client.outgoing())
        client.receive(server.outgoing())
    assert client.peer is not None
    assert server.peer is not None
    kept = [weakref.ref(thing) for peer in (client, server) for thing in (peer, peer._connection)]
    del client, server
    assert [ref() for ref in kept[::2]] == [None, None]
    assert [ref() for ref in kept[1::2]] == [None, None]

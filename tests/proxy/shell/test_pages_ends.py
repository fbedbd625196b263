"""Other channels, the end of one and that of the session, while frames of pages are being made."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from chunking.adapt import Adapter
from chunking.encoder import Encoder
from chunking.regime import Regime
from crypto.tls import TlsConfig
from proxy.errors import EXIT_POLICY, SessionCancelled, exit_code_of
from proxy.limits import FRAME_BYTES_MAX, IN_FLIGHT_BYTES_MIN, MIB
from proxy.paging import Encode, PagingTerms
from proxy.shell.encoding import EncodingLine
from proxy.wire import ChannelId
from tests.proxy.guest import Guest
from tests.proxy.support import Pair, Wire, over_tcp, relays, run, until

SECONDS_MAX = 30.0
STREAM = Guest(1, 1500).stream(rounds=1)


class Hold:
    """Holds threads up where frames are made, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
        self.reached, self.free = threading.Event(), threading.Event()
        real = getattr(Encoder, work)

        def held(*arguments: object, **options: object) -> object:
            self.reached.set()
            assert self.free.wait(SECONDS_MAX)
            return real(*arguments, **options)

        monkeypatch.setattr(Encoder, work, held)


@dataclass
class Scene:
    """Two channels of a session; the first one's frames of pages are held up."""

    pair: Pair
    line: EncodingLine
    near: list[Wire]
    far: list[Wire]
    hold: Hold
    sending: "asyncio.Task[None]"


@asynccontextmanager
async def scene(
    client: TlsConfig, server: TlsConfig, monkeypatch: pytest.MonkeyPatch, work: str = "plan"
) -> AsyncIterator[Scene]:
    """A session in which frames of pages are held up."""
    hypervisors = over_tcp()
    hold = Hold(monkeypatch, work)
    try:
        async with relays(
            client,
            server,
            hypervisors.ingress,
            hypervisors.egress,
            paging=(PagingTerms(encode=Encode.PAGES), PagingTerms()),
        ) as pair:
            ends = [await pair.channel(hypervisors) for _ in range(2)]
            line = pair.departing.encoding
            assert line is not None
            sending = asyncio.create_task(ends[0][0].send(STREAM))
            await until(hold.reached.is_set)
            yield Scene(pair, line, [near for near, _ in ends], [far for _, far in ends], hold, sending)
            sending.cancel()
    finally:
        hold.free.set()
        hypervisors.close()


async def arrive(made: Scene, other: bytes = b"") -> None:
    """Everything that was said arrives after all, and the session ends well."""
    made.hold.free.set()

    async def first() -> None:
        await made.sending
        made.near[0].shut()

    _, stream, heard = await asyncio.gather(first(), made.far[0].to_end(), made.far[1].to_end())
    assert stream == STREAM
    assert heard == other
    for far in made.far:
        far.shut()
    await made.pair.ended_well()


def test_plain_bytes_do_not_pile_up_behind_frames_of_pages(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for the network as those in flight do, and what is urgent would have to wait for them."""
    plain = random.Random(2).randbytes(16 * MIB)

    async def work() -> None:
        async with scene(client_tls, server_tls, monkeypatch) as made:
            monkeypatch.setattr(Adapter, "choose", lambda *_: Regime.RAW)

            async def second() -> None:
                await made.near[1].send(plain)
                made.near[1].shut()

            sending = asyncio.create_task(second())
            await until(lambda: made.line.plain_bytes > IN_FLIGHT_BYTES_MIN - MIB)
            await asyncio.sleep(0.2)
            # The first channel had filled a large buffer before it was to be sent as it is.
            assert made.line.plain_bytes <= IN_FLIGHT_BYTES_MIN + FRAME_BYTES_MAX
            await asyncio.gather(arrive(made, plain), sending)

    run(work(), SECONDS_MAX)


def test_the_end_of_a_channel_does_not_wait_for_another_one(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one channel is never idle, the others' ends take their place behind what came before them."""

    async def work() -> None:
        async with scene(client_tls, server_tls, monkeypatch) as made:
            made.near[1].shut()
            await until(lambda: made.pair.departing.session.senders[ChannelId(1)].ended)
            assert not made.line.idle
            await arrive(made)

    run(work(), SECONDS_MAX)


def test_the_end_of_a_channel_overtakes_nothing(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where a hypervisor's end is looked at for a while, and frames come into the line meanwhile."""

    async def work() -> None:
        async with scene(client_tls, server_tls, monkeypatch, "press") as made:
            looked, on = asyncio.Event(), asyncio.Event()

            async def ended_well() -> None:
                looked.set()
                await on.wait()

            channel = made.pair.departing.channels[ChannelId(1)]
            monkeypatch.setattr(type(channel.connection), "ended_well", lambda _: ended_well(), raising=False)
            made.near[1].shut()
            await looked.wait()
            monkeypatch.delattr(type(channel.connection), "ended_well")
            on.set()
            await until(lambda: made.pair.departing.session.senders[ChannelId(1)].ended)
            await arrive(made)

    run(work(), SECONDS_MAX)


@pytest.mark.parametrize("work_held", ["plan", "press"])
@pytest.mark.parametrize("how", ["cancelled", "broken"])
def test_a_session_ends_while_frames_are_being_made(
    work_held: str, how: str, client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for none of them, and no thread is left when they are done."""

    async def work() -> None:
        async with scene(client_tls, server_tls, monkeypatch, work_held) as made:
            if how == "cancelled":
                made.pair.departing.stop(SessionCancelled("enough"))
            else:
                made.far[1].reset()
            ended = await made.pair.ended()
            assert [error is not None for _, error in ((end.report, end.error) for end in ended)] == [True, True]
            if how == "cancelled":
                assert {exit_code_of(end.error) for end in ended if end.error is not None} == {EXIT_POLICY}
            made.hold.free.set()
            await until(lambda: not any(thread.name.startswith(("plan", "press")) for thread in threading.enumerate()))

    run(work(), SECONDS_MAX)


def test_frames_that_go_as_they_are_wait_for_the_network_too(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is not told sees a link that is never busy, takes it for a fast one, and compresses nothing any more."""
    monkeypatch.setattr(Adapter, "choose", lambda *_: Regime.RAW)
    told: list[bool] = []

    def waiting(_: Adapter, waits: bool, now: float) -> None:
        del now
        told.append(waits)

    monkeypatch.setattr(Adapter, "waiting", waiting)
    stream = random.Random(3).randbytes(64 * MIB)

    async def work() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(
                client_tls, server_tls, hypervisors.ingress, hypervisors.egress, paging=(PagingTerms(), PagingTerms())
            ) as pair:
                near, far = await pair.channel(hypervisors)
                sending = asyncio.create_task(near.send(stream))
                senders = pair.departing.session.senders
                await until(lambda: ChannelId(0) in senders)
                half = senders[ChannelId(0)]
                await until(lambda: half.in_flight > 0 and not pair.departing.session.room_bytes(half))  # nobody reads
                await until(lambda: told[-1:] == [True])
                assert await far.exactly(len(stream)) == stream
                await sending
                await until(lambda: not half.in_flight and told[-1] is False)
                near.shut()
                assert await far.to_end() == b""
                far.shut()
                await pair.ended_well()
        finally:
            hypervisors.close()

    run(work(), SECONDS_MAX)

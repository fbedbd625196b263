"""Either hypervisor resets its connection at a random moment.

Why: a cancelled or killed QEMU closes with unread bytes, which is a reset. Proxies that treat a reset as an end pass
it on as a clean one, and the other hypervisor starts a VM from half a stream; others leave the far side open until a
time-out, with a VM that stands still. Here the other one sees a reset at once, both relays say 7, and go on serving.
"""

import asyncio
import random
import select
from collections.abc import Callable
from pathlib import Path

import pytest

from crypto.tls import TlsConfig
from proxy.endpoints.sockets import SocketConnection
from proxy.errors import EXIT_HYPERVISOR, exit_code_of
from proxy.wire import ChannelId
from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.chaos.load import HEADER, KIB, MIB, Talk
from tests.chaos.relays import standing
from tests.proxy.support import over_tcp, relays, run

RESET_ARRIVES_SECONDS_MAX = 5
SESSIONS = 12
SIZES = (6 * MIB, 6 * MIB)
LONG = (32 * MIB, 32 * MIB)  # still under way when the other one ends


@pytest.mark.parametrize("who", ["source", "destination"])
@on_uvloop
async def test_a_reset_at_any_moment(hosts: Hosts, tmp_path: Path, who: str) -> None:
    dice = random.Random(who)
    async with standing(hosts, tmp_path) as pair:
        ends, codes = await pair.session(Talk(0, MIB, MIB))
        before = [relay.usage for relay in (pair.send, pair.receive)]
        for number in range(1, SESSIONS + 1):
            moment = HEADER.size + dice.choice([1, 1000, 300 * KIB, dice.randrange(sum(SIZES) * 3 // 4)])
            near, far = (moment, None) if who == "source" else (None, moment)
            talks = [Talk(number, *SIZES, near_dies_at=near, far_dies_at=far)]
            if number % 3 == 0:
                talks.append(Talk(1000 + number, *LONG))  # a second channel ends with the first
            ends, codes = await pair.session(*talks)
            told = f"session {number}, {who} dies after {moment}: {[str(end) for end in ends]}"
            assert codes == (EXIT_HYPERVISOR, EXIT_HYPERVISOR), f"{codes}: {told}"
            assert all(end.cut for end in ends), told
            dead, left = (ends[0].near, ends[0].far) if who == "source" else (ends[0].far, ends[0].near)
            assert left is None or left.ended == "reset", told
            assert dead is None or dead.ended == "died", told
        ends, codes = await pair.session(Talk(99, MIB, MIB))
        assert codes == (0, 0)
        assert ends[0].whole
        for relay, usage in zip((pair.send, pair.receive), before, strict=True):
            await relay.level(usage)


@pytest.mark.parametrize("who", ["source", "destination"])
def test_a_reset_that_the_writer_was_told_of_is_no_end_to_the_reader(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """The kernel tells of a reset once; who asks next is told of a clean end.

    A delivery meets the reset when it writes. If the channel's pump has been woken in the same turn of the loop (by an
    acknowledgement, or by the reset itself), it reads b"" before the failure has cancelled it: that must never become
    an END, which would let the other hypervisor take a cut stream for a whole one.
    """
    real = SocketConnection.write
    resets: list[Callable[[], None]] = []

    def write(self: SocketConnection, data: memoryview) -> int:
        if resets:
            poll = select.poll()
            poll.register(self._sock, 0)  # nothing but errors and hang-ups
            resets.pop()()
            assert poll.poll(RESET_ARRIVES_SECONDS_MAX * 1000)
        return real(self, data)

    monkeypatch.setattr(SocketConnection, "write", write)

    async def story() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress) as pair:
                near, far = await pair.channel(hypervisors)
                dead, left = (near, far) if who == "source" else (far, near)
                await dead.send(b"half a stream")
                assert await left.exactly(13) == b"half a stream"
                runner = pair.departing if who == "source" else pair.arriving[0]

                def reset() -> None:
                    dead.reset()
                    runner.channels[ChannelId(0)].reading.wake()

                resets.append(reset)
                await left.send(b"more")
                assert await left.broken(), "the other hypervisor saw a clean end"
                codes = [0 if side.error is None else exit_code_of(side.error) for side in await pair.ended()]
                assert codes == [EXIT_HYPERVISOR, EXIT_HYPERVISOR]
        finally:
            hypervisors.close()

    run(story())


@pytest.mark.parametrize("who", ["source", "destination"])
@pytest.mark.parametrize("size", [1, 10, 100 * KIB])
def test_a_reset_on_the_heels_of_data(client_tls: TlsConfig, server_tls: TlsConfig, who: str, size: int) -> None:
    """The last words and the reset arrive together, in an idle session: there may be no second wake-up for the reset.

    libuv stops to watch a descriptor once epoll has told of an error, after one last call of its reader: whoever reads
    once in it, gets data, and waits to be called again, waits for ever.
    """

    async def story() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, hypervisors.egress) as pair:
                near, far = await pair.channel(hypervisors)
                dead, left = (near, far) if who == "source" else (far, near)
                for speaker, hearer in ((near, far), (far, near)):
                    await speaker.send(b"?")
                    assert await hearer.exactly(1) == b"?"
                dead.sock.send(bytes(size))
                dead.reset()
                async with asyncio.timeout(RESET_ARRIVES_SECONDS_MAX):
                    assert await left.broken()
                codes = [0 if side.error is None else exit_code_of(side.error) for side in await pair.ended()]
                assert codes == [EXIT_HYPERVISOR, EXIT_HYPERVISOR]
        finally:
            hypervisors.close()

    run(story())

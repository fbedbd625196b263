"""A source with a good identity that breaks the protocol: the destination ends its session, and delivers nothing wrong.

Each abuse begins with a session in good order: a lane, channel 0 and `PROLOGUE` delivered. Then comes the abuse, then
the destination has to have ended the session with the code for it, and its hypervisor has to have seen a reset, with
nothing but the prologue (or what was good before the abuse) received.
"""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

import pytest

from crypto.keys import Direction, LaneId
from crypto.records import RecordType, Sealer
from proxy.endpoints.base import Connection
from proxy.endpoints.sockets import TcpEgress
from proxy.wire import ChannelId
from tests.attacks import wire
from tests.attacks.relays import BOUND_SECONDS, Identities, Receiver, StubHypervisor, noise, on_uvloop, shorten
from tests.attacks.rogue import MIB, Gone, HandLane, RogueSource, Stream, ack, finish_well, message, offer

PROLOGUE = noise(5000, 1)
REFUSED, INTEGRITY, LOST, HYPERVISOR = 4, 5, 6, 7


@dataclass
class Scene:
    """A destination, its hypervisor, and a rogue with an open channel 0."""

    receiver: Receiver
    hypervisor: StubHypervisor
    rogue: RogueSource
    lane: HandLane
    credit: int
    stream: Stream = field(default_factory=Stream)

    async def hears(self, expected: bytes) -> None:
        """The hypervisor has heard exactly this."""
        side = self.hypervisor.sides[0]
        async with asyncio.timeout(5.0):
            await side.until(lambda: len(side.received) >= len(expected))
        assert side.received == expected

    @property
    def delivered(self) -> bytes:
        """What the hypervisor got."""
        return bytes(self.hypervisor.sides[0].received)

    async def check(self, code: int, delivered: bytes = PROLOGUE, seconds: float = 5.0) -> None:
        """The session has ended so, and the hypervisor knows."""
        assert await self.receiver.verdict(seconds) == code, self.receiver.errors
        await self.hypervisor.settled()
        assert self.delivered == delivered
        assert {side.ended for side in self.hypervisor.sides} == {"reset"}


@asynccontextmanager
async def scene(identities: Identities) -> AsyncIterator[Scene]:
    """A session in good order."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        StubHypervisor() as hypervisor,
        Receiver(identities.destination, TcpEgress("127.0.0.1", hypervisor.port, "tcp:egress")) as receiver,
        RogueSource(identities.source, receiver.port) as rogue,
    ):
        await rogue.offer()
        lane = await rogue.lane()
        made = Scene(receiver, hypervisor, rogue, lane, await rogue.channel())
        await lane.frame(made.stream.data(PROLOGUE, order=0))
        kind, _ = await lane.receive()
        assert kind is RecordType.ACK
        yield made


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rogue does not close its connections when it is told to: do not wait 5 s for that each time."""
    shorten(monkeypatch, DRAIN_SECONDS_MAX=0.02, ABORT_SECONDS_MAX=0.2)


@on_uvloop
async def test_the_rogue_can_behave(identities: Identities) -> None:
    """The tools of this file speak the protocol well when they want to: what fails below fails for its reason."""
    async with scene(identities) as made:
        await finish_well(made.rogue, made.lane, made.stream, order=1)
        assert await made.receiver.verdict(5.0) == 0
        assert (made.delivered, made.hypervisor.sides[0].ended) == (PROLOGUE, "eof")


# ---- frames

Abuse = Callable[[Scene], Awaitable[None]]


def changed(**changes: object) -> Abuse:
    """The next DATA frame, with these fields of its header."""

    async def abuse(made: Scene) -> None:
        await made.lane.frame(made.stream.data(noise(100, 2), order=1, **changes))

    return abuse


def ended(**changes: object) -> Abuse:
    """An END frame, with these fields."""

    async def abuse(made: Scene) -> None:
        await made.lane.frame(made.stream.end(order=1, **changes))

    return abuse


def record(kind: RecordType, payload: bytes = b"", flags: int = 0) -> Abuse:
    """One record."""

    async def abuse(made: Scene) -> None:
        await made.lane.record(kind, payload, flags)

    return abuse


def control(*messages: bytes) -> Abuse:
    """Control messages."""

    async def abuse(made: Scene) -> None:
        await made.rogue.control.say(b"".join(messages))

    return abuse


async def data_after_end(made: Scene) -> None:
    await made.lane.frame(made.stream.end(order=1))
    await made.lane.frame(made.stream.data(b"more", order=2))


async def second_end(made: Scene) -> None:
    await made.lane.frame(made.stream.end(order=1))
    await made.lane.frame(made.stream.end(order=2))


async def wrong_byte_right_header(made: Scene) -> None:
    """Not the bytes that the digest is of."""
    frame = bytearray(made.stream.data(noise(100, 2), order=1))
    frame[-1] ^= 1
    await made.lane.frame(bytes(frame))


async def shortened_body(made: Scene) -> None:
    await made.lane.frame(made.stream.data(noise(100, 2), order=1)[:-1])


async def lengthened_body(made: Scene) -> None:
    await made.lane.frame(made.stream.data(noise(100, 2), order=1) + b"+")


async def header_cut_short(made: Scene) -> None:
    await made.lane.frame(made.stream.data(noise(100, 2), order=1)[: wire.FRAME_HEADER_BYTES - 1])


async def own_frame_again(made: Scene) -> None:
    """The same frame in a new record: the record layer cannot see it."""
    again = Stream()
    await made.lane.frame(again.data(PROLOGUE, order=0))


async def another_key(made: Scene) -> None:
    """A record of another lane's key with this lane's header."""
    keys = made.rogue.control.keys(made.rogue.session, 7, Direction.FORWARD)
    sealer = Sealer(keys, LaneId(0))
    while sealer.records < made.lane.sealer.records:
        sealer.seal(RecordType.FRAME)
    await made.lane.raw(bytes(sealer.seal(RecordType.FRAME, made.stream.data(b"x", order=1), wire.WHOLE)))


async def skipped_record(made: Scene) -> None:
    made.lane.sealer.seal(RecordType.ACK, ack(0, 1, 0, MIB))
    await made.lane.frame(made.stream.data(b"x", order=1))


async def skipped_epoch(made: Scene) -> None:
    keys = made.rogue.control.keys(made.rogue.session, 0, Direction.FORWARD).following().following()
    sealer = Sealer(keys, LaneId(0))
    while sealer.records < made.lane.sealer.records:
        sealer.seal(RecordType.FRAME)
    await made.lane.raw(bytes(sealer.seal(RecordType.FRAME, made.stream.data(b"x", order=1), wire.WHOLE)))


async def parts_without_first(made: Scene) -> None:
    await made.lane.record(RecordType.FRAME, made.stream.data(b"x", order=1), wire.LAST)


async def two_firsts(made: Scene) -> None:
    part = made.stream.data(noise(1000, 2), order=1)[:500]
    await made.lane.record(RecordType.FRAME, part, wire.FIRST)
    await made.lane.record(RecordType.FRAME, part, wire.FIRST)


async def whole_within_parts(made: Scene) -> None:
    frame = made.stream.data(noise(1000, 2), order=1)
    await made.lane.record(RecordType.FRAME, frame[:500], wire.FIRST)
    await made.lane.frame(frame)


async def too_many_parts(made: Scene) -> None:
    frame = made.stream.data(noise(1000, 2), order=1)
    await made.lane.record(RecordType.FRAME, frame[:500], wire.FIRST)
    await made.lane.record(RecordType.FRAME, frame[500:] + b"+", wire.LAST)


async def too_few_parts(made: Scene) -> None:
    frame = made.stream.data(noise(1000, 2), order=1)
    await made.lane.record(RecordType.FRAME, frame[:500], wire.FIRST)
    await made.lane.record(RecordType.FRAME, frame[500:-1], wire.LAST)


async def complete_without_last(made: Scene) -> None:
    frame = made.stream.data(noise(1000, 2), order=1)
    await made.lane.record(RecordType.FRAME, frame[:500], wire.FIRST)
    await made.lane.record(RecordType.FRAME, frame[500:], 0)


async def first_part_without_header(made: Scene) -> None:
    await made.lane.record(RecordType.FRAME, made.stream.data(b"x", order=1)[:40], wire.FIRST)


async def unknown_flag(made: Scene) -> None:
    await made.lane.record(RecordType.FRAME, made.stream.data(b"x", order=1), wire.WHOLE | 4)


HUGE = 4 * MIB + 1
FRAME_ABUSES: dict[str, Abuse] = {
    "number ahead": changed(number=2),
    "number again": changed(number=0),
    "order ahead": changed(cache_order=2),
    "order again": changed(cache_order=0),
    "offset ahead": changed(offset=len(PROLOGUE) + 1),
    "offset back": changed(offset=0),
    "digest wrong": changed(digest=bytes(16)),
    "channel unknown": changed(channel=1),
    "channel out of range": changed(channel=64),
    "direction backward": changed(direction=1),
    "direction unknown": changed(direction=2),
    "kind unknown": changed(kind=3),
    "codec reserved": changed(codec=1),
    "codec unknown": changed(codec=9),
    "flags set": changed(flags=1),
    "reserved set": changed(reserved=1),
    "spare set": changed(spare=1),
    "raw over the limit": changed(raw=HUGE, length=HUGE),
    "raw and body disagree": changed(raw=99),
    "body longer than the record": changed(raw=101, length=101),
    "empty data": changed(raw=0, length=0),
    "END with another digest": ended(body=bytes(32)),
    "END with another running digest": ended(digest=bytes(16)),
    "END with another count": ended(offset=len(PROLOGUE) - 1),
    "END with stream bytes": ended(raw=1),
    "END with a short digest": ended(body=bytes(16)),
    "data after END": data_after_end,
    "END after END": second_end,
    "digest of other bytes": wrong_byte_right_header,
    "body shorter than announced": shortened_body,
    "body longer than announced": lengthened_body,
    "no whole header": header_cut_short,
    "a frame again": own_frame_again,
    "empty frame": record(RecordType.FRAME, b"", wire.WHOLE),
    "key of another lane": another_key,
    "a sequence number left out": skipped_record,
    "an epoch left out": skipped_epoch,
    "last part without a first": parts_without_first,
    "first part twice": two_firsts,
    "whole frame within a frame": whole_within_parts,
    "more parts than announced": too_many_parts,
    "fewer parts than announced": too_few_parts,
    "complete without LAST": complete_without_last,
    "first part without a header": first_part_without_header,
    "unknown flag": unknown_flag,
    "HELLO again": record(RecordType.HELLO),
    "LANE_OK": record(RecordType.LANE_OK),
    "FINAL in the middle": record(RecordType.FINAL),
    "ACK of nothing": record(RecordType.ACK),
    "ACK of half an entry": record(RecordType.ACK, ack(0, 1, 0, MIB)[:-1]),
    "ACK of 65 entries": record(RecordType.ACK, ack(0, 1, 0, MIB) * 65),
    "ACK of an unsent frame": record(RecordType.ACK, ack(0, 1, 1, MIB)),
    "ACK of an unknown channel": record(RecordType.ACK, ack(1, 1, 0, MIB)),
    "ACK of a channel out of range": record(RecordType.ACK, ack(64, 1, 0, MIB)),
    "ACK of the wrong direction": record(RecordType.ACK, ack(0, 0, 0, MIB)),
    "credit beyond all streams": record(RecordType.ACK, ack(0, 1, 0, 2**63)),
}

DELIVERED_END = {"data after END", "END after END"}


@pytest.mark.parametrize("name", FRAME_ABUSES)
@on_uvloop
async def test_a_bad_record_or_frame_ends_the_session(identities: Identities, name: str) -> None:
    async with scene(identities) as made:
        with suppress(Gone):  # a destination that ends the session in the middle of an abuse is right to
            await FRAME_ABUSES[name](made)
        assert await made.receiver.verdict(5.0) == INTEGRITY, made.receiver.errors
        await made.hypervisor.settled()
        assert made.delivered == PROLOGUE
        assert made.hypervisor.sides[0].ended == ("eof" if name in DELIVERED_END else "reset")


# ---- control messages

GRANT = {"lane": 9, "token": bytes(16)}
BEAT = {"number": 0, "lanes": []}
CONTROL_ABUSES: dict[str, bytes] = {
    "a channel again": message("channel_open", channel=0, credit=MIB),
    "a channel left out": message("channel_open", channel=2, credit=MIB),
    "a channel out of range": message("channel_open", channel=64, credit=MIB),
    "credit beyond all streams": message("channel_open", channel=1, credit=2**63),
    "credit below zero": message("channel_open", channel=1, credit=-1),
    "an offer again": offer(bytes(16)),
    "ACCEPT": message("accept", suite=1, codec=0, lanes=[GRANT], resume_seconds=30, route=bytes(16)),
    "REFUSE": message("refuse", code=3, reason="no"),
    "LANE_GRANTED": message("lane_granted", grant=GRANT),
    "CHANNEL_OPENED": message("channel_opened", channel=0, credit=MIB),
    "FINISHED": message("finished"),
    "FINISH before END": message("finish"),
    "FINISH twice": message("finish") * 2,
    "a channel after FINISH": message("finish") + message("channel_open", channel=1, credit=MIB),
    "a lane after FINISH": message("finish") + message("lane_request"),
    "lane after lane": message("lane_request") * 64,
    "a message over the limit": (64 * 1024 + 1).to_bytes(4, "big"),
    "a message of 4 GiB": b"\xff" * 4,
    "an empty message": bytes(4),
    "no MessagePack": (5).to_bytes(4, "big") + b"\xc1hello",
    "an unknown message": message("please"),
    "no type": (1).to_bytes(4, "big") + b"\x80",
    "a field too many": message("heartbeat", **BEAT, more=1),
    "a field missing": message("heartbeat", number=0),
    "a field of another type": message("heartbeat", number="0", lanes=[]),
    "progress of 17 lanes": message("heartbeat", number=0, lanes=[{"lane": 0, "sent_bytes": 0}] * 17),
    "progress below zero": message("heartbeat", number=0, lanes=[{"lane": 0, "sent_bytes": -1}]),
    "deep nesting": (2000).to_bytes(4, "big") + b"\x91" * 2000,
    "a map of 4 billion entries": (5).to_bytes(4, "big") + b"\xdf" + b"\xff" * 4,
    "a long reason": message("abort", code=5, reason="x" * 513),
}


@pytest.mark.parametrize("name", CONTROL_ABUSES)
@on_uvloop
async def test_a_bad_message_ends_the_session(
    identities: Identities, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shorten(monkeypatch, CONTROL_SECONDS_MAX=0.2)
    async with scene(identities) as made:
        await made.rogue.control.say(CONTROL_ABUSES[name])
        await made.check(INTEGRITY)


@pytest.mark.parametrize(("said", "code"), [(3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (0, 6), (2, 6), (70, 6), (130, 6)])
@pytest.mark.parametrize("lane_first", [False, True])
@on_uvloop
async def test_abort_is_believed_even_when_the_lane_breaks_with_it(
    identities: Identities, said: int, code: int, lane_first: bool
) -> None:
    # Both arrive in one turn of the destination's loop: the reason has to win over "the lane broke".
    async with scene(identities) as made:
        made.rogue.control.tls.send(message("abort", code=said, reason="tired\x1b[2Jof it\n"))
        if lane_first:
            made.lane.sock.close()
        made.rogue.control.sock.send(made.rogue.control.tls.outgoing())
        if not lane_first:
            made.lane.sock.close()
        await made.check(code)
        assert made.receiver.errors[0] is not None
        assert str(made.receiver.errors[0]).isprintable()


@on_uvloop
async def test_sixty_four_channels_and_no_more(identities: Identities) -> None:
    async with scene(identities) as made:
        for number in range(1, 64):
            await made.rogue.channel(number)
        assert len(made.hypervisor.sides) == 64
        await made.rogue.control.say(message("channel_open", channel=0, credit=MIB))
        assert await made.receiver.verdict(5.0) == INTEGRITY
        await made.hypervisor.settled()
        assert len(made.hypervisor.sides) == 64
        assert {side.ended for side in made.hypervisor.sides} == {"reset"}


@on_uvloop
async def test_a_channel_without_a_lane(identities: Identities) -> None:
    async with greeted(identities) as (receiver, hypervisor, rogue):
        await rogue.offer()
        await rogue.control.say(message("channel_open", channel=0, credit=MIB))
        await asyncio.sleep(0.1)
        assert hypervisor.sides == []
        del receiver


@on_uvloop
async def test_a_lane_that_is_withdrawn_before_its_channel(identities: Identities) -> None:
    """No lane is left when the channel is announced: an error of the peer's, never one of ours (70)."""
    async with greeted(identities) as (receiver, hypervisor, rogue):
        await rogue.offer()
        lane = await rogue.lane()
        lane.sock.close()
        await asyncio.sleep(0.02)
        with suppress(Gone):
            await rogue.control.say(message("channel_open", channel=0, credit=MIB))
        assert await receiver.verdict(5.0) in {INTEGRITY, LOST}, receiver.errors
        assert all(side.ended == "reset" for side in hypervisor.sides)


@asynccontextmanager
async def greeted(identities: Identities) -> AsyncIterator[tuple[Receiver, StubHypervisor, RogueSource]]:
    """A destination, its hypervisor, and a rogue that has authenticated and said nothing yet."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        StubHypervisor() as hypervisor,
        Receiver(identities.destination, TcpEgress("127.0.0.1", hypervisor.port, "tcp:egress")) as receiver,
        RogueSource(identities.source, receiver.port) as rogue,
    ):
        yield receiver, hypervisor, rogue


# ---- before ACCEPT

GREETINGS: dict[str, tuple[bytes, int]] = {
    "another version": (offer(bytes(16), version=2), 4),
    "no suite in common": (offer(bytes(16), suites=[9]), 4),
    "no suites": (offer(bytes(16), suites=[]), 4),
    "17 suites": (offer(bytes(16), suites=[1] * 17), 4),
    "no codec in common": (offer(bytes(16), codecs=[1]), 4),
    "an unknown egress": (offer(bytes(16), egress="other"), 3),
    "an egress that is a path": (offer(bytes(16), egress="../../etc/passwd"), 4),
    "an egress that is a command": (offer(bytes(16), egress="exec:reboot"), 4),
    "flags that are a command": (offer(bytes(16), xl_flags="e;reboot"), 4),
    "a short session id": (offer(bytes(15)), 4),
    "no lanes": (offer(bytes(16), lanes=0), 4),
    "17 lanes": (offer(bytes(16), lanes=17), 4),
    "a field too many": (offer(bytes(16), more=1), 4),
    "a channel": (message("channel_open", channel=0, credit=MIB), 4),
    "a lane": (message("lane_request"), 4),
    "a heartbeat": (message("heartbeat", **BEAT), 4),
    "an accept": (message("accept", suite=1, codec=0, lanes=[GRANT], resume_seconds=30, route=bytes(16)), 4),
    "a finish": (message("finish"), 4),
    "an abort": (message("abort", code=5, reason="never mind"), 4),
    "an oversize message": ((64 * 1024 + 1).to_bytes(4, "big"), 4),
    "an oversize message in full": ((64 * 1024 + 1).to_bytes(4, "big") + bytes(64 * 1024 + 1), 4),
    "no message": (noise(100, 3), 4),
}


@pytest.mark.parametrize("name", GREETINGS)
@on_uvloop
async def test_a_bad_greeting_opens_nothing(identities: Identities, name: str) -> None:
    async with greeted(identities) as (receiver, hypervisor, rogue):
        greeting, code = GREETINGS[name]
        with suppress(Gone):
            await rogue.control.say(greeting)
        assert await receiver.verdict(5.0) == code, receiver.errors
        assert receiver.sessions == 0
        assert hypervisor.sides == []


@on_uvloop
async def test_a_session_id_in_use_is_refused(identities: Identities) -> None:
    async with scene(identities) as made, RogueSource(identities.source, made.receiver.port) as second:
        second.session = made.rogue.session
        answer = await second.offer()
        assert (answer["type"], answer["code"]) == ("refuse", 3)
        await made.lane.frame(made.stream.data(b"on and on", order=1))
        await made.hears(PROLOGUE + b"on and on")


@on_uvloop
async def test_an_offer_and_no_lane(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, FIRST_LANE_SECONDS_MAX=0.3)
    async with greeted(identities) as (receiver, hypervisor, rogue):
        await rogue.offer()
        assert await receiver.verdict(5.0) == LOST
        assert hypervisor.sides == []


@on_uvloop
async def test_a_source_that_falls_silent(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, HEARTBEAT_SECONDS=0.1)
    async with scene(identities) as made:
        await made.check(LOST)


@on_uvloop
async def test_a_lane_that_says_it_sent_what_never_comes(
    identities: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(identities) as made:
        with suppress(Gone):
            for number in range(10):
                progress = [{"lane": 0, "sent_bytes": 10**6}]
                await made.rogue.control.say(message("heartbeat", number=number, lanes=progress))
                await asyncio.sleep(0.02)
        await made.check(LOST)


# ---- lanes and tokens


async def hello(made: Scene, token: bytes, lane: int) -> HandLane:
    """Say a lane hello."""
    opened = HandLane(await made.rogue.dial(), *made.rogue.halves(lane))
    await opened.raw(wire.LANE_MAGIC + token)
    await opened.record(RecordType.HELLO)
    return opened


async def granted(made: Scene) -> dict[str, object]:
    """Ask for one more lane."""
    await made.rogue.control.say(message("lane_request"))
    answer = await made.rogue.control.hear()
    assert answer["type"] == "lane_granted"
    grant: dict[str, object] = answer["grant"]
    return grant


async def goes_on(made: Scene) -> None:
    """The session is none the worse."""
    await made.lane.frame(made.stream.data(b"unharmed", order=1))
    await made.hears(PROLOGUE + b"unharmed")
    assert made.receiver.codes == []


@on_uvloop
async def test_tokens_cannot_be_guessed(identities: Identities) -> None:
    """Not even by one who has the keys of the lane that waits; and guessing does not spend the real one."""
    async with scene(identities) as made:
        grant = await granted(made)
        token, number = grant["token"], grant["lane"]
        assert isinstance(token, bytes)
        assert isinstance(number, int)
        for guess in (bytes(16), b"\xff" * 16, noise(16, 8), token[:-1] + bytes((token[-1] ^ 1,))):
            with pytest.raises(Gone):
                await (await hello(made, guess, number)).receive()
        assert (await (await hello(made, token, number)).receive())[0] is RecordType.LANE_OK
        await goes_on(made)


@on_uvloop
async def test_a_token_works_once(identities: Identities) -> None:
    async with scene(identities) as made:
        grant = await granted(made)
        token, number = grant["token"], grant["lane"]
        assert isinstance(token, bytes)
        assert isinstance(number, int)
        first = await hello(made, token, number)
        assert (await first.receive())[0] is RecordType.LANE_OK
        with pytest.raises(Gone):
            await (await hello(made, token, number)).receive()
        await goes_on(made)


@on_uvloop
async def test_a_token_with_another_lanes_key(identities: Identities) -> None:
    async with scene(identities) as made:
        grant = await granted(made)
        token = grant["token"]
        assert isinstance(token, bytes)
        with pytest.raises(Gone):
            await (await hello(made, token, 0)).receive()
        await goes_on(made)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        wire.LANE_MAGIC,
        wire.LANE_MAGIC + bytes(15),
        b"KRL2" + bytes(16),
        b"K" * 4096,
        noise(100, 9),
        b"\x17\x03\x03",
    ],
    ids=["nothing", "magic", "short", "version", "letters", "noise", "tls data"],
)
@on_uvloop
async def test_connections_that_lead_nowhere(
    identities: Identities, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    shorten(monkeypatch, FIRST_BYTE_SECONDS_MAX=0.1)
    async with scene(identities) as made:
        sock = await made.rogue.dial()
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            await loop.sock_sendall(sock, said)
            assert await loop.sock_recv(sock, 1) == b""
        await goes_on(made)


@on_uvloop
async def test_a_hello_that_never_comes(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, LANE_HELLO_SECONDS_MAX=0.1)
    async with scene(identities) as made:
        grant = await granted(made)
        token = grant["token"]
        assert isinstance(token, bytes)
        idle = HandLane(await made.rogue.dial(), *made.rogue.halves(1))
        await idle.raw(wire.LANE_MAGIC + token)
        with pytest.raises(Gone):
            await idle.receive()
        await goes_on(made)


@on_uvloop
async def test_a_hello_of_a_mebibyte_is_refused_by_its_header(identities: Identities) -> None:
    async with scene(identities) as made:
        grant = await granted(made)
        token, number = grant["token"], grant["lane"]
        assert isinstance(token, bytes)
        assert isinstance(number, int)
        big = HandLane(await made.rogue.dial(), *made.rogue.halves(number))
        await big.raw(wire.LANE_MAGIC + token + wire.HEADER.pack(1, wire.HELLO, 0, number, 0, 0, MIB))
        async with asyncio.timeout(2.0):  # at once: nobody waits for the rest
            with pytest.raises(Gone):
                await big.receive()
        await goes_on(made)


# ---- memory


class Unhurried:
    """An egress that takes its time to connect, as a hypervisor under load does."""

    label = "slow:"
    single = False
    exclusive = False
    handover: Literal["", "xl"] = ""
    paused = False

    async def check(self) -> None:
        """Nothing to check."""

    async def connect(self, xl_flags: str) -> Connection:
        """Not now."""
        del xl_flags
        await asyncio.sleep(BOUND_SECONDS)
        raise AssertionError("never")


@asynccontextmanager
async def bounded(limit: int) -> AsyncIterator[None]:
    """The peak of Python's memory in here stays within `limit` bytes of where it began."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < limit, f"{(peak - before) / MIB:.1f} MiB"


async def until(condition: Callable[[], bool]) -> None:
    """Until the destination has got so far; it tells nobody."""
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)


@on_uvloop
async def test_tiny_frames_hold_tiny_buffers(identities: Identities) -> None:
    """A hypervisor that does not read, a credit used up in part, then as many one-byte frames as are allowed."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        StubHypervisor(reads=False) as hypervisor,
        Receiver(identities.destination, TcpEgress("127.0.0.1", hypervisor.port, "tcp:egress")) as receiver,
        RogueSource(identities.source, receiver.port) as rogue,
    ):
        await rogue.offer()
        lane = await rogue.lane()
        credit = await rogue.channel()
        stream = Stream()
        large = min(8, credit // MIB - 1)
        for order in range(large):
            await lane.frame(stream.data(bytes(MIB), order=order))
        half = receiver.runners[0].session.receivers[ChannelId(0)]
        await until(lambda: half.frames == large)
        assert half.written < large, "the hypervisor has taken it all: this test needs larger frames"
        async with bounded(16 * MIB):
            for order in range(large, large + 200):
                await lane.frame(stream.data(b"x", order=order))
            await until(lambda: half.frames == large + 200)
        assert receiver.codes == []
        # And a frame too many is one too many, however small.
        with suppress(Gone):
            for order in range(large + 200, large + 300):
                await lane.frame(stream.data(b"x", order=order))
        assert await receiver.verdict(5.0) == INTEGRITY


@on_uvloop
async def test_credit_is_what_bounds_a_hypervisor_that_does_not_read(identities: Identities) -> None:
    async with (
        asyncio.timeout(BOUND_SECONDS),
        StubHypervisor(reads=False) as hypervisor,
        Receiver(identities.destination, TcpEgress("127.0.0.1", hypervisor.port, "tcp:egress")) as receiver,
        RogueSource(identities.source, receiver.port) as rogue,
    ):
        await rogue.offer()
        lane = await rogue.lane()
        credit = await rogue.channel()
        stream = Stream()
        with suppress(Gone):
            for order in range(4 * credit // MIB):
                await lane.frame(stream.data(bytes(MIB), order=order))
        assert await receiver.verdict(5.0) == INTEGRITY, receiver.errors
        assert stream.offset < 3 * credit


@on_uvloop
async def test_a_frame_that_announces_more_than_it_brings(identities: Identities) -> None:
    """Room is made for what a first part announces: at most for one frame."""
    async with scene(identities) as made:
        frame = made.stream.data(b"x", order=1, raw=4 * MIB, length=4 * MIB)
        async with bounded(6 * MIB):
            await made.lane.record(RecordType.FRAME, frame, wire.FIRST)
            for _ in range(100):
                await made.lane.record(RecordType.FRAME, b"y", 0)
            await made.rogue.control.say(message("heartbeat", **BEAT))
            await asyncio.sleep(0.1)
        await made.lane.record(RecordType.FRAME, b"z", wire.LAST)
        await made.check(INTEGRITY)


@on_uvloop
async def test_announcements_do_not_pile_up(identities: Identities) -> None:
    """While the hypervisor takes its time to accept the first connection."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        Receiver(identities.destination, Unhurried()) as receiver,
        RogueSource(identities.source, receiver.port) as rogue,
    ):
        await rogue.offer()
        await rogue.lane()
        async with bounded(6 * MIB):
            with suppress(Gone):
                for _ in range(200):
                    await rogue.control.say(message("channel_open", channel=0, credit=MIB) * 100)
            assert await receiver.verdict(5.0) == INTEGRITY, receiver.errors


@on_uvloop
async def test_heartbeats_without_end_change_nothing(identities: Identities) -> None:
    progress = [{"lane": lane, "sent_bytes": 0} for lane in range(100, 116)]
    beats = b"".join(message("heartbeat", number=number, lanes=progress) for number in range(100))
    async with scene(identities) as made:
        async with bounded(6 * MIB):
            for _ in range(20):
                await made.rogue.control.say(beats)
            await asyncio.sleep(0.1)
        await goes_on(made)


@on_uvloop
async def test_a_message_in_tiny_pieces(identities: Identities) -> None:
    """One TLS record a byte, a mebibyte announced: refused by its length; and a good one is put together."""
    async with scene(identities) as made:
        for byte in message("heartbeat", **BEAT):
            await made.rogue.control.say(bytes((byte,)))
        await goes_on(made)
        for byte in (MIB).to_bytes(4, "big"):
            await made.rogue.control.say(bytes((byte,)))
        await made.check(INTEGRITY, PROLOGUE + b"unharmed")

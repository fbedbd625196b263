"""A destination with a good identity that breaks the protocol: the source ends its session, and its hypervisor knows.

The source's hypervisor is in the middle of a conversation that is never answered; whatever the rogue does, it must see
a reset and not one byte that is no true answer.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest

from crypto.keys import Direction, LaneId
from crypto.records import RecordType, Sealer
from proxy.limits import LANE_ATTEMPTS_MAX
from proxy.shell.source import Peer
from tests.attacks import wire
from tests.attacks.relays import BOUND_SECONDS, Identities, Side, noise, on_uvloop, send, shorten
from tests.attacks.rogue import MIB, Gone, Met, RogueDestination, Stream, ack, message

QUESTION = noise(3000, 4)
ANSWER_BYTES = 100_000  # what the hypervisor waits for and never gets
REFUSED, POLICY, AUTHENTICATION, INTEGRITY, LOST = 4, 3, 4, 5, 6


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rogue does not close its connections when it is told to: do not wait 5 s for that each time."""
    shorten(monkeypatch, DRAIN_SECONDS_MAX=0.02, ABORT_SECONDS_MAX=0.2)


@dataclass
class Scene:
    """A rogue destination, and a source with its hypervisor that is about to connect to it."""

    rogue: RogueDestination
    sending: "asyncio.Task[tuple[int, BaseException | None, Side]]"
    here: Side

    async def check(self, code: int, answered: bytes = b"") -> BaseException | None:
        """The source has ended so, and its hypervisor knows."""
        async with asyncio.timeout(10.0):
            ended, error, _ = await self.sending
        assert ended == code, repr(error)
        await self.here.told()
        assert self.here.ended == "reset"
        assert self.here.received == answered
        return error


@asynccontextmanager
async def scene(identities: Identities) -> AsyncIterator[Scene]:
    """A source that connects to a rogue."""
    async with asyncio.timeout(BOUND_SECONDS), RogueDestination(identities.destination) as rogue:
        here = Side()
        script = ((QUESTION, bytes(ANSWER_BYTES)),)
        sending = asyncio.create_task(
            send(identities.source, Peer("127.0.0.1", rogue.port, resume_seconds=0), script, here)
        )
        try:
            yield Scene(rogue, sending, here)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


# ---- before ACCEPT

GRANT = {"lane": 0, "token": bytes(16)}


def accept(**changes: object) -> bytes:
    """An ACCEPT with these fields."""
    fields: dict[str, object] = {"suite": 1, "codec": 0, "lanes": [GRANT], "resume_seconds": 30, "route": bytes(16)}
    return message("accept", **(fields | changes))


GREETINGS: dict[str, tuple[bytes, int]] = {
    "refused by policy": (message("refuse", code=3, reason="not\x1b[2Jhere\n"), POLICY),
    "refused otherwise": (message("refuse", code=4, reason="no"), REFUSED),
    "refused with a strange code": (message("refuse", code=0, reason="no"), REFUSED),
    "aborted by policy": (message("abort", code=3, reason="no"), POLICY),
    "aborted": (message("abort", code=7, reason="no"), REFUSED),
    "aborted as corrupt": (message("abort", code=5, reason="no"), REFUSED),
    "a suite that was not offered": (accept(suite=9), REFUSED),
    "a codec that was not offered": (accept(codec=1), REFUSED),
    "no lanes": (accept(lanes=[]), REFUSED),
    "17 lanes": (accept(lanes=[GRANT] * 17), REFUSED),
    "a short token": (accept(lanes=[{"lane": 0, "token": bytes(15)}]), REFUSED),
    "a field too many": (accept(more=1), REFUSED),
    "an offer": (message("offer", version=1), REFUSED),
    "a lane": (message("lane_granted", grant=GRANT), REFUSED),
    "a channel": (message("channel_opened", channel=0, credit=MIB), REFUSED),
    "a heartbeat": (message("heartbeat", number=0, lanes=[]), REFUSED),
    "the end": (message("finished"), REFUSED),
    "an oversize message": ((64 * 1024 + 1).to_bytes(4, "big"), REFUSED),
    "no message": (noise(100, 3), REFUSED),
}


@pytest.mark.parametrize("name", GREETINGS)
@on_uvloop
async def test_a_bad_answer_to_the_offer(identities: Identities, name: str) -> None:
    async with scene(identities) as made:
        said, code = GREETINGS[name]
        control, _ = await made.rogue.greet()
        with suppress(Gone):
            await control.say(said)
        error = await made.check(code)
        assert str(error).isprintable()


@on_uvloop
async def test_no_answer_to_the_offer(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, HANDSHAKE_SECONDS_MAX=0.3)
    async with scene(identities) as made:
        await made.rogue.greet()
        await made.check(REFUSED)


@on_uvloop
async def test_a_destination_that_leaves_after_the_offer(identities: Identities) -> None:
    async with scene(identities) as made:
        control, _ = await made.rogue.greet()
        control.sock.close()
        await made.check(REFUSED)


# ---- lanes


@on_uvloop
async def test_a_lane_id_twice(identities: Identities) -> None:
    async with scene(identities) as made:
        control, _ = await made.rogue.greet()
        await control.say(made.rogue.acceptance(lanes=[{"lane": 0, "token": made.rogue.token}]))
        (await made.rogue.accept()).close()
        assert (await control.hear())["type"] == "lane_request"
        await control.say(message("lane_granted", grant={"lane": 0, "token": bytes(16)}))
        await made.check(INTEGRITY)


@on_uvloop
async def test_lanes_that_never_answer(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, LANE_HELLO_SECONDS_MAX=0.1)
    async with scene(identities) as made:
        control, _ = await made.rogue.greet()
        await control.say(made.rogue.acceptance())
        for lane in range(1, LANE_ATTEMPTS_MAX):
            await made.rogue.accept()
            assert (await control.hear())["type"] == "lane_request"
            await control.say(message("lane_granted", grant={"lane": lane, "token": bytes(16)}))
        await made.rogue.accept()
        await made.check(LOST)


@on_uvloop
async def test_a_lane_request_that_is_not_granted(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, CONTROL_SECONDS_MAX=0.2)
    async with scene(identities) as made:
        control, _ = await made.rogue.greet()
        await control.say(made.rogue.acceptance())
        (await made.rogue.accept()).close()
        await made.check(LOST)


@on_uvloop
async def test_a_channel_that_is_not_opened(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, CHANNEL_OPEN_SECONDS_MAX=0.2)
    async with scene(identities) as made:
        control, heard = await made.rogue.greet()
        await control.say(made.rogue.acceptance())
        await made.rogue.lane(control, heard["session"])
        await made.check(LOST)


# ---- an open channel

Abuse = Callable[[Met], Awaitable[None]]


def backward() -> Stream:
    """The answers' direction."""
    return Stream(direction=Direction.BACKWARD)


def changed(**changes: object) -> Abuse:
    """The first answer, with these fields of its header."""

    async def abuse(met: Met) -> None:
        await met.lane.frame(backward().data(noise(100, 2), order=0, **changes))

    return abuse


def ended(**changes: object) -> Abuse:
    """An END frame, with these fields."""

    async def abuse(met: Met) -> None:
        await met.lane.frame(backward().end(order=0, **changes))

    return abuse


def record(kind: RecordType, payload: bytes = b"", flags: int = 0) -> Abuse:
    """One record."""

    async def abuse(met: Met) -> None:
        await met.lane.record(kind, payload, flags)

    return abuse


def control(said: bytes) -> Abuse:
    """Control messages."""

    async def abuse(met: Met) -> None:
        await met.control.say(said)

    return abuse


async def wrong_byte(met: Met) -> None:
    frame = bytearray(backward().data(noise(100, 2), order=0))
    frame[-1] ^= 1
    await met.lane.frame(bytes(frame))


async def reflected(met: Met) -> None:
    """The source's own frame sent back: sealed anew, but of the other direction."""
    kind, payload = await met.lane.receive()
    assert kind is RecordType.FRAME
    await met.lane.frame(payload)


async def reflected_record(met: Met) -> None:
    """The source's own key and next number, in the wrong direction."""
    keys = met.control.keys(met.offer["session"], 0, Direction.FORWARD)
    sealer = Sealer(keys, LaneId(0))
    sealer.seal(RecordType.FRAME)
    await met.lane.raw(bytes(sealer.seal(RecordType.FRAME, backward().data(b"x", order=0), wire.WHOLE)))


async def skipped_record(met: Met) -> None:
    met.lane.sealer.seal(RecordType.ACK, ack(0, 0, 0, MIB))
    await met.lane.frame(backward().data(b"x", order=0))


ABUSES: dict[str, tuple[Abuse, int]] = {
    "number ahead": (changed(number=1), INTEGRITY),
    "order ahead": (changed(cache_order=1), INTEGRITY),
    "offset ahead": (changed(offset=1), INTEGRITY),
    "offset beyond the credit": (changed(offset=2**40), INTEGRITY),
    "digest wrong": (changed(digest=bytes(16)), INTEGRITY),
    "digest of other bytes": (wrong_byte, INTEGRITY),
    "channel unknown": (changed(channel=1), INTEGRITY),
    "direction forward": (changed(direction=0), INTEGRITY),
    "raw over the limit": (changed(raw=4 * MIB + 1, length=4 * MIB + 1), INTEGRITY),
    "END with another digest": (ended(body=bytes(32)), INTEGRITY),
    "END with another count": (ended(offset=1), INTEGRITY),
    "a frame sent back": (reflected, INTEGRITY),
    "a record sent back": (reflected_record, INTEGRITY),
    "a sequence number left out": (skipped_record, INTEGRITY),
    "LANE_OK again": (record(RecordType.LANE_OK), INTEGRITY),
    "HELLO": (record(RecordType.HELLO), INTEGRITY),
    "FINAL in the middle": (record(RecordType.FINAL), INTEGRITY),
    "ACK of an unsent frame": (record(RecordType.ACK, ack(0, 0, 5, MIB)), INTEGRITY),
    "ACK of an unknown channel": (record(RecordType.ACK, ack(1, 0, 0, MIB)), INTEGRITY),
    "ACK of the wrong direction": (record(RecordType.ACK, ack(0, 1, 0, MIB)), INTEGRITY),
    "a channel again": (control(message("channel_opened", channel=0, credit=MIB)), INTEGRITY),
    "a channel not announced": (control(message("channel_opened", channel=1, credit=MIB)), INTEGRITY),
    "ACCEPT again": (control(accept()), INTEGRITY),
    "REFUSE": (control(message("refuse", code=3, reason="no")), INTEGRITY),
    "an offer": (control(message("offer", version=1)), INTEGRITY),
    "CHANNEL_OPEN": (control(message("channel_open", channel=1, credit=MIB)), INTEGRITY),
    "FINISHED": (control(message("finished")), INTEGRITY),
    "lanes not asked for": (control(message("lane_granted", grant=GRANT) * 2000), INTEGRITY),
    "a message over the limit": (control((64 * 1024 + 1).to_bytes(4, "big")), INTEGRITY),
    "no message": (control((5).to_bytes(4, "big") + b"\xc1hello"), INTEGRITY),
    "ABORT by policy": (control(message("abort", code=3, reason="no")), POLICY),
    "ABORT as corrupt": (control(message("abort", code=5, reason="no")), INTEGRITY),
    "ABORT with a bug": (control(message("abort", code=70, reason="no")), LOST),
    "ABORT with success": (control(message("abort", code=0, reason="no")), LOST),
}


@pytest.mark.parametrize("name", ABUSES)
@on_uvloop
async def test_a_bad_record_or_message_ends_the_session(identities: Identities, name: str) -> None:
    async with scene(identities) as made:
        abuse, code = ABUSES[name]
        met = await made.rogue.meet()
        with suppress(Gone):
            await abuse(met)
        await made.check(code)


@on_uvloop
async def test_a_source_sends_no_more_than_its_credit(identities: Identities) -> None:
    async with scene(identities) as made:
        met = await made.rogue.meet(credit=1000)
        kind, payload = await met.lane.receive()
        assert kind is RecordType.FRAME
        assert payload[wire.FRAME_HEADER_BYTES :] == QUESTION[:1000]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await met.lane.receive()
        await met.lane.record(RecordType.ACK, ack(0, 0, 1, 1500))
        kind, payload = await met.lane.receive()
        assert payload[wire.FRAME_HEADER_BYTES :] == QUESTION[1000:1500]


@on_uvloop
async def test_a_destination_that_falls_silent(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, HEARTBEAT_SECONDS=0.1)
    async with scene(identities) as made:
        await made.rogue.meet()
        await made.check(LOST)


@pytest.mark.parametrize("which", ["control", "lane"])
@on_uvloop
async def test_a_destination_that_closes(identities: Identities, which: str) -> None:
    async with scene(identities) as made:
        met = await made.rogue.meet()
        (met.control.sock if which == "control" else met.lane.sock).close()
        await made.check(LOST)


@on_uvloop
async def test_finished_is_not_believed_before_finish(identities: Identities) -> None:
    """A stream that is not acknowledged is not done, whatever the destination says."""
    async with scene(identities) as made:
        met = await made.rogue.meet()
        await met.lane.receive()
        await met.lane.record(RecordType.ACK, ack(0, 0, 1, MIB))
        await met.control.say(message("finished"))
        await made.check(INTEGRITY)

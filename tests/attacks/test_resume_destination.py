"""A destination that is not the one of before, or says at a resumption what cannot be: the source ends its session.

The source's hypervisor is in the middle of a conversation; whatever the rogue does, it sees a reset and no false byte.
"""

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from crypto.keys import Direction
from crypto.records import RecordType
from crypto.tls import PeerRules, TlsRole
from proxy.shell.source import Peer
from tests.attacks import wire
from tests.attacks.relays import BOUND_SECONDS, Identities, Side, noise, on_uvloop, send, shorten
from tests.attacks.rogue import MIB, Control, Gone, Met, RogueDestination, Stream, ack, message
from tests.attacks.strangers import House, config

QUESTION, ANSWER = noise(3000, 4), noise(2000, 5)
POLICY, AUTHENTICATION, INTEGRITY, LOST, HYPERVISOR = 3, 4, 5, 6, 7


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rogue does not close its connections when it is told to: do not wait 5 s for that each time."""
    shorten(monkeypatch, DRAIN_SECONDS_MAX=0.02, ABORT_SECONDS_MAX=0.2)


@dataclass
class Scene:
    """A source with an open channel whose control connection the rogue has just cut, and which comes back."""

    rogue: RogueDestination
    met: Met
    sending: "asyncio.Task[tuple[int, BaseException | None, Side]]"
    here: Side

    async def check(self, code: int) -> BaseException | None:
        """The source has ended so, and its hypervisor knows, and has heard nothing false."""
        async with asyncio.timeout(10.0):
            ended, error, _ = await self.sending
        assert ended == code, repr(error)
        assert str(error).isprintable()
        await self.here.told()
        assert (self.here.ended, bytes(self.here.received)) == ("reset", b"")
        return error


@asynccontextmanager
async def scene(identities: Identities, seconds: int = 10) -> AsyncIterator[Scene]:
    """Up to the cut: the question has been taken by the destination, and not acknowledged."""
    async with asyncio.timeout(BOUND_SECONDS), RogueDestination(identities.destination) as rogue:
        here = Side()
        where = Peer("127.0.0.1", rogue.port, resume_seconds=seconds)
        sending = asyncio.create_task(send(identities.source, where, ((QUESTION, ANSWER),), here))
        try:
            met = await rogue.meet()
            kind, _ = await met.lane.receive()
            assert kind is RecordType.FRAME
            met.control.sock.close()
            yield Scene(rogue, met, sending, here)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


@on_uvloop
async def test_the_rogue_can_take_a_session_back(identities: Identities) -> None:
    """And what is refused below is refused for its reason. The frame that was not acknowledged comes once more."""
    async with scene(identities) as made:
        control, heard = await made.rogue.taken_back()
        exporter = control.exporter(made.met.offer["session"])
        made.met.secret.verify(heard["proof"], Direction.FORWARD, exporter)
        assert heard["channels"] == [
            {"channel": 0, "frames": 0, "credit": heard["channels"][0]["credit"], "opened": True}
        ]
        await control.say(made.met.resumed(control))
        lane = await made.rogue.lane(control, made.met.offer["session"], 1)
        kind, payload = await lane.receive()
        assert (kind, payload[wire.FRAME_HEADER_BYTES :]) == (RecordType.FRAME, QUESTION)
        stream = Stream(direction=Direction.BACKWARD)
        await lane.frame(stream.data(ANSWER, order=0))
        await lane.frame(stream.end(order=1))
        await lane.record(RecordType.ACK, ack(0, 0, 1, MIB))
        while True:
            kind, payload = await lane.receive()
            if kind is RecordType.FRAME:
                break
        assert len(payload) == wire.END_BYTES
        await lane.record(RecordType.ACK, ack(0, 0, 2, MIB))
        assert (await control.hear())["type"] == "finish"
        await control.say(message("finished"))
        assert (await made.sending)[0] == 0
        assert (made.here.ended, bytes(made.here.received)) == ("eof", ANSWER)


@pytest.mark.parametrize("received", [0, 1])
@on_uvloop
async def test_what_arrived_is_not_sent_again(identities: Identities, received: int) -> None:
    async with scene(identities) as made:
        control, _ = await made.rogue.taken_back()
        await control.say(made.met.resumed(control, received=received))
        lane = await made.rogue.lane(control, made.met.offer["session"], 1)
        if received:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await lane.receive()
        else:
            assert (await lane.receive())[1][wire.FRAME_HEADER_BYTES :] == QUESTION


# ---- answers

Answer = Callable[[Met, Control, dict[str, Any]], bytes]


def resumed(**changes: object) -> Answer:
    """A RESUMED with these fields."""
    return lambda met, control, heard: met.resumed(control, **changes)


def channel(**changes: object) -> dict[str, object]:
    """A channel's state in good order, but for the changes."""
    return {"channel": 0, "frames": 0, "credit": MIB, "opened": True} | changes


def said(kind: str, **fields: object) -> Answer:
    """Another message."""
    return lambda met, control, heard: message(kind, **fields)


GRANT = {"lane": 9, "token": bytes(16)}
ANSWERS: dict[str, tuple[Answer, int]] = {
    "no proof": (resumed(proof=bytes(32)), AUTHENTICATION),
    "the source's own proof": (lambda met, control, heard: met.resumed(control, proof=heard["proof"]), AUTHENTICATION),
    "a proof of the first connection": (
        lambda met, control, heard: met.resumed(
            control, proof=met.secret.proof(Direction.BACKWARD, met.control.exporter(met.offer["session"]))
        ),
        AUTHENTICATION,
    ),
    "a wrong proof and the end": (resumed(proof=bytes(32), phase="closed", channels=[], lanes=[]), AUTHENTICATION),
    "it has frames that were never sent": (resumed(received=2), INTEGRITY),
    "it wrote frames that were never sent": (resumed(channels=[channel(frames=2)]), INTEGRITY),
    "a channel that was never announced": (resumed(channels=[channel(), channel(channel=1)]), INTEGRITY),
    "credit beyond all streams": (resumed(channels=[channel(credit=2**63)]), INTEGRITY),
    "done with an open session": (resumed(phase="closed", channels=[], lanes=[]), INTEGRITY),
    "a phase that is none": (resumed(phase="greeting"), INTEGRITY),
    "a lane of before": (resumed(lanes=[{"lane": 0, "token": bytes(16)}]), INTEGRITY),
    "17 lanes": (resumed(lanes=[GRANT] * 17), INTEGRITY),
    "a field too many": (resumed(more=1), INTEGRITY),
    "ACCEPT": (
        said("accept", suite=1, codec=0, lanes=[GRANT], resume_seconds=30, route=bytes(16)),
        INTEGRITY,
    ),
    "a heartbeat": (said("heartbeat", number=0, lanes=[]), INTEGRITY),
    "the end": (said("finished"), INTEGRITY),
    "an oversize message": (lambda *_: (64 * 1024 + 1).to_bytes(4, "big"), INTEGRITY),
    "no message": (lambda *_: (5).to_bytes(4, "big") + b"\xc1hello", INTEGRITY),
    **{
        f"refused with {code}": (said("refuse", code=code, reason="no\x1b[2J\n"), ends)
        for code, ends in ((3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (0, 6), (2, 6), (70, 6), (143, 6))
    },
    "aborted": (said("abort", code=7, reason="no"), HYPERVISOR),
}


@pytest.mark.parametrize("name", ANSWERS)
@on_uvloop
async def test_a_bad_answer_to_the_resumption(identities: Identities, name: str) -> None:
    answer, code = ANSWERS[name]
    async with scene(identities) as made:
        control, heard = await made.rogue.taken_back()
        with suppress(Gone):
            await control.say(answer(made.met, control, heard))
        await made.check(code)


@pytest.mark.parametrize("name", ["done with an open session", "no proof", "it has frames that were never sent"])
@on_uvloop
async def test_a_refused_answer_leaves_no_connection_open(identities: Identities, name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with scene(identities) as made:
            answer, code = ANSWERS[name]
            control, heard = await made.rogue.taken_back()
            await control.say(answer(made.met, control, heard))
            await made.check(code)
        del made
        gc.collect()
    assert [str(warning.message) for warning in caught if warning.category is ResourceWarning] == []


@on_uvloop
async def test_a_channel_that_is_forgotten_is_announced_again(identities: Identities) -> None:
    """And an answer to that is one too many: it was open already."""
    async with scene(identities) as made:
        control, _ = await made.rogue.taken_back()
        await control.say(made.met.resumed(control, channels=[]))
        assert (await control.hear())["type"] == "channel_open"
        await control.say(message("channel_opened", channel=0, credit=MIB))
        await made.check(INTEGRITY)


@on_uvloop
async def test_the_old_lane_is_not_listened_to(identities: Identities) -> None:
    """What the destination still says by it arrives nowhere."""
    async with scene(identities) as made:
        control, _ = await made.rogue.taken_back()
        with suppress(Gone):
            while True:
                await made.met.lane.receive()
        await control.say(made.met.resumed(control))
        lane = await made.rogue.lane(control, made.met.offer["session"], 1)
        bad = Stream(direction=Direction.BACKWARD).data(b"x", order=0, digest=bytes(16))
        await lane.frame(bad)
        await made.check(INTEGRITY)


# ---- who answers


@pytest.mark.parametrize("rules", [PeerRules(), PeerRules(names=frozenset({"beta", "gamma"}))])
@on_uvloop
async def test_another_host_of_the_ca_answers(tmp_path: Path, rules: PeerRules) -> None:
    """One that the source would have sent to: but this session is beta's, even if gamma had the secret."""
    house = House(tmp_path / "ca")
    source = config(house.issue("alpha"), TlsRole.CLIENT, rules)
    gamma = config(house.issue("gamma"), TlsRole.SERVER)
    async with scene(Identities(source, config(house.issue("beta"), TlsRole.SERVER))) as made:
        with suppress(Gone):
            await made.rogue.taken_back(gamma)
        error = await made.check(AUTHENTICATION)
        assert "'gamma' answers" in str(error)


@on_uvloop
async def test_another_ca_answers(identities: Identities, tmp_path: Path) -> None:
    other = config(House(tmp_path / "ca").issue("beta"), TlsRole.SERVER)
    async with scene(identities) as made:
        with suppress(Exception):
            await made.rogue.taken_back(other)
        await made.check(AUTHENTICATION)


@on_uvloop
async def test_nobody_that_speaks_tls_answers(identities: Identities) -> None:
    async with scene(identities) as made:
        sock = await made.rogue.accept()
        await asyncio.get_running_loop().sock_sendall(sock, b"HTTP/1.0 400 Bad Request\r\n\r\n")
        await made.check(AUTHENTICATION)


@pytest.mark.parametrize("how", ["closes", "resets", "silence", "handshake", "half"])
@on_uvloop
async def test_no_answer_is_waited_for_until_the_time_is_over(
    identities: Identities, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Whatever breaks or falls silent before the answer is one more loss; the first one's time goes on."""
    shorten(monkeypatch, RESUME_ATTEMPT_SECONDS_MAX=0.2)
    attempts = 0

    async def answer_badly(made: Scene) -> None:
        nonlocal attempts
        while True:
            sock = await made.rogue.accept()
            attempts += 1
            if how == "closes":
                sock.close()
            elif how == "resets":
                sock.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SOL_SOCKET, SO_LINGER
                sock.close()
            elif how != "silence":
                control = Control(sock, identities.destination)
                await asyncio.get_running_loop().sock_recv(sock, wire.PREFIX_BYTES)
                await control.handshake()
                if how == "half":
                    await control.hear()
                    await control.say(made.met.resumed(control)[:50])
                    sock.close()

    async with scene(identities, seconds=1) as made:
        loop = asyncio.get_running_loop()
        began = loop.time()
        answering = asyncio.create_task(answer_badly(made))
        await made.check(LOST)
        assert 0.7 < loop.time() - began < 4.0
        assert attempts >= 2
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)


@on_uvloop
async def test_a_destination_that_takes_back_and_opens_no_lane(
    identities: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumption without a lane is none: the time of the loss goes on."""
    shorten(monkeypatch, LANE_HELLO_SECONDS_MAX=0.1)
    async with scene(identities, seconds=1) as made:
        loop = asyncio.get_running_loop()
        began = loop.time()
        control, _ = await made.rogue.taken_back()
        await control.say(made.met.resumed(control))
        await made.check(LOST)
        assert loop.time() - began < 4.0

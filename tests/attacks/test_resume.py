"""Who may take up a session again: the host that began it, with a proof for this very connection, and nobody else.

A refusal touches nothing: each test ends with the session finishing byte-exact with the source it has.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from crypto.keys import Direction, ResumeSecret, SessionId
from crypto.records import RecordType
from crypto.tls import TlsRole
from proxy.control import Message, Resumed
from proxy.errors import HypervisorFailed
from proxy.limits import ENDED_SESSIONS_MAX, REASON_CHARACTERS_MAX
from proxy.shell.link import ControlLink
from tests.attacks import wire
from tests.attacks.relays import Identities, on_uvloop, shorten
from tests.attacks.returning import PROLOGUE, Scene, scene, until
from tests.attacks.rogue import MIB, Control, Gone, RogueSource, ack, message, offer
from tests.attacks.strangers import House, config

POLICY, AUTHENTICATION, INTEGRITY, LOST, HYPERVISOR = 3, 4, 5, 6, 7


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rogue does not close its connections when it is told to: do not wait 5 s for that each time."""
    shorten(monkeypatch, DRAIN_SECONDS_MAX=0.02, ABORT_SECONDS_MAX=0.2)


@pytest.mark.parametrize("noticed", [True, False])
@on_uvloop
async def test_the_rogue_can_resume(identities: Identities, noticed: bool) -> None:
    """The tools of this file resume well when they want to: what is refused below is refused for its reason."""
    async with scene(identities) as made:
        if noticed:
            await made.away()
        answer = await made.back()
        assert answer["type"] == "resumed"
        assert (answer["received"], answer["phase"]) == (1, "open")
        assert answer["channels"] == [
            {"channel": 0, "frames": 1, "credit": answer["channels"][0]["credit"], "opened": True}
        ]
        await made.finishes()
        assert made.receiver.codes == [0]


# ---- what is no good resumption

Attempt = Callable[[Scene], Awaitable[dict[str, Any]]]


async def _said(control: Control, said: bytes) -> dict[str, Any]:
    await control.say(said)
    return await control.hear()


def resumes(**changes: object) -> Attempt:
    """A RESUME with these fields."""

    async def attempt(made: Scene) -> dict[str, Any]:
        control = await made.rogue.returned()
        return await _said(control, made.rogue.resume(control, **changes))

    return attempt


def says(said: bytes) -> Attempt:
    """Something else behind the preface."""

    async def attempt(made: Scene) -> dict[str, Any]:
        return await _said(await made.rogue.returned(), said)

    return attempt


async def proof_of_the_answer(made: Scene) -> dict[str, Any]:
    """The proof that the destination would send."""
    control = await made.rogue.returned()
    proof = made.rogue.secret.proof(Direction.BACKWARD, control.exporter(made.rogue.session))
    return await _said(control, made.rogue.resume(control, proof=proof))


async def proof_of_another_connection(made: Scene) -> dict[str, Any]:
    """A good one, recorded where it was good."""
    recorded, control = await made.rogue.returned(), await made.rogue.returned()
    proof = made.rogue.secret.proof(Direction.FORWARD, recorded.exporter(made.rogue.session))
    return await _said(control, made.rogue.resume(control, proof=proof))


async def proof_of_another_session(made: Scene) -> dict[str, Any]:
    """Of a session of the same two hosts that is open at the same time."""
    async with RogueSource(made.rogue._config, made.receiver.port) as other:
        assert (await other.offer())["type"] == "accept"
        control = await made.rogue.returned()
        proof = other.secret.proof(Direction.FORWARD, control.exporter(made.rogue.session))
        answer = await _said(control, made.rogue.resume(control, proof=proof))
        await other.control.say(message("abort", code=6, reason="thanks"))
        await until(lambda: LOST in made.receiver.codes)
        return answer


async def proof_from_this_connection(made: Scene) -> dict[str, Any]:
    """The right computation, from the new connection's secrets alone: what a second relay of that host has."""
    control = await made.rogue.returned()
    exporter = control.exporter(made.rogue.session)
    proof = ResumeSecret(exporter, SessionId(made.rogue.session)).proof(Direction.FORWARD, exporter)
    return await _said(control, made.rogue.resume(control, proof=proof))


async def resume_without_the_preface(made: Scene) -> dict[str, Any]:
    control = await made.rogue.returned(preface=False)
    return await _said(control, made.rogue.resume(control))


ATTEMPTS: dict[str, tuple[Attempt, int]] = {
    "no proof": (resumes(proof=bytes(32)), AUTHENTICATION),
    "the proof of the answer": (proof_of_the_answer, AUTHENTICATION),
    "a proof of another connection": (proof_of_another_connection, AUTHENTICATION),
    "a proof of another session": (proof_of_another_session, AUTHENTICATION),
    "a proof from this connection": (proof_from_this_connection, AUTHENTICATION),
    "a session that is none": (resumes(session=bytes(16)), LOST),
    "version 2": (resumes(version=2), AUTHENTICATION),
    "version 0": (resumes(version=0), AUTHENTICATION),
    "an offer behind the preface": (says(offer(bytes(16))), AUTHENTICATION),
    "a finish behind the preface": (says(message("finish")), AUTHENTICATION),
    "a heartbeat behind the preface": (says(message("heartbeat", number=0, lanes=[])), AUTHENTICATION),
    "a resume without the preface": (resume_without_the_preface, AUTHENTICATION),
}


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("name", ATTEMPTS)
@on_uvloop
async def test_a_bad_resumption_is_refused_and_touches_nothing(identities: Identities, name: str, away: bool) -> None:
    attempt, code = ATTEMPTS[name]
    async with scene(identities) as made:
        if away:
            await made.away()
        answer = await attempt(made)
        assert answer["type"] == "refuse", answer
        assert answer["code"] == code, answer
        if away:
            await made.back()
        await made.finishes()


MALFORMED: dict[str, Callable[[Scene, Control], bytes]] = {
    "65 channels": lambda made, control: made.rogue.resume(
        control, channels=[{"channel": 0, "frames": 0, "credit": 0, "opened": True}] * 65
    ),
    "channel 64": lambda made, control: made.rogue.resume(
        control, channels=[{"channel": 64, "frames": 0, "credit": 0, "opened": True}]
    ),
    "received below zero": lambda made, control: made.rogue.resume(control, received=-1),
    "received beyond all streams": lambda made, control: made.rogue.resume(control, received=2**63),
    "a short proof": lambda made, control: made.rogue.resume(control, proof=bytes(31)),
    "a field too many": lambda made, control: made.rogue.resume(control, more=1),
    "an oversize message": lambda *_: (64 * 1024 + 1).to_bytes(4, "big"),
    "no message": lambda *_: (5).to_bytes(4, "big") + b"\xc1hello",
    "an abort": lambda *_: message("abort", code=5, reason="never mind"),
}


@pytest.mark.parametrize("name", MALFORMED)
@on_uvloop
async def test_what_is_no_message_resumes_nothing(identities: Identities, name: str) -> None:
    async with scene(identities) as made:
        control = await made.rogue.returned()
        with suppress(Gone):
            await control.say(MALFORMED[name](made, control))
            answer = await control.hear()
            assert answer["type"] == "refuse", answer
        await made.finishes()


@pytest.mark.parametrize(
    "said",
    [b"", b"KRS1", b"KRS1" + bytes(15), b"KRS1" + bytes(16), b"KRS1" + bytes(17), b"KRS2" + bytes(16), b"KRS1" * 50],
    ids=["K alone", "magic", "short", "and nothing", "and no TLS", "version", "again and again"],
)
@on_uvloop
async def test_prefaces_that_lead_nowhere(identities: Identities, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    shorten(monkeypatch, LANE_HELLO_SECONDS_MAX=0.1, HANDSHAKE_SECONDS_MAX=0.2)
    async with scene(identities) as made:
        sock = await made.rogue.dial()
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            await loop.sock_sendall(sock, said or b"K")
            while await loop.sock_recv(sock, 4096):
                pass
        await made.finishes()
        assert made.receiver.codes == [0]  # nobody was there: with --once it must not count


# ---- another host of the CA


@pytest.fixture
def house(tmp_path: Path) -> House:
    """A CA with hosts of every sort."""
    return House(tmp_path / "ca")


@on_uvloop
async def test_another_host_with_the_right_proof(house: House) -> None:
    """The secret has leaked, the identity has not: a session belongs to a name."""
    hosts = Identities(config(house.issue("alpha"), TlsRole.CLIENT), config(house.issue("beta"), TlsRole.SERVER))
    gamma = config(house.issue("gamma"), TlsRole.CLIENT)
    async with scene(hosts) as made:
        for _ in range(2):
            control = await made.rogue.returned(gamma)
            answer = await _said(control, made.rogue.resume(control))
            assert (answer["type"], answer["code"]) == ("refuse", AUTHENTICATION)
            assert "another host" in answer["reason"]
        await made.finishes()


@on_uvloop
async def test_another_certificate_of_the_same_name(house: House) -> None:
    """One that was renewed while the session ran: the same host, and the lanes' keys are of the new one."""
    hosts = Identities(config(house.issue("alpha"), TlsRole.CLIENT), config(house.issue("beta"), TlsRole.SERVER))
    renewed = config(house.issue("alpha", issued=house.now - timedelta(days=1)), TlsRole.CLIENT)
    async with scene(hosts) as made:
        await made.away()
        made.rogue._config = renewed
        assert (await made.back())["type"] == "resumed"
        await made.finishes()


# ---- sessions that cannot, or can no more


@on_uvloop
async def test_a_session_that_is_not_to_resume(identities: Identities) -> None:
    async with scene(identities, seconds=0) as made:
        control = await made.rogue.returned()
        answer = await _said(control, made.rogue.resume(control))
        assert (answer["type"], answer["code"]) == ("refuse", LOST)
        await made.finishes()


async def done_unheard(made: Scene) -> None:
    """The session is done, and its source never hears so."""
    await made.lane.frame(made.stream.end(order=1))
    while (await made.lane.receive())[0] is not RecordType.FRAME:
        pass
    await made.lane.record(RecordType.ACK, ack(0, 1, 1, MIB))
    await made.rogue.control.say(message("finish"))
    await until(lambda: made.receiver.codes == [0])
    made.rogue.control.sock.close()


async def failed_unheard(made: Scene) -> None:
    """The session fails while its source is away."""
    await made.away()
    made.receiver.runners[0].stop(HypervisorFailed("tcp:egress broke"))
    await until(lambda: made.receiver.codes == [HYPERVISOR])


@pytest.mark.parametrize("how", [done_unheard, failed_unheard])
@on_uvloop
async def test_the_verdict_is_for_the_source_alone(house: House, how: Callable[[Scene], Awaitable[None]]) -> None:
    """Whoever has no proof, or another name, learns nothing of how it ended; the source does, as often as it takes."""
    hosts = Identities(config(house.issue("alpha"), TlsRole.CLIENT), config(house.issue("beta"), TlsRole.SERVER))
    gamma = config(house.issue("gamma"), TlsRole.CLIENT)
    async with scene(hosts) as made:
        await how(made)
        for who, changes in ((None, {"proof": bytes(32)}), (gamma, {})):
            control = await made.rogue.returned(who)
            answer = await _said(control, made.rogue.resume(control, **changes))
            assert (answer["type"], answer["code"]) == ("refuse", AUTHENTICATION)
            assert "egress" not in answer["reason"]
        for _ in range(2):
            control = await made.rogue.returned()
            answer = await _said(control, made.rogue.resume(control))
            if how is done_unheard:
                assert answer["type"] == "resumed"
                made.rogue.secret.verify(answer["proof"], Direction.BACKWARD, control.exporter(made.rogue.session))
                assert (answer["phase"], answer["lanes"], answer["channels"]) == ("closed", [], [])
            else:
                assert (answer["type"], answer["code"]) == ("refuse", HYPERVISOR)
                assert "tcp:egress broke" in answer["reason"]
            control.sock.close()  # without close_notify: it may not have heard


@on_uvloop
async def test_a_verdict_that_was_heard_is_forgotten(identities: Identities) -> None:
    async with scene(identities) as made:
        await done_unheard(made)
        telling = asyncio.create_task(made.receiver.destination.told())
        control = await made.rogue.returned()
        assert (await _said(control, made.rogue.resume(control)))["phase"] == "closed"
        assert not telling.done()
        control.tls.close()
        await control.raw(control.tls.outgoing())
        control.sock.close()
        async with asyncio.timeout(5.0):
            await telling
        control = await made.rogue.returned()
        assert (await _said(control, made.rogue.resume(control)))["code"] == LOST


@on_uvloop
async def test_a_verdict_is_kept_for_so_long(identities: Identities) -> None:
    async with scene(identities, seconds=1) as made:
        await done_unheard(made)
        async with asyncio.timeout(3.0):
            await made.receiver.destination.told()
        control = await made.rogue.returned()
        assert (await _said(control, made.rogue.resume(control)))["code"] == LOST


@on_uvloop
async def test_so_many_verdicts_and_no_more(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 3
    assert most < ENDED_SESSIONS_MAX
    shorten(monkeypatch, ENDED_SESSIONS_MAX=most)
    async with scene(identities) as made:
        await done_unheard(made)
        for number in range(most):
            async with RogueSource(identities.source, made.receiver.port) as other:
                assert (await other.offer())["type"] == "accept"
                other.control.sock.close()
                await until(lambda: len(made.receiver.runners) == number + 2)  # noqa: B023
                await until(lambda: made.receiver.runners[-1].link is None)
                made.receiver.runners[-1].stop(HypervisorFailed("no more"))
                await until(lambda: len(made.receiver.codes) == number + 2)  # noqa: B023
        assert len(made.receiver.destination._ended) == most
        control = await made.rogue.returned()
        assert (await _said(control, made.rogue.resume(control)))["code"] == LOST


@on_uvloop
async def test_a_long_reason_arrives(identities: Identities) -> None:
    """A label can be a whole command line; what is said of a failure stays within what a message may hold."""
    async with scene(identities) as made:
        await made.away()
        made.receiver.runners[0].stop(HypervisorFailed(f"exec:{'x' * 2000}\x1b[2J broke"))
        await until(lambda: made.receiver.codes == [HYPERVISOR])
        answer = await made.rogue.comes_back()
        assert (answer["type"], answer["code"]) == ("refuse", HYPERVISOR)
        assert len(answer["reason"]) <= REASON_CHARACTERS_MAX
        assert answer["reason"].startswith("exec:xxx")
        assert answer["reason"].isprintable()


@on_uvloop
async def test_a_session_id_is_not_free_while_its_verdict_is_kept(identities: Identities) -> None:
    async with scene(identities) as made:
        await done_unheard(made)
        async with RogueSource(identities.source, made.receiver.port) as other:
            other.session = made.rogue.session
            answer = await other.offer()
            assert (answer["type"], answer["code"]) == ("refuse", POLICY)


# ---- many


@on_uvloop
async def test_a_flood_of_wrong_proofs_beside_a_live_session(identities: Identities) -> None:
    """Each costs a handshake and is refused; the session goes on between them, and nothing of them is left."""
    async with scene(identities) as made:
        before = len(asyncio.all_tasks())
        delivered = PROLOGUE
        for number in range(15):
            controls = [await made.rogue.returned() for _ in range(4)]
            answers = await asyncio.gather(
                *(_said(control, made.rogue.resume(control, proof=bytes(32))) for control in controls)
            )
            assert {answer["code"] for answer in answers} == {AUTHENTICATION}
            for control in controls:
                control.sock.close()
            word = bytes([number]) * 1000
            await made.lane.frame(made.next(word))
            delivered += word
            await made.hears(delivered)
        await until(lambda: len(asyncio.all_tasks()) <= before)
        assert made.receiver.runners[0].report.resumes == 0
        await made.finishes(delivered)


@on_uvloop
async def test_a_source_that_comes_back_again_and_again(identities: Identities) -> None:
    """Each time over a new connection, without waiting for anything: one control connection is left, and its lane."""
    async with scene(identities) as made:
        before = len(asyncio.all_tasks())
        for _ in range(20):
            assert (await made.back())["type"] == "resumed"
        runner = made.receiver.runners[0]
        await until(lambda: len(runner.lanes) == 1)
        await until(lambda: len(asyncio.all_tasks()) <= before)
        assert runner.report.resumes == 20
        await made.finishes()


@on_uvloop
async def test_the_time_is_over(identities: Identities) -> None:
    async with scene(identities, seconds=1) as made:
        await made.away()
        loop = asyncio.get_running_loop()
        began = loop.time()
        await made.ends(LOST)
        assert 0.7 < loop.time() - began < 3.0
        answer = await made.rogue.comes_back()
        assert (answer["type"], answer["code"]) == ("refuse", LOST)


@on_uvloop
async def test_a_resumption_without_a_lane_does_not_stop_the_clock(identities: Identities) -> None:
    """A source that keeps coming and opens no lane holds its place no longer than one that stays away."""
    async with scene(identities, seconds=1) as made:
        await made.away()
        loop = asyncio.get_running_loop()
        began = loop.time()
        with suppress(Gone):
            while loop.time() - began < 3.0 and not made.receiver.codes:
                await made.rogue.comes_back(channels=[])
                await asyncio.sleep(0.05)
        await made.ends(LOST)
        assert loop.time() - began < 2.0


@on_uvloop
async def test_two_who_come_back_at_once(identities: Identities) -> None:
    """The same source by two connections: the later one has it, the other is dropped, and no lane of it is let in."""
    async with scene(identities) as made:
        first = await made.rogue.returned()
        answer = await _said(first, made.rogue.resume(first))
        assert answer["type"] == "resumed"
        assert (await made.back())["type"] == "resumed"
        with pytest.raises(Gone):
            await first.hear()
        sock = await made.rogue.dial()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, wire.LANE_MAGIC + answer["lanes"][0]["token"])
        with suppress(OSError):
            assert await loop.sock_recv(sock, 1) == b""
        await made.finishes()


@on_uvloop
async def test_an_answer_that_is_slow_to_leave(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source has come again by then, and that one has the session: the slow one must not take it away."""
    ready, waiting = asyncio.Event(), asyncio.Event()
    send = ControlLink.send

    async def sluggish(self: ControlLink, said: Message) -> None:
        if isinstance(said, Resumed) and not waiting.is_set():
            waiting.set()
            await ready.wait()
        await send(self, said)

    monkeypatch.setattr(ControlLink, "send", sluggish)
    async with scene(identities) as made:
        slow = await made.rogue.returned()
        await slow.say(made.rogue.resume(slow))
        await waiting.wait()
        assert (await made.back())["type"] == "resumed"
        ready.set()
        with pytest.raises(Gone):
            await asyncio.wait_for(_hears_no_more(slow), 5.0)
        await made.finishes()


async def _hears_no_more(control: Control) -> None:
    while True:
        await control.hear()

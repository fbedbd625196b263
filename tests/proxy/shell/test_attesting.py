"""Attestation on a control connection, message by message, with a platform that writes down what it was asked."""

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from crypto.attestation.binding import Binding, Side
from crypto.errors import AttestationMissing, PlatformChanged, TpmUnusable
from crypto.keys import SessionId
from crypto.tls import PeerInfo
from proxy.attestation import Demand, Proved
from proxy.control import Attested, Bank, Challenge, Heartbeat, Message, Refuse, Resume, Wanted
from proxy.errors import PeerRefused, PolicyRefused, ProtocolViolation
from proxy.limits import EVIDENCE_PART_BYTES_MAX
from proxy.shell import attesting

SESSION = SessionId(b"s" * 16)
WANTED = Wanted((Bank("sha256", (7,)),))
FOLLOWS = Resume(1, SESSION, bytes(32), 0, ())


def peer(name: str) -> PeerInfo:
    return PeerInfo(name, bytes(32), "group", "cipher")


class Link:
    """One end of a control connection."""

    def __init__(self, said: "asyncio.Queue[Message]", heard: "asyncio.Queue[Message]") -> None:
        self._said, self._heard = said, heard
        self.sent: list[Message] = []
        self.tls = SimpleNamespace(export_attestation=lambda session: b"e" * 32)

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        await self._said.put(message)

    async def receive(self) -> Message:
        return await self._heard.get()


class Platform:
    """Demands, shows and finds what a test says."""

    def __init__(self, wanted: Wanted | None = WANTED, evidence: bytes = b"evidence", error: Exception | None = None):
        self.wanted, self.evidence, self.error = wanted, evidence, error
        self.attested: list[Binding] = []
        self.appraised: list[tuple[str, bytes, Binding]] = []

    def demands(self, peer: str) -> Demand | None:
        return None if self.wanted is None else Demand(self.wanted)

    def attest(self, binding: Binding, wanted: Wanted) -> bytes:
        self.attested.append(binding)
        return self.evidence

    def appraise(self, peer: str, evidence: bytes, binding: Binding, demand: Demand) -> Proved:
        assert demand.wanted == self.wanted
        self.appraised.append((peer, evidence, binding))
        if self.error is not None:
            raise self.error
        return Proved(f"tpm2 {peer}", b"key")


def ends() -> tuple[Link, Link]:
    one, other = asyncio.Queue[Message](), asyncio.Queue[Message]()
    return Link(one, other), Link(other, one)


async def meet(
    source: Platform | None, destination: Platform | None, recipient: Callable[[str, str], bytes] | None = None
) -> tuple[Any, Any, Link, Link]:
    """Both ends' outcomes, errors included."""
    here, there = ends()

    async def begin() -> Proved:
        proved = await attesting.begin(here, SESSION, peer("beta"), source)  # type: ignore[arg-type]
        await here.send(FOLLOWS)
        return proved

    async def answer() -> tuple[Message, str]:
        first = await there.receive()
        return await attesting.answer(there, peer("alpha"), first, destination, recipient)  # type: ignore[arg-type]

    async with asyncio.timeout(10):
        tasks = [asyncio.create_task(begin()), asyncio.create_task(answer())]
        _, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in waiting:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    return outcomes[0], outcomes[1], here, there


async def test_each_shows_what_the_other_wants() -> None:
    source, destination = Platform(evidence=b"alpha's"), Platform(evidence=b"beta's")
    proved, answered, here, there = await meet(source, destination, lambda session, peer: f"{session} {peer}".encode())
    assert proved == Proved("tpm2 beta", b"key")
    assert answered == (FOLLOWS, "tpm2 alpha")
    (asked,) = (message for message in here.sent if isinstance(message, Challenge))
    (back,) = (message for message in there.sent if isinstance(message, Attested))
    assert source.appraised == [("beta", b"beta's", Binding(b"e" * 32, SESSION, Side.DESTINATION, asked.nonce))]
    assert destination.appraised == [("alpha", b"alpha's", Binding(b"e" * 32, SESSION, Side.SOURCE, back.nonce))]
    key = f"{SESSION.hex()} alpha".encode()
    assert destination.attested == [Binding(b"e" * 32, SESSION, Side.DESTINATION, asked.nonce, key)]
    assert source.attested == [Binding(b"e" * 32, SESSION, Side.SOURCE, back.nonce)]
    assert asked.nonce != back.nonce


@pytest.mark.parametrize(
    "size", [0, 1, EVIDENCE_PART_BYTES_MAX, EVIDENCE_PART_BYTES_MAX + 1, 5 * EVIDENCE_PART_BYTES_MAX]
)
async def test_evidence_of_any_length(size: int) -> None:
    source, destination = Platform(), Platform(evidence=bytes(size))
    proved, *_ = await meet(source, destination)
    assert proved.attested
    assert source.appraised[0][1] == bytes(size)


async def test_nobody_demands_anything() -> None:
    proved, answered, here, _ = await meet(Platform(None), Platform(None))
    assert (proved, answered) == (Proved(), (FOLLOWS, ""))
    assert len(here.sent) == 2
    proved, answered, here, _ = await meet(None, None)
    assert (proved, answered, here.sent) == (Proved(), (FOLLOWS, ""), [FOLLOWS])


async def test_a_source_that_does_not_attest() -> None:
    _, refusal, _, there = await meet(None, Platform())
    assert isinstance(refusal, AttestationMissing)
    assert there.sent == [Refuse(4, "attestation failed")]


@pytest.mark.parametrize(
    ("platform", "kind"),
    [
        (None, AttestationMissing),
        (Platform(error=PlatformChanged("PCR 7 was 00")), PlatformChanged),
    ],
    ids=["not set up", "judges"],
)
async def test_a_destination_that_refuses_tells_nothing(platform: Platform | None, kind: type[Exception]) -> None:
    _, refusal, _, there = await meet(Platform(), platform)
    assert isinstance(refusal, kind)
    assert there.sent[-1] == Refuse(4, "attestation failed")


async def test_a_destination_whose_tpm_is_out_of_order() -> None:
    platform = Platform()
    platform.attest = lambda binding, wanted: (_ for _ in ()).throw(TpmUnusable("no TPM at X", "start it"))  # type: ignore[method-assign]
    refused, refusal, _, there = await meet(Platform(), platform)
    assert isinstance(refusal, TpmUnusable)
    assert there.sent == [Refuse(4, "attestation failed")]
    assert isinstance(refused, PeerRefused | asyncio.CancelledError)


def part(size: int, *, more: bool, nonce: bytes = b"", wanted: Wanted | None = None) -> Attested:
    return Attested(bytes(size), more, nonce, wanted)


async def told(*messages: Message) -> BaseException:
    """What a source makes of a destination that says this."""
    here, there = ends()
    for message in messages:
        await there.send(message)
    with pytest.raises(BaseException) as refusal:  # noqa: PT011 - whoever asks says which
        await within(attesting.begin(here, SESSION, peer("beta"), Platform()))  # type: ignore[arg-type]
    return refusal.value


async def within(work: Coroutine[Any, Any, object]) -> None:
    async with asyncio.timeout(10):
        await work


FULL = EVIDENCE_PART_BYTES_MAX


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        ((Heartbeat(0, ()),), ProtocolViolation),
        ((part(1, more=True), part(1, more=False)), ProtocolViolation),
        ((part(FULL, more=True),) * 200, ProtocolViolation),
        ((part(1, more=False, nonce=bytes(31), wanted=WANTED),), ProtocolViolation),
        ((Refuse(4, "no"),), PeerRefused),
        ((Refuse(3, "no"),), PolicyRefused),
    ],
    ids=["another message", "short part", "endless", "short nonce", "refused", "policy"],
)
async def test_a_destination_that_breaks_the_rules(messages: tuple[Message, ...], kind: type[Exception]) -> None:
    assert isinstance(await told(*messages), kind)


async def test_what_follows_is_of_that_session() -> None:
    here, there = ends()
    await here.send(Challenge(1, b"t" * 16, bytes(32)))
    await here.send(FOLLOWS)
    first = await there.receive()
    with pytest.raises(ProtocolViolation):
        await within(attesting.answer(there, peer("alpha"), first, Platform(None)))  # type: ignore[arg-type]

"""A destination with a good identity that abuses pages: the source ends its session, and its hypervisor knows.

The source's guest consists of pages that its content store knows (`PAGES`) and others; its hypervisor waits for an
answer that never comes, and must see a reset.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from crypto.keys import Direction
from crypto.records import RecordType
from proxy.endpoints.sockets import dial_tcp
from proxy.limits import CREDIT_BYTES_MAX
from proxy.paging import Encode, PagingTerms
from proxy.shell import contact
from proxy.shell.source import Peer, Source
from proxy.wire import ChannelId
from tests.attacks import wire
from tests.attacks.paged import CACHE_PAGES, HEADER, PAGE, SEGMENT, Chain, Shelf, aliases, literal, threads
from tests.attacks.relays import BOUND_SECONDS, Identities, Side, noise, on_uvloop, send, shorten
from tests.attacks.returning import until
from tests.attacks.rogue import MIB, Gone, Met, RogueDestination, Stream, ack, message
from tests.proxy.guest import Guest

REFUSED, INTEGRITY, LOST = 4, 5, 6
PAGES = [noise(PAGE, 100 + ordinal) for ordinal in range(1024)]
OFFERED = [{"name": SEGMENT, "pages": len(PAGES)}]
AGREED = {
    "codec": 1,
    "cache_bytes": CACHE_PAGES * PAGE,
    "chains": 1,
    "segments": partial(aliases, OFFERED, Direction.BACKWARD),
}


def stream_of(pages: list[bytes]) -> bytes:
    """What a hypervisor sends of a guest with this memory."""
    guest = Guest(1, 1)
    guest.memory = pages
    return guest.stream(rounds=1)


STREAM = stream_of([*PAGES[:500], noise(PAGE, 1), *PAGES[500:]])


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

    async def check(self, code: int) -> BaseException | None:
        """The source has ended so, its hypervisor knows, and no thread is left."""
        async with asyncio.timeout(10.0):
            ended, error, _ = await self.sending
        assert ended == code, repr(error)
        await self.here.told()
        assert self.here.ended == "reset"
        assert not self.here.received
        await until(lambda: not threads())
        return error

    async def meets(self, **changes: object) -> Met:
        """A session in good order in which pages were agreed on."""
        return await self.rogue.meet(**({"credit": 32 * MIB} | AGREED | changes))  # type: ignore[arg-type]


@asynccontextmanager
async def scene(identities: Identities, stream: bytes = STREAM) -> AsyncIterator[Scene]:
    """A source that connects to a rogue."""
    paging = PagingTerms(Encode.PAGES, CACHE_PAGES * PAGE, 2, "acme", Shelf(PAGES, readable=range(len(PAGES))))
    async with asyncio.timeout(BOUND_SECONDS), RogueDestination(identities.destination) as rogue:
        here = Side()
        where = Peer("127.0.0.1", rogue.port, resume_seconds=0, paging=paging)
        sending = asyncio.create_task(send(identities.source, where, ((stream, bytes(100_000)),), here))
        try:
            yield Scene(rogue, sending, here)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def frame(met: Met) -> tuple[int, int, bytes]:
    """The next frame of pages: its cache order, its number, its body."""
    while True:
        data = b""
        while not data or len(data) < wire.FRAME_HEADER_BYTES + wire.FRAME_HEADER.unpack_from(data)[10]:
            kind, payload = await met.lane.receive()
            assert kind is RecordType.FRAME
            data += payload
        fields = wire.FRAME_HEADER.unpack_from(data)
        if fields[1]:
            return fields[7], fields[6], data[wire.FRAME_HEADER_BYTES :]


async def copying(met: Met) -> tuple[int, list[int]]:
    """The cache order of the first frame that refers to stored pages, and their ordinals."""
    while True:
        order, _, body = await frame(met)
        if count := HEADER.unpack_from(body)[11]:
            return order, list(range(count))


@on_uvloop
async def test_what_was_referred_to_is_given(identities: Identities) -> None:
    async with scene(identities) as made:
        met = await made.meets()
        exporter = met.control.exporter(met.offer["session"])
        assert met.offer["segments"] == aliases(OFFERED, Direction.FORWARD, exporter)
        order, ordinals = await copying(met)
        await met.control.say(message("pages_wanted", order=order, ordinals=ordinals))
        got: list[int] = []
        while len(got) < len(ordinals):
            answer = await met.control.hear()
            assert (answer["type"], answer["order"]) == ("pages_given", order)
            assert answer["pages"] == b"".join(PAGES[ordinal] for ordinal in answer["ordinals"])
            got += answer["ordinals"]
        assert got == ordinals
        assert not made.sending.done()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's control connection takes little while it is not read."""

    async def dial(host: str, port: int) -> socket.socket:
        sock = await dial_tcp(host, port)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    monkeypatch.setattr(contact, "dial_tcp", dial)


@pytest.mark.parametrize(
    "question",
    [
        {"order": 1000},
        {"order": 2**62},
        {"ordinals": [0, 1, 1023]},
        {"ordinals": [1024]},
        {"ordinals": [2**32 - 1]},
        {"ordinals": []},
        {"ordinals": [0] * 1025},
        {"ordinals": [-1]},
    ],
)
@on_uvloop
async def test_a_question_for_what_was_not_referred_to(identities: Identities, question: dict[str, Any]) -> None:
    """A destination gets no page that it does not need: it may hold none of what it says it holds."""
    async with scene(identities, stream_of(PAGES[:400])) as made:
        met = await made.meets()
        order, _ = await copying(met)
        with suppress(Gone):
            await met.control.say(message("pages_wanted", **({"order": order, "ordinals": [0]} | question)))
        await made.check(INTEGRITY)


@on_uvloop
async def test_a_question_for_a_frame_that_was_acknowledged(identities: Identities) -> None:
    async with scene(identities, stream_of(PAGES[:400])) as made:
        met = await made.meets()
        order, _ = await copying(met)
        await met.lane.record(RecordType.ACK, ack(0, 0, order + 1, 32 * MIB))
        await asyncio.sleep(0.1)
        with suppress(Gone):
            await met.control.say(message("pages_wanted", order=order, ordinals=[0]))
        await made.check(INTEGRITY)


@on_uvloop
async def test_a_question_where_no_pages_were_agreed_on(identities: Identities) -> None:
    async with scene(identities) as made:
        met = await made.rogue.meet()
        await met.control.say(message("pages_wanted", order=0, ordinals=[0]))
        await made.check(INTEGRITY)


@pytest.mark.usefixtures("narrow")
@on_uvloop
async def test_questions_without_end_are_not_all_answered(identities: Identities) -> None:
    """Whoever asks and does not read the answers cannot make them pile up, nor keep us from hearing it."""
    async with scene(identities) as made:
        met = await made.meets()
        order, ordinals = await copying(met)
        question = message("pages_wanted", order=order, ordinals=ordinals)
        with suppress(Gone):
            for _ in range(20):
                await met.control.say(question)
        await made.check(INTEGRITY)


@pytest.mark.usefixtures("narrow")
@on_uvloop
async def test_an_answer_that_is_not_read(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, PAGES_GIVEN_SECONDS_MAX=0.3)
    async with scene(identities) as made:
        met = await made.meets()
        order, ordinals = await copying(met)
        for _ in range(2):
            await met.control.say(message("pages_wanted", order=order, ordinals=ordinals))
        error = await made.check(LOST)
        assert "does not read" in str(error)


@pytest.mark.usefixtures("narrow")
@on_uvloop
async def test_a_destination_that_falls_silent_in_the_middle_of_an_answer(
    identities: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is missed as it is at any other time."""
    shorten(monkeypatch, HEARTBEAT_SECONDS=0.1)
    async with scene(identities) as made:
        met = await made.meets()
        order, ordinals = await copying(met)
        for _ in range(2):
            await met.control.say(message("pages_wanted", order=order, ordinals=ordinals))
        error = await made.check(LOST)
        assert "heartbeat" in str(error)


@on_uvloop
async def test_pages_do_not_go_backward(identities: Identities) -> None:
    async with scene(identities) as made:
        met = await made.meets()
        body = literal(PAGES[0]).pack(Chain())
        await met.lane.frame(Stream(direction=Direction.BACKWARD).paged(body, PAGES[0], 0))
        assert "codec PAGES was not agreed on" in str(await made.check(INTEGRITY))


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_bytes": CACHE_PAGES * PAGE + 1},
        {"cache_bytes": 2**63 - 1},
        {"cache_bytes": 2**63},
        {"cache_bytes": PAGE - 1},
        {"cache_bytes": 0},
        {"chains": 3},
        {"chains": 0},
        {"chains": 255},
        {"codec": 2},
        {"segments": [{"name": SEGMENT, "pages": len(PAGES) + 1}]},
        {"segments": OFFERED * 2},
        {"segments": [{"name": bytes(16), "pages": 0}]},
        {"segments": [*OFFERED, {"name": bytes(16), "pages": 1}]},
        {"segments": OFFERED * 65},
        {"segments": "as they were offered"},
        {"segments": "by their names"},
    ],
)
@on_uvloop
async def test_an_acceptance_of_what_was_not_offered(identities: Identities, changes: dict[str, object]) -> None:
    """Nor of stored pages by who cannot show that it knows them: it would be given what they were."""
    async with scene(identities) as made:
        control, heard = await made.rogue.greet()
        exporter = control.exporter(heard["session"])
        segments = changes.get("segments", OFFERED)
        if isinstance(segments, list):
            segments = aliases(segments, Direction.BACKWARD, exporter)
        elif segments == "as they were offered":
            segments = heard["segments"]
        else:
            segments = OFFERED
        with suppress(Gone):
            await control.say(made.rogue.acceptance(**(AGREED | changes | {"segments": segments})))
        await made.check(REFUSED)


@on_uvloop
async def test_no_credit_makes_a_source_keep_more_than_it_should(
    identities: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that weigh nothing on the network stand for much here: stored pages are kept until they arrive."""
    sources: list[Source] = []
    real = Source.__init__

    def noted(self: Source, *arguments: Any) -> None:
        real(self, *arguments)
        sources.append(self)

    monkeypatch.setattr(Source, "__init__", noted)
    async with scene(identities, stream_of([bytes(PAGE)] * (CREDIT_BYTES_MAX // PAGE + 8192))) as made:
        met = await made.meets(credit=2**62)

        async def listen() -> None:
            with suppress(Gone):
                while True:
                    await met.lane.receive()

        listening = asyncio.create_task(listen())
        runner = sources[0].current
        assert runner is not None
        await until(lambda: bool(runner.session.senders))
        half = runner.session.senders[ChannelId(0)]
        await until(lambda: half.offset > CREDIT_BYTES_MAX - 2 * MIB)
        await asyncio.sleep(0.3)
        assert half.offset <= CREDIT_BYTES_MAX
        await met.lane.record(RecordType.ACK, ack(0, 0, half.frames, 2**62))
        await until(lambda: half.offset > CREDIT_BYTES_MAX)
        listening.cancel()

"""A source with a good identity that abuses stored pages: those it is asked for, those of others, those it leaves.

`SHELF` is what an earlier session left; the destination has lost half of it, and must ask for that.
"""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from korora.host_store import HostStore
from proxy.errors import SessionCancelled
from proxy.wire import ChannelId
from tests.attacks.paged import (
    ALONE,
    CACHE_PAGES,
    COPY,
    DELTA,
    LITERAL,
    LOST,
    PAGE,
    SEGMENT,
    ZSTD,
    Body,
    PagedScene,
    Shelf,
    literal,
    paged_scene,
    threads,
)
from tests.attacks.relays import Identities, noise, on_uvloop, shorten
from tests.attacks.returning import bounded, until
from tests.attacks.rogue import MIB, Gone, RogueSource, message
from tests.attacks.test_rogue_pages import squeezed, wide

POLICY, INTEGRITY = 3, 5
PAGES = [noise(PAGE, 100 + ordinal) for ordinal in range(8)]
OFFERED = [{"name": SEGMENT, "pages": len(PAGES)}]
OURS = noise(PAGE, 99)


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rogue does not close its connections when it is told to: do not wait 5 s for that each time."""
    shorten(monkeypatch, DRAIN_SECONDS_MAX=0.02, ABORT_SECONDS_MAX=0.2)


def copies(*ordinals: int) -> tuple[Body, bytes]:
    """A body of copies of stored pages, and what it stands for."""
    located = [CACHE_PAGES + ordinal for ordinal in ordinals]
    return Body([COPY] * len(ordinals), located), b"".join(PAGES[ordinal] for ordinal in ordinals)


def given(order: int, *ordinals: int, **changes: object) -> bytes:
    """The right answer to a question, but for the changes."""
    pages = b"".join(PAGES[ordinal] for ordinal in ordinals)
    return message("pages_given", **({"order": order, "ordinals": list(ordinals), "pages": pages} | changes))


@asynccontextmanager
async def asked(identities: Identities, *, resume_seconds: int = 0, chains: int = 2) -> AsyncIterator[PagedScene]:
    """The destination has asked for stored pages 1 and 3, to which frame 1 refers."""
    shelf = Shelf(PAGES, readable=[0, 2, 4])
    async with paged_scene(
        identities, tenant="acme", store=shelf, segments=OFFERED, resume_seconds=resume_seconds, chains=chains
    ) as made:
        await made.sends(*copies(0, 1, 2, 3))
        assert await made.rogue.control.hear() == {"type": "pages_wanted", "order": 1, "ordinals": [1, 3]}
        yield made


ALL = b"".join(PAGES[:4])


@pytest.mark.parametrize("parts", [[(1, 3)], [(1,), (3,)], [(3,), (1,)]])
@on_uvloop
async def test_what_was_asked_for_is_taken(identities: Identities, parts: list[tuple[int, ...]]) -> None:
    async with asked(identities) as made:
        for ordinals in parts:
            await made.rogue.control.say(given(1, *ordinals))
        await made.hears(ALL)


ANSWERS: dict[str, bytes] = {
    "of a frame before": given(0, 1, 3),
    "of a frame to come": given(2, 1, 3),
    "of no frame": given(2**62, 1, 3),
    "one that was not asked for": given(1, 1, 2, 3),
    "one beyond all": given(1, 1, ordinals=[8]),
    "one twice": given(1, 1) + given(1, 1),
    "one twice in one": given(1, 1, 1),
    "fewer bytes": given(1, 1, 3, pages=bytes(2 * PAGE - 1)),
    "more bytes": given(1, 1, 3, pages=bytes(2 * PAGE + 1)),
    "no page": given(1),
    "16 pages": message("pages_given", order=1, ordinals=list(range(16)), pages=bytes(16 * PAGE)),
    "another page": given(1, 1, 3, pages=PAGES[1] + OURS),
    "the other page": given(1, 1, 3, pages=PAGES[3] + PAGES[1]),
}


@pytest.mark.parametrize("name", ANSWERS)
@on_uvloop
async def test_a_wrong_answer_ends_the_session(identities: Identities, name: str) -> None:
    async with asked(identities) as made:
        with suppress(Gone):
            await made.rogue.control.say(ANSWERS[name])
        await made.ends()
        await until(lambda: not threads())


@on_uvloop
async def test_an_answer_that_came_already(identities: Identities) -> None:
    async with asked(identities) as made:
        await made.rogue.control.say(given(1, 1, 3))
        await made.hears(ALL)
        await made.rogue.control.say(given(1, 1, 3))
        await made.ends()


@on_uvloop
async def test_an_answer_that_nobody_asked_for(identities: Identities) -> None:
    async with paged_scene(identities) as made:
        await made.rogue.control.say(given(1, 1))
        await made.ends()


@on_uvloop
async def test_another_page_that_the_frame_is_made_of(identities: Identities) -> None:
    """Its digest is right: the page's id alone says that it is not the stored one."""
    shelf = Shelf(PAGES, readable=[0])
    async with paged_scene(identities, tenant="acme", store=shelf, segments=OFFERED) as made:
        await made.sends(copies(0, 1)[0], PAGES[0] + OURS)
        assert (await made.rogue.control.hear())["ordinals"] == [1]
        await made.rogue.control.say(given(1, 1, pages=OURS))
        assert "not stored page 1" in str(await made.ends())


@on_uvloop
async def test_an_answer_where_no_pages_were_agreed_on(identities: Identities) -> None:
    async with paged_scene(identities, codecs=[0]) as made:
        await made.rogue.control.say(given(1, 1))
        await made.ends()


@on_uvloop
async def test_pages_where_none_were_agreed_on(identities: Identities) -> None:
    async with paged_scene(identities, codecs=[0]) as made:
        await made.sends(literal(OURS), OURS)
        assert "codec PAGES was not agreed on" in str(await made.ends())


@pytest.mark.parametrize("answered", [False, True])
@on_uvloop
async def test_an_answer_that_never_comes(
    identities: Identities, monkeypatch: pytest.MonkeyPatch, *, answered: bool
) -> None:
    """Although the peer is there: its heartbeats would keep the session waiting for ever."""
    shorten(monkeypatch, PAGES_GIVEN_SECONDS_MAX=0.3)
    async with asked(identities) as made:
        if answered:
            await made.rogue.control.say(given(1, 1))
        await made.ends(LOST)
        await until(lambda: not threads())


@on_uvloop
async def test_a_peer_that_is_away_is_asked_again(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time without it does not count, and it is asked for nothing twice."""
    shorten(monkeypatch, PAGES_GIVEN_SECONDS_MAX=0.5)
    async with asked(identities, resume_seconds=10) as made:
        await made.rogue.control.say(given(1, 1))
        runner = made.receiver.runners[0]
        await until(lambda: runner.decoding is not None and runner.decoding.wanted == {3})
        made.rogue.control.sock.close()
        await until(lambda: runner.link is None)
        await asyncio.sleep(0.7)
        state = {"channel": 0, "frames": 0, "credit": MIB, "opened": True}
        assert (await made.rogue.comes_back(channels=[state], received=0))["type"] == "resumed"
        made.lane = await made.rogue.lane()
        assert await made.rogue.control.hear() == {"type": "pages_wanted", "order": 1, "ordinals": [3]}
        await made.rogue.control.say(given(1, 3))
        await made.hears(ALL)
        await made.sends(*copies(4))
        await made.hears(PAGES[4])


@on_uvloop
async def test_a_question_that_meets_the_peer_s_return_is_asked_once(
    identities: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was about to be asked when the peer came back by another connection, on which it is asked in any case."""
    async with asked(identities, resume_seconds=10) as made:
        runner = made.receiver.runners[0]
        line = runner.decoding
        assert line is not None
        real, gone = runner.link, object()
        monkeypatch.setattr(runner, "link", gone)
        line.ask_again()
        monkeypatch.setattr(runner, "link", real)
        line.ask_again()
        assert (await made.rogue.control.hear())["type"] == "pages_wanted"
        await made.rogue.control.say(given(1, 1, 3))
        await made.hears(ALL)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await made.rogue.control.hear()


@on_uvloop
async def test_tiny_frames_that_wait_for_an_answer_hold_tiny_buffers(identities: Identities) -> None:
    """And a frame too many is one too many, however small."""
    async with asked(identities) as made:
        half = made.receiver.runners[0].session.receivers[ChannelId(0)]
        async with bounded(48 * MIB):
            for number in range(200):
                if number % 2:
                    await made.lane.frame(made.plain(b"x"))
                else:
                    await made.sends(Body(other=b"x"), b"x")
            await until(lambda: half.frames == 202)
        assert made.receiver.codes == []
        with suppress(Gone):
            for _ in range(100):
                await made.sends(Body(other=b"x"), b"x")
        await made.ends()
        await until(lambda: not threads())


@on_uvloop
async def test_frames_that_wait_for_an_answer_are_not_decompressed(identities: Identities) -> None:
    """Credit allows for what they stand for, not for that and its columns besides."""
    pages = 256
    async with asked(identities, chains=1) as made:
        half = made.receiver.runners[0].session.receivers[ChannelId(0)]
        zeros = squeezed(bytes(pages * PAGE))
        async with bounded(26 * MIB):  # a buffer of 1 MiB for each as it came, and a few decompressed
            for _ in range(20):
                await made.sends(Body([LITERAL] * pages, literals=zeros, flags=ZSTD | ALONE), bytes(pages * PAGE))
            await until(lambda: half.frames == 22)
            await asyncio.sleep(0.2)  # what threads may do, they have done
        await made.rogue.control.say(given(1, 1, 3))
        await made.hears(ALL + bytes(20 * pages * PAGE))


@on_uvloop
async def test_frames_that_wait_for_the_hypervisor_hold_no_more_than_they_bring(identities: Identities) -> None:
    async with paged_scene(identities, reads=False) as made:
        half = made.receiver.runners[0].session.receivers[ChannelId(0)]
        zeros = bytes(256 * PAGE)
        async with bounded(96 * MIB):  # 30 as they came, 30 copied, and large buffers for those being decoded
            for _ in range(30):
                await made.sends(Body([0] * 256), zeros)
            decoding = made.receiver.runners[0].decoding
            await until(lambda: half.frames == 31 and decoding is not None and decoding.idle)
        assert half.written < 31


@on_uvloop
async def test_credit_bounds_what_frames_of_pages_stand_for(identities: Identities) -> None:
    async with asked(identities) as made:
        zeros = Body([0] * 1024)
        with suppress(Gone):
            for _ in range(20):
                await made.sends(zeros, bytes(1024 * PAGE))
        await made.ends()
        assert made.stream.offset < 3 * made.credit


@on_uvloop
async def test_a_body_is_hardly_longer_than_what_it_stands_for(identities: Identities) -> None:
    """Credit counts stream bytes: a body without bound would make it worthless."""
    async with paged_scene(identities) as made:
        with suppress(Gone):
            await made.sends(literal(wide(20, padding=30_000), flags=ZSTD | ALONE), b"A" * PAGE)
        assert "frame on channel 0 of 4096 bytes in 9" in str(await made.ends())


@pytest.mark.parametrize("how", ["stopped", "cancelled", "cancelled twice"])
@on_uvloop
async def test_nothing_is_left_of_a_session_that_is_cancelled_while_it_waits(identities: Identities, how: str) -> None:
    async with asked(identities) as made:
        runner = made.receiver.runners[0]
        if how == "stopped":
            runner.stop(SessionCancelled("enough"))
            await made.ends(POLICY)
        else:
            tasks = list(made.receiver.destination._tasks)
            for _ in range(1 if how == "cancelled" else 4):
                for task in tasks:
                    task.cancel()
                await asyncio.sleep(0)
            await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: not threads())


# ---- sessions that are being prepared


class Gate:
    """Holds a thread up until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        """In the thread."""
        self.reached.set()
        assert self.opened.wait(10.0)

    async def hold(self) -> None:
        """Until a thread stands at it."""
        await asyncio.to_thread(self.reached.wait, 10.0)


@pytest.mark.parametrize("what", ["the same session", "a single egress", "too many"])
@on_uvloop
async def test_what_is_refused_is_refused_while_the_store_is_read(
    identities: Identities, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Between an offer and its answer the disk is read, and a second offer may come."""
    gate, shelf = Gate(), Shelf(PAGES)
    async with paged_scene(identities, tenant="acme", store=shelf) as made:
        destination = made.receiver.destination
        if what == "a single egress":
            monkeypatch.setattr(made.receiver.runners[0], "offer", SimpleNamespace(egress="another"))
            monkeypatch.setattr(destination._egresses["default"], "exclusive", True)
        if what == "too many":
            monkeypatch.setattr(destination, "_terms", replace(destination._terms, sessions_max=2))
        shelf.before_open = gate
        fields = {"codecs": [0, 1], "cache_bytes": 2**40, "tenant": "acme"}
        async with RogueSource(identities.source, made.receiver.port) as one:
            first = asyncio.create_task(one.offer(**fields))
            await gate.hold()
            async with RogueSource(identities.source, made.receiver.port) as other:
                if what == "the same session":
                    other.session = one.session
                refused = await other.offer(**fields)
                assert (refused["type"], refused["code"]) == ("refuse", POLICY)
            gate.opened.set()
            assert (await first)["type"] == "accept"


@pytest.mark.parametrize("how", ["is reset", "takes too long"])
@on_uvloop
async def test_a_session_that_never_begins_leaves_nothing_open(
    identities: Identities, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    gate, shelf = Gate(), Shelf(PAGES)
    async with paged_scene(identities, tenant="acme", store=shelf):
        pass
    async with paged_scene(identities, tenant="acme", store=shelf) as made:
        shelf.before_open = gate
        if how == "takes too long":
            shorten(monkeypatch, HANDSHAKE_SECONDS_MAX=0.3)
        async with RogueSource(identities.source, made.receiver.port) as rogue:
            offering = asyncio.create_task(rogue.offer(codecs=[0, 1], cache_bytes=2**40, tenant="acme"))
            await gate.hold()
            if how == "is reset":
                sock = rogue.control.sock
                offering.cancel()
                await asyncio.gather(offering, return_exceptions=True)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close()
            else:
                await until(lambda: bool(made.receiver.codes))
            gate.opened.set()
            await until(lambda: len(shelf.parts) == 3 and shelf.parts[2].kept is not None)
            offering.cancel()
            await asyncio.gather(offering, return_exceptions=True)


# ---- whose pages


@pytest.fixture
def host_store(tmp_path: Path) -> Iterator[HostStore]:
    made = HostStore(tmp_path / "state")
    yield made
    made.close()


async def leave_pages(made: PagedScene) -> None:
    """A few pages, and the session's end."""
    for page in PAGES:
        await made.sends(literal(page), page)
    await made.hears(b"".join(PAGES))
    made.rogue.close()
    assert await made.receiver.verdict(5.0) == LOST


@on_uvloop
async def test_a_source_cannot_choose_what_its_pages_are_called(
    identities: Identities, host_store: HostStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would leave others under a name that two honest hosts know, and each of their sessions would fail."""
    real = RogueSource.__init__

    def named(self: RogueSource, *arguments: object) -> None:
        real(self, *arguments)  # type: ignore[arg-type]
        self.session = SEGMENT

    monkeypatch.setattr(RogueSource, "__init__", named)
    for count in (1, 2):
        async with paged_scene(identities, tenant="acme", store=host_store) as made:
            assert made.rogue.session == SEGMENT
            await leave_pages(made)
        assert host_store.wait(10.0)
        found = host_store.offered("acme")
        assert [segment.pages for segment in found] == [len(PAGES)] * count
        assert SEGMENT not in {segment.name for segment in found}
        assert len({segment.name for segment in found}) == count


@pytest.mark.parametrize("tenant", ["", "other", "acme.", "ACME"])
@on_uvloop
async def test_another_tenant_s_pages_cannot_be_named(
    identities: Identities, host_store: HostStore, tenant: str
) -> None:
    async with paged_scene(identities, tenant="acme", store=host_store) as made:
        await leave_pages(made)
    assert host_store.wait(10.0)
    names = [{"name": segment.name, "pages": segment.pages} for segment in host_store.offered("acme")]
    assert names
    async with paged_scene(identities, tenant="acme", store=host_store, segments=names) as made:
        await made.sends(*copies(0))
        await made.hears(PAGES[0])
    # Their pages at an egress of another tenant, and another's name at an egress of theirs.
    for terms in ({"tenant": tenant}, {"tenant": "acme", "claimed": tenant}, {"tenant": tenant, "claimed": "acme"}):
        async with paged_scene(identities, store=host_store, segments=names, **terms) as made:
            assert made.answer["segments"] == []
            await made.sends(*copies(0))
            await made.ends()


@on_uvloop
async def test_what_is_agreed_on_is_what_the_destination_has(identities: Identities) -> None:
    """Whatever the offer says."""
    shelf = Shelf(PAGES)
    names = [{"name": bytes((number,)) * 16, "pages": 2**25} for number in range(62)]
    async with (
        bounded(16 * MIB),
        paged_scene(identities, tenant="acme", store=shelf, cache_bytes=2**63 - 1, segments=[*names, *OFFERED]) as made,
    ):
        answer = made.answer
        assert answer["cache_bytes"] == CACHE_PAGES * PAGE
        assert answer["chains"] == 2
        assert answer["segments"] == OFFERED
        await made.sends(literal(OURS), OURS)
        await made.hears(OURS)


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_bytes": -1},
        {"cache_bytes": 2**63},
        {"chains": 0},
        {"chains": 17},
        {"tenant": "../acme"},
        {"tenant": "a" * 64},
        {"segments": OFFERED * 65},
        {"segments": [{"name": bytes(15), "pages": 1}]},
        {"segments": [{"name": bytes(16), "pages": -1}]},
        {"segments": [{"name": bytes(16), "pages": 2**25 + 1}]},
        {"segments": [{"name": bytes(16)}]},
    ],
)
@on_uvloop
async def test_an_offer_that_cannot_be_is_none(identities: Identities, changes: dict[str, object]) -> None:
    async with paged_scene(identities) as made, RogueSource(identities.source, made.receiver.port) as rogue:
        with suppress(Gone):
            await rogue.offer(codecs=[0, 1], **changes)
        assert await made.receiver.verdict(5.0) == 4


@pytest.mark.parametrize("cache_bytes", [0, 1, PAGE - 1])
@on_uvloop
async def test_pages_without_a_cache_are_not_agreed_on(identities: Identities, cache_bytes: int) -> None:
    async with paged_scene(identities, cache_bytes=cache_bytes) as made:
        assert (made.answer["codec"], made.answer["cache_bytes"]) == (0, 0)
        await made.sends(literal(OURS), OURS)
        await made.ends()


@on_uvloop
async def test_a_delta_of_a_stored_page_that_is_not_there(identities: Identities) -> None:
    shelf = Shelf(PAGES, readable=range(8))
    async with paged_scene(identities, tenant="acme", store=shelf, segments=OFFERED) as made:
        await made.sends(Body([DELTA], [CACHE_PAGES + len(PAGES)], masks=bytes(64)), PAGES[0])
        await made.ends()

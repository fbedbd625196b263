"""Relays and xls that lie about a hand-over: what they can bring about is what an honest one that fails could, too.

What cannot be prevented is shown as well, where it begins: a source that has COMMITTED written down runs no more by
itself, and a destination that has voted runs what its source commits. From there on either is believed.
"""

import asyncio
from collections.abc import Callable

import pytest

from proxy.errors import HypervisorFailed
from proxy.handover.table import Side, State
from proxy.handover.xl import BANNER, FAILED, GO, READY, REPORT, SUCCEEDED
from proxy.hypervisors.base import CopyState
from proxy.shell import posting
from proxy.shell.xl_guard import XlDestinationGuard
from proxy.wire import ChannelId
from tests.proxy.shell.handing import Hosts, Lie, both_ended, lie, order, quick, tell, turned_back
from tests.proxy.shell.hosted import STREAM, DestinationXl, SourceXl
from tests.proxy.support import until

__all__ = ["quick", "tell"]
pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # who is killed closes nothing
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


# ------------------------------------------------------------------ words before their time


@pytest.mark.parametrize("word", ["prepared", "voted", "committed", "done"])
@pytest.mark.parametrize("moment", ["source xl stream", "destination xl ready", "destination write prepared after"])
def test_a_source_says_too_early_how_it_ended(tell: Callable[..., None], moment: str, word: Lie) -> None:
    """The destination runs nothing before its copy is whole, has the machine's name and its source has committed."""

    async def story(both: Hosts) -> None:
        both.world.at[moment] = lambda: lie(both, Side.SOURCE, word, times=3)
        await both.migrate()
        await both_ended(both)
        order(both, "destination write voted after", "destination start before")
        order(both, "source write committed after", "destination start before")
        assert [ended.error for ended in both.ended.values()] == [None, None]

    tell(story)


@pytest.mark.parametrize("word", ["voted", "committed", "done"])
@pytest.mark.parametrize("moment", ["source xl stream", "destination xl ready"])
def test_a_destination_says_too_early_how_it_ended(tell: Callable[..., None], moment: str, word: Lie) -> None:
    """The source commits to nothing before its own xl has given the machine up, and xl hears no report before DONE."""

    async def story(both: Hosts) -> None:
        both.world.at[moment] = lambda: lie(both, Side.DESTINATION, word, times=3)
        await both.migrate()
        await both_ended(both)
        order(both, "source write voted after", "source write committed before")
        order(both, "destination write voted after", "source write committed before")
        order(both, "source write done after", "source xl report")
        assert [ended.error for ended in both.ended.values()] == [None, None]

    tell(story)


def test_done_before_the_source_has_committed_gives_nothing_away(
    tell: Callable[..., None],
) -> None:
    async def story(both: Hosts) -> None:
        both.world.at["source write voted after"] = lambda: lie(both, Side.DESTINATION, "done", times=3)
        await both.migrate()
        await both_ended(both)
        order(both, "destination start after", "source write done before")

    tell(story)


@pytest.mark.parametrize("word", ["aborted", "doubt", "unknown"])
@pytest.mark.parametrize(
    "moment", ["source xl stream", "source write prepared after", "source xl ready", "source write voted after"]
)
def test_a_destination_says_that_it_will_not(tell: Callable[..., None], moment: str, word: Lie) -> None:
    """Whatever it says instead of going on, and whether or not that has a place: the source is not left suspended.

    What it says of its own copy is its own affair: one that keeps what it says is gone may wait for ever, and runs
    nothing.
    """

    async def story(both: Hosts) -> None:
        both.world.at[moment] = lambda: lie(both, Side.DESTINATION, word)
        await both.migrate()
        await until(lambda: both.source_xl is not None and both.source_xl.end)
        assert both.source_xl is not None
        assert both.source_xl.end == "resumed"
        assert bytes(both.source_xl.heard) in (b"", BANNER, BANNER + READY + FAILED)
        assert both.states()[Side.SOURCE] is State.ABORTED
        if word == "doubt":
            await turned_back(both)
        assert both.world.copies[Side.DESTINATION] is not CopyState.RUNNING

    tell(story)


@pytest.mark.parametrize("word", ["aborted", "doubt", "unknown"])
@pytest.mark.parametrize("moment", ["source xl stream", "destination xl ready", "destination write prepared after"])
def test_a_source_says_that_it_will_not(tell: Callable[..., None], moment: str, word: Lie) -> None:
    async def story(both: Hosts) -> None:
        both.world.at[moment] = lambda: lie(both, Side.SOURCE, word)
        await both.migrate()
        await turned_back(both)

    tell(story)


def test_what_cannot_be_prevented_a_destination_keeps_what_it_says_is_gone(
    tell: Callable[..., None],
) -> None:
    """ABORTED is believed, for nobody else can know. It has the machine's memory, and could have run it anyhow."""

    async def story(both: Hosts) -> None:
        both.world.at["source write committed after"] = lambda: lie(both, Side.DESTINATION, "aborted")
        await both.migrate()
        both.lives[Side.DESTINATION].failures["start"] = 1000
        await until(lambda: both.source_xl is not None and both.source_xl.end == "resumed")
        assert both.states()[Side.SOURCE] is State.ABORTED
        assert both.world.copies[Side.DESTINATION] is CopyState.PAUSED

    tell(story)


# ------------------------------------------------------------------ a destination's relay that lets everything pass


class Rogue(XlDestinationGuard):
    """A destination that writes nothing down, asks nobody and says what its test makes it say."""

    says: tuple[Lie, ...] = ()

    async def read(self, piece: memoryview) -> bool:
        if READY in bytes(piece):
            for word in self.says:
                await self._session.say_word(State(word), "")
        return True

    def ended(self) -> None:
        pass


@pytest.fixture
def rogue(monkeypatch: pytest.MonkeyPatch) -> type[Rogue]:
    class Own(Rogue):
        pass

    monkeypatch.setattr(posting, "XlDestinationGuard", Own)
    return Own


def saying(monkeypatch: pytest.MonkeyPatch, *words: bytes) -> None:
    """The destination's xl says this in place of READY and what follows."""

    async def talk(self: DestinationXl) -> None:
        await self._wire.send(BANNER)
        await self._wire.exactly(len(STREAM))
        for word in words:
            await self._wire.send(word)
        await self._wire.to_end()

    monkeypatch.setattr(DestinationXl, "run", talk)


@pytest.mark.parametrize("words", [(READY,), (READY + SUCCEEDED,)])
def test_ready_without_a_word_is_held(
    tell: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    rogue: type[Rogue],
    words: tuple[bytes, ...],
) -> None:
    saying(monkeypatch, *words)

    async def story(both: Hosts) -> None:
        await both.migrate()
        await until(lambda: both.departing and both.departing.current)
        assert both.departing is not None
        runner = both.departing.current
        assert runner is not None
        await until(lambda: 0 in runner.session.receivers)
        answer = len(BANNER) + sum(map(len, words))
        await until(lambda: runner.session.receivers[0].offset == answer)  # type: ignore[index]
        await asyncio.sleep(0.05)
        assert both.source_xl is not None
        assert bytes(both.source_xl.heard) == BANNER
        both.lose()
        await until(lambda: both.source_xl is not None and both.source_xl.end == "resumed")
        assert both.world.copies[Side.SOURCE] is CopyState.RUNNING
        assert both.states()[Side.SOURCE] is State.ABORTED

    tell(story)


@pytest.mark.parametrize(
    ("words", "heard"),
    [
        pytest.param((READY, READY), READY, id="READY twice"),
        pytest.param((READY + READY,), b"", id="READY twice at once"),
        pytest.param((READY + FAILED,), b"", id="a failure that no relay lets pass"),
        pytest.param((READY + REPORT + b"\1",), b"", id="a failure without permission"),
        pytest.param((READY + GO,), b"", id="GO"),
        pytest.param((b"x" * 34,), b"", id="no READY"),
    ],
)
def test_what_no_xl_says_ends_the_session_turned_back(
    tell: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    rogue: type[Rogue],
    words: tuple[bytes, ...],
    heard: bytes,
) -> None:
    saying(monkeypatch, *words)
    rogue.says = ("prepared",)

    async def story(both: Hosts) -> None:
        await both.migrate()
        await until(lambda: both.source_xl is not None and both.source_xl.end)
        assert both.source_xl is not None
        assert both.source_xl.end == "resumed"
        assert bytes(both.source_xl.heard) in (BANNER, BANNER + READY + FAILED)
        assert both.world.copies[Side.SOURCE] is CopyState.RUNNING
        assert both.states()[Side.SOURCE] is State.ABORTED

    tell(story)


def test_a_report_is_held_until_done_is_said(
    tell: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    rogue: type[Rogue],
) -> None:
    """And a destination that says DONE of nothing has lost the machine: it was the source's to believe it."""
    saying(monkeypatch, READY + SUCCEEDED)
    rogue.says = ("prepared",)

    async def story(both: Hosts) -> None:
        await both.migrate()
        await until(lambda: "source write voted after" in both.world.story)
        await asyncio.sleep(0.05)
        assert both.source_xl is not None
        assert bytes(both.source_xl.heard) == BANNER + READY
        lie(both, Side.DESTINATION, "done", "voted")
        await until(lambda: "source write committed after" in both.world.story)
        await asyncio.sleep(0.05)
        assert bytes(both.source_xl.heard) == BANNER + READY
        lie(both, Side.DESTINATION, "done")
        await until(lambda: both.source_xl is not None and both.source_xl.end == "gone")

    tell(story)


# ------------------------------------------------------------------ xls


def test_ready_before_the_stream_s_end(tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """However prepared the destination says it is: half a machine is not handed over."""
    half = len(STREAM) // 2

    async def send_half(self: SourceXl) -> None:
        self.heard += await self._wire.exactly(len(BANNER))
        self._world.put(Side.SOURCE, CopyState.SUSPENDED)
        await self._wire.send(STREAM[:half])
        while piece := await self._wire.receive():
            self.heard += piece
        raise EOFError

    async def ready_early(self: DestinationXl) -> None:
        await self._wire.send(BANNER)
        await self._wire.exactly(half)
        self._world.put(Side.DESTINATION, CopyState.INCOMING)
        await self._wire.send(READY)
        await self._wire.to_end()

    monkeypatch.setattr(SourceXl, "_run", send_half)
    monkeypatch.setattr(DestinationXl, "run", ready_early)

    async def story(both: Hosts) -> None:
        await both.migrate()
        await turned_back(both)
        assert both.source_xl is not None
        assert bytes(both.source_xl.heard) == BANNER
        error = both.ended[Side.SOURCE].error
        assert isinstance(error, HypervisorFailed)
        assert "the stream has not ended" in str(error)

    tell(story)


def test_nothing_is_stated_of_a_stream_that_has_not_ended(
    tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A destination that asks for the statement at once gets none."""
    found: list[BaseException | None] = []

    async def story(both: Hosts) -> None:
        async def send_halves(self: SourceXl) -> None:
            await self._hear(len(BANNER))
            self._world.put(Side.SOURCE, CopyState.SUSPENDED)
            half = len(STREAM) // 2
            await self._wire.send(STREAM[:half])
            await until(lambda: both.departing and both.departing.current)
            runner = both.departing and both.departing.current
            assert runner is not None
            await until(lambda: runner.session.senders[ChannelId(0)].offset)
            found.extend(await asyncio.gather(runner.until_complete(), return_exceptions=True))
            raise EOFError

        monkeypatch.setattr(SourceXl, "_run", send_halves)
        await both.migrate()
        await turned_back(both)
        assert isinstance(found[0], HypervisorFailed), found

    tell(story)


def giving_up(monkeypatch: pytest.MonkeyPatch, *pieces: bytes, dies: bool = False) -> None:
    """The source's xl says this in place of GO."""

    async def talk(self: SourceXl) -> None:
        await self._hear(len(BANNER))
        self._world.put(Side.SOURCE, CopyState.SUSPENDED)
        await self._wire.send(STREAM)
        await self._hear(len(READY))
        self._given = True
        for piece in pieces:
            await self._wire.send(piece)
            await asyncio.sleep(0.002)
        if dies:
            raise EOFError
        await self._hear(len(REPORT))
        if await self._hear(1) == b"\0":
            self._world.put(Side.SOURCE, CopyState.ABSENT)
            self.end = "gone"
        else:
            assert await self._hear(len(GO)) == GO
            self._resume()

    monkeypatch.setattr(SourceXl, "_run", talk)


@pytest.mark.parametrize(
    "pieces",
    [[GO[:1], GO[1:]], [GO[:43], GO[43:]], [bytes([byte]) for byte in GO]],
    ids=["first", "last", "each"],
)
def test_go_in_pieces_crosses_whole(
    tell: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    pieces: list[bytes],
) -> None:
    giving_up(monkeypatch, *pieces)
    seen: list[int] = []
    real = XlDestinationGuard.arrived

    def arrived(self: XlDestinationGuard, body: memoryview) -> None:
        if self.party.state is State.PREPARED:
            seen.append(len(body))
        real(self, body)

    monkeypatch.setattr(XlDestinationGuard, "arrived", arrived)

    async def story(both: Hosts) -> None:
        await both.migrate()
        await both_ended(both)
        assert [ended.error for ended in both.ended.values()] == [None, None]
        assert seen == [len(GO)], "half of it could be followed by anything"
        order(both, "source write voted after", "destination xl go")

    tell(story)


@pytest.mark.parametrize(
    ("pieces", "dies"),
    [
        pytest.param([GO[:20]], True, id="half, then death"),
        pytest.param([], True, id="death"),
        pytest.param([b"domain is yours, you are NOT cleared to unpause\0"], False, id="altered"),
        pytest.param([GO[:-1] + b"\n"], False, id="no NUL"),
        pytest.param([GO + b"\0"], False, id="more"),
        pytest.param([GO + GO], False, id="twice at once"),
        pytest.param([b"x" * 100_000], False, id="much"),
    ],
)
def test_what_is_not_go_gives_nothing_up(
    tell: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    pieces: list[bytes],
    dies: bool,
) -> None:
    giving_up(monkeypatch, *pieces, dies=dies)

    async def story(both: Hosts) -> None:
        await both.migrate()
        await turned_back(both)
        assert "source write voted before" not in both.world.story
        assert "destination xl go" not in both.world.story

    tell(story)


def test_go_twice_ends_somewhere_and_well(tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    giving_up(monkeypatch, GO, GO)

    async def story(both: Hosts) -> None:
        await both.migrate()
        await both.settle()
        assert both.world.running == 1

    tell(story)


def test_a_report_of_success_is_not_believed_of_a_copy_that_is_not_there(
    tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    saying(monkeypatch, READY, SUCCEEDED)

    async def story(both: Hosts) -> None:
        await both.migrate()
        await turned_back(both)
        assert "destination write voted before" not in both.world.story

    tell(story)

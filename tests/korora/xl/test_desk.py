"""A worker's end of the xl socket by itself: the seam for sessions that another process had, and what the holder hears.

Nothing here makes a session: what is between the pipes and the verdict is the test's.
"""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest

from korora.xl.desk import Begin, Desk, Errand, Readopt, lost
from korora.xl.words import Carry, Stop, Verdict, encode
from proxy.endpoints.handed import HandedPipes
from proxy.errors import HypervisorFailed, Interrupted, PeerLost, RelayError
from proxy.status import SessionStatus

SESSION = "0d220fc0" * 4
SECONDS_MAX = 10.0


class Xl:
    """xl with a `korora xl` as its transport: the pipes' ends of both, and the latter's connection to the daemon."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs = theirs
        self.ours.setblocking(False)
        self.read, self.output = os.pipe()
        self.input, self.write = os.pipe()

    def carry(self, session: str | None = SESSION) -> None:
        socket.send_fds(self.ours, [encode(Carry(1, "beta", session=session))], [self.input, self.output])

    async def hear(self) -> dict[str, Any] | None:
        """The daemon's next word; None at its end."""
        async with asyncio.timeout(SECONDS_MAX):
            data = await asyncio.get_running_loop().sock_recv(self.ours, 65536)
        return json.loads(data) if data else None

    def let_go(self) -> None:
        for end in (self.input, self.output):
            with suppress(OSError):
                os.close(end)
        self.input = self.output = -1

    def close(self) -> None:
        self.let_go()
        self.ours.close()
        os.close(self.read)
        with suppress(OSError):
            os.close(self.write)


def refuse(ask: Carry, uid: int, pipes: HandedPipes, begun: Callable[[], None]) -> Errand:
    del ask, uid, pipes, begun
    raise PeerLost("nothing begins here")


class Site:
    """A desk, and how often it said what to its worker."""

    def __init__(self) -> None:
        self.heard = self.idle = 0
        self.readopt: Readopt = lost
        self.begin: Begin = refuse
        self.desk = Desk(self._begin, self._readopt, heard=self._heard, idle=self._idle)

    def _begin(self, ask: Carry, uid: int, pipes: HandedPipes, begun: Callable[[], None]) -> Errand:
        return self.begin(ask, uid, pipes, begun)

    async def _readopt(self, session_id: str, pipes: HandedPipes) -> Verdict | None:
        return await self.readopt(session_id, pipes)

    def _heard(self) -> None:
        self.heard += 1

    def _idle(self) -> None:
        self.idle += 1


@pytest.fixture
async def site() -> AsyncIterator[tuple[Site, Xl]]:
    made, xl = Site(), Xl()
    made.desk.take(xl.theirs, 0, 1)
    yield made, xl
    await made.desk.close()
    xl.close()


async def test_by_default_a_session_of_another_process_is_lost(site: tuple[Site, Xl]) -> None:
    made, xl = site
    xl.carry()
    assert await xl.hear() == {"say": "taken", "session": SESSION}
    assert await xl.hear() == {"say": "let_go", "output_only": False}
    verdict = await xl.hear()
    assert verdict is not None
    assert (verdict["code"], verdict["session"]) == (6, SESSION)
    assert "the stream of session 0d220fc0 was lost" in verdict["words"]
    assert await xl.hear() is None
    xl.let_go()
    assert os.read(xl.read, 1) == b"", "xl sees the end"
    assert (made.heard, made.idle, made.desk.errands) == (1, 1, 0)


async def test_a_session_that_is_finished_here(site: tuple[Site, Xl]) -> None:
    """As a journal would have it: what xl still has to hear is said, by the pipes that were handed over again."""
    made, xl = site

    async def finish(session_id: str, pipes: HandedPipes) -> Verdict:
        assert session_id == SESSION
        assert pipes.write(memoryview(b"my copy unpause results")) == 23
        pipes.finish()
        await pipes.settle()
        return Verdict(0, session=session_id)

    made.readopt = finish
    xl.carry()
    said = [await xl.hear() for _ in range(4)]
    assert [word and word["say"] for word in said] == ["taken", "let_go", "let_go", "verdict"]
    assert [word and word.get("output_only") for word in said[1:3]] == [True, False]
    xl.let_go()
    assert os.read(xl.read, 100) == b"my copy unpause results"
    assert os.read(xl.read, 100) == b""


async def test_a_session_that_is_not_decided_yet(site: tuple[Site, Xl]) -> None:
    """The holder is told nothing and lets nothing go: it comes again, and xl has seen no end."""
    made, xl = site

    async def leave(session_id: str, pipes: HandedPipes) -> None:
        del session_id
        pipes.leave()

    made.readopt = leave
    xl.carry()
    assert (await xl.hear() or {})["say"] == "taken"
    assert await xl.hear() is None
    os.set_blocking(xl.read, False)
    with pytest.raises(BlockingIOError):
        os.read(xl.read, 1)
    assert os.write(xl.write, b"still there") == 11


async def test_a_readoption_ends_with_its_holder_s_signal(site: tuple[Site, Xl]) -> None:
    made, xl = site
    ended = asyncio.Event()

    async def wait(session_id: str, pipes: HandedPipes) -> Verdict:
        del session_id, pipes
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    made.readopt = wait
    xl.carry()
    assert (await xl.hear() or {})["say"] == "taken"
    xl.ours.send(encode(Stop(15)))
    verdict = await xl.hear()
    assert ended.is_set()
    assert verdict == {
        "say": "verdict",
        "code": 143,
        "words": "korora: error: stopped by signal 15",
        "session": SESSION,
        "report": None,
    }


async def test_a_readoption_ends_with_the_worker_and_without_a_verdict(site: tuple[Site, Xl]) -> None:
    made, xl = site

    async def wait(session_id: str, pipes: HandedPipes) -> Verdict:
        del session_id, pipes
        await asyncio.Event().wait()
        raise AssertionError

    made.readopt = wait
    xl.carry()
    assert (await xl.hear() or {})["say"] == "taken"
    await made.desk.close()
    assert await xl.hear() is None


async def test_a_readoption_that_fails(site: tuple[Site, Xl]) -> None:
    made, xl = site

    async def fail(session_id: str, pipes: HandedPipes) -> Verdict:
        del session_id
        await pipes.abort()
        raise HypervisorFailed("xl says no")

    made.readopt = fail
    xl.carry()
    said = [await xl.hear() for _ in range(3)]
    assert [word and word["say"] for word in said] == ["taken", "let_go", "verdict"]
    assert (said[2] or {})["code"] == 7


# ------------------------------------------------------------------ sessions


class Story:
    """A session that goes as the test wants."""

    session_id = SESSION

    def __init__(self, pipes: HandedPipes) -> None:
        self.pipes = pipes
        self.end: asyncio.Future[Verdict | None] = asyncio.get_running_loop().create_future()
        self.reasons: list[RelayError] = []

    async def run(self) -> Verdict | None:
        return await self.end

    def stop(self, reason: RelayError) -> None:
        self.reasons.append(reason)
        if not self.end.done():
            self.end.set_result(Verdict(6, str(reason), SESSION))

    def status(self) -> SessionStatus | None:
        return None


async def begin(made: Site, xl: Xl) -> Story:
    stories: list[Story] = []

    def story(ask: Carry, uid: int, pipes: HandedPipes, begun: Callable[[], None]) -> Story:
        assert (ask.peer, uid) == ("beta", 0)
        begun()
        stories.append(Story(pipes))
        return stories[0]

    made.begin = story
    xl.carry(session=None)
    assert await xl.hear() == {"say": "taken", "session": SESSION}
    return stories[0]


async def test_a_session_that_may_not_be(site: tuple[Site, Xl]) -> None:
    made, xl = site
    xl.carry(session=None)
    said = [await xl.hear() for _ in range(2)]
    assert [word and word["say"] for word in said] == ["let_go", "verdict"], "and never taken"
    assert (said[1] or {})["code"] == 6
    assert await xl.hear() is None
    assert (made.heard, made.idle) == (1, 1)


async def test_a_session_that_leaves_its_pipes(site: tuple[Site, Xl]) -> None:
    made, xl = site
    story = await begin(made, xl)
    assert (made.heard, made.desk.errands) == (1, 1)
    story.pipes.leave()
    await story.pipes.abort()  # as a session's end does, which knows nothing of it
    story.end.set_result(None)
    assert await xl.hear() is None
    assert (made.heard, made.idle, made.desk.errands) == (1, 1, 0)


async def test_a_holder_that_is_gone(site: tuple[Site, Xl]) -> None:
    made, xl = site
    story = await begin(made, xl)
    xl.ours.close()
    async with asyncio.timeout(SECONDS_MAX):
        await story.end
    assert [str(reason) for reason in story.reasons] == ["korora xl, which xl had started, is gone"]


async def test_signals_and_nonsense_of_the_holder(site: tuple[Site, Xl]) -> None:
    made, xl = site
    story = await begin(made, xl)
    for data in (b"nonsense", encode(Carry(1, "beta")), encode(Stop(2))):
        # With descriptors that nobody asked for: the kernel drops them.
        socket.send_fds(xl.ours, [data], [xl.input])
    verdict = await xl.hear()
    assert (verdict or {})["say"] == "verdict"
    (reason,) = story.reasons
    assert isinstance(reason, Interrupted)
    assert reason.code == 130


async def test_a_verdict_waits_for_a_slow_holder(site: tuple[Site, Xl]) -> None:
    """Its socket is full: what is said each second is left out, and the verdict is not."""
    made, xl = site
    story = await begin(made, xl)
    filled = 0
    with suppress(BlockingIOError):
        while True:
            xl.theirs.send(b'{"say":"taken","session":"filler"}')
            filled += 1
    story.end.set_result(Verdict(7, "the end", SESSION))
    await asyncio.sleep(0.05)  # time to say it, if it could be said
    for _ in range(filled):
        assert (await xl.hear() or {})["session"] == "filler"
    assert (await xl.hear() or {})["words"] == "the end"


async def test_a_verdict_that_is_too_long_goes_without_its_report(site: tuple[Site, Xl]) -> None:
    made, xl = site
    story = await begin(made, xl)
    story.end.set_result(Verdict(0, None, SESSION, {"digest_blake3": "x" * 100_000}))
    verdict = await xl.hear()
    assert verdict == {"say": "verdict", "code": 0, "words": None, "session": SESSION, "report": None}

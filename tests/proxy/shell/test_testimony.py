"""What one side's testimony says, and when, whatever the peer says and however often."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

import pytest

from proxy.authority import Act, Point, Question, Ruling
from proxy.control import Countersigned, Facts, Message, Statement
from proxy.errors import ProtocolViolation
from proxy.report import SessionReport
from proxy.session import Role
from proxy.shell.oversight import Oversight
from proxy.shell.testimony import Testimony as Told
from tests.proxy.support import run, until


class Carried:
    """A session that remembers what was said, and waits where a test wants it to."""

    digested = ()

    def __init__(self) -> None:
        self.said: list[Message] = []
        self.complete = asyncio.Event()
        self.complete.set()
        self.tasks: list[asyncio.Task[None]] = []

    async def say(self, message: Message) -> None:
        self.said.append(message)

    def serve(self, work: Coroutine[Any, Any, None], name: str) -> object:
        del name
        self.tasks.append(asyncio.ensure_future(work))
        return self.tasks[-1]

    def account(self) -> None:
        pass

    async def until_complete(self) -> None:
        await self.complete.wait()


class Signs:
    """A witness; whatever it signs is its own name."""

    def facts(self) -> bytes:
        return b"facts"

    def state(self, facts: bytes, digests: object) -> bytes:
        del digests
        return b"statement of " + facts

    def countersigned(self, receipt: bytes) -> None:
        del receipt


class Thinks:
    """Somebody who has a say, and takes the time for it."""

    def __init__(self) -> None:
        self.asked: list[Point] = []
        self.agreed = asyncio.Event()

    async def ask(self, question: Question) -> Ruling:
        self.asked.append(question.point)
        await self.agreed.wait()
        act = Act("relay", question.point.name.lower(), ())
        return Ruling(question.point, "everybody", "ab" * 32, acts=(act,))

    def ended(self, question: Question) -> None:
        del question


def source(session: Carried, authority: Thinks | None = None) -> Told:
    report = SessionReport(role="source", session_id="5e" * 16, started=datetime.now(UTC))
    question = Question(Point.OFFER, Role.SOURCE, "5e" * 16, peer="beta", pin="", egress="", tenant="")
    return Told(session, Role.SOURCE, Oversight(authority, question, report), Signs())  # type: ignore[arg-type]


async def turns() -> None:
    """Let everything happen that can."""
    for _ in range(50):
        await asyncio.sleep(0)
    await asyncio.to_thread(lambda: None)
    for _ in range(50):
        await asyncio.sleep(0)


def story(tell: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run(tell(), 10)


def test_nothing_is_stated_while_people_think_about_the_hand_over() -> None:
    async def tell() -> None:
        session, authority = Carried(), Thinks()
        testimony = source(session, authority)
        agreeing = asyncio.create_task(testimony.agree())
        await until(lambda: authority.asked)
        testimony.hear(Facts(b"facts"))
        await turns()
        assert session.said == []
        authority.agreed.set()
        await until(lambda: session.said)
        assert session.said == [Statement(b"statement of facts")]
        assert authority.asked == [Point.HANDOVER]
        testimony.hear(Countersigned(b"both"))
        await agreeing

    story(tell)


def test_a_destination_that_repeats_itself_on_each_new_connection_is_answered_once_the_source_is_ready() -> None:
    async def tell() -> None:
        session = Carried()
        session.complete.clear()
        testimony = source(session)
        agreeing = asyncio.create_task(testimony.agree())
        for _ in range(4):  # the first, and after each of three losses
            testimony.hear(Facts(b"facts"))
            await turns()
        assert session.said == []
        session.complete.set()
        await until(lambda: session.said)
        await turns()
        assert set(session.said) == {Statement(b"statement of facts")}
        testimony.hear(Countersigned(b"both"))
        await agreeing

    story(tell)


def test_one_that_says_something_else_meanwhile_is_at_fault() -> None:
    async def tell() -> None:
        session = Carried()
        session.complete.clear()
        testimony = source(session)
        testimony.hear(Facts(b"facts"))
        await turns()
        testimony.hear(Facts(b"facts"))
        with pytest.raises(ProtocolViolation):
            testimony.hear(Facts(b"others"))
        for task in session.tasks:
            task.cancel()
        await asyncio.gather(*session.tasks, return_exceptions=True)

    story(tell)


def test_a_peer_that_comes_back_without_end_drives_nothing_out_of_the_report() -> None:
    async def tell() -> None:
        authority = Thinks()
        authority.agreed.set()
        report = SessionReport(role="destination", session_id="5e" * 16, started=datetime.now(UTC))
        question = Question(Point.OFFER, Role.DESTINATION, "5e" * 16, peer="alpha", pin="", egress="", tenant="")
        oversight = Oversight(authority, question, report)
        await oversight.ask(Point.OFFER)
        for _ in range(100):
            await oversight.ask(Point.RESUME)
        await oversight.ask(Point.HANDOVER)
        assert [decision.point for decision in report.decisions] == ["offer", "resume", "handover"]
        assert [act.procedure for act in report.procedures] == ["offer", "resume", "handover"]

    story(tell)

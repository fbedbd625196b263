"""Progress: a live line on a terminal, a plain one now and then elsewhere, and nothing left behind."""

import asyncio
import io
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from korora import progress
from korora.progress import Progress
from proxy.tally import PageCounts, PageTally

MIB = 1024 * 1024
SAVED = PageTally(pages=PageCounts(zero=1000, literal=536), raw_bytes=6 * MIB, body_bytes=2 * MIB)


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


def runner(forward: int, backward: int = 0, pages: PageTally | None = None, rounds: int = 0) -> Any:
    """As much of a session as progress looks at."""
    halves = {0: SimpleNamespace(offset=forward)}, {0: SimpleNamespace(offset=backward)}
    return SimpleNamespace(
        session=SimpleNamespace(senders=halves[0], receivers=halves[1]),
        channels={0: None},
        report=SimpleNamespace(role="source"),
        peer=SimpleNamespace(name="beta"),
        pages=pages,
        guest=SimpleNamespace(rounds=rounds) if rounds else None,
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_TERMINAL_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0.01)


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - a terminal tells nobody that it was written to
            await asyncio.sleep(0.005)


@pytest.mark.usefixtures("quick")
async def test_a_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    subject = runner(3 * MIB, MIB)
    with Progress(lambda: subject):
        await until(lambda: "MiB" in terminal.getvalue())
        subject.session.senders[0].offset = 2000 * MIB
        await until(lambda: "2,001.0 MiB" in terminal.getvalue())
    shown = terminal.getvalue()
    assert "source ⇄ beta: 4.0 MiB" in shown
    assert "1 channel(s)" in shown
    assert "\n" not in shown
    assert shown.endswith("\r\x1b[K"), "the line is wiped for what comes after it"


@pytest.mark.usefixtures("quick")
async def test_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = io.StringIO()
    monkeypatch.setattr("sys.stderr", plain)
    with structlog.testing.capture_logs() as logs:
        monkeypatch.setattr(progress, "log", structlog.get_logger())
        with Progress(lambda: runner(5 * MIB)):
            await until(lambda: len(logs) >= 2)
    assert logs[0]["event"] == "progress"
    assert logs[0]["mib"] == 5.0
    assert logs[0]["mib_per_second"] > 0
    assert logs[1]["mib_per_second"] == 0
    assert plain.getvalue() == ""


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("pages", "rounds", "shown"),
    [
        (None, 0, "1 channel(s)"),
        (PageTally(), 1, "1 channel(s)"),
        (SAVED, 1, "1 channel(s)  1,536 pages, 4.0 MiB saved"),
        (SAVED, 3, "1 channel(s)  1,536 pages, 4.0 MiB saved  round 3"),
    ],
)
async def test_what_became_of_pages(
    pages: PageTally | None, rounds: int, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress(lambda: runner(MIB, 0, pages, rounds)):
        await until(terminal.getvalue)
    assert terminal.getvalue().split("\r\x1b[K")[1].endswith(shown)


@pytest.mark.usefixtures("quick")
async def test_what_became_of_pages_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with structlog.testing.capture_logs() as logs:
        monkeypatch.setattr(progress, "log", structlog.get_logger())
        with Progress(lambda: runner(MIB, 0, SAVED, 2)):
            await until(lambda: logs)
    assert {key: logs[0][key] for key in ("pages", "mib_saved", "rounds")} == {
        "pages": 1536,
        "mib_saved": 4.0,
        "rounds": 2,
    }


@pytest.mark.usefixtures("quick")
async def test_nothing_is_shown_before_there_is_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    asked: list[int] = []

    def nobody_yet() -> None:
        asked.append(1)

    with Progress(nobody_yet):
        await until(lambda: len(asked) > 2)
    assert terminal.getvalue() == ""


@pytest.mark.usefixtures("quick")
async def test_nothing_goes_on_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    before = asyncio.all_tasks()

    async def session() -> None:
        with Progress(lambda: runner(MIB)):
            await until(terminal.getvalue)
            raise RuntimeError("the session failed")

    with pytest.raises(RuntimeError, match="the session failed"):
        await session()
    shown = terminal.getvalue()
    await until(lambda: asyncio.all_tasks() == before)
    assert terminal.getvalue() == shown

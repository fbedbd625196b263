"""Progress of one session: a live line on a terminal, now and then a plain one elsewhere."""

import asyncio
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import structlog

from proxy.shell.runner import Runner

_TERMINAL_SECONDS: Final = 0.25
_PLAIN_SECONDS: Final = 10.0
_MIB: Final = 1024 * 1024

log = structlog.get_logger("korora")


class Progress:
    """Shows how far a session is while the ``with`` block runs.

    Args:
        current: the session's runner, or None while it is being agreed on.
    """

    def __init__(self, current: Callable[[], Runner | None]) -> None:
        self._current = current
        self._task: asyncio.Task[None] | None = None
        self._terminal = sys.stderr.isatty()
        self._shown = False

    def __enter__(self) -> Self:
        self._task = asyncio.create_task(self._show())
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    async def _show(self) -> None:
        period = _TERMINAL_SECONDS if self._terminal else _PLAIN_SECONDS
        before = 0
        while True:
            await asyncio.sleep(period)
            runner = self._current()
            if runner is None:
                continue
            halves = (runner.session.senders, runner.session.receivers)
            moved = sum(half.offset for side in halves for half in side.values())
            rate = (moved - before) / period
            before = moved
            if self._terminal:
                self._shown = True
                line = f"{moved / _MIB:,.1f} MiB  {rate / _MIB:,.1f} MiB/s  {len(runner.channels)} channel(s)"
                sys.stderr.write(f"\r\x1b[K{runner.report.role} ⇄ {runner.peer.name}: {line}{_of_pages(runner)}")
                sys.stderr.flush()
            else:
                facts = _facts(runner)
                log.info("progress", mib=round(moved / _MIB, 1), mib_per_second=round(rate / _MIB, 1), **facts)


def _of_pages(runner: Runner) -> str:
    """What became of the guest's pages, and which round is under way; empty where that is unknown."""
    words, tally, guest = "", runner.pages, runner.guest
    if tally is not None and tally.pages.total:
        words = f"  {tally.pages.total:,} pages, {tally.saved_bytes / _MIB:,.1f} MiB saved"
    if guest is not None and guest.rounds > 1:
        words += f"  round {guest.rounds}"
    return words


def _facts(runner: Runner) -> dict[str, float]:
    """The same for a log."""
    facts: dict[str, float] = {}
    if runner.pages is not None:
        facts |= {"pages": runner.pages.pages.total, "mib_saved": round(runner.pages.saved_bytes / _MIB, 1)}
    if runner.guest is not None:
        facts["rounds"] = runner.guest.rounds
    return facts

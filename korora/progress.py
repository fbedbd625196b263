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
                sys.stderr.write(f"\r\x1b[K{runner.report.role} ⇄ {runner.peer.name}: {line}")
                sys.stderr.flush()
            else:
                log.info("progress", mib=round(moved / _MIB, 1), mib_per_second=round(rate / _MIB, 1))

"""Progress of one session: a live line on a terminal, now and then a plain one elsewhere."""

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import structlog

from proxy.control import printable
from proxy.status import SessionStatus

if TYPE_CHECKING:
    from proxy.shell.runner import Runner

_TERMINAL_SECONDS: Final = 0.25
_PLAIN_SECONDS: Final = 10.0
_MIB: Final = 1024 * 1024

log = structlog.get_logger("korora")


@dataclass(frozen=True, slots=True)
class _Moment:
    """As much of a session as is shown. Sizes in bytes."""

    role: str
    peer: str
    moved: int
    channels: int
    pages: int | None
    saved: int
    rounds: int | None


class Progress:
    """Shows how far a session is while the ``with`` block runs.

    Args:
        current: the session's runner, or its last status where another process has it; None while it is agreed on.
    """

    def __init__(self, current: "Callable[[], Runner | SessionStatus | None]") -> None:
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
            now = _moment(self._current())
            if now is None:
                continue
            rate = (now.moved - before) / period
            before = now.moved
            if self._terminal:
                self._shown = True
                line = f"{now.moved / _MIB:,.1f} MiB  {rate / _MIB:,.1f} MiB/s  {now.channels} channel(s)"
                sys.stderr.write(f"\r\x1b[K{now.role} ⇄ {now.peer}: {line}{_of_pages(now)}")
                sys.stderr.flush()
            else:
                facts = _facts(now)
                log.info("progress", mib=round(now.moved / _MIB, 1), mib_per_second=round(rate / _MIB, 1), **facts)


def _moment(subject: "Runner | SessionStatus | None") -> _Moment | None:
    if subject is None:
        return None
    if isinstance(subject, SessionStatus):
        kinds = (subject.pages_zero, subject.pages_duplicate, subject.pages_delta, subject.pages_literal)
        return _Moment(
            role=subject.role,
            peer=printable(subject.peer),
            moved=subject.bytes_in + subject.bytes_out,
            channels=subject.channels,
            pages=sum(kinds) + subject.pages_copy if subject.paged_bytes else None,
            saved=subject.paged_bytes - subject.body_bytes,
            rounds=subject.rounds or None,
        )
    halves = (subject.session.senders, subject.session.receivers)
    return _Moment(
        role=subject.report.role,
        peer=subject.peer.name,
        moved=sum(half.offset for side in halves for half in side.values()),
        channels=len(subject.channels),
        pages=None if subject.pages is None else subject.pages.pages.total,
        saved=0 if subject.pages is None else subject.pages.saved_bytes,
        rounds=None if subject.guest is None else subject.guest.rounds,
    )


def _of_pages(now: _Moment) -> str:
    """What became of the guest's pages, and which round is under way; empty where that is unknown."""
    words = f"  {now.pages:,} pages, {now.saved / _MIB:,.1f} MiB saved" if now.pages else ""
    return words + (f"  round {now.rounds}" if now.rounds is not None and now.rounds > 1 else "")


def _facts(now: _Moment) -> dict[str, float]:
    """The same for a log."""
    facts: dict[str, float] = {}
    if now.pages is not None:
        facts |= {"pages": now.pages, "mib_saved": round(now.saved / _MIB, 1)}
    if now.rounds is not None:
        facts["rounds"] = now.rounds
    return facts

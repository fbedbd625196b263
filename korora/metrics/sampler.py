"""Brings the metrics of a process up to date once a second, and finds out how late its event loop is."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from korora.metrics.observer import Observer
from proxy.status import SessionStatus

SAMPLE_SECONDS: Final = 1.0


async def sample_for_ever(
    observer: Observer, statuses: Callable[[], Iterable[SessionStatus]], seconds: float = SAMPLE_SECONDS
) -> None:
    """Sample until cancelled.

    Args:
        observer: of this process.
        statuses: those of the sessions that run in it now; none in a supervisor.
        seconds: between two samples.
    """
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + seconds
        await asyncio.sleep(seconds)
        observer.sample(list(statuses()), loop.time() - due)

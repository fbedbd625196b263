"""Brings the metrics of a process up to date once a second, and finds out how late its event loop is."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from korora.metrics.observer import Observer
from proxy.status import SessionStatus

SAMPLE_SECONDS: Final = 1.0
LAGS_EACH_SAMPLE: Final = 4  # times the loop's lag is looked at meanwhile; the worst counts


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
    step = seconds / LAGS_EACH_SAMPLE
    while True:
        lag = 0.0
        for _ in range(LAGS_EACH_SAMPLE):
            due = loop.time() + step
            await asyncio.sleep(step)
            lag = max(lag, loop.time() - due)
        observer.sample(list(statuses()), lag)

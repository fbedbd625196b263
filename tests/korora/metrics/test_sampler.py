"""The sampler: asks for the sessions of the moment, and knows how late it was."""

import asyncio
import time
from contextlib import suppress

from korora.metrics import families as f
from korora.metrics.instruments import Instruments
from korora.metrics.observer import Observer
from korora.metrics.sampler import sample_for_ever
from proxy.status import SessionStatus
from tests.korora.metrics.support import NO_USAGE, status, value
from tests.proxy.support import run, until


def test_samples_and_the_lag_of_the_loop() -> None:
    instruments = Instruments.alone()
    registry = instruments.registry()
    running: list[SessionStatus] = []

    def lags() -> float:
        return registry.get_sample_value("korora_event_loop_lag_seconds_count") or 0

    def late() -> float:
        return lags() - (registry.get_sample_value("korora_event_loop_lag_seconds_bucket", {"le": "0.1"}) or 0)

    async def story() -> None:
        observer = Observer(instruments, usage=lambda: NO_USAGE)
        sampling = asyncio.create_task(sample_for_ever(observer, lambda: iter(running), 0.01))
        await until(lambda: lags() >= 2)
        assert value(registry, f.SESSIONS, "source", "open") == 0
        running.append(status(bytes_in=5))
        await until(lambda: value(registry, f.SESSIONS, "source", "open") == 1)
        assert value(registry, f.STREAM_BYTES, "source", "in") == 5
        before = late()
        time.sleep(0.15)  # noqa: ASYNC251 - what holds an event loop up
        await until(lambda: late() > before)
        assert not sampling.done()
        sampling.cancel()
        with suppress(asyncio.CancelledError):
            await sampling

    run(story())

"""Connections that have not authenticated: bounded in all and per address, the oldest makes room."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.limits import HALF_OPEN_MAX, HALF_OPEN_PER_ADDRESS_MAX
from proxy.shell.greeting import HalfOpen
from tests.proxy.support import run


async def forever() -> None:
    await asyncio.Event().wait()


def connection(work: Coroutine[Any, Any, None] | None = None) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(work or forever())


async def end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_one_address_has_its_share_and_the_oldest_makes_room() -> None:
    async def story() -> None:
        half_open = HalfOpen()
        tasks = [connection() for _ in range(HALF_OPEN_PER_ADDRESS_MAX + 3)]
        for task in tasks:
            half_open.add(task, "192.0.2.1")
        assert len(half_open) == HALF_OPEN_PER_ADDRESS_MAX
        assert half_open.evicted == 3
        await asyncio.sleep(0)
        assert [task.cancelled() for task in tasks[:4]] == [True, True, True, False]
        await end(*tasks)
        assert len(half_open) == 0

    run(story())


def test_all_addresses_together_have_a_limit() -> None:
    async def story() -> None:
        half_open = HalfOpen()
        tasks = [connection() for _ in range(HALF_OPEN_MAX + 5)]
        for number, task in enumerate(tasks):
            half_open.add(task, f"192.0.2.{number % 200}")
        assert len(half_open) == HALF_OPEN_MAX
        assert half_open.evicted == 5
        await end(*tasks)

    run(story())


def test_who_has_authenticated_no_longer_counts() -> None:
    async def story() -> None:
        half_open = HalfOpen()
        tasks = [connection() for _ in range(HALF_OPEN_PER_ADDRESS_MAX)]
        for task in tasks:
            half_open.add(task, "192.0.2.1")
        half_open.done(tasks[0])
        half_open.done(tasks[0])
        half_open.done(None)
        newcomer = connection()
        half_open.add(newcomer, "192.0.2.1")
        assert half_open.evicted == 0
        assert not tasks[0].cancelled()
        await end(newcomer, *tasks)

    run(story())


def test_who_has_gone_no_longer_counts() -> None:
    async def story() -> None:
        half_open = HalfOpen()
        for _ in range(3 * HALF_OPEN_MAX):
            task = connection(asyncio.sleep(0))
            half_open.add(task, "192.0.2.1")
            await task
            await asyncio.sleep(0)
        assert (len(half_open), half_open.evicted) == (0, 0)

    run(story())


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=400))
def test_the_limits_hold_whoever_comes_and_goes(events: list[tuple[int, bool]]) -> None:
    async def story() -> None:
        half_open, tasks = HalfOpen(), []
        for address, comes in events:
            if comes or not tasks:
                tasks.append(connection())
                half_open.add(tasks[-1], str(address))
            else:
                half_open.done(tasks[len(tasks) // 2])
            assert len(half_open) <= HALF_OPEN_MAX
        await end(*tasks)
        assert len(half_open) == 0

    run(story())

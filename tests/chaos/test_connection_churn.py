"""Hundreds of short sessions, one after another and at once, through relays that stay up.

Why: what leaks once a session (a descriptor, a task, a timer, a certificate) is not noticed in any test of one
session, and is why daemons are restarted every night.
"""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.chaos.load import KIB, Backend, Talk, talk_through
from tests.chaos.relays import RESTING_THREADS_MAX, Watched, receiver, sender, standing

ONE_AFTER_ANOTHER = 800
WARM_UP = 200  # pools fill, and every size has been seen some times
AT_ONCE = 6  # source's relays; the destination takes 16 sessions
EACH = 20
RSS_GROWTH_KIB_MAX = 2 * KIB  # 2.6 KiB a session; the allocator takes 1 MiB at a time


@pytest.mark.timeout(300)  # a minute beside other work
@on_uvloop
async def test_one_after_another(hosts: Hosts, tmp_path: Path) -> None:
    """Descriptors and threads as after the first ones; memory not growing by the session.

    It is compared at rest: while a session lives or has just ended, a relay has 10 MiB more or less. So many sessions
    they have to be as make a small leak more than that of which the allocator has a little too much.
    """

    def talk(number: int) -> Talk:
        return Talk(number, 10_000 * (number % 31), 3_000 * (number % 7))

    async with standing(hosts, tmp_path) as pair:
        relays = (pair.send, pair.receive)
        for number in range(WARM_UP):
            await pair.session(talk(number))
        before = [await relay.at_rest() for relay in relays]
        for number in range(WARM_UP, WARM_UP + ONE_AFTER_ANOTHER):
            ends, codes = await pair.session(talk(number))
            assert codes == (0, 0), f"session {number}: {pair.send.lines}"
            assert ends[0].whole, f"session {number}: {ends[0]}"
        for relay, usage in zip(relays, before, strict=True):
            await relay.level(usage)
            growth = (await relay.at_rest()).rss_kib - usage.rss_kib
            assert growth < RSS_GROWTH_KIB_MAX, f"{growth} KiB in {ONE_AFTER_ANOTHER} sessions"


@on_uvloop
async def test_at_once(hosts: Hosts) -> None:
    """Several source hosts' relays churn against one destination."""
    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(Backend())
        receive = await stack.enter_async_context(receiver(hosts, backend))
        port = await receive.listening()
        sends = [await stack.enter_async_context(sender(hosts, port)) for _ in range(AT_ONCE)]
        await asyncio.gather(*(send.listening() for send in sends))

        async def churn(number: int, send: Watched) -> None:
            ingress = await send.listening()
            for session in range(EACH):
                ends = await talk_through(ingress, backend, Talk(number * 1000 + session, 200 * KIB, 5_000))
                assert ends.whole, f"{number}/{session}: {ends}"
                assert await send.judged(session + 1) == [0] * (session + 1)

        before = receive.usage
        async with asyncio.TaskGroup() as group:
            for number, send in enumerate(sends, 1):
                group.create_task(churn(number, send))
        assert await receive.judged(AT_ONCE * EACH) == [0] * (AT_ONCE * EACH)
        await receive.level(before, descriptors=1)  # the lock of its first session's count
        for send in sends:
            assert send.usage.threads <= RESTING_THREADS_MAX

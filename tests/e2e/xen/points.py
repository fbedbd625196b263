"""Stops what runs in a Xen host at one exact point of a migration (deploy/rig/xen/points.c), and lets it go on.

await arm(two.b, "after destination voted")
pid = await reached(two.b)                  # stopped there, as by SIGSTOP
await two.b.agent.kill(pid, signal.SIGCONT)
"""

import asyncio
from typing import Final

from tests.e2e.xen.host import XenHost

PRELOADED: Final = {"LD_PRELOAD": "/etc/rig/points.so"}
"""The environment of daemons and of `xl migrate` that are to be stopped."""

POINT, STOPPED = "/run/rig/point", "/run/rig/stopped"
REACHED_SECONDS = 90.0
LOOK_SECONDS = 0.15


async def arm(host: XenHost, point: str) -> None:
    """The next process of a host that comes to `point` is stopped there."""
    await host.check(["rm", "-f", STOPPED])
    await host.agent.put(POINT, point.encode())


async def disarm(host: XenHost) -> None:
    """Nobody is stopped any more."""
    await host.check(["rm", "-f", POINT, STOPPED])


async def reached(host: XenHost, within_seconds: float = REACHED_SECONDS) -> int:
    """Until a process has come to the point; its id. Raises TimeoutError."""
    async with asyncio.timeout(within_seconds):
        while (said := await host.agent.get(STOPPED)) is None:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_SECONDS)
    return int(said)

"""A session that loses its connections finds its way back to the worker that has it, lanes and all."""

import asyncio
import random
import shutil
from datetime import UTC, datetime

import pytest

from tests.korora.daemon.support import SECONDS_MAX, Site, echo, exchange, in_thread, until
from tests.korora.daemon.test_reload import load, moves
from tests.korora.daemon.test_sessions import Pair, pair
from tests.proxy.support import Middle, run

LANES = 3


@pytest.fixture
def hosts(site: Site) -> Pair:
    """Four machines, three lanes a session, two workers."""
    made = pair(site, 4, workers=2)
    made.alpha.tables = [table.replace("[[ingress]]", f"[[ingress]]\nlanes = {LANES}") for table in made.alpha.tables]
    return made


def test_sessions_of_every_worker_go_on_after_a_loss(hosts: Pair) -> None:
    dice = random.Random(8)

    async def story() -> None:
        middle = Middle()
        middle.start(hosts.beta.port)
        hosts.alpha.tables[0] = hosts.alpha.tables[0].replace(hosts.beta.address, f"127.0.0.1:{middle.port}")
        await in_thread(hosts.start)
        channels = [await machine.channel() for machine in hosts.machines]
        for ends in channels:
            await echo(*ends)
        spread = {session["worker"] for session in await in_thread(hosts.beta.sessions)}
        assert spread == {0, 1}
        await in_thread(
            until, lambda: all(session["lanes"] == LANES for session in hosts.beta.sessions()), "all lanes are open"
        )
        for which in range(len(middle.links)):
            await middle.cut(which, reset=bool(which % 2))
        streams = [(dice.randbytes(2_000_000), dice.randbytes(500_000)) for _ in channels]
        await asyncio.gather(*(exchange(*ends, *data) for ends, data in zip(channels, streams, strict=True)))
        for host in (hosts.alpha, hosts.beta):
            reports = await in_thread(until, lambda host=host: len(found := host.reports()) == 4 and found)
            assert {(report["outcome"], report["resumes"] >= 1) for report in reports} == {("done", True)}
        await middle.close()

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()


def test_a_drain_lets_a_session_come_back(hosts: Pair) -> None:
    async def story() -> None:
        middle = Middle()
        middle.start(hosts.beta.port)
        hosts.alpha.tables[0] = hosts.alpha.tables[0].replace(hosts.beta.address, f"127.0.0.1:{middle.port}")
        await in_thread(hosts.start)
        async with load(hosts.machines[0]) as sent:
            await moves(sent)
            assert (await in_thread(hosts.beta.ask, "drain"))["sessions"] == 1
            for which in range(len(middle.links)):
                await middle.cut(which, reset=True)
            await moves(sent)
        assert await in_thread(hosts.beta.wait) == 0
        (report,) = hosts.beta.reports()
        assert (report["outcome"], report["resumes"] >= 1) == ("done", True)
        await middle.close()

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()


def test_a_revoked_peer_does_not_come_back(site: Site, hosts: Pair) -> None:
    """Its running session goes on, but a loss is a new contact."""

    async def story() -> None:
        middle = Middle()
        middle.start(hosts.beta.port)
        hosts.alpha.tables[0] = hosts.alpha.tables[0].replace(hosts.beta.address, f"127.0.0.1:{middle.port}")
        await in_thread(hosts.start)
        near, far = await hosts.machines[0].channel()
        await echo(near, far)
        site.authority.revoke("alpha", now=datetime.now(UTC))
        shutil.copy(site.folder / "ca" / "crl.pem", hosts.beta.identity / "crl.pem")
        assert (await in_thread(hosts.beta.ask, "reload"))["ok"]
        await echo(near, far)
        for which in range(len(middle.links)):
            await middle.cut(which, reset=True)
        assert await near.broken()
        (report,) = await in_thread(until, hosts.alpha.reports)
        assert report["exit_code"] == 4
        assert "revoked" in report["error"]
        await middle.close()

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()

"""A real guest changes hosts through two daemons that guard it, whose workers die, and which are killed themselves.

The monitors are in the daemons' configuration files. Never do two copies run; after recovery exactly one does, as both
journals say, and where it has stayed it migrates again.
"""

import asyncio
from typing import Any

import pytest

from crypto.receipts.log import ReceiptLog
from crypto.receipts.statement import parse
from korora.notary import RECEIPTS, RECOVERED
from proxy.handover.table import Side, State
from tests.e2e.guarded import STEP_SECONDS, Which
from tests.e2e.rig import FAST, MIDDLE_BYTES, SLOW, Rig
from tests.e2e.served import BOTH, Served, served, waiting
from tests.e2e.watching import LOOK_SECONDS
from tests.korora.daemon.support import Host

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

MOMENTS = {
    "memory": (Side.SOURCE, State.OPEN),
    "prepared": (Side.SOURCE, State.PREPARED),
    "voted": (Side.DESTINATION, State.VOTED),
}


def each_moment(quick: tuple[Which, str]) -> list[Any]:
    """Whom it happens to and when; all but one in the long run only."""
    cases = [(which, moment) for which in BOTH for moment in MOMENTS]
    return [pytest.param(*case, marks=() if case == quick else pytest.mark.slow) for case in cases]


async def reach(made: Served, moment: str) -> None:
    """Migrate until the moment has come."""
    await made.migrate(SLOW if moment == "memory" else FAST)
    await made.reached(*MOMENTS[moment])
    if moment == "memory":
        async with asyncio.timeout(STEP_SECONDS):
            while (await made.source.migration()).get("ram", {}).get("transferred", 0) < MIDDLE_BYTES:  # noqa: ASYNC110
                await asyncio.sleep(LOOK_SECONDS)


async def end_of(made: Served, rig: Rig) -> None:
    """One runs; and if that is the source's, another QEMU waits at the destination and the machine gets there."""
    if await made.one_runs() == "source":
        async with waiting(rig, made.folder, "another-destination") as made.destination:
            made.migrations += 1
            await made.migrate()
            assert await made.one_runs() == "destination"


async def on_record(host: Host) -> None:
    """How it ended stands in the log of the host whose process died: that knew it only afterwards."""
    log = ReceiptLog(host.state / RECEIPTS)
    async with asyncio.timeout(STEP_SECONDS):
        while not any(RECOVERED in parse(each.payload).predicate.flags for _, each in log.entries()):  # noqa: ASYNC110 - files tell nobody
            await asyncio.sleep(LOOK_SECONDS)


async def report(host: Host) -> dict[str, object]:
    """Of its only session."""
    async with asyncio.timeout(STEP_SECONDS):
        while len(reports := host.reports()) != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return dict(reports[0])


async def test_a_machine_moves_under_guard_between_daemons(rig: Rig) -> None:
    async with served(rig) as made:
        await made.migrate()
        assert await made.one_runs() == "destination"
        for which in BOTH:
            told = await report(made.hosts[which])
            assert (told["outcome"], told["handover"], told["handover_kind"]) == ("done", "done", "qmp")


@pytest.mark.parametrize(("which", "moment"), each_moment(("destination", "memory")))
async def test_a_worker_is_killed(rig: Rig, which: Which, moment: str) -> None:
    async with served(rig) as made:
        await reach(made, moment)
        made.kill_worker(which)
        await end_of(made, rig)
        await on_record(made.hosts[which])


@pytest.mark.parametrize(("which", "moment"), each_moment(("source", "voted")))
async def test_a_daemon_is_killed_and_started_again(rig: Rig, which: Which, moment: str) -> None:
    async with served(rig) as made:
        await reach(made, moment)
        made.kill(which)
        await made.start_daemon(which)
        await end_of(made, rig)
        await on_record(made.hosts[which])

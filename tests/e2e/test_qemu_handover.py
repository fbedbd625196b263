"""A real guest changes hosts under guard, whoever is killed, frozen or cut off, and at whichever step.

Never do two copies run; after recovery exactly one does, and it counts on where it was. Where a QEMU was killed that
alone could have run it, nobody runs it, and both journals say so.
"""

import asyncio
import os
import signal
from typing import Any

import pytest

from proxy.handover.table import Side, State
from tests.e2e.guarded import RESUME_SECONDS, SETTLED_SECONDS, STEP_SECONDS, Guarded, Which, guarded
from tests.e2e.rig import FAST, MIB, SLOW, Rig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

# In the order in which they are reached. At the first the source has halted, and asks.
STEPS = (
    (Side.SOURCE, State.OPEN),
    (Side.DESTINATION, State.PREPARED),
    (Side.SOURCE, State.PREPARED),
    (Side.SOURCE, State.VOTED),
    (Side.DESTINATION, State.VOTED),
    (Side.SOURCE, State.COMMITTED),
    (Side.DESTINATION, State.COMMITTED),
    (Side.DESTINATION, State.DONE),
    (Side.SOURCE, State.DONE),
)
ASKED = STEPS[0]
AWAY_SECONDS = RESUME_SECONDS + 2.0  # the sessions have given up by then
KILLED: dict[str, tuple[Which, ...]] = {
    "source": ("source",),
    "destination": ("destination",),
    "both": ("source", "destination"),
}


def name_of(step: tuple[Side, State]) -> str:
    """A step, for test names."""
    return "asked" if step is ASKED else f"{step[0].value} {step[1].value}"


def each_step(*quick: str) -> list[Any]:
    """All steps, those that are not ``quick`` in the long run only."""
    names = {name_of(step): step for step in STEPS}
    return [
        pytest.param(step, id=name, marks=() if name in quick else pytest.mark.slow) for name, step in names.items()
    ]


async def reach(made: Guarded, step: tuple[Side, State]) -> None:
    """Migrate until the step is reached."""
    await made.migrate()
    if step is ASKED:
        await made.source.qmp.wait_event("MIGRATION", STEP_SECONDS, lambda data: data["status"] == "pre-switchover")
    else:
        await made.reached(*step)


# ------------------------------------------------------------------ all goes well


async def test_a_machine_moves_under_guard(rig: Rig) -> None:
    async with guarded(rig, source_options=["--guarded"], destination_options=["--guarded"]) as made:
        await made.migrate()
        assert await made.one_runs() == "destination"
        for which in made.relays:
            await made.until(made.relays[which].report_file.exists)
            report = made.relays[which].report()
            assert (report["outcome"], report["handover"], report["exit_code"]) == ("done", "done", 0)


@pytest.mark.slow
async def test_with_several_channels_and_rounds(rig: Rig) -> None:
    options = {"capabilities": ("multifd", "return-path"), "incoming": "defer"}
    async with guarded(rig, **options) as made:  # type: ignore[arg-type]
        await made.migrate(24 * MIB, downtime_limit=1)
        await made.source.qmp.wait_event("MIGRATION_PASS", STEP_SECONDS, lambda data: data["pass"] >= 3)
        await made.source.qmp.execute("migrate-set-parameters", downtime_limit=300)
        assert await made.one_runs() == "destination"
        await made.until(made.relays["source"].report_file.exists)
        assert len(made.relays["source"].report()["digest_blake3"]) == 3


@pytest.mark.slow
async def test_a_machine_its_operator_paused_arrives_paused(rig: Rig) -> None:
    async with guarded(rig) as made:
        await made.migrate(SLOW)
        await made.source.qmp.wait_event("MIGRATION_PASS", STEP_SECONDS)
        await made.source.qmp.execute("stop")
        await made.source.qmp.execute("migrate-set-parameters", max_bandwidth=FAST)
        await made.settled()
        assert made.states() == {Side.SOURCE: State.DONE, Side.DESTINATION: State.DONE}
        assert (await made.destination.qmp.execute("query-status"))["status"] == "paused"
        assert made.destination.serial.beats == []
        await made.until(lambda: not made.source.running)
        await made.destination.qmp.execute("cont")
        await made.counts_there()


# ------------------------------------------------------------------ somebody dies, or the network does


@pytest.mark.parametrize("step", each_step("source prepared"))
async def test_the_network_is_lost_for_longer_than_a_session_waits(rig: Rig, step: tuple[Side, State]) -> None:
    async with guarded(rig) as made:
        await reach(made, step)
        await made.network.blackout(AWAY_SECONDS, silence=False)
        await made.one_runs()


@pytest.mark.slow
@pytest.mark.parametrize("step", each_step())
async def test_the_network_is_lost_for_a_moment(rig: Rig, step: tuple[Side, State]) -> None:
    """The session goes on, and so does the hand-over, whatever word was lost."""
    async with guarded(rig) as made:
        await reach(made, step)
        await made.network.blackout(0.3, silence=False)
        assert await made.one_runs() == "destination"


@pytest.mark.parametrize("killed", KILLED)
@pytest.mark.parametrize("step", each_step("source voted"))
async def test_a_relay_is_killed_and_comes_back(rig: Rig, step: tuple[Side, State], killed: str) -> None:
    async with guarded(rig) as made:
        await reach(made, step)
        for which in KILLED[killed]:
            made.kill(which)
        for which in KILLED[killed]:
            await made.relays[which].wait()
            await made.begin(which)
        await made.one_runs()


@pytest.mark.slow
@pytest.mark.parametrize("step", each_step())
async def test_the_destination_s_qemu_is_killed(rig: Rig, step: tuple[Side, State]) -> None:
    """Until it may have run the source goes on; from then on an operator has to say, and both journals say that."""
    async with guarded(rig) as made:
        await reach(made, step)
        made.destination.kill()
        await made.until(lambda: not made.destination.running)
        await made.until(lambda: made.in_doubt() or made.is_settled(), SETTLED_SECONDS)
        if made.in_doubt():
            assert any(made.has(record, State.COMMITTED) for record in made.journal(Side.DESTINATION))
            await made.decide("destination", "--give-up")
            await made.decide("source", "--run-here")
        if made.states()[Side.SOURCE] is State.DONE:
            return  # it ran, and has died with its host
        await made.stayed()


@pytest.mark.slow
@pytest.mark.parametrize("step", [ASKED, STEPS[2], STEPS[4]], ids=name_of)
async def test_the_destination_s_qemu_is_frozen(rig: Rig, step: tuple[Side, State]) -> None:
    """It answers nothing for longer than an answer may take: the source goes on, and what thaws does not run."""
    async with guarded(rig) as made:
        await reach(made, step)
        os.kill(made.destination.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(25.0)
        finally:
            os.kill(made.destination.pid, signal.SIGCONT)
        await made.one_runs()

"""Real QEMUs migrate a real guest through `korora send` and `korora receive`, in each way QEMU knows, and fail in each.

The guest counts aloud and checks its own memory (korora/demo/guest.py): a completed migration has to leave no number
out, repeat none, and find every page as it was written. A failed one has to leave the guest running where it was, or
nowhere, and never in two places.
"""

import asyncio

import pytest

from tests.e2e.rig import FAST, MIB, SLOW, STEP_SECONDS, TOLD_SECONDS, Rig, scene

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]

EXIT_HYPERVISOR = 7


@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_precopy_in_several_rounds(rig: Rig, transport: str) -> None:
    never, usual = 1, 300  # milliseconds of downtime: the first is not to be had while the guest is busy
    parameters = {"max_bandwidth": 24 * MIB, "downtime_limit": never}
    async with scene(rig, transport=transport, parameters=parameters) as made:
        await made.start()
        await made.reach_pass(4)
        await made.set_parameters(downtime_limit=usual)
        state = await made.completed()
        assert state["ram"]["dirty-sync-count"] >= 4
        await made.check_arrived()


@pytest.mark.parametrize("capabilities", [("return-path",), ("return-path", "switchover-ack")], ids="+".join)
async def test_return_path(rig: Rig, capabilities: tuple[str, ...]) -> None:
    async with scene(rig, capabilities=capabilities, parameters={"max_bandwidth": FAST}) as made:
        await made.start()
        await made.completed()
        await made.check_arrived()
        # The destination's answers crossed the relays, and were counted as a direction of their own.
        assert made.relays.send.report()["bytes_out"]["backward"] > 0


async def test_multifd_with_four_channels(rig: Rig) -> None:
    parameters = {"multifd_channels": 4, "max_bandwidth": FAST}
    async with scene(rig, capabilities=["multifd"], parameters=parameters) as made:
        await made.start()
        state = await made.completed()
        assert state["ram"]["multifd-bytes"] > 16 * MIB
        await made.check_arrived(channels=5)  # QEMU's main channel and four of pages


async def test_xbzrle_in_several_rounds(rig: Rig) -> None:
    parameters = {"max_bandwidth": 24 * MIB, "downtime_limit": 1, "xbzrle_cache_size": 64 * MIB}
    async with scene(rig, capabilities=["xbzrle"], parameters=parameters) as made:
        await made.start()
        await made.reach_pass(4)
        await made.set_parameters(downtime_limit=300)
        state = await made.completed()
        assert state["xbzrle-cache"]["pages"] > 0
        await made.check_arrived()


async def test_postcopy_after_the_first_round(rig: Rig) -> None:
    # What is left after a round is little: pushed slowly, so that the guest has to ask for pages it misses.
    parameters = {"max_bandwidth": 24 * MIB, "downtime_limit": 1, "max_postcopy_bandwidth": MIB}
    async with scene(rig, capabilities=["postcopy-ram"], parameters=parameters) as made:
        await made.start()
        await made.reach_pass(2)
        await made.source.qmp.execute("migrate-start-postcopy")
        await made.reach(lambda ram: ram["postcopy-requests"] > 0)
        await made.set_parameters(max_postcopy_bandwidth=FAST)
        await made.completed()
        await made.check_arrived()


async def test_cancel_in_the_middle_leaves_the_guest_where_it_was(rig: Rig) -> None:
    async with scene(rig, parameters={"max_bandwidth": SLOW}) as made:
        await made.start()
        await made.reach_middle()
        await made.source.qmp.execute("migrate_cancel")
        assert await made.source.wait_migration(STEP_SECONDS) == "cancelled"
        await made.check_relays_ended(EXIT_HYPERVISOR)
        await made.check_runs_on_source()
        await made.destination_gave_up()
        await made.check_nothing_arrived()


@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_destination_killed_in_the_middle_is_told_to_the_source_at_once(rig: Rig, transport: str) -> None:
    async with scene(rig, transport=transport, parameters={"max_bandwidth": SLOW}) as made:
        await made.start()
        await made.reach_middle()
        clock = asyncio.get_running_loop().time
        killed_at = clock()
        made.destination.kill()
        assert await made.source.wait_migration(STEP_SECONDS) == "failed"
        assert clock() - killed_at < TOLD_SECONDS
        await made.check_relays_ended(EXIT_HYPERVISOR)
        await made.check_runs_on_source()


@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_source_killed_in_the_middle_starts_nothing_on_the_destination(rig: Rig, transport: str) -> None:
    async with scene(rig, transport=transport, parameters={"max_bandwidth": SLOW}) as made:
        await made.start()
        await made.reach_middle()
        made.source.kill()
        await made.check_relays_ended(EXIT_HYPERVISOR)
        await made.destination_gave_up()
        await made.check_nothing_arrived()

"""A network that is gone for seconds, three times in one migration: QEMU sees a slow peer, the guest sees nothing.

Without resume each of these cuts would have been a failed migration. The guest runs on at the source meanwhile, and
dirties memory that has to be sent again; that it counts on without a gap, and finds every page sound, is the proof.
"""

import pytest

from tests.chaos.proxy import ChaosProxy
from tests.e2e.rig import FAST, MIB, Rig, scene

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

CUTS = 3
CUT_SECONDS = 5.0


@pytest.mark.parametrize(
    ("silence", "lanes", "capabilities"),
    [(False, 1, ()), (False, 3, ("multifd",)), (True, 2, ("return-path",))],
    ids=["every connection reset", "multifd, every connection reset", "silence"],
)
async def test_a_migration_survives_three_cuts_of_five_seconds(
    rig: Rig, *, silence: bool, lanes: int, capabilities: tuple[str, ...]
) -> None:
    parameters = {"max_bandwidth": 4 * MIB, "downtime_limit": 1}
    async with (
        ChaosProxy() as network,
        scene(rig, capabilities=capabilities, parameters=parameters, network=network, lanes=lanes) as made,
    ):
        await made.start()
        await made.reach_middle()
        for cut in range(1, CUTS + 1):
            sent = (await made.source.migration())["ram"]["transferred"]
            beats = len(made.source.serial.beats)
            await network.blackout(CUT_SECONDS, silence=silence)
            await network.calm_again()
            assert len(made.source.serial.beats) > beats, "the guest runs on while the network is gone"
            if not silence:
                await made.resumed(cut)
            await made.reach(lambda ram, sent=sent: ram["transferred"] > sent + MIB // 2)
        await made.set_parameters(max_bandwidth=FAST, downtime_limit=300)
        await made.completed()
        await made.check_arrived(channels=3 if "multifd" in capabilities else 1)
        send, receive = made.relays.send.report(), made.relays.receive.report()
        if silence:
            assert send["exit_code"] == 0, "TCP made up for it, or the relays did"
        else:
            assert send["resumes"] == receive["resumes"] == CUTS

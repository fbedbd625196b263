"""A guest reboots or powers off by itself while xl migrates it, or is started anew on a host that it was leaving.

What xl 4.17 does: the monitor of a guest that ends destroys its domain, and if it reboots makes another one of its
name and UUID; xl migrate cannot suspend what is not there, and ends with 1. So the machine is where it was, or off, and
a copy that waits at the destination is older than the disks: it must not run, and nobody needs to be asked.
"""

from pathlib import Path

import pytest

from tests.korora.handover.moments import MOMENTS
from tests.korora.handover.scene import Crossing, Scene, scene

pytestmark = pytest.mark.timeout(120)

SETTLED_SECONDS = 60.0
BY_NAME = {moment.name: moment for moment in MOMENTS}
OFF = "the machine has shut down by itself, or its copy was destroyed: it does not run here"
AGAIN = "the machine has ended, and was started anew here: it runs"


async def end_of(both: Scene) -> None:
    await both.until(both.settled, "it never settled", SETTLED_SECONDS)
    both.check_never_two()
    assert {both.stands(one.guest) for one in both.crossings} == {("aborted", "aborted")}, both.story()
    assert {one.xl.poll() for one in both.crossings if one.xl is not None} == {1}


def is_off(both: Scene, one: Crossing) -> bool:
    """No copy of it is anywhere."""
    names = [*both.alpha.xen.states, *both.beta.xen.states]
    return not [name for name in names if name.partition("--")[0] == one.guest]


def why(both: Scene, one: Crossing) -> str:
    """What the source's journal has of its end."""
    return next(record.why for record in both.alpha.records if record.vm.name == one.guest)


async def retry(both: Scene, one: Crossing) -> None:
    """It migrates as ever."""
    await both.move(one)
    assert one.xl is not None
    assert one.xl.poll() == 0, both.story()
    assert both.where(one.guest) == "beta"
    both.check_never_two()


@pytest.mark.parametrize("killed", [False, True], ids=["relayed", "killed"])
async def test_a_guest_ends_while_its_memory_is_sent(tmp_path: Path, killed: bool) -> None:
    """With the source's relay there, and with one that dies meanwhile and finds nothing to ask about."""
    async with scene(tmp_path, [(BY_NAME["stream"], "reboot"), (BY_NAME["stream"], "off")]) as both:
        rebooted, off = both.crossings
        if killed:
            both.alpha.kill()
        both.alpha.xen.reboot(rebooted.guest)
        both.alpha.xen.power_off(off.guest)
        both.go_on()
        if killed:
            both.alpha.start()
        await end_of(both)
        assert both.where(rebooted.guest) == "alpha"
        assert is_off(both, off)
        assert why(both, rebooted) == AGAIN
        assert why(both, off) == OFF
        assert "was lost with this host" not in both.alpha.daemon.log()
        await retry(both, rebooted)


EARLIER = [pytest.param(moment, marks=pytest.mark.slow) for moment in ("prepared there", "prepared", "voted")]


@pytest.mark.parametrize("moment", [*EARLIER, "voted there"])
async def test_a_machine_that_was_started_anew_at_its_source_is_not_run_twice(tmp_path: Path, moment: str) -> None:
    """The source's host has crashed, and starts its machines as it comes up; or somebody did it by hand."""
    async with scene(tmp_path, [(BY_NAME[moment], "anew")]) as both:
        (one,) = both.crossings
        assert one.xl is not None
        one.xl.kill()
        both.alpha.kill()
        both.alpha.xen.lose_all()
        both.alpha.xen.create(one.guest, one.uuid)
        both.mend()
        both.go_on()
        both.alpha.start()
        await both.until(both.settled, "it never settled", SETTLED_SECONDS)
        both.check_never_two()
        assert both.where(one.guest) == "alpha"
        assert both.stands(one.guest) == ("aborted", "aborted"), both.story()
        await retry(both, one)

"""An operator decides beside daemons that wait: real daemons, `korora xl` and `korora handover resolve`, xl a stand-in.

The other host is lost with all its domains, and the one that is left has the hand-over in its hands.
"""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.korora.handover.moments import MOMENTS
from tests.korora.handover.scene import Scene, Side, scene

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

RESOLVE_SECONDS_MAX = 60.0
SETTLED_SECONDS = 60.0


def resolve(side: Side, session: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """What an operator types at a host."""
    command = [sys.executable, "-m", "korora", "handover", "resolve", session, "--certain", *words]
    return subprocess.run(
        [*command, "--state", str(side.daemon.state)],
        env=side.xen.env,
        check=False,
        capture_output=True,
        text=True,
        timeout=RESOLVE_SECONDS_MAX,
    )


def lose(side: Side) -> None:
    """A host is gone with its domains; what its journal has is on its disk."""
    side.kill()
    side.xen.end()
    side.xen.lose_all()


@pytest.mark.parametrize(
    ("moment", "left", "what"),
    [
        pytest.param("committed", "alpha", "--run-here", id="a source that has committed"),
        pytest.param("voted there", "beta", "--run-here", id="a destination that has voted"),
        pytest.param("prepared there", "beta", "--give-up", id="a destination that is prepared"),
    ],
)
async def test_nobody_has_to_be_stopped(tmp_path: Path, moment: str, left: str, what: str) -> None:
    async with scene(tmp_path, [(next(one for one in MOMENTS if one.name == moment), "")]) as both:
        here, gone = (both.alpha, both.beta) if left == "alpha" else (both.beta, both.alpha)
        await asyncio.to_thread(lose, gone)
        (record,) = (one for one in here.records if one.vm.name == "g1")
        done = await asyncio.to_thread(resolve, here, record.head.session[:8], what)
        assert done.returncode == 0, (done.stderr, both.story())
        assert here.stands("g1") == ("done" if left == "beta" and what == "--run-here" else "aborted")
        both.go_on()
        both.mend()
        running = {"g1": "running"} if what == "--run-here" else {}
        await both.until(lambda: here.xen.states == running, f"{here.xen.states} here")
        await asyncio.to_thread(gone.start)
        await both.until(lambda: _settled(both), "it never settled", SETTLED_SECONDS)
        assert (here.xen.states, gone.xen.states) == (running, {}), both.story()
        both.check_never_two()


def _settled(both: Scene) -> bool:
    return all(record.settled for side in (both.alpha, both.beta) for record in side.records)

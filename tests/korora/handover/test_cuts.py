"""A hand-over is cut at every moment by every fault that needs no Xen: real daemons and `korora xl`, xl a stand-in.

Afterwards, in every case: exactly one copy runs and at no time did two, nothing is left of the other one, both journals
know how it ended and agree, xl's exit code says so, and the guest migrates again.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from proxy.limits import STOPPED_SECONDS_MAX
from tests.attacks.wire import Way
from tests.korora.handover.moments import MOMENTS
from tests.korora.handover.scene import RESUME_SECONDS, Crossing, Scene, Side, scene

pytestmark = pytest.mark.timeout(240)

SETTLED_SECONDS = 90.0
LONG_SECONDS = RESUME_SECONDS + 2.0  # an absence that no session survives
SILENT_SECONDS = 15.0 + LONG_SECONDS  # three heartbeats missed, too

TOLD = {"alpha": {("aborted", "aborted"), ("aborted", "")}, "beta": {("done", "done")}}

Harm = Callable[[Scene], Awaitable[None]]


async def end_of(both: Scene) -> None:
    """Whoever was held goes on; everything settles; and it is as it should be."""
    both.go_on()
    await both.until(both.settled, "it never settled", SETTLED_SECONDS)
    both.check_never_two()
    wrong = []
    for one in both.crossings:
        host, stands = both.where(one.guest), both.stands(one.guest)
        assert one.xl is not None
        case = (one.guest, one.moment.name, one.harm, host, stands, one.xl.poll())
        if host not in expected(one):
            wrong.append((*case, "it runs elsewhere than expected"))
        if stands not in TOLD[host]:
            wrong.append((*case, "the journals do not say so"))
        if one.xl.poll() not in codes(one, host):
            wrong.append((*case, "xl's exit code does not say so"))
    assert not wrong, "\n".join([*map(str, wrong), both.story()])
    await migrate_again(both)


async def migrate_again(both: Scene) -> None:
    """From wherever they are to the other host."""
    for one in both.crossings:
        one.origin, one.goal = (both.alpha, both.beta) if both.where(one.guest) == "alpha" else (both.beta, both.alpha)
    await asyncio.gather(*(both.move(one) for one in both.crossings))
    ended = {one.guest: one.xl.poll() for one in both.crossings if one.xl is not None}
    assert set(ended.values()) == {0}, (ended, both.story())
    await both.until(both.settled, "a retry is not settled")
    assert [both.where(one.guest) for one in both.crossings] == [one.goal.name for one in both.crossings]
    both.check_never_two()


# ------------------------------------------------------------------ what is done to one guest's network, or to its xl


async def reset_back(both: Scene, one: Crossing) -> None:
    """Every connection is reset, and new ones come through at once."""
    one.proxy.reset()
    one.proxy.heal()


async def gone(both: Scene, one: Crossing) -> None:
    """Reset, and nobody is let in for longer than the resume time."""
    await one.proxy.sever()
    both.go_on(one)
    await asyncio.sleep(LONG_SECONDS)
    one.proxy.heal()


async def silent(both: Scene, one: Crossing, ways: tuple[Way, ...] = tuple(Way)) -> None:
    """Nothing passes, and nobody is told."""
    one.proxy.silence(ways)
    both.go_on(one)
    await asyncio.sleep(SILENT_SECONDS)
    one.proxy.heal()


async def half_forward(both: Scene, one: Crossing) -> None:
    """Nothing passes towards the destination."""
    await silent(both, one, (Way.FORWARD,))


async def half_backward(both: Scene, one: Crossing) -> None:
    """Nothing passes towards the source."""
    await silent(both, one, (Way.BACKWARD,))


async def holder(both: Scene, one: Crossing) -> None:
    """`korora xl` is killed."""
    os.kill(one.holder, signal.SIGKILL)
    one.proxy.heal()


async def migrate(both: Scene, one: Crossing) -> None:
    """`xl migrate` is killed."""
    assert one.xl is not None
    one.xl.kill()
    one.proxy.heal()


async def receive(both: Scene, one: Crossing) -> None:
    """`xl migrate-receive` is killed."""
    os.kill(both.beta.xen.receiver(one.guest), signal.SIGKILL)
    one.proxy.heal()


HARMS = {
    harm.__name__: harm for harm in (reset_back, gone, silent, half_forward, half_backward, holder, migrate, receive)
}
RECEIVING = [moment for moment in MOMENTS if moment.stands[1] in {"open", "prepared"}]  # later it has ended


QUICK = {"receive", "kill_both"}
"""In every run; each of the others takes as long as one of these, some 20 s on a busy machine, or longer."""


def expected(one: Crossing) -> set[str]:
    """Where a guest runs in the end."""
    match one.harm:
        case "reset_back":
            return {"beta"}
        case "half_forward" if one.moment.name == "go passed":
            return {"beta"}  # the word that it has it there is heard, and makes it committed
        case "migrate" if one.moment.stands[0] == "voted":
            return {"beta"}  # xl had given the guest up, and nobody needs it any more
        case "holder" | "beta" if one.moment.name == "voted there":
            return {"alpha", "beta"}  # the word that makes it committed is on its way
    return {"beta" if one.moment.committed else "alpha"}


def codes(one: Crossing, host: str) -> set[int | None]:
    """What xl may end with."""
    match one.harm:
        case "migrate":
            return {-signal.SIGKILL}
        case "holder" if host == "beta":
            return {0, 1}  # where its transport dies it cannot know
    return {0 if host == "beta" else 1}


@pytest.mark.parametrize(
    "harm", [pytest.param(harm, marks=() if harm in QUICK else pytest.mark.slow) for harm in HARMS]
)
async def test_one_by_one(tmp_path: Path, harm: str) -> None:
    moments = RECEIVING if harm == "receive" else MOMENTS
    async with scene(tmp_path, [(moment, harm) for moment in moments]) as both:
        await asyncio.gather(*(HARMS[harm](both, one) for one in both.crossings))
        await end_of(both)


# ------------------------------------------------------------------ what is done to a daemon and all that it carries


async def kill(both: Scene, *sides: Side, away_seconds: float = 0.0) -> None:
    """Daemons are killed with all their processes, and started again."""
    for side in sides:
        side.kill()
    both.mend()
    if away_seconds:
        both.go_on()
        await asyncio.sleep(away_seconds)
    await asyncio.gather(*(asyncio.to_thread(side.start) for side in sides))


async def kill_alpha(both: Scene) -> None:
    """The source's daemon."""
    await kill(both, both.alpha)


async def kill_beta(both: Scene) -> None:
    """The destination's daemon."""
    await kill(both, both.beta)


async def kill_both(both: Scene) -> None:
    """Both daemons at once."""
    await kill(both, both.alpha, both.beta)


async def away_alpha(both: Scene) -> None:
    """The source's daemon, which comes back after the resume time."""
    await kill(both, both.alpha, away_seconds=LONG_SECONDS)


async def away_beta(both: Scene) -> None:
    """The destination's daemon, likewise."""
    await kill(both, both.beta, away_seconds=LONG_SECONDS)


async def stop(both: Scene, side: Side) -> None:
    """A daemon is told to stop in the middle of it all, and started again; no xl goes on before it has left them."""
    stopping = asyncio.create_task(asyncio.to_thread(side.stop))
    await asyncio.wait({stopping}, timeout=STOPPED_SECONDS_MAX + 4.0)
    both.go_on()
    await stopping
    both.mend()
    await asyncio.to_thread(side.start)


async def stop_alpha(both: Scene) -> None:
    """The source's daemon, as by a service manager."""
    await stop(both, both.alpha)


async def stop_beta(both: Scene) -> None:
    """The destination's."""
    await stop(both, both.beta)


async def worker_alpha(both: Scene) -> None:
    """The process of the source's daemon that has the sessions."""
    _kill_workers(both.alpha)
    both.mend()


async def worker_beta(both: Scene) -> None:
    """The same at the destination."""
    _kill_workers(both.beta)
    both.mend()


async def freeze_beta(both: Scene) -> None:
    """The destination's daemon stands still for so long that its source gives it up, and then goes on."""
    both.beta.signal(signal.SIGSTOP)
    both.mend()
    both.go_on()
    await asyncio.sleep(SILENT_SECONDS)
    both.beta.signal(signal.SIGCONT)


async def freeze_alpha(both: Scene) -> None:
    """The source's daemon."""
    both.alpha.signal(signal.SIGSTOP)
    both.mend()
    both.go_on()
    await asyncio.sleep(SILENT_SECONDS)
    both.alpha.signal(signal.SIGCONT)


def _kill_workers(side: Side) -> None:
    for worker in side.daemon.status()["workers"]:
        os.kill(worker["pid"], signal.SIGKILL)


SIDES = (
    *(kill_alpha, kill_beta, kill_both, away_alpha, away_beta, stop_alpha, stop_beta),
    *(worker_alpha, worker_beta, freeze_alpha, freeze_beta),
)


@pytest.mark.parametrize(
    "harm",
    [pytest.param(harm, id=harm.__name__, marks=() if harm.__name__ in QUICK else pytest.mark.slow) for harm in SIDES],
)
async def test_all_at_once(tmp_path: Path, harm: Harm) -> None:
    side = harm.__name__.partition("_")[2]
    async with scene(tmp_path, [(moment, side) for moment in MOMENTS]) as both:
        await harm(both)
        await end_of(both)

"""Whatever is cut, killed or frozen, at every step of a migration between two real Xen hosts: one copy runs.

What is checked after each is in cuts.py. `-s` shows where each guest was afterwards, and how long it took.
"""

import itertools

import pytest

from tests.e2e.xen.cuts import (
    Case,
    Moment,
    carrier_killed,
    cut,
    daemon_killed,
    frozen,
    pair_for_cuts,
    relay_killed,
    run_all,
    silent,
    xl_killed,
)
from tests.e2e.xen.rig import XenRig
from tests.e2e.xen.waves import run_waves

CASE_SECONDS = 240.0  # 12 s with two processors to itself
pytestmark = [pytest.mark.e2e, pytest.mark.xen, pytest.mark.timeout(3000)]

# In the order of a migration: the word of xl, or the line of a journal, before or after which something stops.
STEPS = [
    Moment("b", "after xl banner"),
    Moment("a", "after xl stream"),
    Moment("b", "before xl ready"),
    Moment("b", "after xl ready"),
    Moment("b", "before destination prepared"),
    Moment("b", "after destination prepared"),
    Moment("a", "before source prepared"),
    Moment("a", "after source prepared"),
    Moment("a", "before xl go"),
    Moment("a", "after xl go"),
    Moment("a", "before source voted"),
    Moment("a", "after source voted"),
    Moment("b", "before xl report"),
    Moment("b", "after xl report"),
    Moment("b", "before destination voted"),
    Moment("b", "after destination voted"),
    Moment("a", "before source committed"),
    Moment("a", "after source committed"),
    Moment("b", "before destination committed"),
    Moment("b", "after destination committed"),
    Moment("b", "before destination done"),
    Moment("b", "after destination done"),
    Moment("a", "before source done"),
    Moment("a", "after source done"),
]
COMMITTED = STEPS.index(Moment("a", "after source committed"))
LONG, SHORT = 4.5, 1.0  # more than a session waits for its peer, and less

LONG_CUTS = [
    # From the source's COMMITTED on only the destination can have it; before that nothing is certain but one copy.
    Case("link cut for long", step, cut(LONG), "b" if number >= COMMITTED else "ab")
    for number, step in enumerate(STEPS)
]
SHORT_CUTS = [
    Case("link cut", moment, cut(SHORT), "b")
    for moment in STEPS
    if moment.point in {"after xl ready", "after source prepared", "after xl report", "after source committed"}
]
SILENCES = [
    Case("packets lost", Moment("a", "after xl go"), silent(SHORT), "b"),
    Case("packets lost for long", Moment("a", "after source voted"), silent(20.0)),  # longer than a heartbeat may take
]

KILLED_AT = [
    Moment("a", "after xl stream"),
    Moment("b", "after destination prepared"),
    Moment("a", "after source prepared"),
    Moment("a", "after source voted"),
    Moment("b", "after destination voted"),
    Moment("a", "after source committed"),
    Moment("b", "after destination committed"),
    Moment("b", "after destination done"),
]
KILL_RELAY = [("worker", relay_killed), ("daemon", daemon_killed)]  # by turns


def relays_killed(where: str) -> list[Case]:
    """A relay of one host, at each moment."""
    return [
        Case(f"{what} of {where} killed", moment, kill(where))
        for moment, (what, kill) in zip(KILLED_AT, itertools.cycle(KILL_RELAY), strict=False)
    ]


def xls_killed(where: str) -> list[Case]:
    """xl of one host, at each moment."""
    return [Case(f"xl of {where} killed", moment, xl_killed(where)) for moment in KILLED_AT]


CARRIERS_KILLED = [
    Case("korora xl killed", moment, carrier_killed)
    for moment in (Moment("a", "after source prepared"), Moment("a", "after source committed"))
]
FROZEN = [
    Case("destination frozen", Moment("b", "after destination prepared"), frozen(LONG)),
    Case("destination frozen", Moment("a", "after xl go"), frozen(LONG)),
    Case("destination frozen for long", Moment("b", "after destination committed"), frozen(20.0), "b"),
]


async def test_a_cut_around_go(xen: XenRig) -> None:
    """The one that is in every run."""
    async with pair_for_cuts(xen) as two:
        await run_all(two, [Case("link cut for long", Moment("a", "after xl go"), cut(LONG))], CASE_SECONDS)


@pytest.mark.slow
async def test_links_cut_at_random(xen: XenRig) -> None:
    """Three guests migrate at once, and a cut meets each at another moment, ten times; the longest, and so early."""
    async with pair_for_cuts(xen) as two:
        await run_waves(two, waves=10, guests=3, seed=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(LONG_CUTS[:12], id="links-cut-early"),
        pytest.param(LONG_CUTS[12:], id="links-cut-late"),
        pytest.param(SHORT_CUTS + SILENCES + FROZEN, id="links-cut-for-moments-and-hosts-frozen"),
        pytest.param(relays_killed("a"), id="relays-killed-a"),
        pytest.param(relays_killed("b"), id="relays-killed-b"),
        pytest.param(xls_killed("a"), id="xls-killed-a"),
        pytest.param(xls_killed("b") + CARRIERS_KILLED, id="xls-killed-b"),
    ],
)
async def test_at_every_step(xen: XenRig, cases: list[Case]) -> None:
    async with pair_for_cuts(xen) as two:
        await run_all(two, cases, CASE_SECONDS)

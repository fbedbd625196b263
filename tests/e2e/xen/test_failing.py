"""Migrations that cannot go well: the machine stays where it is and runs on, everybody is told why, and once that is
mended the same migration goes through."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.e2e.xen.daemons import (
    BEATS,
    DESTINATION,
    STATE,
    check_counts_on,
    check_settled,
    check_told,
    configuration,
    configure,
    copies,
    filed,
    migrate,
    peers_of,
    served,
    told,
)
from tests.e2e.xen.host import Guest
from tests.e2e.xen.rig import Pair, XenRig

pytestmark = [pytest.mark.e2e, pytest.mark.xen, pytest.mark.slow, pytest.mark.timeout(420)]

GUEST = Guest("g1", "beat")
REFUSED, HYPERVISOR = 3, 7  # exit codes
XL_FAILED = 1
POLICY = "/root/policy.toml"
NEVER = '[[rule]]\nname = "frozen"\neffect = "deny"\nvm = ["g*"]\n'
ALLOW = '[[rule]]\nname = "everybody"\neffect = "allow"\n'


@asynccontextmanager
async def failing(rig: XenRig, *, egress: str = "") -> AsyncIterator[Pair]:
    """Two hosts with daemons, g1 on a; started once for all of these tests, and for those that cut."""
    async with served(rig, None, egress=egress) as two:
        await two.a.create(GUEST)
        yield two


async def stays(two: Pair, code: int, *words: str) -> None:
    """A migration is tried, fails with `code`, says these words, and g1 runs on where it was."""
    before = await two.a.counter("g1")
    done = await migrate(two.a, "g1", DESTINATION)
    assert done.rc == XL_FAILED, done
    for word in words:
        assert word in done.err, done.err
    assert [copy for copy in await copies(two) if copy[1].startswith("g1") and copy[0] == "a"] == [("a", "g1", True)]
    await two.a.wait_beat("g1", max(before, await two.a.counter("g1")) + BEATS)
    console = await two.a.console("g1")
    assert console.last is not None
    assert console.last.bad == 0
    numbers = [beat.number for beat in console.beats]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    report = await check_told(two, code) if code != REFUSED else None
    assert report is None or report["vm"] == "g1"


async def goes(two: Pair) -> None:
    """And now it goes through."""
    done = await migrate(two.a, "g1", DESTINATION)
    assert done.rc == 0, done
    assert ("b", "g1", True) in await copies(two)
    await check_counts_on([(two.a, "g1"), (two.b, "g1--incoming")])
    await check_told(two, 0)


async def test_a_destination_without_enough_memory(xen: XenRig) -> None:
    async with served(xen, Guest("g1")) as two:  # four MiB would be found
        free = int(await two.b.check(["sh", "-c", "xl info | sed -n 's/^free_memory *: //p'"]))
        filler = Guest("filler", memory_mib=free - 40)
        await two.b.agent.put("/run/filler.cfg", filler.config().encode())
        await two.b.check(["xl", "create", "-p", "/run/filler.cfg"])
        await stays(two, HYPERVISOR, "xl migrate-receive")
        assert [copy[:2] for copy in await copies(two)] == [("a", "g1"), ("b", "filler")]
        assert "libxl: error: " in (await two.b.agent.state("daemon")).err  # its own words are in the daemon's log
        await check_settled(two, {two.a: ["source aborted"], two.b: ["destination aborted"]})
        await two.b.check(["xl", "destroy", "filler"])
        await goes(two)
        await check_settled(
            two, {two.a: ["source aborted", "source done"], two.b: ["destination aborted", "destination done"]}
        )


async def test_an_egress_that_is_not_for_this_host(xen: XenRig) -> None:
    async with failing(xen, egress=f'peers = ["{DESTINATION}"]\n') as two:
        await stays(two, REFUSED, "egress")
        assert await copies(two) == [("a", "g1", True)]
        await configure(two.b, configuration(peers_of(two, two.b)))
        await goes(two)


async def test_a_machine_that_a_policy_denies(xen: XenRig) -> None:
    """Both relays read its name in xl's stream: the destination's refuses, and nothing of the machine is made there."""
    async with failing(xen) as two:
        served_by = f'policy = "{POLICY}"\n{configuration(peers_of(two, two.b))}'
        await two.b.agent.put(POLICY, (NEVER + ALLOW).encode())
        await configure(two.b, served_by)
        await stays(two, REFUSED, "the rule frozen denies it")
        assert await copies(two) == [("a", "g1", True)]
        report = await told(two.a, "/run/xl.json")
        theirs = await filed(two.b, report["session_id"], "destination")
        for end in (report, theirs):
            assert end["exit_code"] == REFUSED
            assert "rule frozen" in end["error"]
        assert [(one["point"], one["allowed"], one["rule"]) for one in theirs["decisions"]] == [
            ("offer", True, "everybody"),
            ("identity", False, "frozen"),
        ]
        for host in (two.a, two.b):
            said = await host.check(["korora", "receipts", "show", report["session_id"], "--json", "--state", STATE])
            assert "rule frozen" in said
        await two.b.agent.put(POLICY, ALLOW.encode())
        await configure(two.b, served_by)
        await goes(two)
        for host in (two.a, two.b):
            assert "is in order" in await host.check(["korora", "receipts", "verify", "--state", STATE])


async def test_a_name_that_is_taken(xen: XenRig) -> None:
    """xl itself finds that after GO: it reports failure, and the machine, which is suspended by then, is resumed."""
    async with failing(xen) as two:
        await two.b.agent.put("/run/twin.cfg", GUEST.config().encode())
        await two.b.check(["xl", "create", "-p", "/run/twin.cfg"])
        await stays(two, HYPERVISOR, "xl migrate-receive")
        assert await copies(two) == [("a", "g1", True), ("b", "g1", False)]
        await check_settled(two, {two.a: ["source aborted"], two.b: ["destination aborted"]})
        await two.b.check(["xl", "destroy", "g1"])
        await goes(two)


async def test_a_revived_machine_is_tended(xen: XenRig) -> None:
    """xl's monitor of a domain that was suspended has gone; another one sees to its reboot and its end."""
    async with failing(xen) as two:
        await two.b.agent.put("/run/twin.cfg", GUEST.config().encode())
        await two.b.check(["xl", "create", "-p", "/run/twin.cfg"])
        await stays(two, HYPERVISOR)
        [monitor] = await two.a.processes("proxy.hypervisors.xl_monitor")
        assert monitor
        [before] = await two.a.xl_list()
        await two.a.check(["xl", "reboot", "g1"])
        after = await two.a.until(lambda found: any(one.id != before.id and one.runs for one in found))
        assert [(one.name, one.uuid) for one in after] == [("g1", before.uuid)]
        await two.a.wait_beat("g1", BEATS)
        assert await two.a.processes("proxy.hypervisors.xl_monitor") == [monitor]
        await two.a.check(["xl", "shutdown", "g1"])
        await two.a.until(lambda found: not found)
        await two.a.gone(monitor)

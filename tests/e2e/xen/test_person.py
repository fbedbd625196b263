"""Migrations that go well, as a person does them: `xl migrate -s "" g1 "korora xl destination"`, daemons in both dom0s.

After each: one copy runs, where it should; the guest has counted on and its memory is as it was; nothing is left on
the other host; the journals are settled; the reports of both ends agree.
"""

import asyncio

import pytest

from tests.e2e.xen.daemons import (
    BEATS,
    DESTINATION,
    MIGRATION_SECONDS,
    SOURCE,
    check_counts_on,
    check_settled,
    check_told,
    copies,
    migrate,
    served,
    told,
)
from tests.e2e.xen.host import Guest
from tests.e2e.xen.rig import IDENTITY, RELAY_PORT, XenRig, pair

pytestmark = [pytest.mark.e2e, pytest.mark.xen, pytest.mark.timeout(420)]

LEFT, ARRIVED = ["source done"], ["destination done"]
BUSY = 300  # pages a second: a machine that works, and still leaves the emulated processor to the relays


@pytest.mark.parametrize(
    "guest",
    [
        pytest.param(Guest(kind="pv"), id="pv"),
        pytest.param(Guest(kind="pv", test_mib=16, memory_mib=96, rate=BUSY), id="pv-busy", marks=pytest.mark.slow),
        pytest.param(Guest(kind="pvh", test_mib=16, memory_mib=96, rate=BUSY), id="pvh-busy", marks=pytest.mark.slow),
    ],
)
async def test_to_the_other_host(xen: XenRig, guest: Guest) -> None:
    async with served(xen, guest) as two:
        done = await migrate(two.a, "g1", DESTINATION)
        assert done.rc == 0, done
        assert await copies(two) == [("b", "g1", True)]
        [counted] = await check_counts_on([(two.a, "g1"), (two.b, "g1--incoming")])
        report = await check_told(two, 0)
        assert (report["vm"], report["pages_missing"]) == ("g1", 0)
        if guest.rate:
            assert report["rounds"] > 1, report  # it changed memory while that was being sent
            assert counted.checked > guest.test_mib * 256
        await check_settled(two, {two.a: LEFT, two.b: ARRIVED})


@pytest.mark.slow
async def test_two_guests_at_once(xen: XenRig) -> None:
    async with served(xen, Guest("g1", "pvh")) as two:
        await two.a.create(Guest("g2", "beat"))
        ends = await asyncio.gather(
            *(migrate(two.a, name, DESTINATION, report=f"/run/{name}.json") for name in ("g1", "g2"))
        )
        assert [end.rc for end in ends] == [0, 0], ends
        assert sorted(await copies(two)) == [("b", "g1", True), ("b", "g2", True)]
        for name in ("g1", "g2"):
            await check_counts_on([(two.a, name), (two.b, f"{name}--incoming")])
            report = await check_told(two, 0, path=f"/run/{name}.json")
            assert report["vm"] == name
        starts = [(await told(two.a, f"/run/{name}.json"))["started"] for name in ("g1", "g2")]
        finish = [(await told(two.a, f"/run/{name}.json"))["ended"] for name in ("g1", "g2")]
        assert max(starts) < min(finish)  # they were under way at the same time
        await check_settled(two, {two.a: LEFT * 2, two.b: ARRIVED * 2})


@pytest.mark.slow
async def test_there_and_back_again(xen: XenRig) -> None:
    """On its way back most of the guest's pages are in the stores of both hosts, and do not cross again.

    `auto` would send them all the same: next to an emulated processor the network is quick.
    """
    async with served(xen, Guest("g1"), xl='encode = "pages"\n') as two:
        assert (await migrate(two.a, "g1", DESTINATION)).rc == 0
        await two.b.wait_beat("g1", await two.a.counter("g1") + BEATS)
        first = two.to_b.proxy.did.forward_bytes + two.to_b.proxy.did.backward_bytes
        back = await migrate(two.b, "g1", SOURCE)
        assert back.rc == 0, back
        second = two.to_a.proxy.did.forward_bytes + two.to_a.proxy.did.backward_bytes
        assert await copies(two) == [("a", "g1", True)]
        await check_counts_on([(two.a, "g1"), (two.b, "g1--incoming"), (two.a, "g1--incoming")])
        out, home = await check_told(two, 0), await check_told(two, 0, source=two.b)
        print(f"there {first} bytes on the wire, pages {out['pages']}; back {second}, pages {home['pages']}")
        assert second < first / 3, (out["pages"], home["pages"])
        await check_settled(two, {two.a: LEFT + ARRIVED, two.b: LEFT + ARRIVED})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["beat", "pvh"])
async def test_within_one_host(xen: XenRig, kind: str) -> None:
    """One daemon is both ends, and one journal has both sides of the hand-over."""
    async with served(xen, Guest("g1", kind)) as two:
        [(_, before)] = await two.domains()
        done = await migrate(two.a, "g1", SOURCE)
        assert done.rc == 0, done
        assert await copies(two) == [("a", "g1", True)]
        [(_, after)] = await two.domains()
        assert after.id != before.id
        assert after.uuid == before.uuid
        await check_counts_on([(two.a, "g1"), (two.a, "g1--incoming")])
        await check_settled(two, {two.a: ARRIVED + LEFT, two.b: []})


@pytest.mark.slow
async def test_it_stays_paused_if_so_told(xen: XenRig) -> None:
    async with served(xen, Guest("g1", "beat")) as two:
        done = await migrate(two.a, "g1", DESTINATION, options=["-p"])
        assert done.rc == 0, done
        [(where, domain)] = await two.domains()
        assert (where, domain.name, domain.paused) == ("b", "g1", True)
        assert await two.b.counter("g1") == -1
        await check_told(two, 0)
        await check_settled(two, {two.a: LEFT, two.b: ARRIVED})
        await two.b.check(["xl", "unpause", "g1"])
        await check_counts_on([(two.a, "g1"), (two.b, "g1--incoming")])


@pytest.mark.slow
async def test_without_daemons(xen: XenRig) -> None:
    """`korora xl` relays by itself, and the destination has an ad hoc `korora receive`."""
    async with pair(xen, Guest("g1", "beat")) as two:
        receive = ["korora", "receive", "--listen", f"0.0.0.0:{RELAY_PORT}", "--to", "xl:", "--identity", IDENTITY]
        await two.b.spawn("receive", [*receive, "--once", "--report", "/run/receive.json"])
        await two.b.said("receive", "ready")
        carrier = f"korora xl --identity {IDENTITY} --report /run/xl.json {two.to_b.address}"
        done = await two.a.run(["xl", "migrate", "-s", "", "g1", carrier], MIGRATION_SECONDS)
        assert done.rc == 0, done
        assert (await two.b.ended("receive")).rc == 0
        assert await copies(two) == [("b", "g1", True)]
        await check_counts_on([(two.a, "g1"), (two.b, "g1--incoming")])
        reports = [await told(two.a), await told(two.b, "/run/receive.json")]
        assert [report["outcome"] for report in reports] == ["done", "done"]
        assert [report["handover"] for report in reports] == ["done", "done"]
        assert reports[0]["digest_blake3"] == reports[1]["digest_blake3"]
        state = f"{IDENTITY}/state"
        await check_settled(two, {two.a: LEFT, two.b: ARRIVED}, state=state)

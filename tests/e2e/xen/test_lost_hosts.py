"""A host is lost in mid-migration, with its memory and its journal's disk, and another one takes its place.

What can be known is settled without anybody. What cannot be is said, on the host that is left, and an operator who has
looked decides with one command; afterwards one copy runs, which has counted on, and a migration goes through.
"""

import json
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.xen.cuts import (
    CARRIER,
    COMMAND_SECONDS,
    LIMITS,
    OPAQUE,
    Migration,
    Moment,
    check_one_copy,
    go_through,
    pair_for_cuts,
    records_of,
    settled,
    until,
)
from tests.e2e.xen.daemons import configuration, configure, peers_of, served_host
from tests.e2e.xen.host import Guest, XenHost
from tests.e2e.xen.points import disarm
from tests.e2e.xen.rig import IDENTITY, RELAY_PORT, Pair, XenRig

pytestmark = [pytest.mark.e2e, pytest.mark.xen, pytest.mark.slow, pytest.mark.timeout(900)]

NAME = "lost"
CASE_SECONDS = 240.0


@asynccontextmanager
async def lost(xen: XenRig, two: Pair, moment: Moment, which: str) -> AsyncIterator[Migration]:
    """A migration in which host `which` is lost at a moment; then another has its name, certificate and address."""
    await two.a.create(Guest(NAME, "beat"))
    it = await until(two, NAME, moment)
    (two.a if which == "a" else two.b).power_off()
    with tempfile.TemporaryDirectory(prefix="korora-xen-") as folder:
        identity = xen.identities[which == "b"]
        async with XenHost(which, xen.image, Path(folder), await served_host(xen, None, identity)) as fresh:
            way = two.to_a if which == "a" else two.to_b
            way.proxy.target = ("127.0.0.1", fresh.ports[RELAY_PORT])
            way.proxy.reset()  # whose ends are gone
            if which == "a":
                two.a = fresh
            else:
                two.b = fresh
            await configure(fresh, configuration(peers_of(two, fresh), "", OPAQUE, LIMITS))
            if it.at is not fresh and it.at in two.hosts:
                await it.go_on()
                await disarm(it.at)
            try:
                yield it
            except BaseException:
                print(await two.logs())  # of the host that took the other's place, while there is one
                raise


async def operator(host: XenHost, *words: str, code: int = 0) -> dict[str, Any]:
    """Type `korora handover …`; what it says as JSON."""
    done = await host.run(
        ["korora", "handover", *words, "--identity", IDENTITY, "--state", "/var/lib/korora", "--json"]
    )
    assert done.rc == code, done
    said: dict[str, Any] = json.loads(done.out)
    return said


async def migrates(two: Pair) -> None:
    """The guest, on a, goes to b, once an operator has said that b's log of receipts was lost with it."""
    command = await two.a.check(["sh", "-c", f"xl migrate -s '' {NAME} '{CARRIER}' 2>&1 || true"], COMMAND_SECONDS)
    assert "destination's log of receipts is" in command, command
    heads = re.search(r"if that is known and right, remove (\S+)", command)
    assert heads, command
    assert await check_one_copy(two, NAME) == "a"
    await two.a.check(["rm", heads[1].rstrip(".,;")])
    await go_through(two, [NAME])


@pytest.mark.parametrize("point", ["b after destination prepared", "a after source voted"])
async def test_the_destination_before_it_may_run(xen: XenRig, point: str) -> None:
    """The source takes its machine back by itself."""
    host, _, at = point.partition(" ")
    async with pair_for_cuts(xen) as two, lost(xen, two, Moment(host, at), "b"):
        done = await two.a.ended(f"migrate-{NAME}", COMMAND_SECONDS)
        assert done.rc == 1, done
        records = await settled(two)
        assert [record["state"] for record in records["a"]] == ["aborted"]
        assert await check_one_copy(two, NAME) == "a"
        await migrates(two)


async def test_the_destination_once_it_may_run(xen: XenRig) -> None:
    """The source cannot know: it waits, and says so, until an operator says that the other host is gone."""
    async with pair_for_cuts(xen) as two, lost(xen, two, Moment("b", "after destination committed"), "b"):
        [record] = [record for record in await records_of(two.a) if record.get("name") == NAME]
        assert record["state"] in {"committed", "doubt"}
        [domain] = await two.a.xl_list()
        assert domain.suspended
        session = record["session"]
        [told] = (await operator(two.a, "list"))["handovers"]
        assert (told["session"], told["settled"]) == (session, False)
        await operator(two.a, "resolve", session[:8], "--run-here", "--certain")
        records = await settled(two)
        assert [record["state"] for record in records["a"]] == ["aborted"]
        assert await check_one_copy(two, NAME) == "a"
        await migrates(two)


@pytest.mark.parametrize("point", ["a after source voted", "a after source prepared"])
async def test_the_source(xen: XenRig, point: str) -> None:
    """The destination has the only copy, paused, and no word that it may run: it keeps it for an operator."""
    async with pair_for_cuts(xen) as two:
        before = two.a
        async with lost(xen, two, Moment("a", point.removeprefix("a ")), "a"):
            [record] = await records_of(two.b)
            assert record["state"] in {"prepared", "voted"}
            assert not record.get("settled")
            [domain] = await two.b.xl_list()
            assert domain.paused
            session = record["session"]
            await operator(two.b, "resolve", session[:8], "--run-here", "--certain")
            [record] = (await settled(two))["b"]
            assert record["state"] == "done"
            [domain] = await two.b.xl_list()
            assert (domain.name, domain.paused) == (NAME, False)
            beats = (await two.b.console(f"{NAME}--incoming")).beats
            await two.b.wait_beat(NAME, beats[-1].number + 5 if beats else 5)
            beats = (await two.b.console(f"{NAME}--incoming")).beats
            assert [beat.number for beat in beats] == list(range(beats[0].number, beats[-1].number + 1))
            assert not any(beat.bad for beat in beats)
            assert before not in two.hosts

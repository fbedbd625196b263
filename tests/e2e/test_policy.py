"""Real migrations between daemons, allowed and refused by policy: both ends name the rule, and so do the receipts."""

import asyncio
import os
import re
import subprocess
from typing import Any

import pytest

from proxy.handover.table import Side, State
from tests.attacks.processes import KORORA
from tests.e2e.guarded import STEP_SECONDS, Which
from tests.e2e.rig import FAST, MIDDLE_BYTES, SLOW, Rig
from tests.e2e.served import BOTH, Served, served, waiting, write_policy
from tests.e2e.watching import LOOK_SECONDS
from tests.korora.policy.shells import Ended, as_user

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

ALLOW = '[[rule]]\nname = "everybody"\neffect = "allow"\n'
NEVER = '[[rule]]\nname = "frozen"\neffect = "deny"\nvm = ["{vm}*"]\n'


def other(which: Which) -> Which:
    return BOTH[1 - BOTH.index(which)]


async def reports(made: Served, count: int) -> dict[Which, dict[str, Any]]:
    """The last of so many reports of each daemon."""
    async with asyncio.timeout(STEP_SECONDS):
        while any(len(host.reports()) < count for host in made.hosts.values()):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_SECONDS)
    return {which: max(host.reports(), key=lambda one: one["started"]) for which, host in made.hosts.items()}


async def receipts(made: Served, which: Which, session: str) -> str:
    """What a host's log says of a session, as its operator sees it: it is written just after the session's end."""
    command = [*KORORA, "receipts", "show", session, "--json", "--state", str(made.hosts[which].state)]
    async with asyncio.timeout(STEP_SECONDS):
        while True:
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=False, timeout=20)
            if b'"outcome"' in done.stdout:
                return done.stdout.decode()
            await asyncio.sleep(LOOK_SECONDS)


async def stays(made: Served, rule: str, count: int = 1, codes: tuple[int, int] = (3, 3)) -> None:
    """The machine runs at the source, nothing has arrived, and both ends name the rule."""
    await made.settled()
    await made.counts_at_the_source()
    told = await reports(made, count)
    assert (told["source"]["exit_code"], told["destination"]["exit_code"]) == codes
    for which in BOTH:
        assert f"rule {rule}" in told[which]["error"], told[which]["error"]


async def moves(made: Served, rig: Rig) -> None:
    """It migrates to a QEMU that waits at the destination: the one that nothing has reached, or another."""
    if made.destination.running:
        made.migrations += 1
        await made.migrate()
        assert await made.one_runs() == "destination"
        return
    async with waiting(rig, made.folder, "another-destination") as made.destination:
        made.migrations += 1
        await made.migrate()
        assert await made.one_runs() == "destination"


async def reload(made: Served, which: Which, policy: str) -> None:
    write_policy(made.folder, which, policy)
    assert (await asyncio.to_thread(made.hosts[which].ask, "reload"))["ok"]


@pytest.mark.parametrize("which", BOTH)
async def test_a_machine_that_may_not_leave_or_arrive_stays_until_a_reload_lets_it(rig: Rig, which: Which) -> None:
    denied = NEVER.format(vm=which) + ALLOW
    async with served(rig, {which: denied}) as made:
        await made.migrate()
        await stays(made, "frozen")
        session = (await reports(made, 1))[which]["session_id"]
        for each in BOTH:
            said = await receipts(made, each, session)
            assert "rule frozen" in said, said
        assert '"frozen"' in await receipts(made, which, session)
        await reload(made, which, ALLOW)
        await moves(made, rig)
        told = await reports(made, 2)
        assert {one["outcome"] for one in told.values()} == {"done"}
        assert [one["rule"] for one in told[which]["decisions"]] == ["everybody"] * 3
        assert len({one["policy"] for one in told.values()}) == 2


@pytest.mark.parametrize("which", BOTH)
async def test_a_reload_counts_at_the_handover_of_a_session_under_way(rig: Rig, which: Which) -> None:
    async with served(rig, {which: ALLOW}) as made:
        await made.migrate(SLOW)
        await made.reached(Side.SOURCE, State.OPEN)
        async with asyncio.timeout(STEP_SECONDS):
            while (await made.source.migration()).get("ram", {}).get("transferred", 0) < MIDDLE_BYTES:  # noqa: ASYNC110
                await asyncio.sleep(LOOK_SECONDS)
        await reload(made, which, NEVER.format(vm=which) + ALLOW)
        await made.source.qmp.execute("migrate-set-parameters", max_bandwidth=FAST)
        await stays(made, "frozen")
        decisions = (await reports(made, 1))[which]["decisions"]
        assert [(one["point"], one["allowed"]) for one in decisions] == [
            ("offer", True),
            ("identity", True),
            ("handover", False),
        ]


async def test_a_bad_policy_is_refused_by_a_reload_and_the_old_one_counts(rig: Rig) -> None:
    async with served(rig, {"destination": ALLOW}) as made:
        write_policy(made.folder, "destination", "[[rule]]\nname = 3\n")
        answer = await asyncio.to_thread(made.hosts["destination"].ask, "reload")
        assert not answer["ok"]
        assert "destination.policy" in answer["error"]
        await made.migrate()
        assert await made.one_runs() == "destination"


async def approve(made: Served, which: Which, uid: int) -> Ended:
    """`korora approve` in a shell of that user's."""
    socket = f"{made.folder}/{which}.approve"
    listed = await as_user(uid, "approve", "--list", "--json", "--socket", socket)
    (session,) = re.findall(r'"session": ?"([0-9a-f]{32})"', listed.out)
    return await as_user(uid, "approve", session, "--socket", socket)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two other users")
@pytest.mark.parametrize("which", BOTH)
async def test_two_people_approve_from_two_shells(rig: Rig, which: Which) -> None:
    rule = '[[rule]]\nname = "two"\neffect = "allow"\napprovals = 2\napprovers = [1001, 1002]\n'
    async with served(rig, {which: rule}) as made:
        made.folder.chmod(0o755)
        await made.migrate()
        async with asyncio.timeout(STEP_SECONDS):
            while not made.hosts[which].events("a migration waits for approval"):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_SECONDS)
        first = await approve(made, which, 1001)
        assert first.code == 0, first.err
        await approve(made, which, 1001)  # twice is not two
        assert (await made.source.migration())["status"] in {"active", "setup"}
        assert not made.hosts[which].reports()
        second = await approve(made, which, 1002)
        assert second.code == 0, second.err
        assert await made.one_runs() == "destination"
        told = await reports(made, 1)
        assert told[which]["decisions"][-1]["approvers"] == [1001, 1002]
        acts = [(act["subject"], act["procedure"]) for act in told[which]["procedures"]]
        assert ("uid:1001", "approve") in acts
        assert ("uid:1002", "approve") in acts

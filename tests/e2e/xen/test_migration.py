"""A guest goes from one real Xen host to another by `xl migrate`: first without us, then through two relays.

The guest counts aloud and checks its memory (deploy/rig/xen/workload.c). Afterwards one copy runs, at the destination;
no number is left out, none comes twice, every page is as it was written, and the source holds nothing.
"""

import json

import pytest

from korora.demo.serial import continuity
from tests.e2e.xen.host import GATEWAY, Guest
from tests.e2e.xen.rig import IDENTITY, RELAY_PORT, Pair, XenRig, pair

pytestmark = [pytest.mark.e2e, pytest.mark.xen, pytest.mark.timeout(420)]

MIGRATION_SECONDS = 240.0  # 10 s with two processors to itself
BEATS = 30  # heard after the arrival, before the guest is believed


async def check_arrived(two: Pair, name: str) -> None:
    """Exactly one copy, on b, under its own name; it counts on, and nothing is left of it on a."""
    domains = await two.domains()
    assert [(host, domain.name, domain.runs) for host, domain in domains] == [("b", name, True)]
    before, after = await two.a.console(name), await two.b.console(f"{name}--incoming")
    assert before.last is not None
    await two.b.wait_beat(name, before.last.number + BEATS)
    after = await two.b.console(f"{name}--incoming")
    counted = continuity(before, after)
    assert counted is not None
    assert counted.unbroken, counted


async def test_over_a_plain_connection(xen: XenRig) -> None:
    """The rig itself: Xen as it comes."""
    async with pair(xen, Guest()) as two:
        await two.b.spawn("receiver", ["socat", "-t3600", "TCP-LISTEN:8002,reuseaddr", "EXEC:xl migrate-receive"])
        await two.b.listening(8002)
        carrier = f"socat -,ignoreeof TCP:{GATEWAY}:{two.b.ports[8002]}"
        done = await two.a.run(["xl", "migrate", "-s", "", "g1", carrier], MIGRATION_SECONDS)
        assert done.rc == 0, done
        assert (await two.b.ended("receiver")).rc == 0
        await check_arrived(two, "g1")


async def test_through_two_relays(xen: XenRig) -> None:
    """By `korora send` and `korora receive`; test_person.py has the other ways, and other guests."""
    async with pair(xen, Guest()) as two:
        receive = ["korora", "receive", "--listen", f"0.0.0.0:{RELAY_PORT}", "--to", "xl:", "--identity", IDENTITY]
        await two.b.spawn("receive", [*receive, "--once", "--report", "/run/receive.json"])
        await two.b.said("receive", "ready")
        carrier = (
            f"korora send --from stdio: --peer {two.to_b.address} --identity {IDENTITY} --once --report /run/send.json"
        )
        done = await two.a.run(["xl", "migrate", "-s", "", "g1", carrier], MIGRATION_SECONDS)
        assert done.rc == 0, done
        assert (await two.b.ended("receive")).rc == 0
        await check_arrived(two, "g1")
        reports = [
            json.loads(await host.agent.get(f"/run/{name}.json") or b"{}")
            for host, name in zip(two.hosts, ("send", "receive"), strict=True)
        ]
        assert [report["outcome"] for report in reports] == ["done", "done"]
        assert reports[0]["digest_blake3"] == reports[1]["digest_blake3"]
        assert reports[0]["pages"]["literal"] > 0

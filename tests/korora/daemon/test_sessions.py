"""Many sessions through one daemon, and what happens to them when a part of it dies."""

import asyncio
import os
import random
import signal
from dataclasses import dataclass, field

from tests.chaos.load import KIB
from tests.chaos.relays import usage
from tests.korora.daemon.support import (
    SECONDS_MAX,
    Host,
    Machine,
    Site,
    echo,
    exchange,
    in_thread,
    until,
    waiting_hypervisor,
)
from tests.proxy.support import run, together

CHANNELS = 8
EACH_WAY = 8  # so that each daemon carries 16: eight that leave it and eight that arrive
BYTES_MAX = 2_000_000
HELD_KIB_MAX = 8 * KIB  # what an allocator may keep of the 40 that a session takes
SETTLED_LOOKS = 10
MEMORY_MIB_MAX = 256 + 15 * 64  # of all of a daemon's processes: one session's, and each further one's


@dataclass
class Pair:
    """Two hosts, and machines that migrate between them."""

    alpha: Host
    beta: Host
    machines: list[Machine] = field(default_factory=list)

    def start(self) -> None:
        for host in (self.beta, self.alpha):
            host.start()

    def close(self) -> None:
        for machine in self.machines:
            machine.close()


def pair(site: Site, there: int, back: int = 0, *, workers: int = 1) -> Pair:
    """alpha and beta, with machines that go there and others that come back."""
    made = Pair(site.host("alpha", workers=workers), site.host("beta", workers=workers))
    for one, other in ((made.alpha, made.beta), (made.beta, made.alpha)):
        one.peer(other.name, other.address)
    for origin, target, count in ((made.alpha, made.beta, there), (made.beta, made.alpha, back)):
        for number in range(count):
            listener, endpoint = waiting_hypervisor()
            target.egress(f"vm{number}", endpoint)
            port = origin.ingress(f"vm{number}", target.name, egress=f"vm{number}")
            made.machines.append(Machine(port, listener))
    return made


def test_sixteen_sessions_of_eight_channels_through_one_daemon(site: Site) -> None:
    hosts = pair(site, EACH_WAY, EACH_WAY, workers=2)
    hosts.start()
    dice = random.Random(16)

    async def migrate(machine: Machine, everybody: asyncio.Barrier) -> None:
        channels = [await machine.channel() for _ in range(CHANNELS)]
        await everybody.wait()  # all are open at once
        streams = [(dice.randbytes(dice.randrange(BYTES_MAX)), dice.randbytes(dice.randrange(9000))) for _ in channels]
        await together(*(exchange(*ends, *data) for ends, data in zip(channels, streams, strict=True)))

    async def story() -> None:
        everybody = asyncio.Barrier(2 * EACH_WAY)
        await together(*(migrate(machine, everybody) for machine in hosts.machines))

    try:
        run(story(), SECONDS_MAX)
        for host in (hosts.alpha, hosts.beta):
            until(lambda host=host: len(host.reports()) == 2 * EACH_WAY)
            finished = host.status()["finished"]
            assert len(finished) == 2 * EACH_WAY
            status = host.status()
            pids = (status["pid"], *(worker["pid"] for worker in status["workers"]))
            peak_kib = sum(usage(pid).peak_kib for pid in pids)
            assert peak_kib < MEMORY_MIB_MAX * KIB, f"{host.name}: {peak_kib} KiB"
    finally:
        hosts.close()
    reports = {
        (report["session_id"], report["role"]): report
        for host in (hosts.alpha, hosts.beta)
        for report in host.reports()
    }
    assert len(reports) == 4 * EACH_WAY
    for (session_id, role), report in reports.items():
        other = reports[session_id, "destination" if role == "source" else "source"]
        assert (report["outcome"], report["channels"], len(report["digest_blake3"])) == ("done", CHANNELS, CHANNELS)
        assert report["digest_blake3"] == other["digest_blake3"]
    for host in (hosts.alpha, hosts.beta):
        host.signal(signal.SIGTERM)
        assert host.wait() == 0


def test_what_a_session_held_is_given_back(site: Site) -> None:
    """Once it is over, not when the next one is: a channel's buffers are several MiB, and a machine may have eight."""
    hosts = pair(site, 1)
    hosts.start()
    machine = hosts.machines[0]
    pids = [host.status()["workers"][0]["pid"] for host in (hosts.alpha, hosts.beta)]
    data = random.Random(8).randbytes(BYTES_MAX)

    async def migrate(channels: int) -> None:
        opened = [await machine.channel() for _ in range(channels)]
        await together(*(exchange(*ends, data, b"back") for ends in opened))

    def settled(sessions: int) -> list[int]:
        until(lambda: all(len(host.reports()) == sessions for host in (hosts.alpha, hosts.beta)))
        seen: list[list[int]] = []

        def rests() -> bool:
            seen.append([usage(pid).rss_kib for pid in pids])
            return seen[-SETTLED_LOOKS:] == SETTLED_LOOKS * [seen[-1]]

        until(rests, "their memory does not come to rest")
        return seen[-1]

    try:
        run(migrate(1), SECONDS_MAX)
        before = settled(1)
        run(migrate(CHANNELS), SECONDS_MAX)
        after = settled(2)
        assert all(now < then + HELD_KIB_MAX for then, now in zip(before, after, strict=True)), (before, after)
    finally:
        hosts.close()


def test_a_worker_that_is_killed_takes_only_its_own_sessions_along(site: Site) -> None:
    hosts = pair(site, 4, workers=2)
    hosts.start()
    alpha, beta = hosts.alpha, hosts.beta

    async def story() -> None:
        channels = [await machine.channel() for machine in hosts.machines]
        for ends in channels:
            await echo(*ends)
        status = await in_thread(alpha.status)
        victim = status["workers"][0]
        lost = {session["way"] for session in status["sessions"] if session["worker"] == 0}
        assert len(lost) == 2
        os.kill(victim["pid"], signal.SIGKILL)
        for number, (near, far) in enumerate(channels):
            if f"vm{number}" in lost:
                assert await near.broken()
                assert await far.broken()
            else:
                await echo(near, far)
        await in_thread(until, lambda: alpha.status()["workers"][0]["ready"])
        after = await in_thread(alpha.status)
        assert after["workers"][0]["restarts"] == 1
        assert after["workers"][0]["pid"] != victim["pid"]
        assert {entry["outcome"] for entry in after["finished"]} == {"lost"}
        # Its ingresses are served again, and the others never stopped.
        for machine in hosts.machines:
            if f"vm{hosts.machines.index(machine)}" in lost:
                await exchange(*await machine.channel(), b"again", b"and back")
        for number, (near, far) in enumerate(channels):
            if f"vm{number}" not in lost:
                await exchange(near, far, b"the end", b"of it")

    try:
        run(story(), SECONDS_MAX)
        assert len(beta.events("session failed")) == 2
        assert len(alpha.events("a worker died")) == 1
    finally:
        hosts.close()


def test_without_their_parent_workers_end_their_sessions(site: Site) -> None:
    hosts = pair(site, 1, workers=2)
    hosts.start()
    alpha = hosts.alpha

    async def story() -> None:
        near, far = await hosts.machines[0].channel()
        await echo(near, far)
        workers = [worker["pid"] for worker in (await in_thread(alpha.status))["workers"]]
        alpha.signal(signal.SIGKILL)
        assert await near.broken()
        assert await far.broken()
        await in_thread(until, lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))

    try:
        run(story(), SECONDS_MAX)
        assert [report["error"] for report in alpha.reports()] == [
            "korora: error: the relay's parent process is gone; check the network and the other relay's log, "
            "then migrate again"
        ]
    finally:
        hosts.close()


def test_new_sessions_are_spread_over_the_workers(site: Site) -> None:
    hosts = pair(site, 6, workers=2)
    hosts.start()

    async def story() -> None:
        for machine in hosts.machines:
            await echo(*await machine.channel())
        await asyncio.sleep(0)

    try:
        run(story(), SECONDS_MAX)
        for host in (hosts.alpha, hosts.beta):
            assert [worker["sessions"] for worker in host.status()["workers"]] == [3, 3]
    finally:
        hosts.close()

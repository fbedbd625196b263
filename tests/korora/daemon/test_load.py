"""The daemon under what hosts and strangers do to it at their worst: churn, floods and reloads all at once."""

import asyncio
import contextlib
import socket
import time
from pathlib import Path

from proxy.limits import HALF_OPEN_PER_ADDRESS_MAX
from tests.korora.daemon.support import SECONDS_MAX, Host, Machine, Site, exchange, in_thread, until
from tests.korora.daemon.test_reload import load, moves
from tests.korora.daemon.test_sessions import pair
from tests.proxy.support import run

MIGRATIONS = 12  # one after another through each ingress
FLOOD = 150  # connections of strangers
RELOADS = 5


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def churn(machine: Machine) -> None:
    """Short migrations, one right after another, as a host that is being emptied makes them."""
    for number in range(MIGRATIONS):
        near, far = await machine.channel()
        await exchange(near, far, bytes([number]) * (number * 4099), b"well")
        near.close()
        far.close()


async def flood(host: Host, stop: asyncio.Event) -> None:
    """Strangers that say half a word, a wrong one, or nothing, and leave as rudely as they can."""
    loop = asyncio.get_running_loop()
    held: list[socket.socket] = []
    while not stop.is_set():
        sock = socket.socket()
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            await loop.sock_connect(sock, ("127.0.0.1", host.port))
            await loop.sock_sendall(
                sock, (b"", b"\x16\x03\x01\x02\0", b"KRL1\0" + bytes(15), b"SSH-2.0-x\r\n")[len(held) % 4]
            )
        held.append(sock)
        if len(held) > FLOOD:
            held.pop(0).close()
        await asyncio.sleep(0.002)
    for sock in held:
        sock.close()


def test_churn_floods_and_reloads_at_once(site: Site) -> None:
    hosts = pair(site, 4, workers=2)
    hosts.start()

    async def story() -> None:
        stop = asyncio.Event()
        flooding = asyncio.create_task(flood(hosts.beta, stop))
        async with load(hosts.machines[0]) as sent:
            churning = [asyncio.create_task(churn(machine)) for machine in hosts.machines[1:]]
            for _ in range(RELOADS):
                for host in (hosts.alpha, hosts.beta):
                    assert (await in_thread(host.ask, "reload"))["ok"]
            await asyncio.gather(*churning)
            await moves(sent)
        stop.set()
        await flooding

    try:
        run(story(), SECONDS_MAX)
        for host in (hosts.alpha, hosts.beta):
            # A connection that comes before the last session is over is a channel of that.
            until(lambda host=host: sum(report["channels"] for report in host.reports()) == 3 * MIGRATIONS + 1)
            assert {(report["outcome"], report["error"]) for report in host.reports()} == {("done", None)}
            status = host.status()
            assert status["reloads"] == {"good": RELOADS, "bad": 0}
            assert [worker["restarts"] for worker in status["workers"]] == [0, 0]
            assert "Traceback" not in host.log()
        _nothing_is_left_open(hosts.beta)
    finally:
        hosts.close()


def _nothing_is_left_open(host: Host) -> None:
    """Once strangers have been given up, every process has the few descriptors it began with."""
    status = host.status()
    pids = [status["pid"], *(worker["pid"] for worker in status["workers"])]
    most = max(descriptors(pid) for pid in pids)
    assert most < 4 * HALF_OPEN_PER_ADDRESS_MAX
    began = time.monotonic()
    until(lambda: max(descriptors(pid) for pid in pids) < 40, "descriptors are left open")
    assert time.monotonic() - began < 12

"""Two real QEMUs whose hand-over two daemons guard; see ``tests.e2e.guarded``, which has commands in their place."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from korora.demo.qemu import BOOT_SECONDS, QemuVm
from proxy.handover.record import Record
from proxy.handover.table import Side
from proxy.shell.journal import Journal
from tests.chaos.proxy import ChaosProxy
from tests.e2e.guarded import RESUME_SECONDS, STEP_SECONDS, Guarded, Which
from tests.e2e.rig import FAST, Rig, private_folder
from tests.e2e.watching import LOOK_SECONDS, never_two
from tests.korora.daemon.support import Host, Site

BOTH: tuple[Which, Which] = ("source", "destination")


class Served(Guarded):
    """A guest on its way between two daemons, each with one worker; ``served`` makes one."""

    hosts: dict[Which, Host]
    migrations = 1
    workers: dict[Which, list[int]]

    async def start_daemon(self, which: Which) -> None:
        """Start a daemon, or start it again."""
        host = self.hosts[which]
        await asyncio.to_thread(host.start)
        self.workers[which] = [worker["pid"] for worker in (await asyncio.to_thread(host.status))["workers"]]

    async def migrate(self, bandwidth: int = FAST, **parameters: int) -> None:
        """Begin the migration, once the source's daemon has told QEMU to halt: a daemon is ready a little before."""
        async with asyncio.timeout(STEP_SECONDS):
            while not await self._halts():  # noqa: ASYNC110
                await asyncio.sleep(LOOK_SECONDS)
        await super().migrate(bandwidth, **parameters)

    async def _halts(self) -> bool:
        told = await self.source.qmp.execute("query-migrate-capabilities")
        return any(one["state"] for one in told if one["capability"] == "pause-before-switchover")

    def kill(self, which: Which) -> None:
        """SIGKILL to a daemon and all its processes."""
        host = self.hosts[which]
        assert host.process is not None
        assert host.process.stdout is not None
        os.killpg(host.process.pid, signal.SIGKILL)
        host.process.wait()
        host.process.stdout.close()
        host.process = None

    def kill_worker(self, which: Which) -> None:
        """SIGKILL to the process of a daemon that has its sessions."""
        for pid in self.workers[which]:
            os.kill(pid, signal.SIGKILL)

    def journal(self, side: Side) -> list[Record]:
        """The hand-over that is under way, or was last; earlier ones are settled, or nothing is to be seen here."""
        records = Journal(self.hosts[side.value].state).records()
        return records[-1:] if len(records) == self.migrations and all(one.settled for one in records[:-1]) else []


@asynccontextmanager
async def served(rig: Rig, policies: Mapping[Which, str] = {}) -> AsyncIterator[Served]:
    """Load the guest at the source and make everything ready to migrate it from daemon to daemon.

    Args:
        policies: of each daemon that is to have one.
    """
    async with AsyncExitStack() as stack:
        folder = await stack.enter_async_context(private_folder())
        network = await stack.enter_async_context(ChaosProxy())
        site = await asyncio.to_thread(Site, folder)
        stack.push_async_callback(asyncio.to_thread, site.close)
        settings = f"[limits]\nresume_timeout = {RESUME_SECONDS}\n"
        for which, policy in policies.items():
            write_policy(folder, which, policy)
        tops = {
            which: f'policy = "{folder}/{which}.policy"\napprovals = "{folder}/{which}.approve"\n' for which in policies
        }
        hosts: dict[Which, Host] = {
            which: site.host(which, workers=1, settings=tops.get(which, "") + settings) for which in BOTH
        }
        network.target = ("127.0.0.1", hosts["destination"].port)
        hosts["source"].peer("destination", f"127.0.0.1:{network.port}")
        hosts["destination"].peer("source")
        hosts["source"].tables.append(
            f'[[ingress]]\nname = "vm"\nfrom = "unix:{folder}/departure"\npeer = "destination"\negress = "vm"\n'
            f'qmp = "unix:{folder}/source.guard"\nrequire_guarded = true\n'
        )
        hosts["destination"].egress("vm", f"unix:{folder}/arrival", f'qmp = "unix:{folder}/destination.guard"\n')
        source = await stack.enter_async_context(
            QemuVm("source", rig.machine, folder, f"exec:cat <{rig.snapshot}", monitor_for_relay(folder, "source"))
        )
        destination = await stack.enter_async_context(waiting(rig, folder, "destination"))
        made = Served(source, destination, network, folder, {}, f"unix:{folder}/departure")
        made.hosts, made.workers = hosts, {}
        try:
            await source.wait_beat(lambda beat: True, BOOT_SECONDS)
            await asyncio.gather(*(made.start_daemon(which) for which in BOTH))
            async with never_two(lambda: (made.source, made.destination)):
                yield made
        except BaseException:
            print(made.logs())
            raise


def write_policy(folder: Path, which: Which, policy: str) -> None:
    """Put a daemon's policy down, or another one."""
    path = folder / f"{which}.policy"
    path.write_text(policy)
    path.chmod(0o600)


def waiting(rig: Rig, folder: Path, name: str) -> QemuVm:
    """A QEMU that waits for the machine, at the destination's paths."""
    return QemuVm(name, rig.machine, folder, f"unix:{folder}/arrival", monitor_for_relay(folder, "destination"))


def monitor_for_relay(folder: Path, which: Which) -> tuple[str, str]:
    """What gives a QEMU a second monitor, for the daemon alone."""
    return ("-qmp", f"unix:{folder}/{which}.guard,server=on,wait=off")

"""A real QEMU migrates a real guest through two daemons, which are reloaded and told to stop in the middle of it."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from korora.demo.qemu import BOOT_SECONDS, QemuVm
from korora.demo.serial import continuity
from tests.e2e.rig import FAST, MIB, SLOW, SPEC, STEP_SECONDS, Rig, Scene, private_folder
from tests.korora.daemon.support import Host, Site, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]

CHANNELS = 5  # QEMU's main channel and four of pages


def daemons(site: Site, folder: Path) -> tuple[Host, Host]:
    """alpha, with a way in for QEMU, and beta, where one waits."""
    alpha, beta = site.host("alpha", workers=1), site.host("beta", workers=1)
    alpha.peer("beta", beta.address)
    beta.peer("alpha")
    alpha.tables.append(f'[[ingress]]\nname = "vm"\nfrom = "unix:{folder}/departure"\npeer = "beta"\negress = "vm"\n')
    beta.egress("vm", f"unix:{folder}/arrival")
    for host in (beta, alpha):
        host.start()
    return alpha, beta


async def test_a_migration_goes_on_through_reload_and_drain(rig: Rig) -> None:
    async with private_folder() as folder:
        site = await asyncio.to_thread(Site, folder)
        try:
            alpha, beta = await asyncio.to_thread(daemons, site, folder)
            async with (
                QemuVm("source", rig.machine, folder, incoming=f"exec:cat <{rig.snapshot}") as source,
                QemuVm("destination", rig.machine, folder, incoming="defer") as destination,
            ):
                relays: Any = None  # a scene of daemons has no pair of commands
                await _migrate(Scene(source, destination, relays, f"unix:{folder}/departure"), alpha, beta, folder)
        finally:
            await asyncio.to_thread(site.close)


async def _migrate(scene: Scene, alpha: Host, beta: Host, folder: Path) -> None:
    source, destination = scene.source, scene.destination
    await source.wait_beat(lambda _: True, BOOT_SECONDS)
    for side in (source, destination):
        await side.set_capabilities("multifd")
        await side.qmp.execute("migrate-set-parameters", multifd_channels=CHANNELS - 1, max_bandwidth=SLOW)
    await destination.qmp.execute("migrate-incoming", uri=f"unix:{folder}/arrival")
    await scene.start()
    await scene.reach(lambda ram: ram["transferred"] + ram["multifd-bytes"] >= 4 * MIB)
    for host in (alpha, beta):
        assert (await asyncio.to_thread(host.ask, "reload"))["ok"]
        host.signal(signal.SIGTERM)
        await asyncio.to_thread(until, lambda host=host: host.status()["phase"] == "draining")
    assert (await source.migration())["status"] == "active"
    await scene.set_parameters(max_bandwidth=FAST)
    await scene.completed()
    there = await destination.wait_beat(lambda _: True, STEP_SECONDS)
    enough = there.checked + SPEC.checks_of_everything
    await destination.wait_beat(lambda beat: beat.checked >= enough, STEP_SECONDS)
    counted = continuity(source.serial, destination.serial)
    assert counted is not None
    assert counted.unbroken, counted
    assert await asyncio.to_thread(alpha.wait) == await asyncio.to_thread(beta.wait) == 0
    (sent,), (received,) = alpha.reports(), beta.reports()
    assert sent["outcome"] == received["outcome"] == "done"
    assert sent["digest_blake3"] == received["digest_blake3"]
    assert len(sent["digest_blake3"]) == CHANNELS

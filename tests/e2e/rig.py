"""What the tests with real QEMUs share: a guest booted once and loaded from a file for each test, and its migration.

The parts themselves (guest, QEMU, relays, counting) are korora.demo's, so that the demo and the tests cannot differ.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from korora.demo.guest import GuestSpec, initramfs
from korora.demo.qemu import BOOT_SECONDS, Machine, QemuVm, find_guest_files, find_qemu
from korora.demo.relays import Identities, RelayPair, free_port, issue_identities
from korora.demo.serial import continuity
from proxy.hypervisors.monitor import QmpError
from tests.chaos.proxy import ChaosProxy

MIB = 1024 * 1024
SPEC = GuestSpec(memory_mib=96, static_mib=4, blocks=8, words=64)
STEP_SECONDS = 30.0  # each wait; what takes a second here has this long on a busy machine
TOLD_SECONDS = 1.0  # within this time the survivor has to learn that the other side died
SLOW = 8 * MIB  # bytes a second at which the first round takes several seconds: time to act "in the middle"
FAST = 200 * MIB
MIDDLE_BYTES = 4 * MIB  # once this much has been sent, the migration is in its middle


@dataclass(frozen=True)
class Rig:
    """Made once per run: the machine, its identities, and a booted guest in a file."""

    machine: Machine
    identities: Identities
    snapshot: Path


@asynccontextmanager
async def private_folder() -> AsyncIterator[Path]:
    """A short path (unix sockets allow 107 bytes), removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="korora-e2e-"))
    try:
        yield folder
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def build_rig(folder: Path) -> Rig:
    """Boot the guest and save it, running, to a file. Raises DemoError (exit code 2) when QEMU or kernel is absent."""
    files = find_guest_files()
    qemu = await find_qemu(files.kernel)
    initrd = folder / "initramfs.gz"
    initrd.write_bytes(initramfs(files.busybox))
    machine = Machine(qemu, files, SPEC, initrd)
    identities = await asyncio.to_thread(issue_identities, folder)
    snapshot = folder / "guest"
    async with QemuVm("boot", machine, folder) as vm:
        await vm.wait_beat(lambda beat: beat.number >= 3, BOOT_SECONDS)
        await vm.set_capabilities()
        await vm.qmp.execute("migrate-set-parameters", max_bandwidth=1024 * MIB)
        await vm.qmp.execute("migrate", uri=f"exec:cat >{snapshot}")
        assert await vm.wait_migration(STEP_SECONDS) == "completed"
    return Rig(machine, identities, snapshot)


@dataclass
class Scene:
    """A running guest on the source, an empty QEMU on the destination, and the pair of relays between them."""

    source: QemuVm
    destination: QemuVm
    relays: RelayPair
    departure: str

    async def set_parameters(self, **parameters: int) -> None:
        """Migration parameters of the source."""
        await self.source.qmp.execute("migrate-set-parameters", **parameters)

    async def start(self) -> None:
        """Begin the migration."""
        await self.source.qmp.execute("migrate", uri=self.departure)

    async def reach_pass(self, number: int) -> None:
        """Wait until the source begins its round `number` over memory (1 is the first)."""
        await self.source.qmp.wait_event("MIGRATION_PASS", STEP_SECONDS, lambda data: data["pass"] >= number)

    async def reach_middle(self) -> None:
        """Wait until some of the guest has been sent, with most of it to come."""
        await self.reach(lambda ram: ram["transferred"] >= MIDDLE_BYTES)

    async def reach(self, enough: Callable[[dict[str, int]], bool]) -> None:
        """Wait until the `ram` part of query-migrate is `enough`: QEMU has no event for these."""
        async with asyncio.timeout(STEP_SECONDS):
            while not ((ram := (await self.source.migration()).get("ram")) and enough(ram)):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def resumed(self, times: int) -> None:
        """Wait until the source's relay has said so often that its session goes on: its report comes at the end."""
        async with asyncio.timeout(STEP_SECONDS):
            while self.relays.send.log.read_text().count("the session goes on") < times:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def completed(self) -> dict[str, Any]:
        """Wait for the migration's end on both sides; returns the source's query-migrate."""
        status = await self.source.wait_migration(STEP_SECONDS)
        state = await self.source.migration()
        assert status == "completed", state
        assert await self.destination.wait_migration(STEP_SECONDS) == "completed"
        return state

    async def check_arrived(self, channels: int = 1) -> None:
        """The guest counts on and finds all of its memory sound; both relays end well and agree on every byte."""
        there = await self.destination.wait_beat(lambda beat: True, STEP_SECONDS)
        enough = there.checked + SPEC.checks_of_everything
        await self.destination.wait_beat(lambda beat: beat.checked >= enough, STEP_SECONDS)
        counted = continuity(self.source.serial, self.destination.serial)
        assert counted is not None
        assert counted.unbroken, counted
        assert await self.relays.wait(STEP_SECONDS) == (0, 0)
        send, receive = self.relays.send.report(), self.relays.receive.report()
        assert (send["outcome"], receive["outcome"]) == ("done", "done")
        assert len(send["digest_blake3"]) == channels
        assert send["digest_blake3"] == receive["digest_blake3"]
        # Nobody has asked for it: a guest's pages are encoded by default, and both ends count the same.
        assert (send["encode"], receive["encode"]) == ("auto", "pages")
        assert send["pages"] == receive["pages"]
        assert send["pages"]["literal"] > 0
        assert send["bytes_saved"] > 0
        for direction in ("forward", "backward"):
            assert (
                send["bytes_in" if direction == "forward" else "bytes_out"][direction]
                == (receive["bytes_out" if direction == "forward" else "bytes_in"][direction])
            )

    async def check_runs_on_source(self) -> None:
        """The guest goes on where it was: no number missing or repeated, all of its memory sound."""
        here = self.source.serial.last
        assert here is not None
        enough = here.checked + SPEC.checks_of_everything
        await self.source.wait_beat(lambda beat: beat.checked >= enough, STEP_SECONDS)
        beats = self.source.serial.beats
        numbers = [beat.number for beat in beats]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert beats[-1].bad == 0

    async def check_nothing_arrived(self) -> None:
        """No copy of the guest has spoken on the destination, and none will: its QEMU has given up, or runs nothing."""
        assert self.destination.serial.beats == []
        if self.destination.running and not self.destination.qmp.gone:
            status = await self.destination.qmp.execute("query-status")
            assert not status["running"], status

    async def destination_gave_up(self) -> None:
        """Wait until the destination's QEMU says that its incoming migration failed, or ends over it."""
        try:
            assert await self.destination.wait_migration(STEP_SECONDS) == "failed"
        except QmpError as error:
            if error.error_class != "Gone":
                raise

    async def check_relays_ended(self, code: int) -> None:
        """Both relays end by themselves with `code`, and their reports say the same outcome and a reason."""
        assert await self.relays.wait(STEP_SECONDS) == (code, code)
        for relay in (self.relays.send, self.relays.receive):
            report = relay.report()
            assert report["outcome"] != "done", report
            assert report["error"], report

    def logs(self) -> str:
        """What every process said, for the reader of a failure."""
        names = {vm.name: vm.errors for vm in (self.source, self.destination)}
        names |= {relay.name: relay.log for relay in (self.relays.send, self.relays.receive)}
        texts = {name: path.read_text(errors="replace") for name, path in names.items() if path.exists()}
        return "\n".join(f"--- {name}\n{text}" for name, text in texts.items())


@asynccontextmanager
async def scene(
    rig: Rig,
    *,
    transport: str = "unix",
    capabilities: Sequence[str] = (),
    parameters: Mapping[str, int] = {},
    network: ChaosProxy | None = None,
    lanes: int = 1,
) -> AsyncIterator[Scene]:
    """Load the guest on the source and make everything ready to migrate it.

    Args:
        transport: "unix" or "tcp": how the two QEMUs meet their relays.
        capabilities, parameters: of the migration, on both sides.
        network: what stands between the relays.
        lanes: how many carry the session.
    """
    async with private_folder() as folder:
        if transport == "tcp":
            departure, arrival = (f"tcp:127.0.0.1:{free_port()}" for _ in range(2))
        else:
            departure, arrival = f"unix:{folder / 'departure'}", f"unix:{folder / 'arrival'}"
        async with (
            QemuVm("source", rig.machine, folder, incoming=f"exec:cat <{rig.snapshot}") as source,
            QemuVm("destination", rig.machine, folder, incoming="defer") as destination,
            RelayPair(
                rig.identities,
                folder,
                ingress=departure,
                egress=arrival,
                send_options=("--lanes", str(lanes)),
                through=None if network is None else f"127.0.0.1:{network.port}",
            ) as relays,
        ):
            if network is not None:
                network.target = ("127.0.0.1", int(relays.address.rpartition(":")[2]))
            made = Scene(source, destination, relays, departure)
            try:
                await source.wait_beat(lambda beat: True, BOOT_SECONDS)
                for side in (source, destination):
                    await side.set_capabilities(*capabilities)
                    if parameters:
                        await side.qmp.execute("migrate-set-parameters", **parameters)
                await destination.qmp.execute("migrate-incoming", uri=arrival)
                yield made
            except BaseException:
                print(made.logs())
                raise


def absent_is_failure() -> bool:
    """Under CI a missing rig is a failure, not a reason to skip."""
    return bool(os.environ.get("CI"))

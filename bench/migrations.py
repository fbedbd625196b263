"""QEMU's own migration beside ours: the same guest moves by plain TCP, by QEMU's TLS, and through a pair of relays.

One guest is booted, fills its memory with random bytes, and is saved, running. Each migration loads that file into a
source QEMU, and moves it to a fresh destination on this host. What QEMU says of it (total time, downtime, bytes,
throughput) is the figure, and the CPU time of both QEMUs and of the relays from the command to the end on both sides.
The guest runs meanwhile, emulated where there is no KVM, and its own work is in QEMU's CPU time: the same in each row.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench.budget import Budget, Outcome, Teller, interleave
from bench.certificates import HOST, make_qemu_credentials
from bench.measure import GiB
from bench.processes import BenchError, cpu_clock_s
from bench.spread import Spread, median_of, number_text, spread_text, table
from korora.demo.errors import DemoError
from korora.demo.guest import GuestSpec, initramfs
from korora.demo.qemu import BOOT_SECONDS, Machine, QemuVm, find_guest_files, find_qemu
from korora.demo.relays import Identities, RelayPair, free_port, issue_identities
from korora.demo.serial import continuity
from proxy.hypervisors.monitor import QmpError

MiB: Final = 1024 * 1024
BANDWIDTH_MAX: Final = 1 << 40  # bytes a second: none that matters
FILL_SECONDS_PER_MIB: Final = 0.5  # patience; under emulation a quiet machine takes 0.035
MIGRATION_SECONDS: Final = 60.0  # for one; a second or two unless something is stuck
ARRIVE_SECONDS: Final = 20.0  # until the guest is heard on the destination
SETTLE_BEATS: Final = 15  # of the guest after it was loaded, with all else started: its emulator translates code anew
SETTLE_SECONDS: Final = 30.0  # patience for them; a second and a half on a quiet machine
MULTIFD_CHANNELS: Final = 4
TLS_ID: Final = "tls0"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way for the guest to move.

    Args:
        name: in every table.
        says: for people.
        tls: QEMU's own TLS on each of its connections.
        relays: through korora send and receive.
        channels: multifd channels; 0 for a single connection.
    """

    name: str
    says: str
    tls: bool = False
    relays: bool = False
    channels: int = 0


VARIANTS: Final[dict[str, Variant]] = {
    variant.name: variant
    for variant in (
        Variant("tcp", "plain TCP, nothing between"),
        Variant("tls", "QEMU's tls-creds-x509, both sides verified", tls=True),
        Variant("korora", "plain TCP to a pair of relays", relays=True),
        Variant("tls multifd", "as tls, multifd", tls=True, channels=MULTIFD_CHANNELS),
        Variant("korora multifd", "as korora, multifd", relays=True, channels=MULTIFD_CHANNELS),
    )
}


@dataclass(frozen=True, slots=True)
class MigrationPlan:
    """How many rounds, and how much random memory the guest has."""

    rounds: int
    filled_mib: int

    @property
    def spec(self) -> GuestSpec:
        """The demo's guest, with more memory and less to do: it must not decide how long a migration takes."""
        return GuestSpec(
            memory_mib=self.filled_mib + 128, static_mib=self.filled_mib, blocks=4, words=4, pause_seconds=2.0
        )


@dataclass(frozen=True, slots=True)
class GuestRig:
    """Made once a run: the machine, the running guest in a file, the relays' identities, QEMU's certificates."""

    machine: Machine
    snapshot: Path
    identities: Identities
    credentials: Path


@dataclass(frozen=True, slots=True)
class MigrationSample:
    """One migration, as QEMU's query-migrate on the source has it, with CPU seconds beside it."""

    variant: str
    round: int
    total_ms: int
    downtime_ms: int
    setup_ms: int
    transferred_bytes: int
    mbps: float
    passes: int
    qemu_cpu_s: float
    relay_cpu_s: float

    @property
    def gib_per_s(self) -> float:
        """Bytes transferred in the total time: setting up and downtime are in it."""
        return self.transferred_bytes / GiB / (self.total_ms / 1000)

    @property
    def cpu_s_per_gib(self) -> float:
        """Both QEMUs and the relays."""
        return (self.qemu_cpu_s + self.relay_cpu_s) * GiB / self.transferred_bytes


@dataclass(frozen=True, slots=True)
class MigrationRow:
    """One variant over all rounds."""

    gib_per_s: Spread
    total_ms: Spread
    downtime_ms: Spread
    mbps: Spread
    transferred_mib: Spread
    qemu_cpu_s: Spread
    relay_cpu_s: Spread
    cpu_s_per_gib: Spread


@asynccontextmanager
async def _folder() -> AsyncIterator[Path]:
    """A short path (unix sockets allow 107 bytes), removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="korora-bench-"))
    try:
        yield folder
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def build_rig(plan: MigrationPlan, folder: Path, patience_s: float) -> GuestRig:
    """Boot the guest, let it fill its memory (within `patience_s` seconds), and save it.

    Raises:
        DemoError, QmpError, TimeoutError: there is no QEMU or kernel, or it does not do.
    """
    files = find_guest_files()
    qemu = await find_qemu(files.kernel)
    initrd = folder / "initramfs.gz"
    initrd.write_bytes(initramfs(files.busybox))
    machine = Machine(qemu, files, plan.spec, initrd)
    identities = await asyncio.to_thread(issue_identities, folder)
    snapshot = folder / "guest"
    async with _folder() as short, QemuVm("boot", machine, short) as vm:
        await vm.wait_beat(lambda beat: beat.number >= 3, patience_s)
        await vm.set_capabilities()
        await vm.qmp.execute("migrate-set-parameters", max_bandwidth=BANDWIDTH_MAX)
        await vm.qmp.execute("migrate", uri=f"exec:cat >{snapshot}")
        status = await vm.wait_migration(MIGRATION_SECONDS)
        if status != "completed":
            raise DemoError(f"saving the guest {status}: {(await vm.migration()).get('error-desc', 'no reason given')}")
    return GuestRig(machine, snapshot, identities, make_qemu_credentials(folder))


async def _prepare(rig: GuestRig, variant: Variant, source: QemuVm, destination: QemuVm) -> None:
    """Capabilities and parameters of both sides."""
    for vm, endpoint in ((source, "client"), (destination, "server")):
        await vm.set_capabilities("return-path", *(("multifd",) if variant.channels else ()))
        parameters: dict[str, Any] = {"max_bandwidth": BANDWIDTH_MAX}
        if variant.channels:
            parameters["multifd_channels"] = variant.channels
        if variant.tls:
            await vm.qmp.execute(
                "object-add",
                qom_type="tls-creds-x509",
                id=TLS_ID,
                dir=str(rig.credentials),
                endpoint=endpoint,
                verify_peer=True,
            )
            parameters |= {"tls_creds": TLS_ID, "tls_hostname": HOST if vm is source else ""}
        await vm.qmp.execute("migrate-set-parameters", **parameters)


async def migrate(rig: GuestRig, variant: Variant, number: int) -> MigrationSample:
    """Move the guest once.

    Raises:
        BenchError: the migration failed, or the guest did not arrive whole.
        DemoError, QmpError, TimeoutError: a QEMU or a relay does not do what it should.
    """
    arrival = f"tcp:127.0.0.1:{free_port()}"
    departure = f"tcp:127.0.0.1:{free_port()}" if variant.relays else arrival
    async with (
        _folder() as folder,
        AsyncExitStack() as stack,
        QemuVm("destination", rig.machine, folder, incoming="defer") as destination,
        QemuVm("source", rig.machine, folder, incoming=f"exec:cat <{rig.snapshot}") as source,
    ):
        relays: list[int] = []
        pair: RelayPair | None = None
        if variant.relays:
            pair = await stack.enter_async_context(RelayPair(rig.identities, folder, ingress=departure, egress=arrival))
            relays = [pair.send.pid, pair.receive.pid]
        first = await source.wait_beat(lambda beat: True, BOOT_SECONDS)
        await _prepare(rig, variant, source, destination)
        await destination.qmp.execute("migrate-incoming", uri=arrival)
        # The same wait for every variant, with everything started: the guest is as busy or idle in each.
        await source.wait_beat(lambda beat: beat.number >= first.number + SETTLE_BEATS, SETTLE_SECONDS)
        qemus = [source.pid, destination.pid]
        qemu_s, relay_s = _cpu(qemus), _cpu(relays)
        await source.qmp.execute("migrate", uri=departure)
        status = await source.wait_migration(MIGRATION_SECONDS)
        state = await source.migration()
        if status != "completed":
            raise BenchError(f"{variant.name}: the migration {status}: {state.get('error-desc', 'no reason given')}")
        arrived = await destination.wait_migration(MIGRATION_SECONDS)
        qemu_s, relay_s = _cpu(qemus) - qemu_s, _cpu(relays) - relay_s
        if arrived != "completed":
            raise BenchError(f"{variant.name}: the migration {arrived} on the destination")
        await destination.wait_beat(lambda beat: True, ARRIVE_SECONDS)
        counted = continuity(source.serial, destination.serial)
        if counted is None or not counted.unbroken:
            raise BenchError(f"{variant.name}: the guest did not arrive whole: {counted}")
        if pair is not None and (codes := await pair.wait()) != (0, 0):
            raise BenchError(f"{variant.name}: the relays ended with {codes}")
    ram = state["ram"]
    return MigrationSample(
        variant=variant.name,
        round=number,
        total_ms=state["total-time"],
        downtime_ms=state["downtime"],
        setup_ms=state["setup-time"],
        transferred_bytes=ram["transferred"],
        mbps=ram["mbps"],
        passes=ram["dirty-sync-count"],
        qemu_cpu_s=qemu_s,
        relay_cpu_s=relay_s,
    )


def _cpu(pids: list[int]) -> float:
    """CPU seconds of these processes."""
    return sum(cpu_clock_s(pid) for pid in pids)


def measure_migrations(plan: MigrationPlan, directory: Path, *, budget: Budget, teller: Teller) -> MigrationResult:
    """All variants, interleaved. Where there is no QEMU, all are left out with the reason."""
    teller.step("a guest boots and fills its memory")
    patience_s = min(BOOT_SECONDS + plan.filled_mib * FILL_SECONDS_PER_MIB, max(0.0, budget.left_s))
    try:
        rig = asyncio.run(build_rig(plan, directory, patience_s))
    except (DemoError, QmpError, TimeoutError, OSError) as error:
        reason = str(error) or type(error).__name__
        teller.warn(f"{reason}; left out")
        outcome: Outcome[MigrationSample] = Outcome(planned=plan.rounds, left_out=dict.fromkeys(VARIANTS, reason))
        return MigrationResult("", plan, outcome)

    def act(item: str, number: int) -> MigrationSample:
        try:
            return asyncio.run(migrate(rig, VARIANTS[item], number))
        except (DemoError, QmpError, TimeoutError, OSError) as error:
            raise BenchError(f"{item}: {str(error) or type(error).__name__}") from error

    outcome = interleave(list(VARIANTS), act, rounds=plan.rounds, budget=budget, teller=teller)
    qemu = rig.machine.qemu
    return MigrationResult(f"QEMU {qemu.version}, {qemu.accel}", plan, outcome)


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """The migrations of one run."""

    qemu: str
    plan: MigrationPlan
    outcome: Outcome[MigrationSample]

    def rows(self) -> dict[str, MigrationRow]:
        """A row a variant, in the order first met."""
        by_name: dict[str, list[MigrationSample]] = {}
        for sample in self.outcome.samples:
            by_name.setdefault(sample.variant, []).append(sample)
        return {name: _row(samples) for name, samples in by_name.items()}

    def to_json(self) -> dict[str, Any]:
        """Rows and samples."""
        return {
            **self.outcome.to_json(),
            "qemu": self.qemu,
            "guest": asdict(self.plan.spec),
            "rows": {name: asdict(row) for name, row in self.rows().items()},
            "samples": [asdict(sample) for sample in self.outcome.samples],
        }

    def to_markdown(self) -> list[str]:
        """A table, total time first."""
        spec = self.plan.spec
        about = f"{self.qemu}; a guest of {spec.memory_mib} MiB, {spec.static_mib} MiB of it random and checked; "
        rows = self.rows()
        plain = rows.get("tcp")
        head = (
            "", "total ms", "÷ tcp", "downtime ms", "MiB transferred", "QEMU's Mbit/s", "CPU-s of both QEMUs", "relays",
            "CPU-s/GiB, all", "how",
        )  # fmt: skip
        cells = []
        for name, row in rows.items():
            ratio = None if plain is None else row.total_ms.median / plain.total_ms.median
            cells.append(
                [
                    name,
                    spread_text(row.total_ms, 0),
                    number_text(ratio, 2),
                    spread_text(row.downtime_ms, 0),
                    number_text(median_of(row.transferred_mib), 0),
                    number_text(median_of(row.mbps), 0),
                    spread_text(row.qemu_cpu_s, 2),
                    spread_text(row.relay_cpu_s, 2) if VARIANTS[name].relays else "–",
                    number_text(median_of(row.cpu_s_per_gib), 2),
                    VARIANTS[name].says,
                ]
            )
        for name, reason in self.outcome.left_out.items():
            cells.append([name, f"left out: {reason}", *[""] * (len(head) - 2)])
        return ["### QEMU migrations", "", about + self.outcome.text(), "", *table(head, cells)]


def _row(samples: list[MigrationSample]) -> MigrationRow:
    """Medians of one variant's samples."""
    return MigrationRow(
        gib_per_s=Spread.over(sample.gib_per_s for sample in samples),
        total_ms=Spread.over(sample.total_ms for sample in samples),
        downtime_ms=Spread.over(sample.downtime_ms for sample in samples),
        mbps=Spread.over(sample.mbps for sample in samples),
        transferred_mib=Spread.over(sample.transferred_bytes / MiB for sample in samples),
        qemu_cpu_s=Spread.over(sample.qemu_cpu_s for sample in samples),
        relay_cpu_s=Spread.over(sample.relay_cpu_s for sample in samples),
        cpu_s_per_gib=Spread.over(sample.cpu_s_per_gib for sample in samples),
    )

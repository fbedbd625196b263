"""The demo's course: boot, pair, migrate, look. A `Stage` is told of each step; show.py draws it for people."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from korora.demo.errors import EXIT_HYPERVISOR, EXIT_SETUP, DemoError
from korora.demo.guest import GuestSpec, initramfs
from korora.demo.process import why_ended
from korora.demo.qemu import BOOT_SECONDS, GuestFiles, Machine, QemuChoice, QemuVm, find_guest_files, find_qemu
from korora.demo.relays import RelayPair, issue_identities
from korora.demo.serial import Continuity, continuity
from proxy.hypervisors.monitor import QmpError

MIB = 1024 * 1024
BANDWIDTH_BYTES_PER_SECOND = 12 * MIB  # QEMU is held to this, so that the migration lasts long enough to be watched
BEATS_BEFORE = 10  # heartbeats to hear before leaving
POLL_SECONDS = 0.1  # how often the progress is asked for
MIGRATION_SECONDS = 60.0  # 6 s here; a guest that changes memory faster than it can be sent would never end
RELAY_WORDS_SECONDS = 5.0  # after a failure: what the relays get to end by themselves and say why
UNIX_PATH_BYTES_MAX = 107  # unix(7), sun_path


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a migration is: bytes of guest memory, rounds over it, and the last number the guest has said."""

    total_bytes: int
    remaining_bytes: int
    sent_bytes: int
    rounds: int
    bytes_per_second: float
    beat: int


@dataclass(frozen=True, slots=True)
class Result:
    """What the demo found out."""

    qemu: QemuChoice
    files: GuestFiles
    spec: GuestSpec
    migration: dict[str, Any]
    guest: Continuity
    send: dict[str, Any]
    receive: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Duration of the migration as QEMU has it."""
        return float(self.migration.get("total-time", 0)) / 1000

    @property
    def downtime_seconds(self) -> float:
        """How long no copy of the guest ran, as QEMU has it."""
        return float(self.migration.get("downtime", 0)) / 1000

    @property
    def stream_bytes(self) -> int:
        """What the source QEMU sent through the relays."""
        return int(self.send.get("bytes_in", {}).get("forward", 0))

    @property
    def digests_agree(self) -> bool:
        """Whether both relays saw the same bytes, by their BLAKE3 of every channel and direction."""
        mine, theirs = self.send.get("digest_blake3"), self.receive.get("digest_blake3")
        return bool(mine) and mine == theirs

    @property
    def good(self) -> bool:
        """The counting went on, memory is sound, and the relays agree on every byte."""
        return self.guest.unbroken and self.digests_agree

    def as_json(self) -> dict[str, Any]:
        """For `--json`: plain values only."""
        return {
            "good": self.good,
            "qemu": {**asdict(self.qemu), "path": str(self.qemu.path)},
            "guest": {"kernel": self.files.kernel_version, **asdict(self.spec)},
            "continuity": {**asdict(self.guest), "unbroken": self.guest.unbroken},
            "migration": {
                "seconds": self.seconds,
                "downtime_seconds": self.downtime_seconds,
                "silence_seconds": round(self.guest.silence_seconds, 3),
                "rounds": self.migration.get("ram", {}).get("dirty-sync-count"),
                "stream_bytes": self.stream_bytes,
                "bytes_per_second": round(self.stream_bytes / self.seconds) if self.seconds else None,
            },
            "digests_agree": self.digests_agree,
            "relays": {"send": self.send, "receive": self.receive},
        }


class Stage(Protocol):
    """Where the demo tells what it does; show.py draws it for people, tests take it down."""

    def step(self, title: str, detail: str = "") -> None:
        """A new step begins."""

    def detail(self, text: str) -> None:
        """More about the current step."""

    def progress(self, progress: Progress) -> None:
        """The migration is so far."""

    def migrated(self) -> None:
        """No more progress will be told."""


async def run(stage: Stage, folder: Path, env: Mapping[str, str] = os.environ, *, encode: str = "auto") -> Result:
    """Play the whole demo in `folder` (which should be empty and private) and return what was found.

    ``encode`` is what `korora send --encode` takes.

    Raises:
        DemoError: a part is missing, or a hypervisor or a relay failed. A guest that arrives damaged raises nothing:
            it is for the caller to look at `Result.good`.
    """
    if len(os.fsencode(folder / "destination.qmp")) > UNIX_PATH_BYTES_MAX:
        raise DemoError(f"{folder} is too long for a unix socket", EXIT_SETUP, "set TMPDIR to a shorter path")
    files = find_guest_files(env)
    qemu = await find_qemu(files.kernel, env)
    spec = GuestSpec()
    origin, *reasons = qemu.why.split("; ")
    stage.step("The stage", f"QEMU {qemu.version}, {origin}")
    for reason in reasons:
        stage.detail(reason)
    stage.detail(f"guest: Linux {files.kernel_version} with busybox, {spec.memory_mib} MiB, 1 processor")
    initrd = folder / "initramfs.gz"
    initrd.write_bytes(initramfs(files.busybox))
    machine = Machine(qemu, files, spec, initrd)
    try:
        async with QemuVm("source", machine, folder) as source:
            return await _migrate(stage, folder, machine, source, encode)
    except QmpError as error:
        raise DemoError(f"a QEMU failed: {error}", EXIT_HYPERVISOR) from None


async def _migrate(stage: Stage, folder: Path, machine: Machine, source: QemuVm, encode: str) -> Result:
    """From the guest's first word to the report."""
    stage.step("Two hosts", 'a CA made for this hour signs "source" and "destination"')
    identities = await asyncio.to_thread(issue_identities, folder)
    stage.step("A guest boots on the source", "it fills its memory, keeps changing it, checks it, and counts aloud")
    first = await source.wait_beat(lambda beat: True, BOOT_SECONDS)
    stage.detail(f"it is up after {first.uptime_seconds:.1f} s of its own time and says: {first.number}")
    # A QEMU URI and an ENDPOINT of korora's are spelled alike.
    departure, arrival = f"unix:{folder / 'departure'}", f"unix:{folder / 'arrival'}"
    async with (
        QemuVm("destination", machine, folder, incoming="defer") as destination,
        RelayPair(identities, folder, ingress=departure, egress=arrival, send_options=("--encode", encode)) as relays,
    ):
        for side in (source, destination):
            await side.set_capabilities("return-path")
        await destination.qmp.execute("migrate-incoming", uri=arrival)
        await source.qmp.execute("migrate-set-parameters", max_bandwidth=BANDWIDTH_BYTES_PER_SECOND)
        stage.step("Two relays", "QEMU → korora send ⇒ TLS 1.3, sealed records ⇒ korora receive → QEMU")
        await source.wait_beat(lambda beat: beat.number >= BEATS_BEFORE, BOOT_SECONDS)
        stage.step("The guest moves, and goes on counting")
        await source.qmp.execute("migrate", uri=departure)
        migration = await _carry(stage, source, destination, relays)
        here = source.serial.last
        stage.step("It has arrived", f"{here.number if here else '?'} was the last number heard on the source")
        there = await destination.wait_beat(lambda beat: True, BOOT_SECONDS)
        stage.detail(f"{there.number} is the first on the destination; the guest looks at all of its memory again")
        enough = there.checked + machine.spec.checks_of_everything
        await destination.wait_beat(lambda beat: beat.checked >= enough, BOOT_SECONDS)
        try:
            codes = await relays.wait()
        except TimeoutError:
            raise DemoError("the migration is done, but a relay does not end", EXIT_HYPERVISOR) from None
        if codes != (0, 0):
            raise _relay_failed(relays, codes)
        counted = continuity(source.serial, destination.serial)
        if counted is None:
            raise DemoError("the guest fell silent", EXIT_HYPERVISOR)
        return Result(
            machine.qemu, machine.files, machine.spec, migration, counted, relays.send.report(), relays.receive.report()
        )


async def _carry(stage: Stage, source: QemuVm, destination: QemuVm, relays: RelayPair) -> dict[str, Any]:
    """Tell the progress until both QEMUs say it is done; returns the source's query-migrate."""
    ended = asyncio.create_task(source.wait_migration(MIGRATION_SECONDS))
    try:
        while not ended.done():
            _tell(stage, source, await source.migration())
            await asyncio.wait([ended], timeout=POLL_SECONDS)
        status = ended.result()
        state = await source.migration()
        if status == "completed":
            _tell(stage, source, state)
            await destination.wait_migration(MIGRATION_SECONDS)
            return state
    except TimeoutError:
        raise DemoError(f"the migration did not end in {MIGRATION_SECONDS:g} s", EXIT_HYPERVISOR) from None
    finally:
        ended.cancel()
        stage.migrated()
    codes = (0, 0)
    with contextlib.suppress(TimeoutError):
        codes = await relays.wait(RELAY_WORDS_SECONDS)
    if codes != (0, 0):
        raise _relay_failed(relays, codes)
    raise DemoError(f"the migration {status}: {state.get('error-desc', 'QEMU gives no reason')}", EXIT_HYPERVISOR)


def _tell(stage: Stage, source: QemuVm, state: Mapping[str, Any]) -> None:
    """Give query-migrate's figures to the stage, once there are any."""
    ram = state.get("ram")
    if not ram:
        return
    last = source.serial.last
    done = state.get("status") == "completed"
    stage.progress(
        Progress(
            total_bytes=int(ram["total"]),
            remaining_bytes=0 if done else int(ram["remaining"]),
            sent_bytes=int(ram["transferred"]),
            rounds=int(ram["dirty-sync-count"]),
            bytes_per_second=float(ram["mbps"]) * 1e6 / 8,
            beat=last.number if last else 0,
        )
    )


def _relay_failed(relays: RelayPair, codes: tuple[int, int]) -> DemoError:
    """The error for relays that ended with `codes` (send, receive): of the one a signal ended, else the first not 0."""
    pair = [(relays.send, codes[0]), (relays.receive, codes[1])]
    relay, code = min((each for each in pair if each[1] != 0), key=lambda each: each[1] > 0)
    return DemoError(f"korora {relay.name}: {why_ended(code, relay.log)}", code if code > 0 else EXIT_HYPERVISOR)

"""Two real QEMUs whose hand-over two relays guard: each relay may be killed and started again, and the network lost.

Who runs is asked of both QEMUs all along, over monitors of the test's own. A step is reached when a relay's journal has
it; what is done then comes a moment later, so a test that kills at a step may hit the next one: what it holds is what
must be so afterwards, whichever it was.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from korora.demo import process
from korora.demo.qemu import BOOT_SECONDS, QemuVm
from korora.demo.relays import KORORA, Relay, free_port
from korora.demo.serial import continuity
from proxy.handover.record import Record
from proxy.handover.table import Side, State
from proxy.shell.journal import Journal
from tests.chaos.proxy import ChaosProxy
from tests.e2e.rig import FAST, MIB, SPEC, STEP_SECONDS, Rig, private_folder
from tests.e2e.watching import never_two

RESUME_SECONDS = 2
GUEST_SECONDS = 60.0  # an emulated guest on a busy machine checks all of its memory
SETTLED_SECONDS = 60.0  # recovery looks every 15 s, and whoever was told to wait for QEMU has its time-outs
JOURNAL_SECONDS = 0.002  # between two looks at a journal: a step lasts a few milliseconds
Which = Literal["source", "destination"]


@dataclass
class Guarded:
    """A guest that runs on the source, a QEMU that waits for it, both relays, and the network between them."""

    source: QemuVm
    destination: QemuVm
    network: ChaosProxy
    folder: Path
    commands: dict[Which, list[str | Path]]
    wire: str
    relays: dict[Which, Relay] = field(default_factory=dict)
    lives: int = 0

    # ---- what happens

    async def begin(self, which: Which) -> Relay:
        """Start a relay, or start it again."""
        self.lives += 1
        relay = self.relays[which] = Relay(f"{which}-relay-{self.lives}", self.commands[which], self.folder)
        await relay.start()
        return relay

    def kill(self, which: Which) -> None:
        """SIGKILL to a relay."""
        os.kill(self.relays[which].pid, signal.SIGKILL)

    async def migrate(self, bandwidth: int = FAST, **parameters: int) -> None:
        """Begin the migration."""
        qmp = self.source.qmp
        await qmp.execute("migrate-set-parameters", max_bandwidth=bandwidth, **parameters)
        await qmp.execute("migrate", uri=self.wire)

    async def reached(self, side: Side, state: State) -> None:
        """Wait until a side's journal has a state."""
        await self.until(lambda: any(self.has(record, state) for record in self.journal(side)))

    @staticmethod
    def has(record: Record, state: State) -> bool:
        return any(entry.state == state.value for entry in record.entries)

    async def until(self, condition: Callable[[], bool], seconds: float = STEP_SECONDS) -> None:
        """Wait until ``condition`` holds; nothing tells."""
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(JOURNAL_SECONDS)

    # ---- what is the case

    def journal(self, side: Side) -> list[Record]:
        return Journal(self.folder / side.value).records()

    def states(self) -> dict[Side, State]:
        """Where each side's only hand-over stands."""
        return {side: record.state for side in Side for record in self.journal(side)}

    async def settled(self) -> None:
        """Wait until both sides have a journal with nothing left to be done."""
        await self.until(self.is_settled, SETTLED_SECONDS)

    def is_settled(self) -> bool:
        """Whether that is so now."""
        kept = [self.journal(side) for side in Side]
        return all(len(records) == 1 and records[0].settled for records in kept)

    def in_doubt(self) -> bool:
        """Whether both sides say that an operator must decide."""
        states = self.states()
        return len(states) == 2 and set(states.values()) == {State.DOUBT}

    async def decide(self, which: Which, what: str) -> None:
        """An operator ends a relay, and says which copy is to run."""
        await self.relays[which].stop()
        (record,) = self.journal(Side(which))
        command = ("handover", "resolve", record.head.session, what, "--certain", "--state", str(self.folder / which))
        child = await process.start([*KORORA, *command], self.folder / f"{which}-resolve.log")
        async with asyncio.timeout(STEP_SECONDS):
            assert await child.wait() == 0

    async def moved(self) -> None:
        """The guest counts on at the destination, and nothing of it is left at the source."""
        assert self.states() == {Side.SOURCE: State.DONE, Side.DESTINATION: State.DONE}
        await self.counts_there()
        await self.until(lambda: not self.source.running)

    async def counts_there(self) -> None:
        """The destination's guest goes on with the next number, its memory sound."""
        there = await self.destination.wait_beat(lambda beat: True, GUEST_SECONDS)
        enough = there.checked + SPEC.checks_of_everything
        await self.destination.wait_beat(lambda beat: beat.checked >= enough, GUEST_SECONDS)
        counted = continuity(self.source.serial, self.destination.serial)
        assert counted is not None
        assert counted.unbroken, counted

    async def stayed(self) -> None:
        """The guest counts on at the source, as if nothing had been, and nothing of it is at the destination."""
        await self.counts_at_the_source()
        await self.until(lambda: not self.destination.running)

    async def counts_at_the_source(self) -> None:
        """The guest has turned back, and has never run at the destination, whose QEMU may wait still."""
        assert set(self.states().values()) == {State.ABORTED}
        last = self.source.serial.last
        assert last is not None
        enough = last.checked + SPEC.checks_of_everything
        await self.source.wait_beat(lambda beat: beat.checked >= enough, GUEST_SECONDS)
        beats = self.source.serial.beats
        assert [beat.number for beat in beats] == list(range(beats[0].number, beats[-1].number + 1))
        assert beats[-1].bad == 0
        assert self.destination.serial.beats == []

    async def one_runs(self) -> Which:
        """After all is settled exactly one runs, as both journals say: which?"""
        await self.settled()
        if self.states()[Side.SOURCE] is State.DONE:
            await self.moved()
            return "destination"
        await self.stayed()
        return "source"

    def logs(self) -> str:
        """What every process said, for the reader of a failure."""
        paths = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.err")])
        told = [f"--- {path.name}\n{path.read_text(errors='replace')}" for path in paths]
        for vm in (self.source, self.destination):
            said = f"{len(vm.serial.beats)} beats, the last {vm.serial.last}"
            told += [f"--- guest of the {vm.name}", said]
        for side in Side:
            for record in self.journal(side):
                told += [f"--- journal of the {side.value}", *(repr(entry) for entry in record.entries)]
        return "\n".join(told)


@asynccontextmanager
async def guarded(
    rig: Rig,
    *,
    source_options: Sequence[str] = (),
    destination_options: Sequence[str] = (),
    monitored: Sequence[Which] = ("source", "destination"),
    capabilities: Sequence[str] = (),
    incoming: str = "",
) -> AsyncIterator[Guarded]:
    """Load the guest at the source and make everything ready to migrate it under guard.

    Args:
        source_options, destination_options: further words of the two relays' command lines.
        monitored: whose relay is told of its QEMU's monitor.
        capabilities: of the migration, on both sides.
        incoming: "defer" where the destination is to be told of its parameters first.
    """
    async with private_folder() as folder, ChaosProxy() as network:
        arrival, departure = f"unix:{folder / 'arrival'}", f"unix:{folder / 'departure'}"
        paths: dict[Which, Path] = {"source": folder / "source.guard", "destination": folder / "destination.guard"}
        second = {which: ("-qmp", f"unix:{path},server=on,wait=off") for which, path in paths.items()}
        told = {which: ("--qmp", f"unix:{path}") if which in monitored else () for which, path in paths.items()}
        port = free_port()
        network.target = ("127.0.0.1", port)
        shared = ("--resume-timeout", str(RESUME_SECONDS))
        commands: dict[Which, list[str | Path]] = {
            "destination": [
                *("receive", "--listen", f"127.0.0.1:{port}", "--to", arrival, "--name", "source", *shared),
                *("--identity", rig.identities.destination, "--state", folder / "destination", *told["destination"]),
                *destination_options,
            ],
            "source": [
                *("send", "--from", departure, "--peer", f"127.0.0.1:{network.port}", "--name", "destination", *shared),
                *("--identity", rig.identities.source, "--state", folder / "source", *told["source"]),
                *source_options,
            ],
        }
        async with (
            QemuVm("source", rig.machine, folder, f"exec:cat <{rig.snapshot}", second["source"]) as source,
            QemuVm("destination", rig.machine, folder, incoming or arrival, second["destination"]) as destination,
        ):
            made = Guarded(source, destination, network, folder, commands, departure)
            try:
                await source.wait_beat(lambda beat: True, BOOT_SECONDS)
                if capabilities:
                    for vm in (source, destination):
                        await vm.set_capabilities(*capabilities)
                        await vm.qmp.execute("migrate-set-parameters", multifd_channels=2)
                if incoming:
                    await destination.qmp.execute("migrate-incoming", uri=arrival)
                await asyncio.gather(made.begin("destination"), made.begin("source"))
                async with never_two(lambda: (made.source, made.destination)):
                    yield made
            except BaseException:
                print(made.logs())
                raise
            finally:
                await asyncio.gather(*(relay.stop() for relay in made.relays.values()))


__all__ = ["MIB", "Guarded", "Which", "guarded"]

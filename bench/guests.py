"""QEMU's own ways to send fewer bytes, for the guests of the captured streams: what arrives at a socket that counts.

A captured QEMU stream is loaded into a QEMU, which runs the guest from then on, and migrates it out again: plainly,
with xbzrle, and over multifd channels with zstd. Nobody loads what arrives; it is counted and thrown away. The guest
has changed since the stream was taken, so look at the bytes over the guest memory that QEMU says it moved, not over the
stream's.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.budget import Budget, Outcome, Teller, interleave
from bench.corpus import Stream
from bench.peers import LOOPBACK
from bench.processes import BenchError
from chunking.pages import PAGE_BYTES
from korora.demo.errors import DemoError
from korora.demo.guest import GuestSpec
from korora.demo.qemu import Machine as GuestMachine
from korora.demo.qemu import QemuChoice, QemuVm, find_guest_files, find_qemu
from proxy.hypervisors.monitor import QmpError

BANDWIDTH_MAX: Final = 1 << 40  # bytes a second: none that matters
CACHE_BYTES: Final = 256 * 1024 * 1024  # of xbzrle: more than the guests have touched
CHANNELS: Final = 2  # as many as the relay has chains
LOAD_TIMEOUT_S: Final = 30.0
MIGRATE_TIMEOUT_S: Final = 60.0
SETTLE_S: Final = 0.5  # that the guest runs before it leaves
RECEIVE_BYTES: Final = 1024 * 1024
CONNECTIONS_MAX: Final = 16
# How the captured guests were started; their RAM is what their streams say.
MACHINE: Final = ("-accel", "tcg", "-cpu", "max", "-M", "pc-i440fx-7.2", "-nodefaults", "-display", "none")


@dataclass(frozen=True, slots=True)
class Way:
    """One of QEMU's ways.

    Args:
        capabilities: turned on.
        parameters: set.
    """

    capabilities: tuple[str, ...] = ()
    parameters: tuple[tuple[str, str | int], ...] = ()


WAYS: Final = {
    "plain": Way(),
    "xbzrle": Way(("xbzrle",), (("xbzrle-cache-size", CACHE_BYTES),)),
    "multifd zstd": Way(("multifd",), (("multifd-compression", "zstd"), ("multifd-channels", CHANNELS))),
}


@dataclass(frozen=True, slots=True)
class GuestSample:
    """One migration out.

    Args:
        item: guest and way.
        wire_bytes: that arrived, on all connections.
        guest_bytes: 4096 times the pages that QEMU says it sent, zero pages included.
        total_ms: QEMU's total time.
    """

    item: str
    stream: str
    way: str
    round: int
    wire_bytes: int
    guest_bytes: int
    total_ms: int


class _Loaded(GuestMachine):
    """The machine a captured stream belongs to."""

    def command(self, name: str) -> list[str | Path]:
        return [self.qemu.path, "-name", name, *MACHINE, "-m", str(self.spec.memory_mib)]


class _Counter:
    """Takes connections and counts what they bring."""

    def __init__(self) -> None:
        self._listener = socket.create_server((LOOPBACK, 0), backlog=CONNECTIONS_MAX)
        self.port: int = self._listener.getsockname()[1]
        self._counts: list[int] = []
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            thread = threading.Thread(target=self._count, args=(connection, len(self._counts)))
            self._counts.append(0)
            self._threads.append(thread)
            thread.start()

    def _count(self, connection: socket.socket, index: int) -> None:
        buffer = bytearray(RECEIVE_BYTES)
        with connection:
            while True:
                try:
                    size = connection.recv_into(buffer)
                except OSError:
                    return  # QEMU was ended
                if not size:
                    return
                self._counts[index] += size

    def close(self) -> int:
        """The bytes of all connections; they must have been closed by the other side."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in [self._accepting, *self._threads]:
            thread.join()
        return sum(self._counts)


@contextmanager
def _counter() -> Iterator[_Counter]:
    counter = _Counter()
    try:
        yield counter
    finally:
        if counter._listener.fileno() >= 0:
            counter.close()


async def find() -> QemuChoice:
    """The QEMU to use. Raises DemoError where there is none that does."""
    return await find_qemu(find_guest_files().kernel)


async def migrate_out(qemu: QemuChoice, stream: Stream, memory_mib: int, way: Way) -> Mapping[str, Any]:
    """Load a stream, let the guest run, and count what QEMU sends of it.

    Raises:
        BenchError, DemoError, QmpError, TimeoutError: QEMU does not do what it should.
    """
    folder = Path(tempfile.mkdtemp(prefix="korora-bench-"))  # short: unix sockets allow 107 bytes
    machine = _Loaded(qemu, find_guest_files(), GuestSpec(memory_mib=memory_mib), folder)
    try:
        with _counter() as counter:
            async with QemuVm("guest", machine, folder, incoming="defer") as vm:
                await vm.set_capabilities()
                await vm.qmp.execute("migrate-incoming", uri=f"exec:cat {stream.path}")
                if (status := await vm.wait_migration(LOAD_TIMEOUT_S)) != "completed":
                    raise BenchError(f"loading {stream.name} {status}")
                await vm.qmp.wait_event("RESUME", LOAD_TIMEOUT_S)
                await asyncio.sleep(SETTLE_S)
                await vm.set_capabilities(*way.capabilities)
                parameters = {"max-bandwidth": BANDWIDTH_MAX, **dict(way.parameters)}
                await vm.qmp.execute(
                    "migrate-set-parameters", **{k.replace("-", "_"): v for k, v in parameters.items()}
                )
                vm.qmp.events.clear()
                await vm.qmp.execute("migrate", uri=f"tcp:{LOOPBACK}:{counter.port}")
                status = await vm.wait_migration(MIGRATE_TIMEOUT_S)
                said = await vm.migration()
                if status != "completed":
                    raise BenchError(f"{stream.name}: {status}: {said.get('error-desc', 'no reason given')}")
            return {**said, "arrived": await asyncio.to_thread(counter.close)}
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def measure_guests(
    streams: Mapping[str, tuple[Stream, int]], rounds: int, *, budget: Budget, teller: Teller
) -> Outcome[GuestSample]:
    """Every way for every guest, interleaved. Where there is no QEMU, all are left out with the reason.

    Args:
        streams: by name: the stream, and the guest's RAM in MiB.
    """
    items = {f"{name}, {way}": (*streams[name], way) for name in streams for way in WAYS}
    try:
        qemu = asyncio.run(find())
    except (DemoError, OSError) as error:
        reason = str(error) or type(error).__name__
        teller.warn(f"{reason}; QEMU's own ways are left out")
        return Outcome(planned=rounds, left_out=dict.fromkeys(items, reason))

    def act(item: str, number: int) -> GuestSample:
        stream, memory_mib, way = items[item]
        try:
            said = asyncio.run(migrate_out(qemu, stream, memory_mib, WAYS[way]))
        except (DemoError, QmpError, TimeoutError, OSError) as error:
            raise BenchError(f"{item}: {str(error) or type(error).__name__}") from error
        ram = said["ram"]
        pages = ram["normal"] + ram["duplicate"] + said.get("xbzrle-cache", {}).get("pages", 0)
        return GuestSample(item, stream.name, way, number, said["arrived"], PAGE_BYTES * pages, said["total-time"])

    return interleave(list(items), act, rounds=rounds, budget=budget, teller=teller)

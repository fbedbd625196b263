"""A guest keeps its virtual TPM over a migration: what it measured, keeps in NV, and has sealed to that.

QEMU carries the vTPM in its stream (-tpmdev emulator, a swtpm on each host): the relays move no byte of it, and what
has arrived is asked who it is. The guest is the demo's, with one shell function more: it hands commands from its second
serial line to /dev/tpm0 and the answers back, so that the test is the guest's TPM software.
"""

import asyncio
import gzip
import secrets
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from korora.agents.vtpm import parcel
from korora.agents.vtpm.commands import Response
from korora.agents.vtpm.parcel import Proof, Quoted
from korora.agents.vtpm.rehearsal import ask
from korora.agents.vtpm.swtpm import Swtpm
from korora.demo.guest import APPLETS, INIT, CpioEntry, newc
from korora.demo.qemu import BOOT_SECONDS, Machine, QemuVm
from korora.demo.relays import RelayPair
from tests.e2e.rig import FAST, STEP_SECONDS, Rig, private_folder
from tests.korora.agents.vtpm.emulators import POLICY_FAILED, Guest
from tests.proxy.support import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

BRIDGE = """\
bridge() {
    stty -F /dev/ttyS1 raw -echo
    while read -r line; do
        exec 4<>/dev/tpm0
        echo "$line" | xxd -r -p >&4
        dd bs=4096 count=1 <&4 2>/dev/null | xxd -p | tr -d '\\n'
        exec 4>&-
        echo
    done </dev/ttyS1 >/dev/ttyS1
}
bridge &
"""
PCR = 16


class Line:
    """The guest's TPM, over its second serial line."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(STEP_SECONDS)
        self.sock.connect(str(path))

    def ask(self, command: bytes) -> Response:
        self.sock.sendall(command.hex().encode() + b"\n")
        line = bytearray()
        while not line.endswith(b"\n"):
            piece = self.sock.recv(4096)
            assert piece, "the guest's line has ended"
            line += piece
        return Response.parse(bytes.fromhex(line.decode().strip()))


def guest_at(path: Path) -> Guest:
    """Who uses the TPM in the guest."""
    line = Line(path)
    return Guest(line.sock, line)


def proof_of(guest: Guest, qualifying: bytes) -> Proof:
    """Who it says that it is."""
    told = ask(guest.tpm, qualifying)
    quotes = tuple(Quoted(int(said.hierarchy), said.public, said.quote, said.signature) for said in told.quotes)
    return Proof(quotes, b"".join(told.pcrs))


def before_it_leaves(path: Path, secret: bytes) -> tuple[Proof, tuple[bytes, bytes]]:
    with guest_at(path) as guest:
        guest.extend(PCR, b"\x11" * 32)
        guest.write_nv(b"kept in NV")
        sealed = guest.seal(secret, PCR)
        assert guest.unseal(sealed, PCR) == secret
        return proof_of(guest, b"b" * 32), sealed


def after_it_arrived(path: Path, secret: bytes, before: Proof, sealed: tuple[bytes, bytes]) -> None:
    with guest_at(path) as guest:
        after = proof_of(guest, b"a" * 32)
        parcel.verify(before, b"b" * 32)
        parcel.verify(after, b"a" * 32)  # fresh: the same keys sign what was asked just now
        parcel.same(before, after)
        assert after.pcrs[PCR * 32 : PCR * 32 + 32] != bytes(32)
        assert guest.read_nv(10) == b"kept in NV"
        assert guest.unseal(sealed, PCR) == secret
        guest.extend(PCR, b"\x22" * 32)
        guest.unseal(sealed, PCR, expected=POLICY_FAILED)  # what was sealed to goes by what was measured


@contextmanager
def emulator(folder: Path, name: str) -> Iterator[Path]:
    """A swtpm for one QEMU; its control channel's socket."""
    state, control = folder / f"{name}.tpm", folder / f"{name}.ctl"
    state.mkdir()
    process = subprocess.Popen(
        ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={control}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield control
    finally:
        process.kill()
        process.wait(STEP_SECONDS)


def options(control: Path, line: Path) -> list[str]:
    """QEMU's, for the TPM and the second serial line."""
    return [
        *("-chardev", f"socket,id=tpm,path={control}", "-tpmdev", "emulator,id=tpm0,chardev=tpm"),
        *("-device", "tpm-tis,tpmdev=tpm0", "-serial", f"unix:{line},server=on,wait=off"),
    ]


def with_bridge(busybox: Path) -> bytes:
    """The demo's initramfs, and the bridge."""
    entries = [CpioEntry(name, stat.S_IFDIR | 0o755) for name in ("bin", "dev", "proc", "mem")]
    entries.append(CpioEntry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()))
    entries += [CpioEntry(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in (*APPLETS, "stty", "xxd", "tr")]
    init = INIT.replace("change_memory &\n", BRIDGE + "change_memory &\n", 1)
    entries.append(CpioEntry("init", stat.S_IFREG | 0o755, init.encode()))
    return gzip.compress(newc(entries), compresslevel=1, mtime=0)


async def test_what_it_measured_kept_and_sealed_is_there_afterwards(rig: Rig) -> None:
    secret = secrets.token_bytes(32)
    async with private_folder() as folder:
        initrd = folder / "initramfs.gz"
        initrd.write_bytes(with_bridge(rig.machine.files.busybox))
        machine: Machine = replace(rig.machine, initrd=initrd)
        departure, arrival = f"unix:{folder / 'departure'}", f"unix:{folder / 'arrival'}"
        lines = {name: folder / f"{name}.line" for name in ("source", "destination")}
        with emulator(folder, "source") as here, emulator(folder, "destination") as there:
            for control in (here, there):
                await until(partial(getattr, Swtpm(control), "listens"))
            async with (
                QemuVm("source", machine, folder, options=options(here, lines["source"])) as source,
                QemuVm(
                    "destination",
                    machine,
                    folder,
                    incoming="defer",
                    options=options(there, lines["destination"]),
                ) as destination,
                RelayPair(rig.identities, folder, ingress=departure, egress=arrival) as relays,
            ):
                await source.wait_beat(lambda beat: beat.number >= 3, BOOT_SECONDS)
                before, sealed = await asyncio.to_thread(before_it_leaves, lines["source"], secret)
                for vm in (source, destination):
                    await vm.set_capabilities()
                    await vm.qmp.execute("migrate-set-parameters", max_bandwidth=FAST)
                await destination.qmp.execute("migrate-incoming", uri=arrival)
                await source.qmp.execute("migrate", uri=departure)
                assert await source.wait_migration(STEP_SECONDS) == "completed"
                assert await destination.wait_migration(STEP_SECONDS) == "completed"
                assert await relays.wait(STEP_SECONDS) == (0, 0)
                await asyncio.to_thread(after_it_arrived, lines["destination"], secret, before, sealed)

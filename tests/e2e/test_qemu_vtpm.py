"""A guest keeps its virtual TPM over a migration: what it measured, keeps in NV, and has sealed to that.

QEMU carries the vTPM in its stream (-tpmdev emulator, a swtpm on each host): the relays move no byte of it. Under guard
they see for themselves that it is the same at both ends; here what has arrived is asked who it is, too. The guest is
the demo's, with one shell function more: it hands commands from its second serial line to /dev/tpm0 and the answers
back, so that the test is the guest's TPM software.
"""

import asyncio
import gzip
import secrets
import socket
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from korora.agents.vtpm import parcel
from korora.agents.vtpm.commands import Response
from korora.agents.vtpm.epochs import Entry, Ledger
from korora.agents.vtpm.handover import Holding
from korora.agents.vtpm.ledger import Ledgers, now
from korora.agents.vtpm.parcel import Proof, Quoted
from korora.agents.vtpm.rehearsal import ask
from korora.agents.vtpm.swtpm import Swtpm
from korora.demo.guest import APPLETS, INIT, CpioEntry, newc
from korora.demo.qemu import BOOT_SECONDS, Machine, QemuVm
from korora.demo.relays import RelayPair
from proxy.errors import EXIT_INTEGRITY
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
UUID = "0f9c2f1e-0000-4000-8000-00000000abcd"
SIDES = ("source", "destination")


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
def emulator(folder: Path, name: str, *words: str) -> Iterator[Path]:
    """A swtpm for one QEMU; its control channel's socket."""
    state, control = folder / f"{name}.tpm", folder / f"{name}.ctl"
    state.mkdir()
    process = subprocess.Popen(
        ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={control}", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield control
    finally:
        process.kill()
        process.wait(STEP_SECONDS)


def options(control: Path, line: Path, monitor: Path) -> list[str]:
    """QEMU's, for the TPM, the second serial line, and its relay."""
    return [
        *("-chardev", f"socket,id=tpm,path={control}", "-tpmdev", "emulator,id=tpm0,chardev=tpm"),
        *("-device", "tpm-tis,tpmdev=tpm0", "-serial", f"unix:{line},server=on,wait=off"),
        *("-uuid", UUID, "-qmp", f"unix:{monitor},server=on,wait=off"),
    ]


def with_bridge(busybox: Path) -> bytes:
    """The demo's initramfs, and the bridge."""
    entries = [CpioEntry(name, stat.S_IFDIR | 0o755) for name in ("bin", "dev", "proc", "mem")]
    entries.append(CpioEntry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()))
    entries += [CpioEntry(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in (*APPLETS, "stty", "xxd", "tr")]
    init = INIT.replace("change_memory &\n", BRIDGE + "change_memory &\n", 1)
    entries.append(CpioEntry("init", stat.S_IFREG | 0o755, init.encode()))
    return gzip.compress(newc(entries), compresslevel=1, mtime=0)


@dataclass
class Scene:
    """A guest that uses its TPM at the source, a QEMU that waits for it, and both relays."""

    folder: Path
    source: QemuVm
    destination: QemuVm
    relays: RelayPair
    lines: dict[str, Path]

    async def migrate(self) -> None:
        for vm in (self.source, self.destination):
            await vm.set_capabilities()
            await vm.qmp.execute("migrate-set-parameters", max_bandwidth=FAST)
        await self.destination.qmp.execute("migrate-incoming", uri=f"unix:{self.folder / 'arrival'}")
        await self.source.qmp.execute("migrate", uri=f"unix:{self.folder / 'departure'}")

    def ledger(self, name: str) -> Ledger:
        return Ledgers(self.folder / f"{name}.relay").read(UUID)


@asynccontextmanager
async def scene(
    rig: Rig, *, guarded: bool = False, words: tuple[str, ...] = (), file: str = ""
) -> AsyncIterator[Scene]:
    """Boot the guest.

    Args:
        guarded: whether the relays guard the hand-over.
        words: further ones of the emulators' command lines.
        file: content of both relays' ``vtpm.toml``, if they have one.
    """
    async with private_folder() as folder:
        initrd = folder / "initramfs.gz"
        initrd.write_bytes(with_bridge(rig.machine.files.busybox))
        machine: Machine = replace(rig.machine, initrd=initrd)
        told: dict[str, list[str]] = {}
        for name in SIDES:
            state = folder / f"{name}.relay"
            state.mkdir()
            if file:
                (state / "vtpm.toml").write_text(file.replace("FOLDER", str(folder)))
            told[name] = ["--state", str(state), *(("--qmp", f"unix:{folder / name}.guard") if guarded else ())]
        (folder / "key").write_bytes(secrets.token_bytes(32))
        spelt = tuple(word.replace("FOLDER", str(folder)) for word in words)
        lines = {name: folder / f"{name}.line" for name in SIDES}
        with emulator(folder, "source", *spelt) as here, emulator(folder, "destination", *spelt) as there:
            for control in (here, there):
                await until(partial(getattr, Swtpm(control), "listens"))
            words_of = {
                name: options(control, lines[name], folder / f"{name}.guard")
                for name, control in zip(SIDES, (here, there), strict=True)
            }
            async with (
                QemuVm("source", machine, folder, options=words_of["source"]) as source,
                QemuVm("destination", machine, folder, "defer", words_of["destination"]) as destination,
                RelayPair(
                    rig.identities,
                    folder,
                    ingress=f"unix:{folder / 'departure'}",
                    egress=f"unix:{folder / 'arrival'}",
                    send_options=told["source"],
                    receive_options=told["destination"],
                ) as relays,
            ):
                await source.wait_beat(lambda beat: beat.number >= 3, BOOT_SECONDS)
                yield Scene(folder, source, destination, relays, lines)


KEY = "file=FOLDER/key,format=binary,mode=aes-256-cbc"
VERIFY = 'carried = "verify"\n'
WITH_KEY = f'{VERIFY}migration_key = "{KEY}"\n'


@pytest.mark.parametrize(
    ("guarded", "words", "file"),
    [(False, (), ""), (True, ("--migration-key", KEY), WITH_KEY), (True, (), VERIFY)],
    ids=["unguarded", "verified", "verified-in-clear"],
)
async def test_what_it_measured_kept_and_sealed_is_there_afterwards(
    rig: Rig, guarded: bool, words: tuple[str, ...], file: str
) -> None:
    secret = secrets.token_bytes(32)
    async with scene(rig, guarded=guarded, words=words, file=file) as made:
        before, sealed = await asyncio.to_thread(before_it_leaves, made.lines["source"], secret)
        await made.migrate()
        assert await made.destination.wait_migration(STEP_SECONDS) == "completed"
        assert await made.relays.wait(STEP_SECONDS) == (0, 0)
        await asyncio.to_thread(after_it_arrived, made.lines["destination"], secret, before, sealed)
        if not file:
            assert [made.ledger(name).holding for name in SIDES] == [Holding.UNKNOWN, Holding.UNKNOWN]
            return
        ledgers = [made.ledger(name) for name in SIDES]
        assert [ledger.holding for ledger in ledgers] == [Holding.GONE, Holding.HERE]
        assert [ledger.epoch for ledger in ledgers] == [1, 1]
        # What the relays saw of it is what the guest's software sees.
        assert {ledger.identity for ledger in ledgers} == {parcel.identity_of(before)}
        for relay in (made.relays.send, made.relays.receive):
            assert relay.report()["vtpm_epoch"] == 1
            assert ("in clear within its machine's stream" in relay.log.read_text()) is (
                not words and relay.name == "send"
            )


async def test_one_that_is_not_the_one_known_there_turns_its_machine_back(rig: Rig) -> None:
    """The destination had a machine of that UUID with another vTPM: nothing runs there, and the guest keeps its own."""
    secret = secrets.token_bytes(32)
    async with scene(rig, guarded=True, words=("--migration-key", KEY), file=WITH_KEY) as made:
        before, sealed = await asyncio.to_thread(before_it_leaves, made.lines["source"], secret)
        for name, entry in (
            ("source", Entry("here", 2, now())),
            ("destination", Entry("gone", 1, now(), "ab" * 16, "source", "000b" + "cd" * 32, "ef" * 32)),
        ):
            with Ledgers(made.folder / f"{name}.relay").locked(UUID) as known:
                known.write(entry)
        await made.migrate()
        send, receive = await made.relays.wait(STEP_SECONDS)
        assert (send, receive) == (EXIT_INTEGRITY, EXIT_INTEGRITY)
        assert "another vTPM than the one known here" in made.relays.receive.log.read_text()
        assert made.destination.serial.beats == []
        last = made.source.serial.last
        assert last is not None
        await made.source.wait_beat(lambda beat: beat.number > last.number, STEP_SECONDS)
        await asyncio.to_thread(after_it_arrived, made.lines["source"], secret, before, sealed)
        assert made.ledger("source").holding is Holding.HERE
        assert made.ledger("destination").holding is Holding.GONE

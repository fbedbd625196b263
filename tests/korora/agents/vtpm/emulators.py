"""Real swtpm processes with known keys, and what a guest would do with their TPMs."""

import os
import secrets
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self

import pytest

from korora.agents.vtpm import commands
from korora.agents.vtpm.commands import Hierarchy
from korora.agents.vtpm.rehearsal import Keys, ask
from korora.agents.vtpm.swtpm import Swtpm, Tpm

SECONDS_MAX = 10.0
MODE = "mode=aes-256-cbc,format=binary"
NOTHING = bytes(32)
_TSS = 0x8002
_PASSWORD = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)
NV_INDEX = 0x01800001
STORAGE = (  # TPMT_PUBLIC of a storage key: ECC P-256, AES-128-CFB (TPM 2.0 Library, Part 2 §12.2.4)
    struct.pack(">HHIH", 0x0023, 0x000B, 0x00030472, 0)
    + struct.pack(">HHHHHH", 0x0006, 128, 0x0043, 0x0010, 0x0003, 0x0010)
    + struct.pack(">HH", 0, 0)
)
POLICY_FAILED = 0x99D  # TPM_RC_POLICY_FAIL of the first session
SECRET = b"what its disk is encrypted with."


class Asked(Protocol):
    """A TPM, however it is reached."""

    def ask(self, command: bytes) -> commands.Response: ...


class Emulator:
    """One swtpm with its folder: ``c`` is its control channel, ``s`` its data channel, ``state`` its state."""

    def __init__(self, folder: Path, key: Path | None, *, options: tuple[str, ...] = (), wait: bool = True) -> None:
        self.folder, self.control, self.state = folder, folder / "c", folder / "state"
        self.state.mkdir(parents=True, exist_ok=True)
        self.data = folder / "s"
        self.process = subprocess.Popen(
            [
                *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.state}"),
                *("--ctrl", f"type=unixio,path={self.control}", "--server", f"type=unixio,path={self.data}"),
                *(() if key is None else ("--migration-key", f"file={key},{MODE}")),
                *options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.swtpm = Swtpm(self.control)
        self.sealed = b"", b""
        """What its guest keeps on its disk, once it has been lived in."""
        if wait:
            deadline = time.monotonic() + SECONDS_MAX
            while not self.swtpm.listens:
                assert self.process.poll() is None, "swtpm does not start"
                assert time.monotonic() < deadline, "swtpm does not listen"
                time.sleep(0.002)

    def guest(self) -> "Guest":
        """Who speaks to its data channel, as the machine's own driver would."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(SECONDS_MAX)
        sock.connect(str(self.data))
        return Guest(sock)

    def files(self) -> list[str]:
        """Its state on the disk."""
        return sorted(name for name in os.listdir(self.state) if name != ".lock")

    def close(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(SECONDS_MAX)


class Guest:
    """Commands of a guest's, raw, with what they must answer."""

    def __init__(self, sock: socket.socket, tpm: Asked | None = None) -> None:
        self.sock, self.tpm = sock, tpm or Tpm(sock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, code: int, rest: bytes, *, tag: int = 0x8001, expected: int = 0) -> bytes:
        answer = self.tpm.ask(struct.pack(">HII", tag, 10 + len(rest), code) + rest)
        assert answer.code == expected, hex(answer.code)
        return answer.body

    def code(self) -> int:
        """What the TPM answers to a harmless question: 0 where it is running and started."""
        return self.tpm.ask(commands.pcr_read(16)).code

    def startup(self) -> None:
        self.send(0x144, struct.pack(">H", 0))

    def extend(self, pcr: int, digest: bytes) -> None:
        self.send(0x182, struct.pack(">I", pcr) + _PASSWORD + struct.pack(">IH", 1, 0x000B) + digest, tag=_TSS)

    def pcr(self, pcr: int) -> bytes:
        return commands.digests(self.tpm.ask(commands.pcr_read(pcr // 8 * 8)))[pcr % 8]

    def primary(self, hierarchy: Hierarchy = Hierarchy.NULL) -> int:
        return commands.created(self.tpm.ask(commands.create_primary(hierarchy)).require("a key"))[0]

    def set_endorsement_password(self, password: bytes) -> None:
        rest = struct.pack(">I", Hierarchy.ENDORSEMENT) + _PASSWORD + struct.pack(">H", len(password)) + password
        self.send(0x129, rest, tag=_TSS)

    def write_nv(self, content: bytes) -> None:
        """TPM2_NV_DefineSpace by its owner, and NV_Write."""
        public = struct.pack(">IHIHH", NV_INDEX, 0x000B, 0x00040004 | 0x02000000, 0, len(content))
        rest = struct.pack(">I", 0x40000001) + _PASSWORD + struct.pack(">HH", 0, len(public)) + public
        self.send(0x12A, rest, tag=_TSS)
        rest = struct.pack(">II", NV_INDEX, NV_INDEX) + _PASSWORD + struct.pack(">H", len(content)) + content
        self.send(0x137, rest + struct.pack(">H", 0), tag=_TSS)

    def read_nv(self, size: int) -> bytes:
        rest = struct.pack(">II", NV_INDEX, NV_INDEX) + _PASSWORD + struct.pack(">HH", size, 0)
        return self.send(0x14E, rest, tag=_TSS)[6 : 6 + size]

    def storage(self) -> int:
        """A storage key of the owner's hierarchy, the same each time."""
        rest = struct.pack(">I", 0x40000001) + _PASSWORD + struct.pack(">HHHH", 4, 0, 0, len(STORAGE)) + STORAGE
        return int.from_bytes(self.send(0x131, rest + struct.pack(">HI", 0, 0), tag=_TSS)[:4], "big")

    def session(self, pcr: int, *, trial: bool) -> tuple[int, bytes]:
        """A policy session that wants the PCR as it is, and the policy's digest."""
        kind = 3 if trial else 1
        rest = struct.pack(">IIH", 0x40000007, 0x40000007, 16) + bytes(16) + struct.pack(">HBHH", 0, kind, 0x10, 0x0B)
        handle = self.send(0x176, rest)[:4]
        selected = bytes(1 << pcr % 8 if pcr // 8 == byte else 0 for byte in range(3))
        self.send(0x17F, handle + struct.pack(">HIHB", 0, 1, 0x000B, 3) + selected)
        return int.from_bytes(handle, "big"), self.send(0x189, handle)[2:]

    def flush(self, *handles: int) -> None:
        for handle in handles:
            self.tpm.ask(commands.flush(handle)).require("to flush")

    def seal(self, secret: bytes, pcr: int) -> tuple[bytes, bytes]:
        """Sealed to this TPM and to the PCR as it is: what the guest would keep on its disk."""
        trial, policy = self.session(pcr, trial=True)
        parent = self.storage()
        sensitive = struct.pack(">HH", 0, len(secret)) + secret
        public = struct.pack(">HHIH", 0x0008, 0x000B, 0x12, len(policy)) + policy + struct.pack(">HH", 0x0010, 0)
        rest = struct.pack(">I", parent) + _PASSWORD + struct.pack(">H", len(sensitive)) + sensitive
        rest += struct.pack(">H", len(public)) + public + struct.pack(">HI", 0, 0)
        body = self.send(0x153, rest, tag=_TSS)[4:]
        private, rest = body[2 : 2 + int.from_bytes(body[:2], "big")], body[2 + int.from_bytes(body[:2], "big") :]
        self.flush(trial, parent)
        return private, rest[2 : 2 + int.from_bytes(rest[:2], "big")]

    def unseal(self, sealed: tuple[bytes, bytes], pcr: int, *, expected: int = 0) -> bytes:
        parent = self.storage()
        rest = struct.pack(">I", parent) + _PASSWORD + b"".join(struct.pack(">H", len(part)) + part for part in sealed)
        loaded = int.from_bytes(self.send(0x157, rest, tag=_TSS)[:4], "big")
        self.flush(parent)
        session, _ = self.session(pcr, trial=False)
        auth = struct.pack(">IIHBH", 9, session, 0, 1, 0)  # continueSession
        body = self.send(0x15E, struct.pack(">I", loaded) + auth, tag=_TSS, expected=expected)
        self.flush(loaded, session)
        return b"" if expected else body[6 : 6 + int.from_bytes(body[4:6], "big")]

    def names(self) -> tuple[bytes, ...]:
        """The public areas of its identity keys."""
        return tuple(quote.public for quote in ask(self.tpm, NOTHING).quotes)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A migration key of 256 bits."""
    path = tmp_path / "migration.key"
    path.write_bytes(secrets.token_bytes(32))
    path.chmod(0o600)
    return path


def keys(key: Path) -> Keys:
    """As a host's configuration would name it."""
    return Keys(f"file={key},{MODE}")


@contextmanager
def emulators() -> Iterator[list[Emulator]]:
    """A list to put emulators in: they end with the context."""
    held: list[Emulator] = []
    try:
        yield held
    finally:
        for one in held:
            one.close()


def lived_in(emulator: Emulator) -> None:
    """Start it and use it: two PCRs, NV, a secret sealed to one of them: what must survive."""
    emulator.swtpm.start()
    with emulator.guest() as guest:
        guest.startup()
        guest.extend(16, b"\x11" * 32)
        guest.extend(10, b"\x22" * 32)
        guest.write_nv(b"kept in NV")
        emulator.sealed = guest.seal(SECRET, 16)


def known_by(emulator: Emulator, sealed: tuple[bytes, bytes]) -> object:
    """What a guest knows its TPM by: its identity, what it measured, kept and sealed."""
    with emulator.guest() as guest:
        return guest.names(), guest.pcr(16), guest.pcr(10), guest.read_nv(10), guest.unseal(sealed, 16)

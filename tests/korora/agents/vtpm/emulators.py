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
from typing import Self

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

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.tpm = sock, Tpm(sock)

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
    """Start it and use it: NV, two PCRs, a transient object, the things that must survive."""
    emulator.swtpm.start()
    with emulator.guest() as guest:
        guest.startup()
        guest.extend(16, b"\x11" * 32)
        guest.extend(10, b"\x22" * 32)
        guest.write_nv(b"kept in NV")

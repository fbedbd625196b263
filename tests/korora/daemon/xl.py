"""Stand-ins for xl at both ends of a migration, for tests of the daemon.

They say what tools/xl/xl_migrate.c of Xen 4.17 says; the stream is a real one (tests/vectors). The source's is the test
itself: it has the other ends of the pipes of a `korora xl` that it starts as xl does.
"""

import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

import zstandard

from tests.korora.daemon.support import SECONDS_MAX, Host, Site, until

VECTORS = Path(__file__).parents[2] / "vectors" / "streams"
BANNER = b"xl migration receiver ready, send binary domain data.\n"
READY = b"domain received, ready to unpause\0"
GO = b"domain is yours, you are cleared to unpause\0"
REPORT = b"my copy unpause results are as follows\0" + b"\0"


@cache
def stream() -> bytes:
    """What xl of Xen 4.17 sent for a PV guest, up to its permission (GO)."""
    packed = (VECTORS / "xen417-pv.xlmig-up.zst").read_bytes()
    whole = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    assert whole.endswith(GO)
    return whole.removesuffix(GO)


def receiver(size: int) -> str:
    """xl migrate-receive: its words, and a file that says how it ended. It takes a moment to destroy a copy."""
    return f"""#!{sys.executable}
import hashlib, os, sys, time
def note(words):
    with open(sys.argv[0] + ".note", "a") as file:
        file.write(words + "\\n")
def say(words):
    sys.stdout.buffer.write(words)
    sys.stdout.buffer.flush()
def hear(count):
    heard = sys.stdin.buffer.read(count)
    if len(heard) < count:
        time.sleep(0.2)
        note("destroyed")
        sys.exit(0)
    return heard
note(" ".join(sys.argv[1:]))
say({BANNER!r})
note(hashlib.sha256(hear({size})).hexdigest())
say({READY!r})
assert hear({len(GO)}) == {GO!r}
say({REPORT!r})
note("unpaused")
"""


class Transport:
    """A `korora xl`, and xl's ends of its pipes."""

    def __init__(self, *words: str, daemon: Path | str, identity: Path | None = None) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KORORA_")}
        if identity is not None:
            environment["KORORA_IDENTITY"] = str(identity)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "korora", "xl", "--daemon", str(daemon), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def say(self, words: bytes) -> None:
        assert self.process.stdin is not None
        view = memoryview(words)
        while view:
            view = view[self.process.stdin.write(view) :]

    def hear(self, words: bytes) -> None:
        assert self.process.stdout is not None
        heard = bytearray()
        while len(heard) < len(words) and (piece := self.process.stdout.read(len(words) - len(heard))):
            heard += piece
        assert bytes(heard) == words

    def rest(self) -> bytes:
        """What xl can still read, to the end."""
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def end(self) -> None:
        """xl goes: it closes its ends."""
        for end in (self.process.stdin, self.process.stdout):
            if end is not None:
                with suppress(BrokenPipeError):
                    end.close()

    def wait(self) -> tuple[int, str]:
        """Its exit code and its words."""
        assert self.process.stderr is not None
        words = self.process.stderr.read().decode()
        return self.process.wait(SECONDS_MAX), words

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.end()
        if self.process.stderr is not None:
            self.process.stderr.close()


class XenSite:
    """Host alpha, whose `korora xl` finds a daemon, and host beta, whose `xl` is the stand-in."""

    def __init__(self, site: Site, *, workers: int = 1) -> None:
        self.site = site
        self.alpha, self.beta = site.host("alpha", workers=workers), site.host("beta")
        self.alpha.peer("beta", self.beta.address)
        self.beta.peer("alpha")
        self.beta.egress("default", "xl:")
        self.folder = site.folder / "bin"
        self.folder.mkdir()
        self.socket = site.folder / "xl.sock"
        self.size = len(stream())
        self.transports: list[Transport] = []

    def xl_table(self, more: str = "") -> None:
        self.alpha.tables.append(f'[xl]\nsocket = "{self.socket}"\n{more}')

    def start(self, hosts: Iterable[Host] | None = None) -> None:
        xl = self.folder / "xl"
        xl.write_text(receiver(self.size))
        xl.chmod(0o755)
        for host in hosts or (self.beta, self.alpha):
            host.start(env={"PATH": f"{self.folder}:{os.environ['PATH']}"})

    def transport(self, *words: str) -> Transport:
        """`korora xl`, as xl starts it."""
        made = Transport(*words, daemon=self.socket)
        self.transports.append(made)
        return made

    @property
    def notes(self) -> list[str]:
        note = self.folder / "xl.note"
        return note.read_text().splitlines() if note.exists() else []

    def worker_pids(self) -> list[int]:
        return [worker["pid"] for worker in self.alpha.status()["workers"]]

    def noted(self, words: str) -> None:
        until(lambda: words in self.notes, f"the receiver never noted {words!r}")

    def close(self) -> None:
        for transport in self.transports:
            transport.close()

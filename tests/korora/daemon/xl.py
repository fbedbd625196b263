"""Stand-ins for xl at both ends of a migration, for tests of the daemon.

They say what tools/xl/xl_migrate.c of Xen 4.17 says; the stream is a real one (tests/vectors). The source's is the test
itself: it has the other ends of the pipes of a `korora xl` that it starts as xl does.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

import zstandard

from proxy.streams.parser import StreamParser
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


@cache
def machine() -> tuple[str, str]:
    """Name and UUID that the stream tells."""
    parser = StreamParser()
    parser.feed(memoryview(stream()), final=False)
    return str(parser.facts.vm_name), str(parser.facts.vm_uuid)


def program(size: int, first: str) -> str:
    """A host's xl, with one domain at most: `first` is how it stands to begin with, as the file xl.domain says later.

    migrate-receive says its words, and notes how it ended. It takes a moment to destroy a copy.
    """
    name, uuid = machine()
    return f"""#!{sys.executable}
import hashlib, os, sys, time
def note(words):
    with open(sys.argv[0] + ".note", "a") as file:
        file.write(words + "\\n")
def stands(how=None):
    path = sys.argv[0] + ".domain"
    if how is not None:
        with open(path + ".new", "w") as file:
            file.write(how)
        os.replace(path + ".new", path)
    return open(path).read() if os.path.exists(path) else {first!r}
def say(words):
    sys.stdout.buffer.write(words)
    sys.stdout.buffer.flush()
def hear(count):
    heard = sys.stdin.buffer.read(count)
    if len(heard) < count:
        time.sleep(0.2)
        stands("gone")
        note("destroyed")
        sys.exit(0)
    return heard
match sys.argv[1]:
    case "list":
        def line(name, number, letters, uuid):
            print("{{:<40}} {{:5d}} {{:5d}} {{:5d}}     {{}}  {{:8.1f}} {{}} {{:>8}} {{:>16}}".format(
                name, number, 96, 1, letters, 1.0, uuid, "-", "-"))
        print("Name  ID  Mem VCPUs\\tState\\tTime(s)   UUID  Reason-Code\\tSecurity Label")
        line("Domain-0", 0, "r-----", "00000000-0000-0000-0000-000000000000")
        match stands():
            case "incoming":
                line({name!r} + "--incoming", 7, "--p---", {uuid!r})
            case "paused":
                line({name!r}, 7, "--p---", {uuid!r})
            case "running":
                line({name!r}, 7, "-b----", {uuid!r})
    case "unpause":
        stands("running")
    case "destroy":
        stands("gone")
    case "migrate-receive":
        note(" ".join(sys.argv[1:]))
        say({BANNER!r})
        heard = hear(100_000)
        stands("incoming")
        heard += hear({size} - 100_000)
        note(hashlib.sha256(heard).hexdigest())
        say({READY!r})
        assert hear({len(GO)}) == {GO!r}
        stands("paused")
        say({REPORT!r})
        note("reported")
"""


class Transport:
    """A `korora xl`, and xl's ends of its pipes."""

    def __init__(
        self, *words: str, daemon: Path | str, identity: Path | None = None, env: dict[str, str] | None = None
    ) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KORORA_")}
        environment.update(env or {})
        if identity is not None:
            environment["KORORA_IDENTITY"] = str(identity)
        self.moved: Callable[[], None] = lambda: None
        """The machine has left, as far as this host's xl is concerned."""
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
        self.moved()
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
        self.folder = self.bin("beta")
        self.socket = site.folder / "xl.sock"
        self.size = len(stream())
        self.transports: list[Transport] = []

    def xl_table(self, more: str = "") -> None:
        self.alpha.tables.append(f'[xl]\nsocket = "{self.socket}"\n{more}')

    def start(self, hosts: Iterable[Host] | None = None) -> None:
        for host in hosts or (self.beta, self.alpha):
            host.start(env=self.env(host))

    def env(self, host: Host) -> dict[str, str]:
        """An environment in which xl is that host's."""
        xl = self.bin(host.name) / "xl"
        xl.write_text(program(self.size, "running" if host is self.alpha else "gone"))
        xl.chmod(0o755)
        return {"PATH": f"{xl.parent}:{os.environ['PATH']}"}

    def bin(self, name: str) -> Path:
        """Where a host's xl is."""
        folder = self.site.folder / f"bin-{name}"
        folder.mkdir(exist_ok=True)
        return folder

    def moved(self) -> None:
        """The source's xl has heard that it runs there, and has destroyed its copy; the next test's is another."""
        (self.bin("alpha") / "xl.domain").write_text("gone")

    def transport(self, *words: str) -> Transport:
        """`korora xl`, as xl starts it."""
        made = Transport(*words, daemon=self.socket)
        made.moved = self.moved
        (self.bin("alpha") / "xl.domain").unlink(missing_ok=True)
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

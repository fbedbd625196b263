"""`korora xl` and `--to xl:` between stand-ins for xl: its conversation goes through, and a cut one is wound down.

The stand-ins say what tools/xl/xl_migrate.c of Xen says; the real xl is not needed.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

KORORA = (sys.executable, "-m", "korora")
SECONDS_MAX = 30.0

BANNER = b"xl migration receiver ready, send binary domain data.\n"
STREAM = b"Xen saved domain, xl format\n \0 \r".ljust(48, b"\0") + os.urandom(3_000_000)
READY = b"domain received, ready to unpause\0"
GO = b"domain is yours, you are cleared to unpause\0"
REPORT = b"my copy unpause results are as follows\0" + b"\0"

# xl migrate-receive: its own words, and a file that says how it ended. It takes a moment to destroy a copy.
RECEIVER = f"""#!{sys.executable}
import sys, time
def note(words):
    with open(sys.argv[0] + ".note", "a") as file:
        file.write(words + "\\n")
def say(words):
    sys.stdout.buffer.write(words)
    sys.stdout.buffer.flush()
def hear(count):
    heard = sys.stdin.buffer.read(count)
    if len(heard) < count:
        time.sleep(0.3)
        note("destroyed")
        sys.exit(0)
    return heard
note(" ".join(sys.argv[1:]))
say({BANNER!r})
hear({len(STREAM)})
say({READY!r})
assert hear({len(GO)}) == {GO!r}
say({REPORT!r})
note("unpaused")
"""


class Hosts:
    """A destination whose `xl` is the stand-in, and the source's `korora xl` as xl starts it."""

    def __init__(self, receiver: "subprocess.Popen[bytes]", transport: "subprocess.Popen[bytes]", xl: Path) -> None:
        self.receiver, self.transport, self._xl = receiver, transport, xl

    def say(self, words: bytes) -> None:
        assert self.transport.stdin is not None
        self.transport.stdin.write(words)
        self.transport.stdin.flush()

    def hear(self, words: bytes) -> None:
        assert self.transport.stdout is not None
        assert self.transport.stdout.read(len(words)) == words

    @property
    def notes(self) -> list[str]:
        return self._xl.with_name("xl.note").read_text().splitlines()


@pytest.fixture
def hosts(identity_alpha: Path, identity_beta: Path, tmp_path: Path) -> Iterator[Callable[..., Hosts]]:
    """Start both sides; `flags` are what `korora xl` is given."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*flags: str, to: str = "xl:") -> Hosts:
        xl = tmp_path / "xl"
        xl.write_text(RECEIVER)
        xl.chmod(0o755)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        receiver = subprocess.Popen(
            [
                *KORORA,
                "receive",
                "--listen",
                address,
                "--to",
                to,
                "--identity",
                identity_beta,
                "--once",
                "--resume-timeout",
                "1",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )
        running.append(receiver)
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == b"ready\n"
        transport = subprocess.Popen(
            [*KORORA, "xl", *flags, address, "--name", "beta"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "KORORA_IDENTITY": str(identity_alpha)},
        )
        running.append(transport)
        return Hosts(receiver, transport, xl)

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_a_whole_migration(hosts: Callable[..., Hosts]) -> None:
    made = hosts("-p", to="xl:-e")
    made.hear(BANNER)
    made.say(STREAM)
    made.hear(READY)
    made.say(GO)
    made.hear(REPORT)
    out, err = made.transport.communicate(timeout=SECONDS_MAX)
    # What xl reads from its transport is the other xl's and nothing of ours.
    assert (made.transport.returncode, out, err) == (0, b"", b"")
    assert made.receiver.wait(SECONDS_MAX) == 0
    assert made.notes == ["migrate-receive -e -p", "unpaused"]


def test_xl_dies_in_the_middle_of_its_stream(hosts: Callable[..., Hosts]) -> None:
    made = hosts()
    made.hear(BANNER)
    made.say(STREAM[: len(STREAM) // 2])
    _, err = made.transport.communicate(timeout=SECONDS_MAX)
    assert made.transport.returncode == 7
    assert b"the xl stream ended after" in err
    assert made.receiver.wait(SECONDS_MAX) == 7
    # Killed, the receiver would have left a paused copy: it has seen the end of its input and had time to clean up.
    assert made.notes == ["migrate-receive", "destroyed"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_source_s_relay_dies(hosts: Callable[..., Hosts], number: signal.Signals) -> None:
    made = hosts()
    made.hear(BANNER)
    made.say(STREAM[: len(STREAM) // 2])
    time.sleep(0.2)
    made.transport.send_signal(number)
    assert made.transport.wait(SECONDS_MAX) in {-number, 128 + number}
    # xl resumes its domain when its transport's output ends.
    assert made.transport.communicate()[0] == b""
    assert made.receiver.wait(SECONDS_MAX) == 6
    assert made.notes == ["migrate-receive", "destroyed"]


def test_the_destination_has_no_xl(hosts: Callable[..., Hosts], tmp_path: Path) -> None:
    made = hosts("-d")
    (tmp_path / "xl").unlink()
    out, err = made.transport.communicate(timeout=SECONDS_MAX)
    if made.transport.returncode == 0:
        pytest.skip("this host has a real xl")
    assert (made.transport.returncode, out) == (7, b"")
    assert b"cannot start xl: (xl migrate-receive -d)" in err

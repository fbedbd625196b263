"""Relays as processes of their own: standard streams, signals, and what a hypervisor sees when a relay dies."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

KORORA = (sys.executable, "-m", "korora")
SECONDS_MAX = 30.0
STREAM = bytes(range(256)) * 9000
STDIO_READY = b"ready"


def free_port() -> int:
    """A port that nobody listens on, below the kernel's own range: no outgoing connection takes it meanwhile."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


BRIEF = ("--resume-timeout", "1")  # how long the one that is left waits for the other


@dataclass
class Processes:
    """Starts relays with the identities of alpha (source) and beta (destination), and ends them all."""

    alpha: Path
    beta: Path
    folder: Path

    def __post_init__(self) -> None:
        self.running: list[subprocess.Popen[bytes]] = []
        self.address = f"127.0.0.1:{free_port()}"

    def start(self, *words: str, **streams: Any) -> "subprocess.Popen[bytes]":
        """`korora` with these words; streams not given are pipes."""
        piped: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([*KORORA, *words], **(piped | streams))
        self.running.append(process)
        return process

    def receive(self, to: str, *words: str, **streams: Any) -> "subprocess.Popen[bytes]":
        """The destination, ready."""
        report = str(self.folder / "receive.json")
        command = ["receive", "--listen", self.address, "--to", to, "--identity", str(self.beta), "--once", *BRIEF]
        return self._ready(self.start(*command, "--report", report, *words, **streams), stdio=to == "stdio:")

    def send(self, source: str, *words: str, **streams: Any) -> "subprocess.Popen[bytes]":
        """The source, ready."""
        report = str(self.folder / "send.json")
        command = ["send", "--from", source, "--peer", self.address, "--identity", str(self.alpha), "--once", *BRIEF]
        return self._ready(self.start(*command, "--report", report, *words, **streams), stdio=source == "stdio:")

    @staticmethod
    def _ready(process: "subprocess.Popen[bytes]", *, stdio: bool) -> "subprocess.Popen[bytes]":
        stream = process.stderr if stdio else process.stdout
        assert stream is not None
        for line in stream:
            if line.strip() == STDIO_READY:
                return process
        raise AssertionError(f"not ready: {process.wait(SECONDS_MAX)} {(process.stderr or stream).read()!r}")

    def report(self, name: str) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return report

    def end(self) -> None:
        for process in self.running:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture
def processes(identity_alpha: Path, identity_beta: Path, tmp_path: Path) -> Iterator[Processes]:
    made = Processes(identity_alpha, identity_beta, tmp_path)
    yield made
    made.end()


def code(process: "subprocess.Popen[bytes]") -> int:
    return process.wait(SECONDS_MAX)


def words_of(process: "subprocess.Popen[bytes]") -> str:
    assert process.stderr is not None
    return process.stderr.read().decode()


# ------------------------------------------------------------------ standard streams


def test_pipes_to_pipes(processes: Processes) -> None:
    far = processes.receive("stdio:", stdin=subprocess.PIPE)
    near = processes.send("stdio:", stdin=subprocess.PIPE)
    assert near.stdin is not None
    assert near.stdout is not None
    assert far.stdin is not None
    assert far.stdout is not None
    near.stdin.write(STREAM)
    near.stdin.close()
    assert far.stdout.read() == STREAM
    # The forward direction has ended; the answer comes after that.
    far.stdin.write(b"received")
    far.stdin.close()
    assert near.stdout.read() == b"received"
    assert (code(near), code(far)) == (0, 0)
    for name in ("send", "receive"):
        report = processes.report(name)
        assert report["digest_blake3"]["0"]["forward"] == blake3(STREAM).hexdigest()
        assert report["bytes_out"] == {"forward": len(STREAM), "backward": 8}
        assert (report["outcome"], report["exit_code"], report["error"]) == ("done", 0, None)


def test_a_socketpair_as_standard_streams(processes: Processes) -> None:
    """As inetd, socat or a hypervisor hands them over: one socket is both, and stays blocking for its other owners."""
    near, near_given = socket.socketpair()
    far, far_given = socket.socketpair()
    with near, near_given, far, far_given:
        receiver = processes.receive("stdio:", stdin=far_given, stdout=far_given)
        sender = processes.send("stdio:", stdin=near_given, stdout=near_given)
        assert near_given.getblocking()
        assert os.get_blocking(near_given.fileno())
        near_given.close()
        far_given.close()
        near.sendall(b"there")
        assert far.recv(100) == b"there"
        far.sendall(b"and back")
        assert near.recv(100) == b"and back"
        near.shutdown(socket.SHUT_WR)
        assert far.recv(100) == b""
        far.sendall(b"still open")
        assert near.recv(100) == b"still open"
        far.shutdown(socket.SHUT_WR)
        assert near.recv(100) == b""
        assert (code(sender), code(receiver)) == (0, 0)


def test_files_as_standard_streams_are_used_from_where_they_stand(processes: Processes) -> None:
    """`(head -c 9 >/dev/null; korora send ...) < file` and `korora receive ... >> file`: offsets are the shell's."""
    origin, target = processes.folder / "origin", processes.folder / "target"
    origin.write_bytes(b"read by another" + STREAM)
    target.write_bytes(b"written before: ")
    with origin.open("rb", buffering=0) as reading, target.open("ab", buffering=0) as writing:
        reading.read(len(b"read by another"))
        receiver = processes.receive("stdio:", stdout=writing)
        sender = processes.send("stdio:", stdin=reading)
        assert (code(sender), code(receiver)) == (0, 0)
    assert target.read_bytes() == b"written before: " + STREAM


def test_flags_of_a_shared_pipe_are_left_alone(processes: Processes) -> None:
    """O_NONBLOCK on the description would hit whoever shares the pipe: the shell, the next command, the log."""
    reading, writing = os.pipe()
    try:
        receiver = processes.receive("stdio:", stdout=writing)
        sender = processes.send("stdio:", stdin=subprocess.PIPE)
        assert sender.stdin is not None
        sender.stdin.write(b"x")
        sender.stdin.flush()
        assert os.read(reading, 1) == b"x"
        assert os.get_blocking(writing)
        sender.stdin.close()
        assert (code(sender), code(receiver)) == (0, 0)
    finally:
        os.close(reading)
        os.close(writing)


# ------------------------------------------------------------------ the relays die


class TcpHypervisors:
    """Two TCP hypervisors around two processes, a byte each way exchanged."""

    def __init__(self, processes: Processes) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        port = free_port()
        self.receiver = processes.receive(f"tcp:127.0.0.1:{self.listener.getsockname()[1]}")
        self.sender = processes.send(f"tcp:127.0.0.1:{port}")
        self.near = socket.create_connection(("127.0.0.1", port))
        self.far, _ = self.listener.accept()
        for sock in (self.near, self.far):
            sock.settimeout(SECONDS_MAX)
        self.near.sendall(b">")
        self.far.sendall(b"<")
        assert (self.far.recv(1), self.near.recv(1)) == (b">", b"<")

    def close(self) -> None:
        for sock in (self.near, self.far, self.listener):
            sock.close()


@pytest.fixture
def hypervisors(processes: Processes) -> Iterator[TcpHypervisors]:
    made = TcpHypervisors(processes)
    yield made
    made.close()


def broken(sock: socket.socket) -> bool:
    """Whether it ends by a reset."""
    try:
        while sock.recv(65_536):
            pass
    except ConnectionResetError:
        return True
    return False


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_relay_is_killed(hypervisors: TcpHypervisors, side: str) -> None:
    """SIGKILL: nothing of ours runs any more, and still both hypervisors see a reset."""
    dead, left = hypervisors.sender, hypervisors.receiver
    if side == "destination":
        dead, left = left, dead
    dead.kill()
    assert broken(hypervisors.near)
    assert broken(hypervisors.far)
    assert code(dead) == -signal.SIGKILL
    assert code(left) == 6
    assert words_of(left).count("korora: error:") == 1


@pytest.mark.parametrize("side", ["send", "receive"])
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_relay_is_stopped_in_the_middle(
    processes: Processes, hypervisors: TcpHypervisors, *, side: str, number: signal.Signals, expected: int
) -> None:
    stopped, left = hypervisors.sender, hypervisors.receiver
    if side == "receive":
        stopped, left = left, stopped
    stopped.send_signal(number)
    assert broken(hypervisors.near)
    assert broken(hypervisors.far)
    assert (code(stopped), code(left)) == (expected, 6)
    report = processes.report(side)
    assert (report["outcome"], report["exit_code"]) == ("interrupted", expected)
    other = processes.report("receive" if side == "send" else "send")
    assert (other["outcome"], other["exit_code"]) == ("lost", 6)
    assert report["session_id"] == other["session_id"]
    for process in (stopped, left):
        assert "Traceback" not in words_of(process)


@pytest.mark.parametrize("start", [lambda p: p.receive("stdio:"), lambda p: p.send(f"tcp:127.0.0.1:{free_port()}")])
def test_a_relay_is_stopped_while_it_waits(
    processes: Processes, start: "Callable[[Processes], subprocess.Popen[bytes]]"
) -> None:
    process = start(processes)
    process.send_signal(signal.SIGTERM)
    assert code(process) == 143
    assert "Traceback" not in words_of(process)


def test_a_file_is_not_left_behind_by_a_relay_that_was_stopped(processes: Processes) -> None:
    target = processes.folder / "guest"
    receiver = processes.receive(f"file:{target}")
    sender = processes.send("stdio:", stdin=subprocess.PIPE)
    assert sender.stdin is not None
    sender.stdin.write(b"half a guest")
    sender.stdin.flush()
    partial = target.with_name("guest.partial")
    while not partial.exists() or partial.stat().st_size == 0:
        assert receiver.poll() is None
        assert sender.poll() is None
    receiver.terminate()
    assert (code(receiver), code(sender)) == (143, 6)
    assert not target.exists()
    assert not partial.exists()

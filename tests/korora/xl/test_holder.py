"""`korora xl` beside something that listens where a daemon would: whatever that does, xl is not left in the dark."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from korora.xl.holder import HAND_OVERS_MAX
from tests.korora.daemon.xl import Transport

SECONDS_MAX = 30.0
SESSION = "0d220fc0" * 4


class Daemon:
    """Whatever the test wants it to be."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "xl.sock"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.settimeout(SECONDS_MAX)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.transports: list[Transport] = []

    def transport(self, *words: str) -> Transport:
        made = Transport("-e", "-p", "beta", *words, daemon=self.path)
        self.transports.append(made)
        return made

    def accept(self) -> socket.socket:
        sock, _ = self.listener.accept()
        sock.settimeout(SECONDS_MAX)
        return sock

    def close(self) -> None:
        self.listener.close()
        for transport in self.transports:
            transport.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path)
    yield made
    made.close()


def asked(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, fds, _, _ = socket.recv_fds(sock, 65536, 3)
    return json.loads(data), list(fds)


def say(sock: socket.socket, word: str, **fields: Any) -> None:
    sock.send(json.dumps({"say": word} | fields).encode())


def test_what_it_asks_and_what_it_ends_with(daemon: Daemon, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    xl = daemon.transport("--name", "beta", "--name", "gamma", "--report", str(report))
    with daemon.accept() as sock:
        request, fds = asked(sock)
        assert request == {
            "say": "carry",
            "version": 1,
            "peer": "beta",
            "flags": "ep",
            "names": ["beta", "gamma"],
            "session": None,
        }
        assert len(fds) == 2
        xl.say(b"of xl")
        assert os.read(fds[0], 100) == b"of xl"
        os.write(fds[1], b"for xl")
        xl.hear(b"for xl")
        for fd in fds:
            os.close(fd)
        say(sock, "taken", session=SESSION)
        say(sock, "let_go", output_only=True)
        assert xl.rest() == b""
        xl.say(b"which may go on")
        say(sock, "verdict", code=7, words="korora: error: it was not to be", session=SESSION, report={"exit_code": 7})
        assert xl.wait() == (7, "korora: error: it was not to be\n")
    assert json.loads(report.read_text()) == {"exit_code": 7}


def test_a_daemon_that_refuses_before_it_has_read(daemon: Daemon) -> None:
    """What was sent to it resets the connection; its answer waits behind the error."""
    xl = daemon.transport()
    with daemon.accept() as sock:
        assert sock.recv(1, socket.MSG_PEEK), "it has asked"
        xl.process.send_signal(signal.SIGSTOP)
        say(sock, "verdict", code=3, words="no")
    xl.process.send_signal(signal.SIGCONT)
    assert xl.wait() == (3, "no\n")


def test_a_daemon_that_dies_of_it_each_time(daemon: Daemon) -> None:
    xl = daemon.transport()
    for number in range(HAND_OVERS_MAX):
        with daemon.accept() as sock:
            request, fds = asked(sock)
            for fd in fds:
                os.close(fd)
            assert request["session"] == (None if number == 0 else SESSION)
            say(sock, "taken", session=SESSION)
    code, words = xl.wait()
    assert (code, f"went away {HAND_OVERS_MAX} times" in words) == (6, True), words
    assert xl.rest() == b""


@pytest.mark.parametrize(
    "data", [b"nonsense", b'{"say": "carry"}', b'{"say": "verdict"}', b'{"say": "taken"}', b"\xff"]
)
def test_a_daemon_that_says_what_is_no_answer(daemon: Daemon, data: bytes) -> None:
    xl = daemon.transport("--daemon-timeout", "1")
    with daemon.accept() as sock:
        asked(sock)
        sock.send(data)
        daemon.listener.close()
        assert sock.recv(1) == b""
    assert xl.wait()[0] == 6


def test_a_daemon_that_says_nothing(daemon: Daemon) -> None:
    xl = daemon.transport("--daemon-timeout", "1")
    with daemon.accept():
        daemon.listener.close()
        assert xl.wait()[0] == 6
    assert xl.rest() == b"", "what it has not read of us keeps xl's pipes no longer"


def test_a_daemon_that_dies_after_it_had_the_pipes_closed(daemon: Daemon) -> None:
    """There is nothing left to hand over, and nobody will say how it ended."""
    xl = daemon.transport()
    with daemon.accept() as sock:
        asked(sock)
        say(sock, "taken", session=SESSION)
        say(sock, "let_go")
    code, words = xl.wait()
    assert (code, "ended after it had closed xl's pipes" in words) == (6, True)


def test_a_second_signal_ends_it_whatever_the_daemon_does(daemon: Daemon) -> None:
    xl = daemon.transport()
    with daemon.accept() as sock:
        asked(sock)
        say(sock, "taken", session=SESSION)
        xl.process.send_signal(signal.SIGTERM)
        assert json.loads(sock.recv(65536)) == {"say": "stop", "signal": 15}
        assert xl.process.poll() is None
        xl.process.send_signal(signal.SIGINT)
        assert xl.wait() == (130, "")


def test_progress_comes_by_the_daemon(daemon: Daemon) -> None:
    """A line each ten seconds is what a log gets: here only that it is understood, and not taken for a verdict."""
    xl = daemon.transport()
    status = {
        "session_id": SESSION,
        "role": "source",
        "peer": "beta",
        "peer_address": None,
        "vm": None,
        "state": "open",
        "delay_seconds": 0.0,
        "bytes_per_second": 0.0,
        "rate_limit": None,
        "seconds": 1.0,
    }
    counts = (
        "channels lanes bytes_in bytes_out wire_sent wire_received frames_sent frames_received frames_resent "
        "records_sent records_received rekeys lanes_lost resumes queue_frames queue_bytes window_bytes"
    )
    status |= dict.fromkeys(counts.split(), 1)
    with daemon.accept() as sock:
        asked(sock)
        say(sock, "taken", session=SESSION)
        say(sock, "moved", status=status)
        say(sock, "verdict", code=0)
        assert xl.wait() == (0, "")


def test_a_socket_that_may_not_be_used(tmp_path: Path) -> None:
    """Something is there, so that relaying beside it would go behind its back."""
    path = tmp_path / "xl.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        xl = Transport("beta", daemon=path)
        code, words = xl.wait()
        xl.close()
    assert code == 2
    assert words.startswith(f"korora: error: cannot reach the daemon at {path}: ")
    assert words.endswith("; be root or the daemon's user, or say --daemon no\n")

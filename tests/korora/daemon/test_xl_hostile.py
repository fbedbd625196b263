"""Whoever comes to the xl socket and is no `korora xl`: refused in words, in bounded time; nothing of his is kept."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from korora.xl.door import GREETED_MAX
from korora.xl.words import REQUEST_BYTES_MAX
from proxy.limits import FIRST_BYTE_SECONDS_MAX
from tests.korora.daemon.support import SECONDS_MAX, Site, until
from tests.korora.daemon.xl import XenSite

NOBODY = 65534


@pytest.fixture
def xen(site: Site) -> Iterator[XenSite]:
    """A daemon that sends to beta, which is not there."""
    made = XenSite(site)
    made.xl_table()
    made.start([made.alpha])
    yield made
    made.close()


def carry(**changes: Any) -> bytes:
    request = {"say": "carry", "version": 1, "peer": "beta", "flags": "", "names": [], "session": None}
    return json.dumps(request | changes).encode()


def descriptors(xen: XenSite) -> dict[int, int]:
    """How many each process of the daemon has open."""
    assert xen.alpha.process is not None
    return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in (xen.alpha.process.pid, *xen.worker_pids())}


def asked(xen: XenSite, data: bytes, fds: list[int]) -> dict[str, Any]:
    """One request's answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(SECONDS_MAX)
        sock.connect(str(xen.socket))
        socket.send_fds(sock, [data], fds)
        answer: dict[str, Any] = json.loads(sock.recv(65536))
        assert sock.recv(65536) == b"", "the last word"
        return answer


class Pipes:
    """Two pipes as xl makes them, and the ends that `korora xl` has of them."""

    def __init__(self, stack: ExitStack) -> None:
        self.ends = [*os.pipe(), *os.pipe()]
        for end in self.ends:
            stack.callback(os.close, end)
        self.own = [self.ends[0], self.ends[3]]


def _file(stack: ExitStack) -> int:
    return stack.enter_context(tempfile.TemporaryFile()).fileno()


def _folder(stack: ExitStack) -> int:
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, fd)
    return fd


def _event(stack: ExitStack) -> int:
    fd = os.eventfd(0)
    stack.callback(os.close, fd)
    return fd


def _path(stack: ExitStack) -> int:
    fd = os.open("/dev/null", os.O_PATH)
    stack.callback(os.close, fd)
    return fd


def _null(stack: ExitStack) -> int:
    fd = os.open(os.devnull, os.O_RDWR)
    stack.callback(os.close, fd)
    return fd


def _listening(stack: ExitStack) -> int:
    return stack.enter_context(socket.create_server(("127.0.0.1", 0))).fileno()


def _datagrams(stack: ExitStack) -> int:
    return stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).fileno()


def _terminal(stack: ExitStack) -> int:
    ends = os.openpty()
    for end in ends:
        stack.callback(os.close, end)
    return ends[1]


WRONG = [_file, _folder, _event, _path, _null, _listening, _datagrams, _terminal]


def test_wrong_descriptors(xen: XenSite) -> None:
    before = descriptors(xen)
    with ExitStack() as stack:
        pipes = Pipes(stack)
        for make in WRONG:
            for place, name in enumerate(("input", "output")):
                given = list(pipes.own)
                given[place] = make(stack)
                answer = asked(xen, carry(), given)
                assert answer["code"] == 2, make
                assert f"the {name} is no pipe or stream socket open for it" in answer["words"], make
        # Pipes, but their other ends.
        assert "the input is no pipe" in asked(xen, carry(), [pipes.ends[1], pipes.ends[3]])["words"]
        assert "the output is no pipe" in asked(xen, carry(), [pipes.ends[0], pipes.ends[2]])["words"]
        for count in (0, 1):
            assert f"{count} descriptors instead of two" in asked(xen, carry(), pipes.own[:count])["words"]
        for count in (3, 4, 200):
            many = (pipes.own * 100)[:count]
            assert "brings 2 descriptors, not more" in asked(xen, carry(), many)["words"]
    assert until(lambda: descriptors(xen) == before), (before, descriptors(xen))
    assert xen.alpha.status()["sessions_ended"] == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x00\xff", "no request"),
        (b'{"say": "carry"}', "no request"),
        (b'{"say": "stop", "signal": 15}', "nothing to stop"),
        (carry(version=2), "korora xl speaks version 2, the daemon 1"),
        (carry(flags="z"), "no request"),
        (carry(peer="x" * 301), "no request"),
        (carry(names=["beta"] * 65), "no request"),
        (carry(names=["x" * 64]), "no request"),
        (carry(session="../../etc/passwd"), "no request"),
        (carry(surplus=1), "no request"),
        (carry(peer="x" * REQUEST_BYTES_MAX), f"at most {REQUEST_BYTES_MAX} bytes"),
        (b"[" * 8000, "no request"),
    ],
    ids=lambda value: value[:20].decode(errors="replace") if isinstance(value, bytes) else value[:20],
)
def test_wrong_words(xen: XenSite, data: bytes, words: str) -> None:
    before = descriptors(xen)
    with ExitStack() as stack:
        answer = asked(xen, data, Pipes(stack).own)
    assert (answer["code"], answer["session"]) == (2, None)
    assert answer["words"].startswith("korora: error: the daemon cannot take this: ")
    assert words in answer["words"]
    assert until(lambda: descriptors(xen) == before)


def test_a_session_that_is_not_known(xen: XenSite) -> None:
    before = descriptors(xen)
    with ExitStack() as stack, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(SECONDS_MAX)
        sock.connect(str(xen.socket))
        socket.send_fds(sock, [carry(session="0" * 32)], Pipes(stack).own)
        said = [json.loads(sock.recv(65536)) for _ in range(3)]
    assert [word["say"] for word in said] == ["taken", "let_go", "verdict"]
    assert (said[1]["output_only"], said[2]["code"]) == (False, 6)
    assert until(lambda: descriptors(xen) == before)


def test_crowds_that_say_nothing(xen: XenSite) -> None:
    """They wait in the backlog while so many are greeted; a real one gets his turn when their time is up."""
    before = descriptors(xen)
    with ExitStack() as stack:
        began = time.monotonic()
        silent = []
        for _ in range(GREETED_MAX + 20):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.settimeout(SECONDS_MAX)
            sock.connect(str(xen.socket))
            silent.append(sock)
        pids = list(before)
        until(lambda: descriptors(xen)[pids[1]] >= before[pids[1]] + GREETED_MAX)
        assert descriptors(xen)[pids[1]] <= before[pids[1]] + GREETED_MAX
        assert descriptors(xen)[pids[0]] <= before[pids[0]] + 1, "the parent keeps none"
        answer = asked(xen, b"is it my turn?", [])
        assert answer["code"] == 2
        assert FIRST_BYTE_SECONDS_MAX - 1 < time.monotonic() - began < 4 * FIRST_BYTE_SECONDS_MAX
        assert silent[0].recv(1) == b"", "his time was up"
    assert until(lambda: descriptors(xen) == before)


def test_requests_that_nobody_waits_for(xen: XenSite) -> None:
    before = descriptors(xen)
    with ExitStack() as stack:
        pipes = Pipes(stack)
        for number in range(300):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(SECONDS_MAX)
                sock.connect(str(xen.socket))
                socket.send_fds(sock, [carry(session=f"{number:032x}")], pipes.own)
    assert asked(xen, b"are you there?", [])["code"] == 2
    assert until(lambda: descriptors(xen) == before)


def test_whoever_takes_no_answer_holds_nothing_up(xen: XenSite) -> None:
    """He stops in the middle of greeting: others are served, and his pipes are let go."""
    before = descriptors(xen)
    with ExitStack() as stack, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        pipes = Pipes(stack)
        sock.settimeout(SECONDS_MAX)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        sock.connect(str(xen.socket))
        socket.send_fds(sock, [carry()], pipes.own)
        assert asked(xen, b"are you there?", [])["code"] == 2
        (report,) = until(xen.alpha.reports)
        assert report["exit_code"] == 6
        assert json.loads(sock.recv(65536))["say"] == "taken"
    assert until(lambda: descriptors(xen) == before)


COME = """
import json, os, socket, sys
os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.settimeout(30)
try:
    sock.connect(sys.argv[1])
except PermissionError:
    sys.exit("not allowed")
read, write = os.pipe()
try:
    socket.send_fds(sock, [sys.argv[3].encode()], [read, write])
except (BrokenPipeError, ConnectionResetError):
    pass  # refused already
try:
    data = sock.recv(65536)
except ConnectionResetError:
    data = sock.recv(65536)
print(data.decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_another_user(xen: XenSite) -> None:
    before = descriptors(xen)

    def come() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", COME, str(xen.socket), str(NOBODY), carry().decode()],
            capture_output=True,
            text=True,
            timeout=SECONDS_MAX,
            check=False,
        )

    with ExitStack() as stack:
        for folder in (*xen.socket.parents,)[:-1]:
            mode = folder.stat().st_mode
            if mode & 0o001 == 0:
                stack.callback(folder.chmod, mode & 0o7777)
                folder.chmod(mode | 0o001)
        assert "not allowed" in come().stderr, "the socket's mode keeps him out"
        xen.socket.chmod(0o666)
        answer = json.loads(come().stdout)
    assert (answer["code"], answer["words"]) == (
        3,
        f"korora: error: user {NOBODY} may not migrate by this daemon; be root",
    )
    assert [event["uid"] for event in xen.alpha.events("somebody else was refused at the xl socket")] == [NOBODY]
    assert until(lambda: descriptors(xen) == before)


def test_a_stopped_holder_does_not_keep_a_daemon_from_ending(xen: XenSite) -> None:
    """Its end of the socket fills up, and its verdict with it; the daemon ends all the same."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        xen.alpha.tables[0] = xen.alpha.tables[0].replace(xen.beta.address, f"127.0.0.1:{silent.getsockname()[1]}")
        xen.alpha.write()
        assert xen.alpha.ask("reload")["ok"]
        xl = xen.transport("beta")
        until(lambda: xen.alpha.events("xl migrates"))
        xl.process.send_signal(signal.SIGSTOP)
        xen.alpha.signal(signal.SIGTERM)
        until(lambda: xen.alpha.status()["phase"] == "draining")
        xen.alpha.signal(signal.SIGTERM)
        assert xen.alpha.wait() == 143
        xl.process.send_signal(signal.SIGCONT)
        assert xl.wait() == (143, "korora: error: stopped by signal 15\n")

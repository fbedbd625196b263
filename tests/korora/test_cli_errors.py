"""Bad input to each command, as an operator meets it: one line that says what is wrong and what to do, the right exit
code, never a traceback, and on standard output nothing, or `ready` where the command could take work.

Every test runs `python -m korora` in a process of its own.
"""

import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from crypto.pki import Authority

KORORA = (sys.executable, "-m", "korora")
SECONDS_MAX = 30.0
NOBODY_HOME = "127.0.0.1:1"  # tcpmux: nothing listens there
# Longer than a name may be (RFC 1035 section 2.3.4): it cannot resolve, and no server has to be asked.
UNRESOLVABLE = ".".join("x" * 150)
# Root may read everything; without these two capabilities it is as any other user.
DROP = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    def complaint(self, code: int, *, ready: bool = False) -> str:
        """The one line on standard error: prefix, what is wrong, remedy."""
        assert self.code == code, self.err
        assert self.out == ("ready\n" if ready else "")
        assert "Traceback" not in self.err
        assert re.fullmatch(r"korora: error: [^\n]+; [^\n]+[^.\n]\n", self.err), self.err
        return self.err


def korora(*arguments: str | Path, prefix: Sequence[str] = (), env: dict[str, str] | None = None) -> Ended:
    """Run a command to its end, with /dev/null as its standard input."""
    done = subprocess.run(
        [*prefix, *KORORA, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
        env={**os.environ, **(env or {})},
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def receive(identity_beta: Path) -> Callable[..., Ended]:
    """`korora receive` on a free port, with what a test adds; an option given twice counts in its last form."""

    def run(to: str, *arguments: str | Path, identity: Path = identity_beta, prefix: Sequence[str] = ()) -> Ended:
        words = ("--listen", "127.0.0.1:0", "--to", to, "--identity", identity, "--log-level", "error")
        return korora("receive", *words, *arguments, prefix=prefix)

    return run


@pytest.fixture
def send(identity_alpha: Path) -> Callable[..., Ended]:
    """`korora send` to a port where nobody is, with what a test adds."""

    def run(source: str, *arguments: str | Path, prefix: Sequence[str] = ()) -> Ended:
        words = ("--from", source, "--peer", NOBODY_HOME, "--identity", identity_alpha, "--log-level", "error")
        return korora("send", *words, *arguments, prefix=prefix)

    return run


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    """Something to send."""
    path = tmp_path / "stream"
    path.write_bytes(b"not a guest " * 1000)
    return path


@pytest.fixture
def without_privilege() -> tuple[str, ...]:
    """What to put before a command so that file modes count for it, whoever runs the tests."""
    if os.geteuid() != 0:
        return ()
    if shutil.which(DROP[0]) is None or subprocess.run([*DROP, "true"], capture_output=True, check=False).returncode:
        pytest.skip("as root without setpriv file modes mean nothing")
    return DROP


# ---- usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["--frobnicate"], "No such option: --frobnicate"),
        (["receive"], "Missing option '--listen'"),
        (["receive", "--listen", ":0", "--to", "stdio:"], "Missing option '--identity'"),
        (["receive", "--listen", ":0", "--to", "stdio:", "--identity", "x", "more"], "unexpected extra argument"),
        (["receive", "--rate", "2"], "No such option: --rate"),
        (["receive", "--listen"], "requires an argument"),
        (["receive", "--listen", ":0", "--to", "stdio:", "--identity", "x", "--log-level", "loud"], "--log-level"),
        (["send"], "Missing option '--from'"),
        (["send", "--from", "stdio:", "--identity", "x"], "Missing option '--peer'"),
        (["send", "--from", "stdio:", "--peer", "h:1", "--identity", "x", "--lanes", "0"], "--lanes"),
        (["send", "--from", "stdio:", "--peer", "h:1", "--identity", "x", "--lanes", "17"], "--lanes"),
        (["send", "--from", "stdio:", "--peer", "h:1", "--identity", "x", "--lanes", "many"], "--lanes"),
        (
            ["send", "--from", "stdio:", "--peer", "h:1", "--identity", "x", "--resume-timeout", "-1"],
            "--resume-timeout",
        ),
        (["xl"], "Missing argument 'PEER'"),
        (["xl", "-x", "peer"], "No such option: -x"),
        (["demo", "--fast"], "No such option: --fast"),
        (["pki", "frobnicate"], "No such command 'frobnicate'"),
        (["pki", "issue"], "Missing argument 'DIR'"),
        (["pki", "issue", "ca"], "Missing argument 'NAME'"),
        (["pki", "init", "ca", "--days", "0"], "--days"),
    ],
    ids=" ".join,
)
def test_usage(arguments: list[str], words: str) -> None:
    line = korora(*arguments).complaint(2)
    assert words in line
    assert re.search(r"; see korora( \w+)* --help\n", line)


@pytest.mark.parametrize("arguments", [[], ["pki"], ["store"]], ids=["korora", "pki", "store"])
def test_a_command_that_is_missing_gives_the_help(arguments: list[str]) -> None:
    ended = korora(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("Usage: korora")
    assert "Commands:" in ended.err


# ---- endpoints and addresses


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("blah", "'blah' is no endpoint"),
        ("carrier-pigeon:7", "no endpoint a migration can go to"),
        ("tcp:4444", "'4444' is no HOST:PORT"),
        ("tcp:127.0.0.1:65536", "is no HOST:PORT"),
        ("tcp:127.0.0.1:0", "nobody can be reached on port 0"),
        ("tcp:::1:4444", "is no HOST:PORT"),
        ("unix:", "names no path"),
        ("file:", "names no path"),
        ("stdio:here", "no endpoint"),
        ("exec: ", "no endpoint"),
        ("xl:-z", "unknown flags of xl"),
        (f"unix:/{'x' * 107}", "at most 107 bytes"),
    ],
)
def test_an_endpoint_to_hand_over_to(receive: Callable[..., Ended], to: str, words: str) -> None:
    assert words in receive(to).complaint(2)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "'' is no endpoint"),
        ("xl:", "no endpoint a migration can come from"),
        ("tcp:4444", "'4444' is no HOST:PORT"),
        (f"unix:/{'x' * 107}", "at most 107 bytes"),
    ],
)
def test_an_endpoint_to_take_from(send: Callable[..., Ended], source: str, words: str) -> None:
    assert words in send(source).complaint(2)


@pytest.mark.parametrize("address", ["", "127.0.0.1", "8010", "127.0.0.1:http", "127.0.0.1:70000", "::1:8010"])
def test_addresses(receive: Callable[..., Ended], address: str) -> None:
    line = receive("stdio:", "--listen", address).complaint(2)
    assert f"--listen {address!r} is no HOST:PORT; write for instance" in line


def test_the_address_of_a_peer(send: Callable[..., Ended], stream: Path, identity_alpha: Path) -> None:
    assert "--peer 'nowhere' is no HOST:PORT" in send(f"file:{stream}", "--peer", "nowhere").complaint(2)
    line = korora("xl", "nowhere:", "--identity", identity_alpha).complaint(2)
    assert "PEER 'nowhere:' is no HOST:PORT" in line


def test_an_address_that_is_not_of_this_host(receive: Callable[..., Ended]) -> None:
    # 192.0.2.0/24 is for documentation (RFC 5737): no host has it.
    assert "give an address of this host" in receive("exec:cat", "--listen", "192.0.2.1:0").complaint(2)
    assert "no local address" in receive("exec:cat", "--listen", f"{UNRESOLVABLE}:0").complaint(2)


def test_ports_in_use(receive: Callable[..., Ended], send: Callable[..., Ended]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for ended in (receive("exec:cat", "--listen", address), send(f"tcp:{address}")):
            line = ended.complaint(2)
            assert f"{address}: Address already in use" in line
            assert "ss -ltnp" in line


@pytest.mark.parametrize("pin", ["", "g" * 64, f"sha1:{'0' * 64}"])
def test_pins(receive: Callable[..., Ended], pin: str) -> None:
    assert "64 hexadecimal digits" in receive("exec:cat", "--pin", pin).complaint(2)


# ---- local ends


def test_unix_sockets_that_cannot_be_listened_on(
    send: Callable[..., Ended], tmp_path: Path, without_privilege: tuple[str, ...]
) -> None:
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(tmp_path / "taken"))
        taken.listen()
        assert "another process listens there" in send(f"unix:{tmp_path / 'taken'}").complaint(2)
    (tmp_path / "note").write_text("kept")
    assert "is no socket" in send(f"unix:{tmp_path / 'note'}").complaint(2)
    assert (tmp_path / "note").read_text() == "kept"
    assert "a directory that exists" in send(f"unix:{tmp_path / 'nowhere' / 'socket'}").complaint(2)
    (tmp_path / "locked").mkdir(mode=0o555)
    ended = send(f"unix:{tmp_path / 'locked' / 'socket'}", prefix=without_privilege)
    assert "Permission denied" in ended.complaint(2)


def test_files_that_cannot_be_read(
    send: Callable[..., Ended], stream: Path, without_privilege: tuple[str, ...]
) -> None:
    assert "No such file" in send(f"file:{stream}.gone").complaint(2)
    assert "Is a directory" in send(f"file:{stream.parent}").complaint(2)
    stream.chmod(0)
    assert "Permission denied" in send(f"file:{stream}", prefix=without_privilege).complaint(2)


def test_files_and_reports_that_cannot_be_written(
    receive: Callable[..., Ended], tmp_path: Path, without_privilege: tuple[str, ...]
) -> None:
    missing, locked = tmp_path / "nowhere", tmp_path / "locked"
    locked.mkdir(mode=0o555)
    assert f"there is no directory {missing}" in receive(f"file:{missing / 'vm'}").complaint(2)
    assert "it is a directory" in receive(f"file:{tmp_path}").complaint(2)
    assert "permission denied" in receive(f"file:{locked / 'vm'}", prefix=without_privilege).complaint(2)
    for report in (missing / "report", tmp_path):
        assert f"cannot write the report {report}" in receive("exec:cat", "--report", report).complaint(2)
    ended = receive("exec:cat", "--report", locked / "report", prefix=without_privilege)
    assert "cannot write the report" in ended.complaint(2)


@contextmanager
def terminal() -> Iterator[int]:
    """The slave of a pseudo-terminal."""
    master, slave = pty.openpty()
    try:
        yield slave
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("command", ["send", "receive", "xl"])
def test_a_terminal_is_no_stream(identity_alpha: Path, command: str) -> None:
    words = {
        "send": ["--from", "stdio:", "--peer", NOBODY_HOME],
        "receive": ["--to", "stdio:", "--listen", "127.0.0.1:0"],
        "xl": [NOBODY_HOME],
    }[command]
    with terminal() as slave:
        done = subprocess.run(
            [*KORORA, command, *words, "--identity", identity_alpha],
            stdin=subprocess.DEVNULL if command == "receive" else slave,
            stdout=slave if command == "receive" else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            timeout=SECONDS_MAX,
            check=False,
        )
    stream = "output" if command == "receive" else "input"
    assert f"standard {stream} is a terminal" in Ended(done.returncode, done.stdout or "", done.stderr).complaint(2)


@pytest.mark.parametrize(("redirection", "name"), [("<&-", "input"), (">&-", "output")])
def test_a_closed_standard_stream(identity_alpha: Path, redirection: str, name: str) -> None:
    words = f"receive --to stdio: --listen 127.0.0.1:0 --identity '{identity_alpha}'"
    done = subprocess.run(
        ["/bin/sh", "-c", f"exec '{sys.executable}' -m korora {words} {redirection}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert f"standard {name} is closed" in Ended(done.returncode, done.stdout, done.stderr).complaint(2)


@pytest.mark.parametrize("command", ["send", "receive"])
def test_nobody_can_read_ready(identity_alpha: Path, command: str) -> None:
    words = {
        "send": ["--from", "tcp:127.0.0.1:0", "--peer", NOBODY_HOME],
        "receive": ["--to", "exec:cat", "--listen", "127.0.0.1:0"],
    }[command]
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "wb") as full:
        for stdout, reason in ((writing, "Broken pipe"), (full.fileno(), "No space left on device")):
            done = subprocess.run(
                [*KORORA, command, *words, "--identity", identity_alpha, "--log-level", "error"],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
                timeout=SECONDS_MAX,
                check=False,
            )
            assert f"standard output: {reason}" in Ended(done.returncode, "", done.stderr).complaint(2)
    os.close(writing)


# ---- identities


def test_there_is_no_identity(receive: Callable[..., Ended], tmp_path: Path) -> None:
    line = receive("exec:cat", identity=tmp_path / "nobody").complaint(2)
    assert f"korora pki issue DIR NAME --out {tmp_path / 'nobody'}" in line
    ended = korora("xl", NOBODY_HOME, env={"KORORA_IDENTITY": str(tmp_path / "nobody")})
    assert str(tmp_path / "nobody") in ended.complaint(2)


@pytest.fixture
def identity(identity_beta: Path, tmp_path: Path) -> Path:
    """A copy of an identity, to be spoilt."""
    return shutil.copytree(identity_beta, tmp_path / "identity")


@pytest.mark.parametrize("file", ["host.key", "crl.pem"])
def test_an_identity_that_lacks_a_file(receive: Callable[..., Ended], identity: Path, file: str) -> None:
    (identity / file).unlink()
    assert f"there is no {identity / file}" in receive("exec:cat", identity=identity).complaint(2)


def test_a_key_that_others_can_read(receive: Callable[..., Ended], identity: Path) -> None:
    (identity / "host.key").chmod(0o644)
    assert f"chmod 600 {identity / 'host.key'}" in receive("exec:cat", identity=identity).complaint(2)


def test_a_key_that_cannot_be_read(
    receive: Callable[..., Ended], identity: Path, without_privilege: tuple[str, ...]
) -> None:
    (identity / "host.key").chmod(0)
    line = receive("exec:cat", identity=identity, prefix=without_privilege).complaint(2)
    assert f"{identity / 'host.key'} cannot be read: Permission denied" in line


def test_a_key_that_is_none(receive: Callable[..., Ended], identity: Path) -> None:
    (identity / "host.key").write_text("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
    line = receive("exec:cat", identity=identity).complaint(2)
    assert "is no unencrypted PEM private key" in line
    assert "c2VjcmV0" not in line


def test_an_expired_crl(receive: Callable[..., Ended], tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority = Authority.create(tmp_path / "ca", now=now - timedelta(days=9))
    identity = authority.issue("host", now=now).directory
    authority.publish_crl(now=now - timedelta(days=9), days=1)
    line = receive("exec:cat", identity=identity).complaint(2)
    assert "crl.pem expired at" in line
    assert "korora pki crl" in line


def test_an_own_certificate_that_is_revoked(receive: Callable[..., Ended], tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority = Authority.create(tmp_path / "ca", now=now)
    identity = authority.issue("host", now=now).directory
    authority.revoke("host", now=now)
    assert "has been revoked" in receive("exec:cat", identity=identity).complaint(2)


# ---- the other side


def test_nobody_answers(send: Callable[..., Ended], stream: Path) -> None:
    line = send(f"file:{stream}").complaint(6, ready=True)
    assert f"cannot reach the peer at {NOBODY_HOME}: Connection refused" in line


def test_a_name_that_does_not_resolve(send: Callable[..., Ended], stream: Path, identity_alpha: Path) -> None:
    line = send(f"file:{stream}", "--peer", f"{UNRESOLVABLE}:8010").complaint(6, ready=True)
    assert "the name does not resolve" in line
    # xl reads our standard output: not even `ready` may stand there.
    line = korora("xl", UNRESOLVABLE, "--identity", identity_alpha).complaint(6)
    assert "the name does not resolve" in line
    assert ":8010" in line


@pytest.fixture
def pair(
    identity_alpha: Path, identity_beta: Path, tmp_path: Path
) -> Iterator[Callable[[str, str], tuple[Ended, Ended]]]:
    """Run `send --from SOURCE` against `receive --to TO` on this machine; what became of the two."""
    running: list[subprocess.Popen[str]] = []

    def run(source: str, to: str) -> tuple[Ended, Ended]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        words = ["--once", "--log-level", "error"]
        out = tmp_path / "receive.out"
        with out.open("w") as stdout:
            receiver = subprocess.Popen(
                [*KORORA, "receive", "--listen", address, "--to", to, "--identity", identity_beta, *words],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
            )
        running.append(receiver)
        deadline = time.monotonic() + SECONDS_MAX
        while out.read_text() != "ready\n" and receiver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        sent = korora("send", "--from", source, "--peer", address, "--identity", identity_alpha, *words)
        _, complaint = receiver.communicate(timeout=SECONDS_MAX)
        return sent, Ended(receiver.returncode, out.read_text(), complaint)

    yield run
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("to", "words"),
    [
        (f"tcp:{NOBODY_HOME}", "cannot connect to the hypervisor at tcp:127.0.0.1:1: Connection refused"),
        ("unix:/nonexistent/qemu", "cannot connect to the hypervisor at unix:/nonexistent/qemu"),
        ("exec:cat >/dev/null; exit 3", "ended with status 3"),
    ],
)
def test_the_destination_hypervisor_fails(
    pair: Callable[[str, str], tuple[Ended, Ended]], stream: Path, to: str, words: str
) -> None:
    sent, received = pair(f"file:{stream}", to)
    assert words in received.complaint(7, ready=True)
    line = sent.complaint(7, ready=True)
    assert "the peer ended the session" in line
    assert words in line


def test_the_source_hypervisor_fails(pair: Callable[[str, str], tuple[Ended, Ended]], tmp_path: Path) -> None:
    sent, received = pair("exec:echo half; exit 3", f"file:{tmp_path / 'vm'}")
    assert "ended with status 3" in sent.complaint(7, ready=True)
    assert "the peer ended the session" in received.complaint(7, ready=True)
    assert not list(tmp_path.glob("vm*"))


# ---- the demo


def test_the_demo_without_a_hypervisor(tmp_path: Path) -> None:
    line = korora("demo", env={"KORORA_QEMU": str(tmp_path / "qemu")}).complaint(2)
    assert "KORORA_QEMU" in line


def test_names_too_long(tmp_path: Path, receive: Callable[..., Ended]) -> None:
    """Before Python 3.12 asking whether such a path exists raises instead of saying no."""
    long = tmp_path / ("x" * 300)
    receive(f"file:{long}").complaint(2)
    receive("file:/dev/null", "--report", long).complaint(2)
    receive("file:/dev/null", identity=long).complaint(2)

"""The relay pair and what it is compared with, each started as its own users would, tuned in its favour.

Every peer takes connections on a loopback port, carries them (through a second process, when encrypted) to the sink,
and stays up for further ones. What was chosen for each, from trials on the bench's own stream:

- socat: blocks of 256 KiB (its default of 8 KiB costs three to four times the CPU time; 64 KiB to 1 MiB are equal
  within the noise, 256 KiB was the fastest).
- socat-openssl: the same blocks (8 KiB: 1.6 times the CPU time); TLS 1.3, both certificates verified, AES-128-GCM
  (its default, AES-256-GCM, is equal within the noise).
- ssh: aes128-gcm@openssh.com through a forwarding (-L): no further process touches the bytes. A command at the far end
  with a hop to a socket costs 1.7 times the CPU time at half the throughput. Set-up time is that of a fresh `ssh -W`
  each session, as xl starts one ssh per migration.
- stunnel: TLS 1.3, both certificates verified, AES-128-GCM (AES-256-GCM is equal within the noise). It resumes its TLS
  sessions, as it does by default, so its set-up time is that of a resumed handshake but for the first of a round.
- korora: AES-256-GCM, BLAKE3 of the stream at both ends, X25519MLKEM768, both certificates verified.

Nagle's algorithm is off wherever the peer has an option for it.
"""

from __future__ import annotations

import getpass
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.certificates import make_self_signed
from bench.processes import BenchError, KiB, ProcessTree, free_ports

START_TIMEOUT_S: Final = 20.0  # until a relay listens, Python's imports on a busy machine included
COMMAND_TIMEOUT_S: Final = 60.0  # ssh-keygen, korora pki
SOCAT_BLOCK_BYTES: Final = 256 * KiB
TLS_CIPHER: Final = "TLS_AES_128_GCM_SHA256"
SSH_CIPHER: Final = "aes128-gcm@openssh.com"
LOOPBACK: Final = "127.0.0.1"
SYSTEM_PATHS: Final = "/usr/sbin:/usr/local/sbin:/sbin"  # where sshd is, and not on everybody's PATH


@dataclass(frozen=True, slots=True)
class Target:
    """What a peer is started for: where its bytes go, and where it may keep files."""

    sink_port: int
    directory: Path
    fresh_sessions: bool = False  # set-up is measured: no connection may be shared between sessions


Start = Callable[[ProcessTree, Target], int]


@dataclass(frozen=True, slots=True)
class Peer:
    """One thing to measure.

    `start` starts it in the tree and returns the port to connect to, once something listens there.
    """

    name: str
    encrypted: bool
    programs: tuple[str, ...]
    package: str
    start: Start

    def missing(self) -> str:
        """What is not installed and how to get it, in one line; empty if all is there."""
        absent = [program for program in self.programs if find_program(program) is None]
        if not absent:
            return ""
        return f"{', '.join(absent)} not found; Debian: apt-get install {self.package}"


def find_program(name: str) -> str | None:
    """Full path of a program on PATH or in the system directories."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATHS}")


def program(name: str) -> str:
    """Full path of a program that must be there (sshd insists on one)."""
    path = find_program(name)
    if path is None:
        raise BenchError(f"{name} not found")
    return path


def run(argv: list[str]) -> None:
    """Run a short command to its end; BenchError with its last line if it fails."""
    try:
        done = subprocess.run(
            argv, check=False, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{Path(argv[0]).name}: {error}") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise BenchError(f"{Path(argv[0]).name} failed with code {done.returncode}: {lines[-1]}")


def start_direct(_tree: ProcessTree, target: Target) -> int:
    """No relay: the source connects to the sink."""
    return target.sink_port


def start_socat(tree: ProcessTree, target: Target) -> int:
    """One plain hop."""
    [port] = free_ports(1)
    tree.spawn([
        program("socat"), "-b", str(SOCAT_BLOCK_BYTES),
        f"TCP-LISTEN:{port},bind={LOOPBACK},fork,reuseaddr,nodelay",
        f"TCP:{LOOPBACK}:{target.sink_port},nodelay",
    ])  # fmt: skip
    tree.await_listening(port, START_TIMEOUT_S)
    return port


def start_socat_openssl(tree: ProcessTree, target: Target) -> int:
    """Two socats with TLS 1.3 between them."""
    pem = make_self_signed(target.directory)
    config = target.directory / "openssl.cnf"
    config.write_text(
        "openssl_conf = init\n[init]\nssl_conf = ssl\n[ssl]\nsystem_default = defaults\n"
        f"[defaults]\nMinProtocol = TLSv1.3\nCiphersuites = {TLS_CIPHER}\n"
    )
    tls = f"cert={pem},cafile={pem},verify=1,openssl-min-proto-version=TLS1.3,nodelay"
    port, middle = free_ports(2)
    base = [program("socat"), "-b", str(SOCAT_BLOCK_BYTES)]
    env = {"OPENSSL_CONF": str(config)}
    tree.spawn(
        [
            *base,
            f"OPENSSL-LISTEN:{middle},bind={LOOPBACK},fork,reuseaddr,{tls}",
            f"TCP:{LOOPBACK}:{target.sink_port},nodelay",
        ],
        env=env,
    )
    tree.spawn(
        [
            *base,
            f"TCP-LISTEN:{port},bind={LOOPBACK},fork,reuseaddr,nodelay",
            f"OPENSSL:{LOOPBACK}:{middle},commonname=localhost,{tls}",
        ],
        env=env,
    )
    tree.await_listening(middle, START_TIMEOUT_S)
    tree.await_listening(port, START_TIMEOUT_S)
    return port


def make_ssh_keys(directory: Path) -> None:
    """Throwaway host and user keys, and the user's key as the only authorised one."""
    if (directory / "user").exists():
        return
    for name in ("host", "user"):
        run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)])
    (directory / "authorized").write_bytes((directory / "user.pub").read_bytes())
    (directory / "known").write_text(f"bench {(directory / 'host.pub').read_text()}")


def start_ssh(tree: ProcessTree, target: Target) -> int:
    """An sshd of our own on loopback, and a forwarding through it (or a fresh `ssh -W` for each session)."""
    directory = target.directory
    make_ssh_keys(directory)
    port, middle = free_ports(2)
    if os.geteuid() == 0:
        # sshd run by root insists on this empty directory, which its service makes at boot. It is left there: an sshd
        # started meanwhile may have come to need it.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    sshd_options = {
        "ListenAddress": LOOPBACK,
        "AuthorizedKeysFile": str(directory / "authorized"),
        "StrictModes": "no",
        "PidFile": "none",
        "UsePAM": "no",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "UseDNS": "no",
    }
    tree.spawn([
        program("sshd"), "-D", "-e", "-f", "/dev/null", "-p", str(middle), "-h", str(directory / "host"),
        *(word for key, value in sshd_options.items() for word in ("-o", f"{key}={value}")),
    ])  # fmt: skip
    tree.await_listening(middle, START_TIMEOUT_S)
    ssh = [
        program("ssh"), "-F", "none", "-p", str(middle), "-i", str(directory / "user"), "-c", SSH_CIPHER,
        "-l", getpass.getuser(), "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR",
        "-o", "HostKeyAlias=bench", "-o", f"UserKnownHostsFile={directory / 'known'}",
    ]  # fmt: skip
    sink = f"{LOOPBACK}:{target.sink_port}"
    if target.fresh_sessions:
        launch = [sys.executable, "-m", "bench.load", "launch", "--port", str(port), "--"]
        tree.spawn([*launch, *ssh, "-W", sink, LOOPBACK])
    else:
        tree.spawn([*ssh, "-N", "-o", "ExitOnForwardFailure=yes", "-L", f"{LOOPBACK}:{port}:{sink}", LOOPBACK])
    tree.await_listening(port, START_TIMEOUT_S)
    return port


def start_stunnel(tree: ProcessTree, target: Target) -> int:
    """Two stunnels with TLS 1.3 between them."""
    pem = make_self_signed(target.directory)
    port, middle = free_ports(2)
    common = (
        "foreground = yes\npid =\ndebug = err\nsslVersion = TLSv1.3\n"
        f"ciphersuites = {TLS_CIPHER}\ncert = {pem}\nCAfile = {pem}\nverifyChain = yes\n"
        "socket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n"
    )
    server = f"[server]\naccept = {LOOPBACK}:{middle}\nconnect = {LOOPBACK}:{target.sink_port}\n"
    client = f"[client]\nclient = yes\naccept = {LOOPBACK}:{port}\nconnect = {LOOPBACK}:{middle}\n"
    for name, service in (("server", server), ("client", client)):
        config = target.directory / f"stunnel-{name}.conf"
        config.write_text(common + service)
        tree.spawn([program("stunnel4"), str(config)])
    tree.await_listening(middle, START_TIMEOUT_S)
    tree.await_listening(port, START_TIMEOUT_S)
    return port


def make_identities(directory: Path) -> tuple[Path, Path]:
    """A CA and two host identities, by the same commands that a user runs."""
    source, destination = directory / "source", directory / "destination"
    if not destination.exists():
        korora = [sys.executable, "-m", "korora"]
        authority = str(directory / "ca")
        run([*korora, "pki", "init", authority])
        for identity in (source, destination):
            run([*korora, "pki", "issue", authority, identity.name, "--out", str(identity)])
    return source, destination


def await_ready(process: subprocess.Popen[bytes], tree: ProcessTree, what: str) -> None:
    """Wait for the line `ready` on a relay's standard output."""
    assert process.stdout is not None  # noqa: S101 (spawned with a pipe just before)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
        raise BenchError(f"korora: {what} did not say that it is ready within {START_TIMEOUT_S:.0f} s")
    line = process.stdout.readline()
    if line != b"ready\n":
        time.sleep(0.2)  # it is ending: let its message reach the log
        tree.check_alive()
        raise BenchError(f"korora: {what} said {line!r} instead of ready")


def start_korora(tree: ProcessTree, target: Target) -> int:
    """`korora receive` and `korora send`, one process each."""
    return start_pair(tree, target)


def start_pair(tree: ProcessTree, target: Target, *, options: Sequence[str] = (), report: Path | None = None) -> int:
    """`korora receive` and `korora send`; returns the port to send to.

    Args:
        tree: where they belong.
        target: where the bytes go.
        options: further words for both command lines.
        report: a file for the source's report.
    """
    source, destination = make_identities(target.directory)
    middle, port = free_ports(2)
    korora = [sys.executable, "-m", "korora"]
    common = ["--log-level", "warning", *options]
    receive = tree.spawn(
        [
            *korora, "receive", "--listen", f"{LOOPBACK}:{middle}", "--to", f"tcp:{LOOPBACK}:{target.sink_port}",
            "--identity", str(destination), *common,
        ],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    await_ready(receive, tree, "receive")
    send = tree.spawn(
        [
            *korora, "send", "--from", f"tcp:{LOOPBACK}:{port}", "--peer", f"{LOOPBACK}:{middle}",
            "--identity", str(source), *common, *(() if report is None else ("--report", str(report))),
        ],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    await_ready(send, tree, "send")
    return port


DIRECT: Final = "direct"
KORORA: Final = "korora"
PEERS: Final[dict[str, Peer]] = {
    peer.name: peer
    for peer in (
        Peer(DIRECT, encrypted=False, programs=(), package="", start=start_direct),
        Peer("socat", encrypted=False, programs=("socat",), package="socat", start=start_socat),
        Peer("socat-openssl", encrypted=True, programs=("socat",), package="socat", start=start_socat_openssl),
        Peer("ssh", encrypted=True, programs=("ssh", "sshd", "ssh-keygen"),
             package="openssh-client openssh-server", start=start_ssh),
        Peer("stunnel", encrypted=True, programs=("stunnel4",), package="stunnel4", start=start_stunnel),
        Peer(KORORA, encrypted=True, programs=(), package="", start=start_korora),
    )
}  # fmt: skip

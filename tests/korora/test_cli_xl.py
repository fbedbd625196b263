"""`korora xl` and `--to xl:` between two hosts whose xl is a stand-in (tests/standins): the real one is not needed."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.standins.xen_host import XenHost

KORORA = (sys.executable, "-m", "korora")
SECONDS_MAX = 30.0


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Hosts:
    """A guest on its way from alpha to beta: `xl migrate` there, with `korora xl` as its transport; a relay here."""

    def __init__(
        self, alpha: XenHost, beta: XenHost, receiver: "subprocess.Popen[bytes]", migrate: "subprocess.Popen[bytes]"
    ) -> None:
        self.alpha, self.beta = alpha, beta
        self.receiver, self.migrate = receiver, migrate
        self.another: Callable[[str], subprocess.Popen[bytes]] = lambda _: migrate
        """Lets another guest of alpha follow."""

    @property
    def transport(self) -> int:
        """The process id of `korora xl`, which xl has started."""
        children = Path(f"/proc/{self.migrate.pid}/task/{self.migrate.pid}/children")
        until(children.read_text)
        return int(children.read_text().split()[0])

    def ended(self) -> tuple[int, int, bytes]:
        """Exit codes of xl and of the relay, and what xl and its transport said to people."""
        said = self.migrate.communicate(timeout=SECONDS_MAX)[1]
        return self.migrate.returncode, self.receiver.wait(SECONDS_MAX), said

    @property
    def states(self) -> tuple[dict[str, str], dict[str, str]]:
        return self.alpha.states, self.beta.states


@pytest.fixture
def hosts(identity_alpha: Path, identity_beta: Path, tmp_path: Path) -> Iterator[Callable[..., Hosts]]:
    """Start both sides; `flags` are what `korora xl` is given, `steps` where alpha's xl is held or dies."""
    running: list[subprocess.Popen[bytes]] = []
    made: list[XenHost] = []

    def start(
        *flags: str, to: str = "xl:", fault: tuple[str, str] | None = None, has_xl: bool = True, once: bool = True
    ) -> Hosts:
        alpha, beta = XenHost(tmp_path / "alpha"), XenHost(tmp_path / "beta")
        made[:] = [alpha, beta]
        alpha.create("g1", pages=2048)
        if fault:
            alpha.fault(*fault)
        if not has_xl:
            beta.program.unlink()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        words = ["--listen", address, "--to", to, "--identity", identity_beta, "--resume-timeout", "1"]
        words += ["--once"] * once
        receiver = subprocess.Popen(
            [*KORORA, "receive", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=beta.env,
            start_new_session=True,
        )
        running.append(receiver)
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == b"ready\n"
        command = shlex.join([*KORORA, "xl", *flags, address, "--name", "beta", "--recover-for", "0"])

        def migrate(name: str) -> "subprocess.Popen[bytes]":
            process = subprocess.Popen(
                [alpha.program, "migrate", "-s", "", name, f"exec {command}"],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**alpha.env, "KORORA_IDENTITY": str(identity_alpha)},
                start_new_session=True,
            )
            running.append(process)
            return process

        hosts = Hosts(alpha, beta, receiver, migrate("g1"))
        hosts.another = migrate
        return hosts

    yield start
    for process in running:
        # With xl's transport; what beta's relay has started has a session of its own.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for host in made:
        host.end()
    for process in running:
        process.communicate(timeout=SECONDS_MAX)


def test_a_whole_migration(hosts: Callable[..., Hosts]) -> None:
    made = hosts("-p", to="xl:-e")
    sent = made.alpha.stream_of("g1")
    code, receiver, said = made.ended()
    # What xl reads from its transport is the other xl's and nothing of ours, or it would have given up.
    assert (code, receiver) == (0, 0)
    assert said.splitlines()[-1] == b"Migration successful."
    assert made.beta.log[0] == "migrate-receive -e -p"
    assert made.states == ({}, {"g1": "paused"})
    assert made.beta.stream_of("g1") == sent


def test_two_guests_at_once(hosts: Callable[..., Hosts]) -> None:
    """The second does not wait for the first, nor is it refused: each gets an xl migrate-receive of its own."""
    made = hosts(fault=("migrate:stream", "hold"), once=False)
    until(lambda: made.beta.states)
    made.alpha.heal("migrate:stream")
    made.alpha.create("g2", uuid="11111111-2222-4333-8444-555555555555")
    made.beta.fault("receive:go", "hold")
    second = made.another("g2")
    until(lambda: made.beta.log.count("step receive:go") == 2)
    assert made.beta.states == {"g1--incoming": "paused", "g2--incoming": "paused"}
    made.beta.heal("receive:go")
    for migrate in (made.migrate, second):
        assert migrate.communicate(timeout=SECONDS_MAX)[1].splitlines()[-1] == b"Migration successful."
    assert made.states == ({}, {"g1": "running", "g2": "running"})


def test_xl_dies_in_the_middle_of_its_stream(hosts: Callable[..., Hosts]) -> None:
    made = hosts(fault=("migrate:stream", "die"))
    code, receiver, said = made.ended()
    assert (code, receiver) == (-signal.SIGKILL, 7)
    assert b"the xl stream ended after" in said
    # Killed, the receiver would have left a paused copy: it has seen the end of its input and had time to clean up.
    assert made.states == ({"g1": "running"}, {})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_source_s_relay_dies(hosts: Callable[..., Hosts], number: signal.Signals) -> None:
    made = hosts(fault=("migrate:stream", "hold"))
    until(lambda: made.beta.states and made.alpha.reached("migrate:stream"))
    os.kill(made.transport, number)
    until(lambda: made.beta.states == {})
    made.alpha.heal("migrate:stream")
    code, receiver, said = made.ended()
    # xl resumes its domain when its transport is gone.
    assert (code, receiver) == (1, 6)
    assert b"Migration failed, resuming at sender." in said
    assert made.states == ({"g1": "running"}, {})


def test_the_destination_has_no_xl(hosts: Callable[..., Hosts]) -> None:
    made = hosts("-d", has_xl=False)
    code, receiver, said = made.ended()
    if receiver == 0:
        pytest.skip("this host has a real xl")
    assert (code, receiver) == (1, 7)
    assert b"cannot start xl: (xl migrate-receive -d -p)" in said
    assert made.states == ({"g1": "running"}, {})

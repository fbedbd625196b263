"""The stand-in for xl does what real xl was seen to do in each cut; docs/handover.md has the figures.

S and D are this test's ends of the two channels: the source's xl has pipes, the destination's a socket.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.standins.xen_host import UUID, XenHost, guest_stream
from tests.standins.xl import BANNER, GO, READY, REPORT

SECONDS_MAX = 20.0
LENGTH = len(guest_stream("g1"))
CARRIER = (
    "import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
    "socket.send_fds(s, [b'x'], [0, 1]); os.close(0); os.close(1); s.recv(1)"
)


class Migration:
    """One migration between two hosts, its channel cut open in the middle.

    Args:
        source, destination: may be the same.
        flags: of migrate-receive.
    """

    def __init__(self, source: XenHost, destination: XenHost, folder: Path, flags: tuple[str, ...] = ()) -> None:
        self.source, self.destination = source, destination
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "carrier"))
        listener.listen()
        listener.settimeout(SECONDS_MAX)
        command = f'exec {sys.executable} -SEc "{CARRIER}" {folder / "carrier"}'
        self.migrate = subprocess.Popen(
            [source.program, "migrate", "-s", "", "g1", command], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        self._carrier, _ = listener.accept()
        listener.close()
        _, (self.from_source, self.to_source), _, _ = socket.recv_fds(self._carrier, 1, 2)
        self._source_ends: tuple[int, ...] = (self.from_source, self.to_source)
        self.receiver, far = socket.socketpair()
        self.receiver.settimeout(SECONDS_MAX)
        self.receive = subprocess.Popen(
            [destination.program, "migrate-receive", *flags], stdin=far, stdout=far, stderr=subprocess.PIPE
        )
        far.close()

    # ---- S

    def hear_source(self, count: int) -> bytes:
        got = bytearray()
        while len(got) < count and (piece := os.read(self.from_source, count - len(got))):
            got += piece
        return bytes(got)

    def tell_source(self, words: bytes) -> None:
        os.write(self.to_source, words)

    def end_source(self) -> None:
        """End of file, both ways."""
        ends, self._source_ends = self._source_ends, ()
        for fd in ends:
            os.close(fd)
        self._carrier.close()

    # ---- D

    def hear_receiver(self, count: int) -> bytes:
        got = bytearray()
        while len(got) < count and (piece := self.receiver.recv(count - len(got))):
            got += piece
        return bytes(got)

    def tell_receiver(self, words: bytes) -> None:
        self.receiver.sendall(words)

    def wind_down(self) -> bytes:
        """HALF: shut the write side and read on."""
        self.receiver.shutdown(socket.SHUT_WR)
        return self.hear_receiver(1 << 20)

    # ---- steps

    def stream(self) -> None:
        """The banner, and the whole stream."""
        assert self.hear_receiver(len(BANNER)) == BANNER
        self.tell_source(BANNER)
        self.tell_receiver(self.hear_source(LENGTH))

    def ready(self) -> None:
        """As far as READY from the destination, held."""
        self.stream()
        assert self.hear_receiver(len(READY)) == READY

    def go(self) -> None:
        """As far as GO from the source, held."""
        self.ready()
        self.tell_source(READY)
        assert self.hear_source(len(GO)) == GO

    def codes(self) -> tuple[int, int]:
        """Both exit codes, once both have ended."""
        return self.migrate.wait(SECONDS_MAX), self.receive.wait(SECONDS_MAX)

    @property
    def states(self) -> tuple[dict[str, str], dict[str, str]]:
        return self.source.states, self.destination.states

    def close(self) -> None:
        self.end_source()
        self.receiver.close()
        for process in (self.migrate, self.receive):
            process.kill()
            process.communicate()


@pytest.fixture
def alpha(tmp_path: Path) -> XenHost:
    host = XenHost(tmp_path / "alpha")
    host.create("g1")
    return host


@pytest.fixture
def beta(tmp_path: Path) -> XenHost:
    return XenHost(tmp_path / "beta")


@pytest.fixture
def migration(alpha: XenHost, beta: XenHost, tmp_path: Path) -> Iterator[Migration]:
    made = Migration(alpha, beta, tmp_path)
    yield made
    made.close()


@pytest.fixture
def paused(alpha: XenHost, beta: XenHost, tmp_path: Path) -> Iterator[Migration]:
    """With -p."""
    made = Migration(alpha, beta, tmp_path, ("-p",))
    yield made
    made.close()


def test_the_words_have_the_lengths_of_the_protocol() -> None:
    assert [len(words) for words in (BANNER, READY, GO, REPORT)] == [54, 34, 44, 39]


def test_a_whole_migration(migration: Migration) -> None:
    sent = migration.source.stream_of("g1")
    migration.go()
    assert migration.source.states == {"g1--migratedaway": "suspend"}
    migration.tell_receiver(GO)
    migration.tell_source(migration.hear_receiver(40))
    assert migration.codes() == (0, 0)
    assert migration.states == ({}, {"g1": "running"})
    assert migration.destination.stream_of("g1") == sent
    assert migration.destination.domains["g1"].uuid == UUID


def test_cut_in_the_stream(migration: Migration) -> None:
    migration.source.fault("migrate:stream", "hold")
    migration.tell_source(BANNER)
    migration.hear_receiver(len(BANNER))
    migration.tell_receiver(migration.hear_source(LENGTH // 4))
    migration.end_source()
    migration.source.heal("migrate:stream")
    migration.receiver.close()
    code, receiver = migration.codes()
    assert (code, receiver != 0) == (1, True)
    assert migration.states == ({"g1": "running"}, {})


def test_ready_held_and_both_reset(migration: Migration) -> None:
    migration.stream()
    migration.destination.fault("receive:ready", "hold")
    migration.end_source()
    migration.receiver.close()
    migration.destination.heal("receive:ready")
    assert migration.codes() == (1, 1)
    assert migration.states == ({"g1": "running"}, {"g1--incoming": "paused"})
    # It blocks every retry.
    retry = subprocess.run(
        [migration.destination.program, "migrate-receive"], input=guest_stream("g1"), capture_output=True, check=False
    )
    assert (retry.returncode, retry.stdout) == (1, BANNER)


def test_ready_held_and_the_source_s_carrier_gives_no_end_of_file(migration: Migration) -> None:
    migration.ready()
    with pytest.raises(subprocess.TimeoutExpired):
        migration.migrate.wait(0.3)
    assert migration.source.states == {"g1": "suspend"}


def test_ready_held_and_both_wound_down(migration: Migration) -> None:
    migration.ready()
    migration.end_source()
    assert migration.wind_down() == REPORT + b"\xff" + GO
    assert migration.codes() == (1, 0)
    assert migration.states == ({"g1": "running"}, {})


def test_ready_passed_and_the_source_cut_at_once(migration: Migration) -> None:
    migration.source.fault("migrate:ready", "hold")
    migration.ready()
    migration.tell_source(READY)
    migration.end_source()
    migration.source.heal("migrate:ready")
    assert migration.wind_down() == REPORT + b"\xff" + GO
    assert migration.codes() == (1, 0)
    assert migration.states == ({"g1--migratedaway": "suspend"}, {})


def test_go_swallowed_and_the_answer_passed_on(migration: Migration) -> None:
    migration.go()
    migration.tell_source(migration.wind_down())
    assert migration.codes() == (1, 0)
    assert migration.states == ({"g1": "running"}, {})


def test_go_swallowed_and_the_permission_lost(migration: Migration) -> None:
    migration.go()
    migration.tell_source(migration.wind_down()[: 39 + 1])
    migration.end_source()
    assert migration.codes() == (1, 0)
    assert migration.states == ({"g1--migratedaway": "suspend"}, {})


def test_go_passed_and_the_source_cut_before_report(migration: Migration) -> None:
    migration.go()
    migration.tell_receiver(GO)
    migration.end_source()
    migration.hear_receiver(40)
    assert migration.codes() == (1, 0)
    assert migration.states == ({"g1--migratedaway": "suspend"}, {"g1": "running"})


def test_go_passed_and_the_destination_reset_at_once(migration: Migration) -> None:
    migration.destination.fault("receive:go", "hold")
    migration.go()
    migration.tell_receiver(GO)
    migration.receiver.close()
    migration.destination.heal("receive:go")
    assert migration.receive.wait(SECONDS_MAX) == 1
    assert migration.destination.states == {"g1": "running"}
    assert migration.migrate.poll() is None


def test_go_and_ready_twice(migration: Migration) -> None:
    migration.go()
    migration.tell_source(READY)
    migration.tell_receiver(GO + GO)
    migration.tell_source(migration.hear_receiver(40))  # the second READY is shorter than the report it is taken for
    assert migration.codes() == (1, 0)
    assert migration.states == ({"g1--migratedaway": "suspend"}, {"g1": "running"})


def test_failure_and_permission_forged(migration: Migration) -> None:
    migration.go()
    migration.tell_source(REPORT + b"\3" + GO)
    assert migration.migrate.wait(SECONDS_MAX) == 1
    migration.tell_receiver(GO)
    assert migration.receive.wait(SECONDS_MAX) == 0
    # The disaster that the hand-over has to prevent.
    assert migration.states == ({"g1": "running"}, {"g1": "running"})


def test_a_receiver_with_p(paused: Migration) -> None:
    paused.go()
    paused.tell_receiver(GO)
    paused.tell_source(paused.hear_receiver(40))
    assert paused.codes() == (0, 0)
    assert paused.states == ({}, {"g1": "paused"})
    subprocess.run([paused.destination.program, "unpause", "g1"], check=True)
    assert paused.states == ({}, {"g1": "running"})


def test_with_p_the_report_held_and_the_copy_destroyed(paused: Migration) -> None:
    paused.go()
    paused.tell_receiver(GO)
    assert paused.hear_receiver(40) == REPORT + b"\0"
    subprocess.run([paused.destination.program, "destroy", "g1"], check=True)
    paused.tell_source(REPORT + b"\1" + GO)
    assert paused.codes() == (1, 0)
    assert paused.states == ({"g1": "running"}, {})


def test_one_host_with_both_copies(alpha: XenHost, tmp_path: Path) -> None:
    migration = Migration(alpha, alpha, tmp_path)
    try:
        migration.ready()
        assert alpha.states == {"g1": "suspend", "g1--incoming": "paused"}
        migration.tell_source(READY)
        migration.tell_receiver(migration.hear_source(len(GO)))
        migration.tell_source(migration.hear_receiver(40))
        assert migration.codes() == (0, 0)
        assert alpha.states == {"g1": "running"}
    finally:
        migration.close()


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("migrate:suspended", {"g1": "suspend"}),
        ("migrate:ready", {"g1": "suspend"}),
        ("migrate:renamed", {"g1--migratedaway": "suspend"}),
        ("migrate:go", {"g1--migratedaway": "suspend"}),
    ],
)
def test_a_source_s_xl_that_dies(migration: Migration, step: str, left: dict[str, str]) -> None:
    migration.source.fault(step, "die")
    with suppress(BrokenPipeError):
        migration.stream()
        migration.tell_source(READY)
    assert migration.migrate.wait(SECONDS_MAX) == -signal.SIGKILL
    assert migration.source.states == left


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("receive:stream", {"g1--incoming": "paused"}),
        ("receive:ready", {"g1--incoming": "paused"}),
        ("receive:go", {"g1--incoming": "paused"}),
        ("receive:renamed", {"g1": "paused"}),
        ("receive:report", {"g1": "running"}),
    ],
)
def test_a_destination_s_xl_that_dies(migration: Migration, step: str, left: dict[str, str]) -> None:
    migration.destination.fault(step, "die")
    with suppress(AssertionError, BrokenPipeError, ConnectionResetError):
        migration.go()
        migration.tell_receiver(GO)
    assert migration.receive.wait(SECONDS_MAX) == -signal.SIGKILL
    assert migration.destination.states == left


def ask(host: XenHost, *words: str) -> tuple[int, str]:
    done = subprocess.run([host.program, *words], capture_output=True, text=True, check=False, timeout=SECONDS_MAX)
    return done.returncode, done.stdout + done.stderr


def test_plain_commands(alpha: XenHost) -> None:
    assert ask(alpha, "pause", "g1")[0] == 0
    assert alpha.states == {"g1": "paused"}
    assert ask(alpha, "unpause", "1")[0] == 0
    assert alpha.states == {"g1": "running"}
    code, words = ask(alpha, "unpause", "g1")
    assert (code, "Invalid argument" in words) == (0, True)
    assert ask(alpha, "rename", "g1", "Domain-0")[0] == 1
    assert ask(alpha, "rename", "g1", "g2")[0] == 0
    assert ask(alpha, "destroy", "g1")[0] == 1
    assert ask(alpha, "destroy", "g2")[0] == 0
    assert alpha.states == {}


def test_commands_that_go_wrong(alpha: XenHost) -> None:
    alpha.fault("destroy", "lie")
    assert ask(alpha, "destroy", "g1")[0] == 0
    assert alpha.states == {"g1": "running"}
    alpha.fault("destroy", "fail")
    assert ask(alpha, "destroy", "g1")[0] == 1
    assert alpha.states == {"g1": "running"}
    assert ask(alpha, "destroy", "g1")[0] == 0
    assert alpha.states == {}


def test_the_list(alpha: XenHost) -> None:
    alpha.create("a name of more than forty characters, as may be", shutdown="suspend")
    lines = ask(alpha, "list", "-v")[1].splitlines()
    assert lines[0].split() == [
        "Name",
        "ID",
        "Mem",
        "VCPUs",
        "State",
        "Time(s)",
        "UUID",
        "Reason-Code",
        "Security",
        "Label",
    ]
    assert lines[1].split()[:5] == ["Domain-0", "0", "96", "1", "r-----"]
    assert lines[2].split()[4:] == ["-b----", lines[2].split()[5], UUID, "-", "-"]
    assert lines[3].split()[-5:] == ["---ss-", "0.0", UUID, "2", "-"]

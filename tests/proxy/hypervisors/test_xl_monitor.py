"""Somebody waits for the end of a domain that was revived, and does what its configuration says then."""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import HypervisorFailed
from proxy.hypervisors.libxl import Libxl
from proxy.hypervisors.xl_monitor import Monitor, Watch, XlMonitors, _is_ours, find_monitor
from tests.standins.xen_host import UUID, XenHost

SECONDS_MAX = 20.0


@pytest.fixture
def host(tmp_path: Path) -> XenHost:
    return XenHost(tmp_path / "host")


def wait_until(condition: Any) -> None:
    end = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# ------------------------------------------------------------------ xl's own


def process(proc: Path, pid: int, comm: str, log: Path) -> None:
    (proc / str(pid) / "fd").mkdir(parents=True)
    (proc / str(pid) / "comm").write_text(comm + "\n")
    (proc / str(pid) / "fd" / "1").symlink_to(log)


@pytest.mark.parametrize(
    ("comm", "name", "words", "found"),
    [
        ("xl", "xl-g1.log", "Waiting for domain g1 (domid 7) to die [pid 42]\n", True),
        ("xl", "xl-g1--incoming.log", "noise\nWaiting for domain g1--incoming (domid 7) to die [pid 42]\nmore\n", True),
        # After a reboot of its guest it waits for another one.
        (
            "xl",
            "xl-g1.log",
            "Waiting for domain g1 (domid 7) to die [pid 42]\nDone. Rebooting now\n"
            "Waiting for domain g1 (domid 8) to die [pid 42]\n",
            False,
        ),
        # It has seen the domain suspended, and is about to end.
        (
            "xl",
            "xl-g1.log",
            "Waiting for domain g1 (domid 7) to die [pid 42]\nDomain 7 has shut down, reason code 2 0x2\n",
            False,
        ),
        # The last monitor of an earlier domain wrote into the same file.
        ("xl", "xl-g1.log", "Waiting for domain g1 (domid 7) to die [pid 41]\n", False),
        ("qemu", "xl-g1.log", "Waiting for domain g1 (domid 7) to die [pid 42]\n", False),
        ("xl", "other.log", "Waiting for domain g1 (domid 7) to die [pid 42]\n", False),
        ("xl", "xl-g1.log", "", False),
    ],
)
def test_xl_s_own_monitor_is_known_by_its_log(tmp_path: Path, *, comm: str, name: str, words: str, found: bool) -> None:
    log = tmp_path / name
    log.write_text(words)
    proc = tmp_path / "proc"
    process(proc, 42, comm, log)
    (proc / "self").mkdir()
    (proc / "43").mkdir()
    assert find_monitor(7, proc) == (42 if found else None)


# ------------------------------------------------------------------ ours


class Stage:
    """A monitor at work in this thread: each time it waits, the next thing happens."""

    def __init__(self, host: XenHost, *happens: Any) -> None:
        self.host, self.happens = host, list(happens)
        self.said: list[str] = []
        self.made: list[dict[str, Any]] = []

    def wait(self) -> None:
        assert self.happens, "it waits, and nothing happens any more"
        self.happens.pop(0)()

    def create(self, config: dict[str, Any]) -> int:
        self.made.append(config)
        return self.host.create("g1")

    def monitor(self, domid: int) -> Monitor:
        made = Monitor(
            domid, self.create, self.wait, self.said.append, program=str(self.host.program), pause=lambda _: None
        )
        made.begin()
        return made


def configure(host: XenHost, number: int, **actions: str) -> None:
    """What `xl list -l` shows; it leaves out what is `destroy`."""
    host.alter(number, config={"c_info": {"name": "g1", "uuid": UUID, "domid": number}, "b_info": {}, **actions})


def nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("shutdown", "actions", "left"),
    [
        ("poweroff", {}, {}),
        ("reboot", {}, {}),
        ("crash", {"on_reboot": "restart"}, {}),
        ("crash", {"on_crash": "preserve"}, {"g1": "crash"}),
        ("reboot", {"on_reboot": "restart_rename"}, {"g1": "reboot"}),
        ("crash", {"on_crash": "coredump_destroy"}, {}),
    ],
)
def test_a_domain_ends(host: XenHost, shutdown: str, actions: dict[str, str], left: dict[str, str]) -> None:
    number = host.create("g1")
    configure(host, number, **actions)
    stage = Stage(host, nothing, lambda: host.alter(number, shutdown=shutdown))
    stage.monitor(number).run()
    assert host.states == left
    assert stage.made == []
    assert ("dump-core" in " ".join(host.log)) == ("coredump" in str(actions))


@pytest.mark.parametrize("action", ["restart", "coredump_restart"])
def test_a_guest_that_reboots_is_made_anew_and_waited_for(host: XenHost, action: str) -> None:
    number = host.create("g1")
    configure(host, number, on_reboot="destroy")
    stage = Stage(
        host,
        nothing,
        # The configuration may have changed since the monitor began.
        lambda: (configure(host, number, on_reboot=action), host.alter(number, shutdown="reboot")),
        nothing,
        lambda: host.alter(number + 1, shutdown="poweroff"),
    )
    stage.monitor(number).run()
    assert host.states == {}
    assert [made["on_reboot"] for made in stage.made] == [action]


def test_a_suspended_domain_is_left_alone_and_still_waited_for(host: XenHost) -> None:
    """xl's own monitor ends here; the domain may be resumed."""
    number = host.create("g1")
    stage = Stage(
        host,
        lambda: host.alter(number, shutdown="suspend"),
        lambda: host.alter(number, shutdown=None),
        lambda: host.alter(number, shutdown="poweroff"),
    )
    stage.monitor(number).run()
    assert stage.happens == []
    assert host.states == {}


def test_a_domain_that_goes_away_ends_it(host: XenHost) -> None:
    number = host.create("g1")
    stage = Stage(host, host.lose_all)
    stage.monitor(number).run()
    assert not any(line.startswith("destroy") for line in host.log)


def test_another_domain_with_the_same_id_is_not_its_own(host: XenHost) -> None:
    number = host.create("g1")
    stage = Stage(host, lambda: host.alter(number, uuid="11111111-2222-4333-8444-555555555555", shutdown="crash"))
    stage.monitor(number).run()
    assert host.states == {"g1": "crash"}


def test_what_fails_is_tried_again(host: XenHost) -> None:
    number = host.create("g1")
    host.fault("destroy", "lie")
    stage = Stage(host, lambda: host.alter(number, shutdown="poweroff"))
    stage.monitor(number).run()
    assert host.states == {}
    assert any("cannot be destroyed" in words for words in stage.said)


def test_a_domain_that_cannot_be_made_anew_is_told(host: XenHost) -> None:
    number = host.create("g1")
    configure(host, number, on_reboot="restart")
    stage = Stage(host, lambda: host.alter(number, shutdown="reboot"))

    def fail(config: dict[str, Any]) -> int:
        raise HypervisorFailed("no memory")

    stage.create = fail  # type: ignore[method-assign]
    stage.monitor(number).run()
    assert "could not be made anew: no memory" in stage.said[-1]


# ------------------------------------------------------------------ xenstored


class Xenstored(threading.Thread):
    """Says what xenstored says about @releaseDomain."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.asked = b""
        self.client: socket.socket | None = None

    def run(self) -> None:
        client, _ = self.listener.accept()
        self.asked = client.recv(1024)
        client.sendall(struct.pack("=4I", 4, 0, 0, 3) + b"OK\0")
        self.client = client
        self.tell()

    def tell(self) -> None:
        words = b"@releaseDomain\0korora\0"
        assert self.client is not None
        self.client.sendall(struct.pack("=4I", 15, 0, 0, len(words)) + words)

    def close(self) -> None:
        self.join(SECONDS_MAX)
        self.listener.close()
        if self.client is not None:
            self.client.close()


@pytest.fixture
def xenstored(tmp_path: Path) -> Iterator[Xenstored]:
    made = Xenstored(tmp_path / "xenstored")
    made.start()
    yield made
    made.close()


def test_xenstored_is_watched(xenstored: Xenstored, tmp_path: Path) -> None:
    watch = Watch(str(tmp_path / "xenstored"), poll_seconds=60)
    watch.wait()
    assert xenstored.asked == struct.pack("=4I", 4, 0, 0, 22) + b"@releaseDomain\0korora\0"
    woken = threading.Event()
    waiter = threading.Thread(target=lambda: (watch.wait(), woken.set()), daemon=True)
    waiter.start()
    assert not woken.wait(0.1)
    xenstored.tell()
    assert woken.wait(SECONDS_MAX)
    waiter.join(SECONDS_MAX)
    watch.close()


def test_without_xenstored_it_looks_again_and_again(tmp_path: Path) -> None:
    watch = Watch(str(tmp_path / "nobody"), poll_seconds=0.01)
    began = time.monotonic()
    for _ in range(3):
        watch.wait()
    assert 0.02 < time.monotonic() - began < SECONDS_MAX


# ------------------------------------------------------------------ as a process

STUB = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static char *kept;
void *xtl_createlogger_stdiostream(FILE *file, int level, unsigned flags) { return file; }
int libxl_ctx_alloc(void **context, int version, unsigned flags, void *logger) {
    *context = malloc(1); return logger ? version : -3;
}
int libxl_ctx_free(void *context) { free(context); return 0; }
void libxl_domain_config_init(void *config) { memset(config, 0, 4096); }
void libxl_domain_config_dispose(void *config) { free(kept); kept = 0; }
int libxl_domain_config_from_json(void *context, void *config, const char *text) { kept = strdup(text); return 0; }
int libxl_domain_create_new(void *context, void *config, unsigned *domid, const void *how, const void *console) {
    FILE *file = fopen(getenv("STUB_FILE"), "w");
    if (!file || how || console) return -3;
    fprintf(file, "create %s\n", kept); fclose(file);
    *domid = 99;
    return 0;
}
int libxl_domain_unpause(void *context, unsigned domid, const void *how) {
    FILE *file = fopen(getenv("STUB_FILE"), "a");
    fprintf(file, "unpause %u\n", domid); fclose(file);
    return 0;
}
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something with libxl's functions."""
    folder = tmp_path_factory.mktemp("libxl")
    (folder / "stub.c").write_text(STUB)
    try:
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-o", folder / "stub.so", folder / "stub.c"], check=True, timeout=SECONDS_MAX
        )
    except FileNotFoundError:
        pytest.skip("no C compiler")
    return folder / "stub.so"


def test_libxl_makes_a_domain_of_what_xl_shows(stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_FILE", str(tmp_path / "calls"))
    assert Libxl(str(stub)).create({"c_info": {"name": "g1", "domid": 7}, "on_reboot": "restart"}) == 99
    assert (tmp_path / "calls").read_text().splitlines() == [
        'create {"c_info": {"name": "g1"}, "on_reboot": "restart"}',
        "unpause 99",
    ]


def test_what_is_no_libxl_is_refused() -> None:
    with pytest.raises(HypervisorFailed, match="cannot be used"):
        Libxl("/nonexistent/libxenlight.so")
    with pytest.raises(HypervisorFailed, match="cannot be used"):
        Libxl("libc.so.6")


def test_a_monitor_in_the_background(
    host: XenHost, stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xenstored: Xenstored
) -> None:
    """Started once, it outlives its starter, makes the guest anew when it reboots, and ends with its domain."""
    # Beyond the ids of real domains, and not another run's on this machine.
    number = host.create("g1", number=40_000 + os.getpid() % 50_000)
    monkeypatch.setenv("STUB_FILE", str(tmp_path / "calls"))
    configure(host, number, on_reboot="restart")
    words = [sys.executable, "-P", "-m", "proxy.hypervisors.xl_monitor", "--xl", str(host.program)]
    words += ["--libxl", str(stub), "--xenstored", str(tmp_path / "xenstored")]
    words += ["--locks", str(tmp_path), str(number)]
    try:
        first = subprocess.run(words, capture_output=True, timeout=SECONDS_MAX, check=False)
        assert (first.returncode, first.stderr) == (0, b"")
        (pid,) = monitors_of(number)
        assert find_monitor(number) == pid
        assert os.getsid(pid) == pid
        second = subprocess.run(words, capture_output=True, timeout=SECONDS_MAX, check=False)
        assert second.returncode == 0
        assert monitors_of(number) == [pid]
        wait_until(lambda: xenstored.client is not None)
        host.alter(number, shutdown="reboot")
        xenstored.tell()
        wait_until(lambda: host.states == {})
        wait_until(lambda: (tmp_path / "calls").exists() and "unpause 99" in (tmp_path / "calls").read_text())
        xenstored.tell()
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
    finally:
        for left in monitors_of(number):
            os.kill(left, signal.SIGKILL)


def monitors_of(domid: int) -> list[int]:
    """All that are ours, whoever claims to be the only one."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _is_ours(entry) == domid]


def options(host: XenHost, libxl: str) -> list[str]:
    return ["--xl", str(host.program), "--libxl", libxl, "--locks", str(host.folder)]


def test_who_cannot_start_one_says_what_to_type(host: XenHost) -> None:
    number = host.create("g1", number=40_000 + os.getpid() % 50_000)
    monitors = XlMonitors(options(host, "/nonexistent/libxenlight.so"), {})
    words = monitors.tend(number)
    assert words is not None
    assert "cannot be used" in words
    assert f"xl destroy {number}" in words
    assert "xl migrate-receive" in words
    assert not monitors.tends(number)


def test_no_monitor_for_what_is_not_there(host: XenHost, stub: Path) -> None:
    assert "there is no domain 39999" in str(XlMonitors(options(host, str(stub)), {}).tend(39_999))


def test_no_folder_for_its_lock(host: XenHost, stub: Path) -> None:
    words = XlMonitors([*options(host, str(stub)), "--locks", "/nonexistent"], {}).tend(39_999)
    assert "cannot make /nonexistent" in str(words)

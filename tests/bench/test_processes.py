"""The accounting: CPU time of a whole tree, its memory, and its end."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.processes import (
    BenchError,
    ProcessTree,
    cpu_clock_s,
    descendants,
    free_ports,
    holds_socket,
    listening_inodes,
)

BURN_S = 0.4
# Burns a known amount of CPU time in a thread of its own, says so, and waits.
BURN = f"""
import sys, threading, time
def burn():
    while time.thread_time() < {BURN_S}:
        pass
thread = threading.Thread(target=burn)
thread.start()
thread.join()
print(time.process_time(), flush=True)
time.sleep(60)
"""
# The same in a child that is waited for, so that only the parent's account of its children knows.
BURN_IN_CHILD = f"""
import subprocess, sys, time
subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < {BURN_S}: pass"])
print(0, flush=True)
time.sleep(60)
"""


def burnt(process: subprocess.Popen[bytes]) -> float:
    """Wait for the burning process's line."""
    assert process.stdout is not None
    return float(process.stdout.readline())


def test_cpu_time_of_ended_threads_counts(tmp_path: Path) -> None:
    with ProcessTree("burn", tmp_path) as tree:
        process = tree.spawn([sys.executable, "-c", BURN], stdout=subprocess.PIPE)
        own_account_s = burnt(process)
        assert tree.cpu_s() == pytest.approx(own_account_s, abs=0.02)
        assert own_account_s >= BURN_S


def test_cpu_time_of_awaited_children_counts(tmp_path: Path) -> None:
    with ProcessTree("burn", tmp_path) as tree:
        burnt(tree.spawn([sys.executable, "-c", BURN_IN_CHILD], stdout=subprocess.PIPE))
        # Two interpreters start, too, so only the lower bound is sharp.
        assert BURN_S - 0.02 <= tree.cpu_s() < BURN_S + 5


def test_an_idle_process_uses_nothing(tmp_path: Path) -> None:
    with ProcessTree("sleep", tmp_path) as tree:
        tree.spawn(["sleep", "60"])
        time.sleep(0.1)
        before_s = tree.cpu_s()
        time.sleep(0.3)
        assert tree.cpu_s() - before_s < 0.005


def test_a_process_that_is_gone_has_no_clock() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert cpu_clock_s(process.pid) == 0.0
    assert descendants([process.pid]) == set()


def test_memory_is_read_for_each_process(tmp_path: Path) -> None:
    wanted = ["sh", "sleep", "sleep"]
    with ProcessTree("shell", tmp_path) as tree:
        tree.spawn(["sh", "-c", "sleep 60 & sleep 60 & wait"])
        deadline = time.monotonic() + 10
        while sorted(item.command for item in tree.memory()) != wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        memory = tree.memory()
    assert sorted(item.command for item in memory) == wanted
    assert all(item.peak_kib > 0 for item in memory)


def test_a_tree_leaves_nobody_behind(tmp_path: Path) -> None:
    with ProcessTree("stubborn", tmp_path) as tree:
        # The shell ignores SIGTERM, and its child is in a session of its own.
        tree.spawn(["sh", "-c", "trap '' TERM; setsid sleep 60 & sleep 60"])
        deadline = time.monotonic() + 5
        while len(tree.pids()) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        pids = tree.pids()
        assert len(pids) == 3
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    """Whether the process runs (one that waits to be reaped by somebody else does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_program_that_ends_is_quoted(tmp_path: Path) -> None:
    with ProcessTree("peer", tmp_path) as tree:
        tree.spawn(["sh", "-c", "echo first >&2; echo the reason >&2; exit 3"])
        with pytest.raises(BenchError, match=r"^peer: sh ended with code 3: the reason$"):
            tree.await_listening(free_ports(1)[0], 10)


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with ProcessTree("peer", tmp_path) as tree, pytest.raises(BenchError, match="cannot start /nonexistent/program"):
        tree.spawn(["/nonexistent/program"])


def test_not_listening_is_an_error_in_time(tmp_path: Path) -> None:
    with ProcessTree("sleep", tmp_path) as tree:
        tree.spawn(["sleep", "60"])
        with pytest.raises(BenchError, match="does not listen on port"):
            tree.await_listening(free_ports(1)[0], 0.1)


def test_a_listener_is_seen_without_connecting() -> None:
    first, second = free_ports(2)
    assert first != second
    assert not listening_inodes(first)
    with socket.create_server(("127.0.0.1", first)):
        assert holds_socket(os.getpid(), listening_inodes(first))
        assert not holds_socket(os.getpid(), listening_inodes(second))
    assert os.getpid() in descendants([os.getpid()])


def test_somebody_elses_listener_is_not_the_peers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, ProcessTree("sleep", tmp_path) as tree:
        tree.spawn(["sleep", "60"])
        with pytest.raises(BenchError, match="does not listen on port"):
            tree.await_listening(other.getsockname()[1], 0.1)

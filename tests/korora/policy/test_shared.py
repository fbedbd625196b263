"""The ledger of several processes: all count together, and what a dead one began runs no more."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from korora.policy import shared
from korora.policy.ledger import Usage
from korora.policy.shared import Ledger
from proxy.errors import PolicyRefused
from tests.korora.policy.support import NOW

ROOT = Path(__file__).parents[3]
CHILD = """
import sys
from pathlib import Path
from korora.policy.shared import Ledger
from tests.korora.policy.support import NOW
ledger = Ledger(Path(sys.argv[1]))
ledger.begin("theirs", "beta", "blue", 7, NOW)
print("begun", flush=True)
for line in sys.stdin:
    ledger.end("theirs")
    print("ended", flush=True)
"""


@contextmanager
def other_process(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has begun a session."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            yield process
            if process.stdin is not None and process.stdin.closed:
                process.wait(20)
        finally:
            process.kill()


def test_all_processes_count_together(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    with other_process(tmp_path / "ledger") as process:
        ledger.begin("ours", "beta", "blue", None, NOW)
        assert ledger.usage(NOW) == Usage(2, {"beta": 2}, {"blue": 2}, {7: 1}, {"beta": 2})
        assert ledger.usage(NOW, "ours") == Usage(1, {"beta": 1}, {"blue": 1}, {7: 1}, {"beta": 1})
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ended\n"
        assert ledger.usage(NOW) == Usage(1, {"beta": 1}, {"blue": 1}, {}, {"beta": 2})


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_dead_process_began_is_over_and_has_begun(tmp_path: Path, how: int) -> None:
    ledger = Ledger(tmp_path / "ledger")
    with other_process(tmp_path / "ledger") as process:
        os.kill(process.pid, how)
        process.wait(20)
    assert ledger.usage(NOW) == Usage(0, {}, {}, {}, {"beta": 1})
    assert not list((tmp_path / "ledger").glob("*.alive"))


def test_a_session_of_the_same_name_in_another_process_is_another(tmp_path: Path) -> None:
    one, two = Ledger(tmp_path / "ledger"), Ledger(tmp_path / "ledger")
    one.begin("same", "beta", "blue", None, NOW)
    two.begin("same", "beta", "blue", None, NOW)
    assert one.usage(NOW).running == 2
    assert (one.usage(NOW, "same").running, two.usage(NOW, "same").running) == (0, 1)
    two.end("same")
    assert (one.usage(NOW).running, one.usage(NOW, "same").running) == (1, 0)
    one.close()
    assert two.usage(NOW).running == 0


def test_processes_that_ended_without_a_word_leave_no_files(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    with other_process(tmp_path / "ledger") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ended\n"  # no session of it runs that it would be missed by
        process.stdin.close()
    with other_process(tmp_path / "ledger"):
        ledger.begin("ours", "beta", "blue", None, NOW)
        assert len(list((tmp_path / "ledger").glob("*.alive"))) == 2


def test_what_cannot_be_counted_is_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process that holds the lock refuses sessions, and keeps none counted for ever."""
    monkeypatch.setattr(shared, "LOCK_SECONDS_MAX", 0.05)
    ledger = Ledger(tmp_path / "ledger")
    ledger.begin("a", "beta", "blue", None, NOW)
    with open(tmp_path / "ledger" / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PolicyRefused, match=r"sessions cannot be counted: .*: another process has it locked"):
            ledger.usage(NOW)
        with pytest.raises(PolicyRefused, match="a session that begins cannot be counted"):
            ledger.begin("b", "beta", "blue", None, NOW)
        ledger.end("a")
    assert ledger.usage(NOW).running == 0


def test_a_ledger_that_is_not_understood_is_begun_anew(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.begin("a", "beta", "blue", None, NOW)
    (tmp_path / "ledger" / "sessions").write_bytes(b"[{")
    assert ledger.usage(NOW).running == 0
    ledger.begin("b", "beta", "blue", None, NOW)
    assert ledger.usage(NOW).running == 1


def test_its_files_are_its_owner_s_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.begin("a", "beta", "blue", None, NOW)
    files = list((tmp_path / "ledger").iterdir())
    assert len(files) == 3
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "ledger", *files))


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ledger = Ledger(tmp_path / "file" / "ledger")
    with pytest.raises(PolicyRefused, match=r"a session that begins cannot be counted: .*: Not a directory"):
        ledger.begin("a", "beta", "blue", None, NOW)
    ledger.end("a")

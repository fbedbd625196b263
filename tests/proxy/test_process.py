"""A process is known again, and another one of its number is not taken for it."""

import os
import subprocess
import sys

from proxy.process import lives, written_down


def test_a_process_lives_until_it_ends_also_where_nobody_has_reaped_it() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        written = written_down(child.pid)
        assert lives(written)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not lives(written)
        assert written_down(child.pid) == ""
    assert not lives(written)


def test_another_one_of_its_number_is_another_one() -> None:
    number, _, started = written_down(os.getpid()).partition(" ")
    assert lives(f"{number} {started}")
    assert not lives(f"{number} {int(started) - 1}")


def test_what_is_no_process_does_not_live() -> None:
    for written in ("", "1", "x 1", "1 ", "-1 1", f"{2**22 + 1} 1"):
        assert not lives(written), written

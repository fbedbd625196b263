"""A page cache is no larger than a small host can spare, and what threads had can be given back."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from korora.memory import affordable

MIB = 1024 * 1024
ARENAS = """
import ctypes, threading
from korora.memory import prepare

prepare()
held = []
threads = [threading.Thread(target=lambda: held.append(bytearray(100_000))) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
assert libc.malloc_info(0, out) == 0
libc.fclose(out)
"""


@pytest.mark.parametrize(
    ("available_kib", "wanted", "given"),
    [(16 * 1024 * 1024, 512 * MIB, 512 * MIB), (400 * 1024, 512 * MIB, 100 * MIB), (0, 512 * MIB, 0), (1024, 0, 0)],
)
def test_what_a_host_can_spare(tmp_path: Path, available_kib: int, wanted: int, given: int) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal:       1 kB\nMemAvailable:   {available_kib} kB\nBuffers: 5 kB\n")
    assert affordable(wanted, meminfo) == given


@pytest.mark.parametrize("text", ["", "MemAvailable: many\n"])
def test_a_kernel_that_does_not_tell(tmp_path: Path, text: str) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(text)
    assert affordable(512 * MIB, meminfo) == 512 * MIB
    assert affordable(512 * MIB, tmp_path / "absent") == 512 * MIB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="arenas are glibc's")
def test_threads_share_one_arena() -> None:
    """Of any other arena malloc_trim keeps what is free at its end."""
    told = subprocess.run([sys.executable, "-c", ARENAS], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.count("<heap nr=") == 1

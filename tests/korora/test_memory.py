"""A page cache is no larger than a small host can spare."""

from pathlib import Path

import pytest

from korora.memory import affordable

MIB = 1024 * 1024


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

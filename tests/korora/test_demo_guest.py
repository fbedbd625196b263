"""The demo's parts that need no QEMU: the initramfs writer, the reading of the guest's counting."""

import gzip
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from korora.demo import process
from korora.demo.guest import INIT, CpioEntry, GuestSpec, initramfs, newc
from korora.demo.serial import SerialLine, continuity

# ------------------------------------------------------------------ cpio


def unpack(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """An independent reader of cpio(5)'s New ASCII Format: name to (mode, data)."""
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        field = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = field[1], field[6], field[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        start = (at + 110 + name_size + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            return found
        found[name[:-1].decode()] = (mode, archive[start : start + size])
        at = (start + size + 3) // 4 * 4


def test_newc_gives_back_names_modes_and_data_of_every_alignment() -> None:
    entries = [CpioEntry("d", stat.S_IFDIR | 0o755), CpioEntry("link", stat.S_IFLNK | 0o777, b"d/target")]
    entries += [CpioEntry("n" * length, stat.S_IFREG | 0o644, bytes(range(length))) for length in range(1, 10)]
    assert unpack(newc(entries)) == {entry.name: (entry.mode, entry.data) for entry in entries}


def test_newc_is_the_same_every_time_and_has_whole_words() -> None:
    entries = [CpioEntry("a", stat.S_IFREG | 0o600, b"abc")]
    assert newc(entries) == newc(entries)
    assert len(newc(entries)) % 4 == 0


@pytest.mark.skipif(shutil.which("cpio") is None and shutil.which("busybox") is None, reason="no cpio to ask")
def test_cpio_itself_reads_newc(tmp_path: Path) -> None:
    cpio = ["cpio"] if shutil.which("cpio") else ["busybox", "cpio"]
    archive = newc([CpioEntry("dir", stat.S_IFDIR | 0o755), CpioEntry("dir/file", stat.S_IFREG | 0o640, b"content")])
    subprocess.run([*cpio, "-i"], input=archive, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "dir" / "file").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "dir" / "file").stat().st_mode) == 0o640


def test_initramfs_holds_busybox_its_applets_and_an_init_that_can_be_run(tmp_path: Path) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"\x7fELF")
    members = unpack(gzip.decompress(initramfs(busybox)))
    assert members["init"] == (stat.S_IFREG | 0o755, INIT.encode())
    assert members["bin/busybox"][1] == b"\x7fELF"
    assert members["bin/sh"] == (stat.S_IFLNK | 0o777, b"busybox")


def test_init_is_correct_shell() -> None:
    subprocess.run(["sh", "-n"], input=INIT.encode(), check=True)


def test_the_kernel_command_line_carries_what_init_reads() -> None:
    words = GuestSpec(static_mib=3, blocks=5, words=7, pause_seconds=0.5).kernel_arguments().split()
    assert {"STATIC_MIB=3", "BLOCKS=5", "WORDS=7", "PAUSE=0.5"} <= set(words)


# ------------------------------------------------------------------ the guest's counting


def line(number: int, bad: int = 0) -> bytes:
    return b"HB %d t=%d.5 written=64 checked=2 bad=%d\r\n" % (number, number, bad)


def heard(*chunks: bytes) -> SerialLine:
    serial = SerialLine()
    for now, chunk in enumerate(chunks):
        serial.feed(chunk, float(now))
    return serial


def test_counting_that_goes_on_is_unbroken() -> None:
    found = continuity(heard(b"GUEST filling memory\r\n", line(0), line(1)), heard(line(2), line(3)))
    assert found is not None
    assert found.unbroken
    assert (found.first, found.last_on_source, found.first_on_destination, found.last) == (0, 1, 2, 3)


@pytest.mark.parametrize("cut", range(1, len(line(2))))
def test_a_line_cut_by_the_switch_over_is_joined(cut: int) -> None:
    found = continuity(heard(line(0), line(1) + line(2)[:cut]), heard(line(2)[cut:], line(3)))
    assert found is not None
    assert found.unbroken
    assert found.first_on_destination == 2


def test_numbers_missing_or_repeated_are_named() -> None:
    found = continuity(heard(line(0), line(1), line(2)), heard(line(2), line(5)))
    assert found is not None
    assert (found.missing, found.repeated, found.unbroken) == ([3, 4], [2], False)


def test_bad_memory_breaks_the_verdict() -> None:
    found = continuity(heard(line(0)), heard(line(1, bad=1), line(2, bad=1)))
    assert found is not None
    assert not found.unbroken


def test_silence_on_either_side_is_no_continuity() -> None:
    assert continuity(heard(line(0)), heard()) is None
    assert continuity(heard(), heard(line(0))) is None


def test_what_is_no_heartbeat_is_kept_as_noise_and_an_endless_line_is_bounded() -> None:
    serial = heard(line(0), b"Kernel panic\r\n", b"x" * 100_000)
    assert serial.noise == ["Kernel panic"]
    assert len(serial.tail) <= 4096


# ------------------------------------------------------------------ child processes


async def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    child = await process.start([sys.executable, "-c", stubborn], tmp_path / "err")
    assert child.stdout is not None
    assert await child.stdout.readline() == b"up\n"
    assert await process.end(child, grace_seconds=0.1) == -9


async def test_a_process_that_ended_by_itself_keeps_its_exit_code_and_words(tmp_path: Path) -> None:
    child = await process.start([sys.executable, "-c", "import sys; sys.exit('farewell')"], tmp_path / "err")
    await child.wait()
    assert await process.end(child) == 1
    assert process.last_words(tmp_path / "err") == "farewell"

"""The log on the disk: what append has said to be logged is there after any crash, and what is there was logged."""

import errno
import multiprocessing
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from crypto.errors import LogDamaged, LogUnusable, ReceiptMalformed
from crypto.receipts import checkpoint as heads
from crypto.receipts import log as log_module
from crypto.receipts.dsse import encode
from crypto.receipts.limits import RECEIPT_BYTES_MAX, STATEMENT_BYTES_MAX
from crypto.receipts.log import ENTRIES, HEAD, INDEX, ReceiptLog
from crypto.receipts.merkle import Tree, leaf_hash, verify_consistency, verify_inclusion
from tests.crypto.receipts.making import ALPHA, filled, receipt


def root_of(count: int) -> bytes:
    hashes: list[bytes] = []
    tree = Tree(hashes, 0)
    for number in range(count):
        hashes.extend(tree.append(leaf_hash(encode(receipt(number)))))
    return tree.root()


def test_what_was_appended_is_there_and_proven(tmp_path: Path) -> None:
    log = filled(tmp_path / "receipts", 11)
    assert log.head() == (11, root_of(11))
    assert list(log.entries()) == [(number, receipt(number)) for number in range(11)]
    assert list(log.entries(9)) == [(9, receipt(9)), (10, receipt(10))]
    for size in range(1, 12):
        for index in range(size):
            proof = log.inclusion(index, size)
            verify_inclusion(leaf_hash(encode(log.entry(index))), index, size, proof, root_of(size))
        verify_consistency(size, root_of(size), 11, root_of(11), log.consistency(size))


def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    log = filled(tmp_path / "receipts", 1)
    log.checkpoint("alpha", ALPHA)
    assert stat.S_IMODE(log.folder.stat().st_mode) == 0o700
    for name in (ENTRIES, INDEX, HEAD):
        assert stat.S_IMODE((log.folder / name).stat().st_mode) == 0o600


def test_a_log_that_never_was_is_empty_and_reading_makes_none(tmp_path: Path) -> None:
    log = ReceiptLog(tmp_path / "receipts")
    assert log.head() == (0, Tree([], 0).root())
    assert list(log.entries()) == []
    assert log.last_head() is None
    with pytest.raises(ValueError, match="0 entries"):
        log.entry(0)
    assert not log.folder.exists()


def test_heads_are_signed_and_prove_what_they_continue(tmp_path: Path) -> None:
    log = filled(tmp_path / "receipts", 5)
    text = log.checkpoint("alpha", ALPHA)
    head = heads.verify(text, "korora/alpha", ALPHA.verify_key)
    assert (head.size, head.root) == log.head()
    assert log.last_head() == text
    for number in range(5, 9):
        log.append(receipt(number))
    text, proofs = log.prove((5, 0, 9, 10, -1), "alpha", ALPHA)
    new = heads.verify(text, "korora/alpha", ALPHA.verify_key)
    verify_consistency(5, head.root, new.size, new.root, proofs[0])
    assert proofs[1:] == ((), (), (), ())


def test_an_entry_that_is_too_large_is_not_logged(tmp_path: Path) -> None:
    log = filled(tmp_path / "receipts", 1)
    with pytest.raises(ReceiptMalformed):
        log.append(replace(receipt(), payload=bytes(RECEIPT_BYTES_MAX)))
    assert log.head() == (1, root_of(1))


def test_the_largest_entry_is_logged_and_read(tmp_path: Path) -> None:
    log = ReceiptLog(tmp_path / "receipts")
    large = replace(receipt(), payload=bytes(STATEMENT_BYTES_MAX))
    log.append(large)
    assert log.entry(0) == large


# ---- crashes


def torn(folder: Path, source: Path, length: int) -> ReceiptLog:
    """A copy of a log whose entries end after ``length`` bytes, as if the rest had not reached the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    os.truncate(folder / ENTRIES, length)
    return ReceiptLog(folder)


def before_and_after(tmp_path: Path) -> tuple[Path, int, int]:
    """A log of three entries whose index knows two: so a crash leaves it, between the entry's write and the index's."""
    before = filled(tmp_path / "before", 2).folder
    index, start = (before / INDEX).read_bytes(), (before / ENTRIES).stat().st_size
    after = filled(tmp_path / "after", 3).folder
    (after / INDEX).write_bytes(index)
    return after, start, (after / ENTRIES).stat().st_size


def test_a_tail_that_is_torn_at_any_byte_is_cut_away_and_said(tmp_path: Path) -> None:
    after, start, end = before_and_after(tmp_path)
    said: list[str] = []
    for length in range(start + 1, end):
        torn(tmp_path / "torn", after, length)
        log = ReceiptLog(tmp_path / "torn", said.append)
        assert log.append(receipt(7)) == 2
        assert (
            said.pop() == f"a crash left {length - start} bytes of an entry that was never logged: they were cut away"
        )
        assert [envelope for _, envelope in log.entries()] == [receipt(0), receipt(1), receipt(7)]


def test_an_entry_that_is_whole_is_never_cut_away(tmp_path: Path) -> None:
    after, _, end = before_and_after(tmp_path)
    said: list[str] = []
    torn(tmp_path / "torn", after, end)
    assert ReceiptLog(tmp_path / "torn", said.append).head() == (3, root_of(3))
    assert said == ["1 entries were logged and not in the index: it has them now"]


def test_sectors_that_were_never_written_read_as_zeros(tmp_path: Path) -> None:
    after, start, end = before_and_after(tmp_path)
    for first, last in ((start, end - 1), (start, start + 512), (end - 512, end - 1), (start, end)):
        log = torn(tmp_path / "torn", after, end)
        with (tmp_path / "torn" / ENTRIES).open("r+b") as file:
            file.seek(first)
            file.write(bytes(last - first))
        assert log.append(receipt(2)) == 2
        assert log.head() == (3, root_of(3))


def test_an_index_that_a_crash_cut_short_or_left_as_holes_is_made_anew(tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole", 6).folder
    content = (whole / INDEX).read_bytes()
    for length in range(len(content)):
        for index in (content[:length], content[:length] + bytes(len(content) - length)):
            (whole / INDEX).write_bytes(index)
            assert ReceiptLog(whole).head() == (6, root_of(6))
            assert (whole / INDEX).read_bytes() == content
    (whole / INDEX).unlink()
    assert ReceiptLog(whole).append(receipt(6)) == 6
    assert ReceiptLog(whole).head() == (7, root_of(7))


@pytest.mark.parametrize("left", [b"", bytes(150)])
def test_an_empty_head_after_a_crash_is_no_head(tmp_path: Path, left: bytes) -> None:
    log = filled(tmp_path / "log", 1)
    (log.folder / HEAD).write_bytes(left)
    assert log.append(receipt(1)) == 1


# ---- what is no crash is damage, and nothing is appended to it


@pytest.mark.parametrize("offset", [0, 700, -1, -2, -700])
def test_an_altered_last_entry_stops_the_log(tmp_path: Path, offset: int) -> None:
    log = filled(tmp_path / "log", 3)
    content = bytearray((log.folder / ENTRIES).read_bytes())
    place = len(content) + offset if offset < 0 else log_start(log) + offset
    content[place] ^= 1
    (log.folder / ENTRIES).write_bytes(content)
    with pytest.raises(LogDamaged, match="entry 2") as caught:
        log.append(receipt(3))
    assert "evidence" in caught.value.remedy
    assert (log.folder / ENTRIES).read_bytes() == content


def log_start(log: ReceiptLog) -> int:
    """Where the third entry begins."""
    return sum(len(encode(receipt(number))) + 1 for number in range(2))


def test_an_altered_entry_is_named_when_it_is_read(tmp_path: Path) -> None:
    log = filled(tmp_path / "log", 3)
    content = (log.folder / ENTRIES).read_bytes()
    (log.folder / ENTRIES).write_bytes(content.replace(encode(receipt(1))[:-9], encode(receipt(7))[:-9]))
    assert log.entry(0) == receipt(0)
    with pytest.raises(LogDamaged, match="entry 1 is altered"):
        log.entry(1)
    with pytest.raises(LogDamaged, match="entry 1 is altered"):
        list(log.entries())


@pytest.mark.parametrize("left", range(4))
def test_a_log_that_lost_entries_stops(tmp_path: Path, left: int) -> None:
    log = filled(tmp_path / "log", 4)
    length = sum(len(encode(receipt(number))) + 1 for number in range(left))
    os.truncate(log.folder / ENTRIES, length)
    with pytest.raises(LogDamaged, match="entry 3 is cut short"):
        log.append(receipt(4))


def test_a_log_that_was_shortened_with_its_index_stops_at_its_signed_head(tmp_path: Path) -> None:
    log = filled(tmp_path / "log", 4)
    log.checkpoint("alpha", ALPHA)
    shorter = filled(tmp_path / "shorter", 3)
    for name in (ENTRIES, INDEX):
        shutil.copy(shorter.folder / name, log.folder / name)
    with pytest.raises(LogDamaged, match="3 entries are left of 4"):
        log.append(receipt(3))


@pytest.mark.parametrize("index", [b"", None])
def test_a_truncation_that_looks_like_a_crash_is_none_where_a_head_covers_it(
    tmp_path: Path, index: bytes | None
) -> None:
    """And nothing of it is cut away: it is evidence."""
    log = filled(tmp_path / "log", 3)
    whole = (log.folder / INDEX).read_bytes()
    log.append(receipt(3))
    log.checkpoint("alpha", ALPHA)
    left = (log.folder / ENTRIES).read_bytes()[:-1]
    (log.folder / ENTRIES).write_bytes(left)
    (log.folder / INDEX).write_bytes(whole if index is None else index)
    for use in (lambda: log.append(receipt(3)), log.head):
        with pytest.raises(LogDamaged, match="3 entries are left of 4"):
            use()
    assert (log.folder / ENTRIES).read_bytes() == left


def test_a_log_that_was_rewritten_with_its_index_stops_at_its_signed_head(tmp_path: Path) -> None:
    log = filled(tmp_path / "log", 4)
    log.checkpoint("alpha", ALPHA)
    other = ReceiptLog(tmp_path / "other")
    for number in (0, 9, 2, 3, 4):
        other.append(receipt(number))
    for name in (ENTRIES, INDEX):
        shutil.copy(other.folder / name, log.folder / name)
    with pytest.raises(LogDamaged, match="was rewritten"):
        log.append(receipt(5))


def test_a_line_that_is_no_receipt_stops_the_log(tmp_path: Path) -> None:
    log = filled(tmp_path / "log", 2)
    for tail in (b"{}\n", b"x" * (RECEIPT_BYTES_MAX + 2)):
        content = (log.folder / ENTRIES).read_bytes()
        (log.folder / ENTRIES).write_bytes(content + tail)
        with pytest.raises(LogDamaged, match="entry 2 is"):
            log.append(receipt(2))
        (log.folder / ENTRIES).write_bytes(content)
    assert log.append(receipt(2)) == 2


@pytest.mark.parametrize("name", [ENTRIES, INDEX])
def test_what_is_no_file_is_not_followed_and_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    (tmp_path / "elsewhere").touch()
    for make in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "elsewhere"), os.mkdir):
        path = folder / name
        make(path)
        with pytest.raises(LogUnusable):
            ReceiptLog(folder).append(receipt())
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        if name == INDEX:
            (folder / ENTRIES).unlink(missing_ok=True)
    assert (tmp_path / "elsewhere").read_bytes() == b""


# ---- a disk that is full, or fails


@pytest.mark.parametrize("file", [ENTRIES, INDEX])
@pytest.mark.parametrize("written", [0, 1, 10])
def test_a_full_disk_leaves_nothing_half_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, written: int
) -> None:
    log = filled(tmp_path / "log", 2)
    contents = {name: (log.folder / name).read_bytes() for name in (ENTRIES, INDEX)}
    real = os.pwrite

    def full(descriptor: int, content: bytes, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/{file}"):
            real(descriptor, bytes(content)[:written], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, content, offset)

    with monkeypatch.context() as patched:
        patched.setattr(log_module.os, "pwrite", full)
        with pytest.raises(LogUnusable, match="No space left") as caught:
            log.append(receipt(2))
    assert "make room" in caught.value.remedy
    assert {name: (log.folder / name).read_bytes() for name in (ENTRIES, INDEX)} == contents
    assert log.append(receipt(2)) == 2
    assert log.head() == (3, root_of(3))


def test_a_disk_that_does_not_sync_has_logged_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = filled(tmp_path / "log", 2)

    def fails(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(log_module.os, "fsync", fails)
        with pytest.raises(LogUnusable, match="Input/output"):
            log.append(receipt(2))
    assert log.head() == (2, root_of(2))


def test_the_entry_is_on_the_disk_before_its_index_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an index that knows of an entry would not show that the entry was there."""
    log = filled(tmp_path / "log", 1)
    order: list[str] = []
    real_write, real_sync = os.pwrite, os.fsync

    def name_of(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    def write(descriptor: int, content: bytes, offset: int) -> int:
        order.append(f"write {name_of(descriptor)}")
        return real_write(descriptor, content, offset)

    def sync(descriptor: int) -> None:
        order.append(f"sync {name_of(descriptor)}")
        real_sync(descriptor)

    monkeypatch.setattr(log_module.os, "pwrite", write)
    monkeypatch.setattr(log_module.os, "fsync", sync)
    log.append(receipt(1))
    assert order == ["write entries", "sync entries", "write index"]


# ---- several at once


def _append_many(folder: Path, first: int, count: int) -> None:
    log = ReceiptLog(folder)
    for number in range(first, first + count):
        log.append(receipt(number))
        log.checkpoint("alpha", ALPHA)


def together(*targets: Callable[[], None] | tuple[Callable[..., None], tuple[object, ...]]) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=arguments) for target, arguments in targets]  # type: ignore[misc]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        if process.is_alive():
            process.kill()
            process.join(5)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def test_two_processes_append_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    together(*((_append_many, (folder, 100 * part, 25)) for part in range(3)))
    logged = [int(envelope.payload.split(b'"session":"')[1][:32], 16) for _, envelope in ReceiptLog(folder).entries()]
    assert sorted(logged) == [100 * part + number for part in range(3) for number in range(25)]
    for part in range(3):  # each in its own order
        assert [one for one in logged if one // 100 == part] == [100 * part + number for number in range(25)]


@pytest.mark.parametrize("end", [0, 1, 1 << 40, (1 << 64) - 1])
def test_an_index_that_leads_elsewhere_is_not_followed(tmp_path: Path, end: int) -> None:
    log = filled(tmp_path / "log", 4)
    content = (log.folder / INDEX).read_bytes()
    second = 8 + 32  # behind the first entry's end and leaf
    (log.folder / INDEX).write_bytes(content[:second] + end.to_bytes(8, "big") + content[second + 8 :])
    with pytest.raises(LogDamaged, match="entry 1 does not end at") as caught:
        log.entry(1)
    assert "made anew" in caught.value.remedy
    (log.folder / INDEX).unlink()
    assert log.entry(1) == receipt(1)

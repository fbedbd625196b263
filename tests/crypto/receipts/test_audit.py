"""Tampering with a log in any way is found, and named with the entry: also by whoever makes the index anew."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from crypto.errors import LogUnusable
from crypto.receipts import audit as audit_module
from crypto.receipts.audit import Audit, audit
from crypto.receipts.dsse import Envelope, countersign, encode, sign
from crypto.receipts.log import ENTRIES, HEAD, INDEX, ReceiptLog
from crypto.receipts.merkle import leaf_hash
from crypto.receipts.receipt import Receipt
from crypto.receipts.signers import Trust
from crypto.receipts.statement import Heads, build
from tests.crypto.receipts.making import ALPHA, BETA, STRANGER, Known, filled, predicate, receipt

TRUST = Known()
LINES = [encode(receipt(number)) + b"\n" for number in range(5)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of three entries with its signed head; never changed."""
    log = filled(tmp_path_factory.mktemp("audit") / "receipts", 3)
    log.checkpoint("alpha", ALPHA)
    return log.folder


def audited(whole: Path, tmp_path: Path, name: str, content: bytes) -> Audit:
    """What is found where one file holds something else."""
    folder = tmp_path / "altered"
    if not folder.exists():
        shutil.copytree(whole, folder)
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    found = audit(folder, TRUST, "alpha")
    (folder / name).write_bytes(before)
    return found


def kinds(found: Audit) -> list[tuple[str, int | None]]:
    return [(one.kind, one.index) for one in found.findings]


def test_nothing_is_found_in_a_log_that_is_in_order(whole: Path) -> None:
    found = audit(whole, TRUST, "alpha")
    assert (found.findings, found.entries, found.unindexed, found.torn) == ([], 3, 0, 0)
    assert found.head is not None
    assert (found.head.size, found.root) == (3, found.head.root)
    assert audit(whole, TRUST).findings == []  # whose log it is, its head says


@pytest.mark.parametrize("part", range(8))
def test_every_byte_of_the_entries_that_is_altered_is_found_and_its_entry_named(tmp_path: Path, part: int) -> None:
    log = filled(tmp_path / "whole", 2)
    log.checkpoint("alpha", ALPHA)
    for place in range(part, len(LINES[0]) + len(LINES[1]), 8):
        content, entry = LINES[0] + LINES[1], int(place >= len(LINES[0]))
        flips = {1 << (place // 8 % 8)}  # a bit
        if place % 7 == 0:
            flips.add(content[place] ^ ord("\n"))  # a newline where there was none
        for flip in flips - {0}:
            altered = content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :]
            found = audited(log.folder, tmp_path, ENTRIES, altered)
            assert found.findings, place
            assert found.findings[0].index == entry, (place, found.findings)
            assert found.findings[0].kind in {"altered", "truncated"}, (place, found.findings)


def test_every_byte_of_the_index_that_is_altered_is_found(whole: Path, tmp_path: Path) -> None:
    content = (whole / INDEX).read_bytes()
    ends = [40, 40 + 72, 40 + 72 + 40]
    for place in range(len(content)):
        entry = next(number for number, end in enumerate(ends) if place < end)
        altered = content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        found = audited(whole, tmp_path, INDEX, altered)
        assert kinds(found) == [("index", entry)], (place, found.findings)


def test_every_byte_of_the_head_that_is_altered_is_found(whole: Path, tmp_path: Path) -> None:
    content = (whole / HEAD).read_bytes()
    for place in range(len(content)):
        altered = content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        found = audited(whole, tmp_path, HEAD, altered)
        assert kinds(found) == [("head", None)], (place, found.findings)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ([1, 2], [("missing", 0)]),
        ([0, 2], [("missing", 1)]),
        ([0, 1], [("truncated", 2)]),
        ([], [("truncated", 0)]),
        ([1, 0, 2], [("out of order", 0), ("out of order", 1)]),
        ([2, 1, 0], [("out of order", 0), ("out of order", 2)]),
        ([1, 2, 0], [("out of order", 0), ("out of order", 1), ("out of order", 2)]),
        ([0, 0, 1, 2], [("repeated", 1)]),
        ([0, 1, 0, 2], [("repeated", 2)]),
        ([0, 1, 2, 2], [("repeated", 3)]),
        ([0, 1, 2, 0], [("repeated", 3)]),
        ([0, 3, 1, 2], [("added", 1)]),
        ([3, 1, 2], [("altered", 0)]),
    ],
)
def test_entries_that_are_taken_away_moved_doubled_or_put_in_are_named(
    whole: Path, tmp_path: Path, order: Sequence[int], expected: list[tuple[str, int]]
) -> None:
    found = audited(whole, tmp_path, ENTRIES, b"".join(LINES[number] for number in order))
    assert kinds(found) == expected, found.findings


@pytest.mark.parametrize("order", [[1, 2], [0, 2, 1], [0, 1], [0, 3, 2], [0, 3, 1, 2], []])
def test_whoever_makes_the_index_anew_is_found_by_the_signed_head(
    whole: Path, tmp_path: Path, order: Sequence[int]
) -> None:
    log = ReceiptLog(tmp_path / "log")
    for number in order:
        log.append(receipt(number))
    log.folder.mkdir(exist_ok=True)
    shutil.copy(whole / HEAD, log.folder)
    found = audit(log.folder, TRUST, "alpha")
    expected = ("truncated", len(order)) if len(order) < 3 else ("forked", None)
    assert kinds(found) == [expected]


def told(number: int, text: str) -> Envelope:
    """A receipt that tells a head of alpha's log."""
    content = build(msgspec.structs.replace(predicate(number), heads=Heads(source=text)), {})
    return countersign(sign(content, ALPHA), BETA)


def test_whoever_makes_the_head_anew_too_is_found_by_heads_that_receipts_tell(tmp_path: Path) -> None:
    """Its host's key signs whatever it likes; what the other host has signed with it stays."""
    log = filled(tmp_path / "log", 3)
    later = told(3, log.checkpoint("alpha", ALPHA))
    log.append(later)
    log.checkpoint("alpha", ALPHA)
    assert audit(log.folder, TRUST, "alpha").findings == []
    for order in ([1, 2], [0, 9, 2], [0, 2, 1]):
        forked = ReceiptLog(tmp_path / f"forked{order}")
        for number in order:
            forked.append(receipt(number))
        forked.append(later)
        forked.checkpoint("alpha", ALPHA)
        found = audit(forked.folder, TRUST, "alpha")
        assert kinds(found) == [("forked", len(order))]


def test_a_receipt_that_a_stranger_signed_is_found(tmp_path: Path) -> None:
    log = filled(tmp_path / "log", 1)
    log.append(sign(receipt(1).payload, STRANGER))
    found = audit(log.folder, TRUST, "alpha")
    assert kinds(found) == [("receipt", 1)]
    assert "without the signature of any host" in found.findings[0].what


def test_what_a_crash_left_is_told_and_is_nothing_wrong(tmp_path: Path) -> None:
    log = filled(tmp_path / "log", 2)
    index = (log.folder / INDEX).read_bytes()
    log.append(receipt(2))
    (log.folder / INDEX).write_bytes(index)
    with (log.folder / ENTRIES).open("ab") as file:
        file.write(LINES[3][:100])
    found = audit(log.folder, TRUST, "alpha")
    assert (found.findings, found.entries, found.unindexed, found.torn) == ([], 3, 1, 100)


def test_a_line_longer_than_any_receipt_is_one_line(tmp_path: Path) -> None:
    log = filled(tmp_path / "log", 2)
    with (log.folder / ENTRIES).open("ab") as file:
        file.write(b"x" * 500_000 + b"\n" + LINES[2])
    found = audit(log.folder, TRUST, "alpha")
    assert kinds(found) == [("altered", 2)]
    assert found.entries == 4


def test_a_log_that_grows_while_it_is_read_is_read_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = filled(tmp_path / "log", 3)
    log.checkpoint("alpha", ALPHA)
    real = audit_module.examine
    grown = iter(range(3, 100))

    def growing(envelope: Envelope, trust: Trust) -> Receipt:
        log.append(receipt(next(grown)))
        log.checkpoint("alpha", ALPHA)
        return real(envelope, trust)

    monkeypatch.setattr(audit_module, "examine", growing)
    found = audit(log.folder, TRUST, "alpha")
    assert (found.findings, found.entries, found.unindexed) == ([], 3, 0)
    assert found.head is not None
    assert found.head.size == 3


def test_no_log_is_an_empty_one_and_one_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    assert audit(tmp_path / "none", TRUST).entries == 0
    (tmp_path / ENTRIES).mkdir()
    with pytest.raises(LogUnusable):
        audit(tmp_path, TRUST)


def test_an_entry_that_is_spelled_otherwise_is_found_although_its_index_goes_with_it(tmp_path: Path) -> None:
    """The same receipt, so its signatures hold; but nobody has logged these bytes."""
    line = LINES[0].replace(b'","', b'", "')
    (tmp_path / ENTRIES).write_bytes(line)
    (tmp_path / INDEX).write_bytes(len(line).to_bytes(8, "big") + leaf_hash(line[:-1]))
    found = audit(tmp_path, TRUST, "alpha")
    assert kinds(found) == [("receipt", 0)]
    assert "not spelled" in found.findings[0].what

"""Whoever rewrites or shortens his log shows it to every host that has seen a head of it."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crypto import files
from crypto.errors import HeadMalformed, LogForked, LogTruncated, LogUnusable, PkiNameInvalid
from crypto.receipts import peers as peers_module
from crypto.receipts.checkpoint import Checkpoint, sign
from crypto.receipts.limits import EVIDENCE_FILES_MAX, HEADS_ASKED_MAX, HEADS_KNOWN_MAX
from crypto.receipts.log import ReceiptLog
from crypto.receipts.peers import Evidence, PeerHeads
from tests.crypto.receipts.making import ALPHA, BETA, filled, receipt

KEY = ALPHA.verify_key


def exchange(peers: PeerHeads, log: ReceiptLog) -> Checkpoint:
    """One session's exchange: the peer is asked, and answers."""
    asked = peers.known("alpha")
    text, proofs = log.prove(tuple(one.head.size for one in asked), "alpha", ALPHA)
    return peers.check("alpha", KEY, text, asked, proofs)


def grown(folder: Path, *numbers: int) -> ReceiptLog:
    log = ReceiptLog(folder)
    for number in numbers:
        log.append(receipt(number))
    return log


def test_a_log_that_grows_is_followed(tmp_path: Path) -> None:
    peers, log = PeerHeads(tmp_path / "beta"), ReceiptLog(tmp_path / "alpha")
    assert peers.known("alpha") == ()
    for number in range(9):
        assert exchange(peers, log).size == number
        log.append(receipt(number))
    exchange(peers, log)
    assert exchange(peers, log).size == 9  # nothing new
    assert [one.head.size for one in peers.known("alpha")] == [9]


def test_a_log_that_was_truncated_with_a_valid_signature_is_found(tmp_path: Path) -> None:
    peers = PeerHeads(tmp_path / "beta")
    exchange(peers, filled(tmp_path / "alpha", 5))
    with pytest.raises(LogTruncated, match="it has 4 entries, and had 5") as caught:
        exchange(peers, filled(tmp_path / "shorter", 4))
    evidence = one_evidence(tmp_path)
    assert evidence.what == "truncated"
    assert (evidence.known.head.size, evidence.shown.head.size) == (5, 4)
    assert str(next((tmp_path / "beta" / "peers").glob("*.evidence"))) in str(caught.value)
    assert "alpha.json" in caught.value.remedy
    with pytest.raises(LogTruncated):  # and again: the longer one stays
        exchange(peers, filled(tmp_path / "shorter again", 4))
    assert exchange(peers, grown(tmp_path / "alpha", 5)).size == 6


@pytest.mark.parametrize("numbers", [(0, 1, 9), (9, 1, 2, 3), (1, 0, 2), (0, 2, 3, 4, 5, 6), (0, 1, 1, 2)])
def test_a_log_that_was_rewritten_with_a_valid_signature_is_found(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    peers = PeerHeads(tmp_path / "beta")
    exchange(peers, filled(tmp_path / "alpha", 3))
    with pytest.raises(LogForked, match=f"its {len(numbers)} entries do not continue the 3"):
        exchange(peers, grown(tmp_path / "forked", *numbers))
    evidence = one_evidence(tmp_path)
    assert evidence.what == "forked"
    assert (evidence.known.head.size, evidence.shown.head.size) == (3, len(numbers))


def one_evidence(tmp_path: Path) -> Evidence:
    found = list((tmp_path / "beta" / "peers").glob("*.evidence"))
    assert len(found) == 1
    return msgspec.json.decode(found[0].read_bytes(), type=Evidence)


def test_sessions_that_ask_at_one_time_are_each_proven_and_the_next_one_proves_both(tmp_path: Path) -> None:
    peers, log = PeerHeads(tmp_path / "beta"), filled(tmp_path / "alpha", 3)
    exchange(peers, log)
    asked = peers.known("alpha")
    first = log.prove((3,), "alpha", ALPHA)
    log.append(receipt(3))
    second = log.prove((3,), "alpha", ALPHA)
    peers.check("alpha", KEY, second[0], asked, second[1])  # the later one comes first
    assert peers.check("alpha", KEY, first[0], asked, first[1]).size == 3
    assert sorted(one.head.size for one in peers.known("alpha")) == [3, 4]
    log.append(receipt(4))
    exchange(peers, log)
    assert [one.head.size for one in peers.known("alpha")] == [5]


def test_two_forks_shown_to_two_sessions_at_one_time_are_found_by_the_next(tmp_path: Path) -> None:
    """Each continues what was known, and neither the other."""
    peers, log = PeerHeads(tmp_path / "beta"), filled(tmp_path / "alpha", 3)
    exchange(peers, log)
    asked = peers.known("alpha")
    shutil.copytree(tmp_path / "alpha", tmp_path / "fork")
    fork = grown(tmp_path / "fork", 7, 8)
    grown(tmp_path / "alpha", 3)
    for one in (log, fork):
        text, proofs = one.prove((3,), "alpha", ALPHA)
        peers.check("alpha", KEY, text, asked, proofs)
    for one in (log, fork):
        grown(one.folder, 10, 11)
        with pytest.raises(LogForked):
            exchange(peers, one)


def test_two_heads_of_one_size_and_two_roots_are_a_fork_at_once(tmp_path: Path) -> None:
    peers = PeerHeads(tmp_path / "beta")
    exchange(peers, filled(tmp_path / "alpha", 3))
    text, _ = grown(tmp_path / "fork", 0, 1, 9).prove((), "alpha", ALPHA)
    with pytest.raises(LogForked):
        peers.check("alpha", KEY, text)  # as a session that had met nobody yet


def test_many_sessions_at_one_time_come_down_to_one_head(tmp_path: Path) -> None:
    peers, log = PeerHeads(tmp_path / "beta"), ReceiptLog(tmp_path / "alpha")
    for number in range(HEADS_KNOWN_MAX):
        log.append(receipt(number))
        peers.check("alpha", KEY, log.checkpoint("alpha", ALPHA))
    log.append(receipt(99))
    with pytest.raises(LogUnusable, match=f"{HEADS_KNOWN_MAX} heads"):
        peers.check("alpha", KEY, log.checkpoint("alpha", ALPHA))
    assert len(peers.known("alpha")) == HEADS_ASKED_MAX
    for _ in range(HEADS_KNOWN_MAX // (HEADS_ASKED_MAX - 1) + 1):
        exchange(peers, log)
    assert [one.head.size for one in peers.known("alpha")] == [HEADS_KNOWN_MAX + 1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        sign(Checkpoint("korora/beta", 3, bytes(32)), ALPHA),
        sign(Checkpoint("korora/alpha", 3, bytes(32)), BETA),
        sign(Checkpoint("korora/alpha", 3, bytes(32)), ALPHA).replace("\n3\n", "\n4\n"),
    ],
)
def test_what_the_host_has_not_signed_is_not_remembered(tmp_path: Path, text: str) -> None:
    peers = PeerHeads(tmp_path / "beta")
    with pytest.raises(HeadMalformed):
        peers.check("alpha", KEY, text)
    assert peers.known("alpha") == ()


def test_proofs_must_be_as_many_as_were_asked_for(tmp_path: Path) -> None:
    peers, log = PeerHeads(tmp_path / "beta"), filled(tmp_path / "alpha", 3)
    exchange(peers, log)
    with pytest.raises(HeadMalformed, match="against 0"):
        peers.check("alpha", KEY, log.checkpoint("alpha", ALPHA), peers.known("alpha"), ())


def test_evidence_does_not_fill_the_disk(tmp_path: Path) -> None:
    peers = PeerHeads(tmp_path / "beta")
    exchange(peers, filled(tmp_path / "alpha", 3))
    asked = peers.known("alpha")
    for number in range(EVIDENCE_FILES_MAX + 3):
        text = sign(Checkpoint("korora/alpha", 4, bytes([number]) * 32), ALPHA)
        for _ in range(2):  # the same twice is one file
            with pytest.raises(LogForked):
                peers.check("alpha", KEY, text, asked, ((),))
    assert len(list((tmp_path / "beta" / "peers").glob("*.evidence"))) == EVIDENCE_FILES_MAX


def test_what_is_remembered_is_not_believed_either(tmp_path: Path) -> None:
    peers = PeerHeads(tmp_path / "beta")
    exchange(peers, filled(tmp_path / "alpha", 3))
    path = tmp_path / "beta" / "peers" / "alpha.json"
    content = path.read_bytes()
    told: Any = msgspec.json.decode(content)
    for altered in (
        b"{}",
        content[:-2],
        content[:9] + bytes(16) + content[25:],
        content.replace(b"\\n3\\n", b"\\n2\\n"),
        content.replace(b'"key":"', b'"key":"0', 1),
        msgspec.json.encode({"heads": []}),
        msgspec.json.encode({"heads": told["heads"] * (HEADS_KNOWN_MAX + 1)}),
        b" " * 1_000_000,
    ):
        assert altered != content
        path.write_bytes(altered)
        with pytest.raises(HeadMalformed, match=r"alpha\.json") as caught:
            peers.known("alpha")
        assert "followed anew" in caught.value.remedy


def test_an_empty_file_after_a_crash_is_no_head(tmp_path: Path) -> None:
    peers, log = PeerHeads(tmp_path / "beta"), filled(tmp_path / "alpha", 3)
    exchange(peers, log)
    (tmp_path / "beta" / "peers" / "alpha.json").write_bytes(b"")
    assert peers.known("alpha") == ()
    assert exchange(peers, log).size == 3


def test_a_line_that_a_crash_cut_short_leaves_the_head_before_it(tmp_path: Path) -> None:
    peers, log = PeerHeads(tmp_path / "beta"), filled(tmp_path / "alpha", 3)
    path = tmp_path / "beta" / "peers" / "alpha.json"
    exchange(peers, log)
    first = len(path.read_bytes())
    log.append(receipt(3))
    exchange(peers, log)
    content = path.read_bytes()
    assert [one.head.size for one in PeerHeads(tmp_path / "beta").known("alpha")] == [4]
    for length in range(first, len(content)):
        for left in (content[:length], content[:length] + bytes(len(content) - length - 1) + b"\n"):
            path.write_bytes(left)
            assert [one.head.size for one in peers.known("alpha")] == ([4] if left == content else [3])
    path.write_bytes(content[:-9])
    assert exchange(peers, log).size == 4
    assert path.read_bytes() == content


def test_a_line_that_is_whole_and_another_is_no_crash(tmp_path: Path) -> None:
    peers, log = PeerHeads(tmp_path / "beta"), filled(tmp_path / "alpha", 3)
    path = tmp_path / "beta" / "peers" / "alpha.json"
    exchange(peers, log)
    log.append(receipt(3))
    exchange(peers, log)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\\n4\\n", b"\\n5\\n"))
    with pytest.raises(HeadMalformed, match="does not verify"):
        peers.known("alpha")


def test_many_sessions_leave_a_short_file(tmp_path: Path) -> None:
    peers, log = PeerHeads(tmp_path / "beta"), ReceiptLog(tmp_path / "alpha")
    lengths = set()
    for number in range(120):
        log.append(receipt(number))
        exchange(peers, log)
        lengths.add((tmp_path / "beta" / "peers" / "alpha.json").stat().st_size)
    assert max(lengths) < 34 * 1024
    assert [one.head.size for one in PeerHeads(tmp_path / "beta").known("alpha")] == [120]


def test_a_full_disk_is_said_and_the_verdict_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, log = PeerHeads(tmp_path / "beta"), filled(tmp_path / "alpha", 3)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(peers_module, "write_private", full)
        with pytest.raises(LogUnusable, match="No space left"):
            exchange(peers, log)
        assert peers.known("alpha") == ()
    exchange(peers, log)
    log.append(receipt(3))
    with monkeypatch.context() as patched:
        real = os.pwrite
        patched.setattr(
            peers_module.os,
            "pwrite",
            lambda file, content, at: real(file, content[:20] if bytes(content[:8]) == b'{"heads"' else content, at),
        )
        with pytest.raises(LogUnusable, match="No space left"):
            exchange(peers, log)
        assert [one.head.size for one in peers.known("alpha")] == [3]
    exchange(peers, log)
    monkeypatch.setattr(peers_module, "write_private", full)
    with pytest.raises(LogTruncated, match="cannot be kept: No space left"):
        exchange(peers, filled(tmp_path / "shorter", 2))
    assert files.write_private is not full


@pytest.mark.parametrize("name", ["", ".", "../alpha", "a/b"])
def test_a_name_that_no_host_has_leads_nowhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(PkiNameInvalid):
        PeerHeads(tmp_path).known(name)

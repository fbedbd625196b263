"""What xl says at the end of a migration: followed in any pieces, and nothing else passes for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import HypervisorFailed
from proxy.handover.xl import (
    BANNER,
    FAILED,
    GO,
    READY,
    READY_END,
    REPORT,
    SUCCEEDED,
    Answers,
    Part,
    Permission,
)
from proxy.streams.formats import XL_GO

GOOD = BANNER + READY + SUCCEEDED
BAD = BANNER + READY + FAILED
PARTS = {GOOD: [Part.BANNER, Part.READY, Part.SUCCEEDED], BAD: [Part.BANNER, Part.READY, Part.FAILED]}
ENDS = {GOOD: {54, 88, 128}, BAD: {54, 88, 128, 172}}


def in_pieces(follower: Answers | Permission, said: bytes, size: int) -> None:
    for at in range(0, len(said), size):
        follower.feed(said[at : at + size])


def test_the_bytes_of_xl() -> None:
    """As xl_migrate.c has them, with the sizes that were measured."""
    assert BANNER == b"xl migration receiver ready, send binary domain data.\n"
    assert READY == b"domain received, ready to unpause\0"
    assert GO == XL_GO == b"domain is yours, you are cleared to unpause\0"
    assert REPORT == b"my copy unpause results are as follows\0"
    assert (len(BANNER), len(READY), len(GO), len(REPORT)) == (54, 34, 44, 39)
    assert READY_END == 88


def test_what_the_source_is_told() -> None:
    """Exactly these make it destroy its copy, or resume it."""
    assert SUCCEEDED == b"my copy unpause results are as follows\0" + b"\0"
    assert (len(SUCCEEDED), len(FAILED)) == (40, 84)
    assert FAILED == REPORT + b"\1" + GO


# ------------------------------------------------------------------ what the destination's says


@pytest.mark.parametrize("said", [GOOD, BAD], ids=["good", "bad"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 39, 40, 54, 88, 128, 172])
def test_in_pieces_of_any_size(said: bytes, size: int) -> None:
    answers, found = Answers(), []
    for at in range(0, len(said), size):
        found += answers.feed(said[at : at + size])
    assert found == PARTS[said]
    assert answers.whole


@pytest.mark.parametrize("said", [GOOD, BAD], ids=["good", "bad"])
def test_with_every_cut(said: bytes) -> None:
    for cut in range(len(said) + 1):
        answers = Answers()
        before = answers.feed(said[:cut])
        assert answers.whole is (cut in ENDS[said]), cut
        after = answers.feed(memoryview(said)[cut:])
        assert before + after == PARTS[said], cut
        assert before == PARTS[said][: sum(cut >= end for end in (54, 88, 128))], cut


@pytest.mark.parametrize("status", range(256))
def test_every_status(status: int) -> None:
    answers = Answers()
    parts = answers.feed(BANNER + READY + REPORT + bytes([status]))
    assert parts[2:] == [Part.SUCCEEDED if status == 0 else Part.FAILED]


def test_between_two_parts_it_is_whole() -> None:
    answers = Answers()
    seen = [at for at, byte in enumerate(BAD, 1) if answers.feed(bytes([byte])) is not None and answers.whole]
    assert seen == [54, 88, 128, 172]


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"Permission denied (publickey).\r\n", id="ssh"),
        pytest.param(b"libxl: error: libxl_create.c:1234\n", id="log"),
        pytest.param(READY, id="READY first"),
        pytest.param(BANNER + BANNER, id="banner twice"),
        pytest.param(BANNER + GO, id="GO"),
        pytest.param(BANNER + READY + READY, id="READY twice"),
        pytest.param(BANNER + SUCCEEDED, id="a report without READY"),
        pytest.param(BANNER + READY[:-1] + b"\n", id="no NUL"),
        pytest.param(GOOD + b"\0", id="more after success"),
        pytest.param(GOOD + SUCCEEDED, id="a report twice"),
        pytest.param(BAD + b"\0", id="more after failure"),
        pytest.param(BAD[:-1] + b"x", id="no permission after failure"),
        pytest.param(BANNER + READY + REPORT + b"\1" + READY, id="READY after failure"),
        pytest.param(bytes(4096), id="zeros"),
        pytest.param(b"x" * 10_000_000, id="much"),
    ],
)
@pytest.mark.parametrize("size", [1, 13, 10_000_000])
def test_what_is_not_xl(said: bytes, size: int) -> None:
    with pytest.raises(HypervisorFailed, match="xl migrate-receive"):
        in_pieces(Answers(), said, size)


def test_no_other_byte_at_any_place() -> None:
    """Every byte but the status is one that xl says."""
    for said in (GOOD, BAD):
        for at in range(len(said)):
            if at == 127:
                continue
            for mask in (0x01, 0x20, 0x80):
                wrong = bytearray(said)
                wrong[at] ^= mask
                with pytest.raises(HypervisorFailed):
                    Answers().feed(wrong)


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_hostile_bytes_are_xl_s_words_or_refused(pieces: list[bytes]) -> None:
    answers, said = Answers(), b""
    try:
        for piece in pieces:
            answers.feed(piece)
            said += piece
    except HypervisorFailed:
        return
    assert (BANNER + READY + REPORT).startswith(said)


@given(st.integers(0, 172), st.binary(min_size=1, max_size=20))
def test_a_good_beginning_excuses_nothing(cut: int, rest: bytes) -> None:
    answers = Answers()
    answers.feed(BAD[:cut])
    if BAD[cut:].startswith(rest) or (cut < 128 <= cut + len(rest)):
        return
    with pytest.raises(HypervisorFailed):
        answers.feed(rest)


def test_it_keeps_no_more_than_xl_says() -> None:
    answers = Answers()
    answers.feed(BAD)
    with pytest.raises(HypervisorFailed):
        answers.feed(b"x")
    assert len(answers._said) == len(BAD)


# ------------------------------------------------------------------ what the source's says


def test_go_in_pieces() -> None:
    for size in range(1, len(GO) + 1):
        permission = Permission()
        told = [permission.feed(GO[at : at + size]) for at in range(0, len(GO), size)]
        assert told == [False] * (len(told) - 1) + [True], size


def test_go_with_every_cut() -> None:
    for cut in range(1, len(GO)):
        permission = Permission()
        assert not permission.feed(memoryview(GO)[:cut])
        assert permission.feed(memoryview(GO)[cut:])


def test_nothing_is_not_go() -> None:
    permission = Permission()
    assert not permission.feed(b"")
    assert permission.feed(GO)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(GO + b"\0", id="more"),
        pytest.param(GO + GO, id="twice at once"),
        pytest.param(GO[:-1] + b"\n", id="no NUL"),
        pytest.param(b"domain is yours, you are NOT cleared to unpause\0", id="the opposite"),
        pytest.param(READY, id="READY"),
        pytest.param(b"\0" + GO, id="a NUL before"),
        pytest.param(bytes(44), id="zeros"),
        pytest.param(b"x" * 10_000_000, id="much"),
    ],
)
@pytest.mark.parametrize("size", [1, 10, 10_000_000])
def test_what_is_not_go(said: bytes, size: int) -> None:
    with pytest.raises(HypervisorFailed):
        in_pieces(Permission(), said, size)


def test_no_other_byte_of_go() -> None:
    for at in range(len(GO)):
        for mask in (0x01, 0x20, 0x80):
            wrong = bytearray(GO)
            wrong[at] ^= mask
            with pytest.raises(HypervisorFailed):
                Permission().feed(wrong)


def test_go_twice() -> None:
    permission = Permission()
    assert permission.feed(GO)
    with pytest.raises(HypervisorFailed):
        permission.feed(GO)


@given(st.lists(st.binary(max_size=30), max_size=6))
def test_hostile_bytes_are_go_or_refused(pieces: list[bytes]) -> None:
    permission, said = Permission(), b""
    try:
        for piece in pieces:
            said += piece
            assert permission.feed(piece) is (said == GO)
    except HypervisorFailed:
        return
    assert GO.startswith(said)

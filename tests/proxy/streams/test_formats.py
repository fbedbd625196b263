"""What a stream is and whether it is whole, on real streams: their ends in tests/vectors, all of them where present.

The whole streams are large and not part of the repository: KORORA_SHARED names the directory above their corpus/.
"""

import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.streams.formats import (
    HEAD_BYTES,
    TAIL_BYTES,
    XEN_END_RECORD,
    XL_GO,
    EndWatch,
    StreamFormat,
    recognise,
)

CHECKOUT = Path(__file__).parents[3]
ENDS = CHECKOUT / "tests" / "vectors" / "streams"
CORPUS = Path(os.environ.get("KORORA_SHARED", CHECKOUT.parent / "shared")) / "corpus"
ZSTD = shutil.which("zstd")
CUTS = 300
PIECE_BYTES = 1 << 18

needs_corpus = pytest.mark.skipif(
    not CORPUS.is_dir() or ZSTD is None, reason="no corpus of whole streams here (KORORA_SHARED), or no zstd"
)


@dataclass(frozen=True)
class Real:
    """A captured stream: what it is, and whether the other side answered."""

    name: str
    format: StreamFormat
    answered: bool

    @property
    def head(self) -> bytes:
        return (ENDS / f"{self.name}.head").read_bytes()

    @property
    def tail(self) -> bytes:
        return (ENDS / f"{self.name}.tail").read_bytes()

    @property
    def size_bytes(self) -> int:
        """The whole stream's size, as zstd's frame header has it."""
        command = [str(ZSTD), "-lv", str(CORPUS / f"{self.name}.zst")]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"Decompressed Size:.*\((\d+) B\)", listed)
        assert found is not None
        return int(found[1])

    def whole(self) -> Iterator[memoryview]:
        """The whole stream, piece by piece."""
        assert ZSTD is not None
        command = [ZSTD, "-dcq", "--long=27", str(CORPUS / f"{self.name}.zst")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            while piece := process.stdout.read(PIECE_BYTES):
                yield memoryview(piece)


QEMU = Real("q10_idle_a.qemu", StreamFormat.QEMU, answered=False)
XL_PV = Real("xen417-live-idle-a.xlmig-up", StreamFormat.XL, answered=True)
XL_HVM = Real("xen417-live-pvh.xlmig-up", StreamFormat.XL, answered=True)
XL_SAVE = Real("xen417-save.xlsave", StreamFormat.XL, answered=False)
KEPT = [QEMU, XL_PV, XL_HVM, XL_SAVE]
WHOLE = [
    *KEPT,
    Real("q10_touch_xbzrle.qemu", StreamFormat.QEMU, answered=False),
    Real("xen417-live-busy.xlmig-up", StreamFormat.XL, answered=True),
]

# The libxl and libxc streams stand inside an xl one, behind its header and configuration.
LIBXL_AT = XL_PV.head.index(b"LibxlFmt")
LIBXC_AT = XL_PV.head.index(b"\xff" * 8 + b"XENF")


def watched(*pieces: bytes) -> EndWatch:
    watch = EndWatch()
    for piece in pieces:
        watch.feed(memoryview(piece))
    return watch


def ends_like_a_description(data: bytes) -> bool:
    return data.endswith((b"]}", b"] }"))


# ------------------------------------------------------------------ what it is


@pytest.mark.parametrize("real", KEPT, ids=lambda real: real.name)
def test_real_streams_are_recognised_however_they_arrive(real: Real) -> None:
    assert recognise(real.head[:HEAD_BYTES]) is real.format
    assert watched(real.head).format is real.format
    assert watched(*(bytes([byte]) for byte in real.head[:100])).format is real.format


def test_inner_streams_are_recognised() -> None:
    assert recognise(XL_PV.head[LIBXL_AT:]) is StreamFormat.LIBXL
    assert recognise(XL_PV.head[LIBXC_AT:]) is StreamFormat.LIBXC


def test_multifd_channels_are_recognised() -> None:
    assert recognise(bytes.fromhex("11223344 00000001")) is StreamFormat.QEMU_MULTIFD


@pytest.mark.parametrize(
    "head", [b"", b"QEV", b"\xff" * 12, b"Xen saved domain", b"\x11\x22\x33", bytes(32), b"libxlfmt"]
)
def test_the_rest_is_opaque(head: bytes) -> None:
    assert recognise(head) is StreamFormat.OPAQUE


def test_the_receivers_side_of_a_migration_is_opaque() -> None:
    said = (ENDS / "xen417-live-idle-a.xlmig-down").read_bytes()
    assert len(said) == 128
    assert recognise(said) is StreamFormat.OPAQUE
    assert not watched(said).cut(answered=False)


# ------------------------------------------------------------------ whether it is whole


@pytest.mark.parametrize("real", KEPT, ids=lambda real: real.name)
def test_real_streams_are_whole(real: Real) -> None:
    assert not watched(real.head, real.tail).cut(answered=real.answered)
    assert not watched(real.head, *(bytes([byte]) for byte in real.tail)).cut(answered=real.answered)


@pytest.mark.parametrize("real", [XL_PV, XL_HVM], ids=lambda real: real.name)
def test_a_migration_without_its_last_byte_is_cut(real: Real) -> None:
    """An answered xl stream ends with GO and with nothing else: every shorter one is cut."""
    for short in range(1, len(real.tail)):
        assert watched(real.head, real.tail[:-short]).cut(answered=True), short


def test_a_qemu_stream_without_its_last_byte_is_cut() -> None:
    """But within its description, which no QEMU needs to run: a prefix of it that looks whole does no harm."""
    unseen = [
        short
        for short in range(1, len(QEMU.tail) - TAIL_BYTES)
        if not watched(QEMU.head, QEMU.tail[:-short]).cut(answered=False)
    ]
    assert 1 not in unseen
    assert all(ends_like_a_description(QEMU.tail[:-short]) for short in unseen)
    assert len(unseen) < 200


def test_a_saved_domain_is_whole_without_an_answer_and_cut_with_one() -> None:
    """A saved domain ends with END. Answered, the same stream is a migration whose GO is missing."""
    assert not watched(XL_SAVE.head, XL_SAVE.tail).cut(answered=False)
    assert watched(XL_SAVE.head, XL_SAVE.tail).cut(answered=True)
    assert watched(XL_PV.head, XL_PV.tail).cut(answered=False)


@pytest.mark.parametrize("at", [LIBXL_AT, LIBXC_AT], ids=["libxl", "libxc"])
def test_inner_streams_end_with_end(at: int) -> None:
    head = XL_PV.head[at:]
    assert not watched(head, XEN_END_RECORD).cut(answered=False)
    for wrong in (XEN_END_RECORD[:-1] + b"\1", b"\1" + bytes(7), XL_GO):
        assert watched(head, wrong).cut(answered=False)


@pytest.mark.parametrize(
    ("end", "cut"),
    [
        (b"\x7e\0\0\0\x2a\0", False),
        (b"\x7e\0\0\0\x2a\x04", True),
        (b"\x7e\0\0\0\x2a", True),
        (b"\x7e\0\1\0\0\0", True),
        (b"\x7d\0\0\0\x2a\0", True),
        (b'"size": 4}]}]}', False),
        (b'"size": 4}] }', False),
        (b'"size": 4}]}\0', True),
        (b"\0\0\0]}", True),
        (b"", True),
    ],
)
def test_how_a_qemu_stream_may_end(end: bytes, cut: bool) -> None:
    """Its description, or (postcopy, or none sent) a section's footer and EOF."""
    assert (
        watched(QEMU.head, b"\xaa" * 100, b'"version": 1, "fields": ' if end[:1] == b'"' else b"", end).cut(
            answered=True
        )
        is cut
    )


@given(st.binary(max_size=200).filter(lambda data: recognise(data) is StreamFormat.OPAQUE), st.booleans())
def test_what_is_not_known_is_never_called_cut(data: bytes, answered: bool) -> None:
    assert not watched(data).cut(answered=answered)


def test_a_multifd_channel_is_never_called_cut() -> None:
    assert not watched(bytes.fromhex("11223344 00000001") + bytes(3)).cut(answered=False)


@pytest.mark.parametrize("magic", [b"QEVM", b"LibxlFmt", b"Xen saved domain, xl format", b"\xff" * 8 + b"XENF"])
def test_a_known_format_that_is_nothing_but_its_magic_is_cut(magic: bytes) -> None:
    assert watched(magic).cut(answered=False)
    assert watched(magic).cut(answered=True)


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=8), st.booleans())
def test_pieces_make_no_difference(data: bytes, cuts: list[int], answered: bool) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for head in (b"", b"QEVM\0\0\0\3", b"LibxlFmt"):
        stream = head + data
        split = watched(head, *(data[start:end] for start, end in pairwise(edges)))
        whole = watched(stream)
        assert split.format is whole.format is recognise(stream)
        assert split.cut(answered=answered) == whole.cut(answered=answered)


# ------------------------------------------------------------------ whole streams


@needs_corpus
@pytest.mark.parametrize("real", WHOLE, ids=lambda real: real.name)
def test_a_whole_stream_is_whole_and_cut_anywhere_else_it_is_cut(real: Real) -> None:
    """Cut at seeded places. A saved domain that is cut behind eight zero bytes, as guests are full of, cannot be told
    from a whole one; nor can a QEMU stream that is cut within its description."""
    source = CORPUS / f"{real.name}.zst"
    if not source.exists():
        pytest.skip(f"no {source.name} in the corpus")
    size = real.size_bytes
    places = iter(sorted(random.Random(size).sample(range(HEAD_BYTES, size), CUTS)))
    watch, position, unseen, last = EndWatch(), 0, 0, b""
    place = next(places, None)
    for piece in real.whole():
        start = 0
        while place is not None and place <= position + len(piece):
            part = piece[start : place - position]
            watch.feed(part)
            last = (last + bytes(part[-TAIL_BYTES:]))[-TAIL_BYTES:]
            if not watch.cut(answered=real.answered):
                unseen += 1
                zeros = real is XL_SAVE and last.endswith(XEN_END_RECORD)
                assert zeros or (real.format is StreamFormat.QEMU and ends_like_a_description(last)), place
            start, place = place - position, next(places, None)
        watch.feed(piece[start:])
        last = (last + bytes(piece[max(start, len(piece) - TAIL_BYTES) :]))[-TAIL_BYTES:]
        position += len(piece)
    assert position == size
    assert watch.format is real.format
    assert not watch.cut(answered=real.answered)
    assert unseen <= (CUTS // 2 if real is XL_SAVE else CUTS // 50)

"""What a hostile stream may cost: memory in proportion to the piece, a bounded number of structures in each."""

import struct
import tracemalloc
from collections.abc import Iterable, Iterator

import pytest

from proxy.limits import MIB, PARSER_STEPS_MAX, XEN_RECORD_BYTES_MAX
from proxy.streams.parser import StreamParser
from tests.proxy.streams.describing import check, cut, describe
from tests.proxy.streams.made import (
    EOS,
    PAGE,
    block_list,
    libxc_header,
    multifd_init,
    multifd_packet,
    qemu_header,
    record,
    section,
    text,
    word,
)

PIECE_BYTES = 4 * MIB
MEMORY_BYTES_MAX = 10 * PIECE_BYTES  # while a piece is described; kept between pieces it is far less
KEPT_BYTES_MAX = MIB
QEMU_START = qemu_header() + section(1, 2, b"ram", block_list({b"pc.ram": 1 << 40}) + EOS)
QEMU_PART = b"\x02" + struct.pack(">I", 2) + word(0x02) + text(b"pc.ram") + b"\0"


def repeated(head: bytes, unit: bytes, pieces: int) -> Iterator[bytes]:
    """``head``, then as many ``unit`` as fill that number of pieces."""
    yield head
    filled = unit * (PIECE_BYTES // len(unit))
    for _ in range(pieces):
        yield filled


def table(entries: int, size: int) -> bytes:
    """The head of a PAGE_DATA record that claims so many entries."""
    return libxc_header() + struct.pack("<IIII", 1, size, entries, 0)


XTAB = struct.pack("<Q", 0xF << 60)
ENTRIES = (XEN_RECORD_BYTES_MAX - 8) // 8
HOSTILE = {
    "a table of nothing but pages that are not": (table(ENTRIES, 8 + 8 * ENTRIES), XTAB, 20),
    "a table of more pages than the record holds": (table(ENTRIES, 8 + 8 * ENTRIES), bytes(8), 20),
    "a table of as many pages as a record holds": (table(32_000, 8 + 32_000 * 4104), bytes(8), 3),
    "zero pages": (QEMU_START + QEMU_PART, word(0x22) + b"\0", 3),
    "zero pages with their block": (QEMU_START + QEMU_PART, word(0x02) + text(b"pc.ram") + b"\0", 3),
    "words that are nothing": (QEMU_START + QEMU_PART, word(0x200), 3),
    "sections of nothing": (QEMU_START, section(2, 2, None, EOS), 3),
    "records of nothing": (libxc_header(), record(0xD), 3),
    "blocks without end": (
        qemu_header() + section(1, 2, b"ram", word((1 << 50) | 4))[:-5],
        text(b"a" * 200) + word(PAGE),
        3,
    ),
    "sections without end": (qemu_header(), section(4, 7, b"x" * 255, bytes(9)), 3),
    "packets of nothing": (multifd_init(), multifd_packet(flags=1), 3),
    "packets with zero pages": (multifd_init(), multifd_packet([], [PAGE * n for n in range(128)]), 3),
}


def fed(parser: StreamParser, pieces: Iterable[bytes]) -> tuple[int, int]:
    """The most that was held while a piece was described, and between pieces, in bytes."""
    held = peak = 0
    for piece in pieces:
        view = memoryview(piece)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        spans = parser.feed(view, final=False)
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
        check(spans, view, final=False)
        del spans
        held = max(held, tracemalloc.get_traced_memory()[0] - before)
    return peak, held


@pytest.mark.parametrize("name", HOSTILE)
def test_memory_stays_in_proportion_to_the_piece(name: str) -> None:
    tracemalloc.start()
    try:
        peak, held = fed(StreamParser(), repeated(*HOSTILE[name]))
    finally:
        tracemalloc.stop()
    assert peak <= MEMORY_BYTES_MAX
    assert held <= KEPT_BYTES_MAX


@pytest.mark.parametrize(
    ("head", "unit"),
    [
        (libxc_header(), record(0xD)),
        (QEMU_START + QEMU_PART, word(0x02) + text(b"pc.ram") + b"\0"),
        (QEMU_START + QEMU_PART, word(0x200)),
    ],
)
def test_a_piece_of_nothing_but_structures_is_given_up(head: bytes, unit: bytes) -> None:
    """For the time that it would take: no hypervisor sends a hundred thousand of them in a few MiB."""
    few = head + unit * (PARSER_STEPS_MAX // 8)
    many = head + unit * PARSER_STEPS_MAX
    assert describe(cut(few)).facts.opaque_reason is None
    assert describe(cut(many)).facts.opaque_reason == "too_fine"
    assert describe(cut(many, range(0, len(many), 100_000))).facts.opaque_reason is None


def test_zero_pages_are_not_given_up_however_many_there_are() -> None:
    """An idle guest's stream is full of them: a piece of 4 MiB may hold 466 thousand."""
    said = describe(cut(QEMU_START + QEMU_PART + (word(0x22) + b"\0") * 400_000))
    assert said.facts.opaque_reason is None
    assert said.facts.pages_zero_marked == 400_001


def test_nothing_of_a_piece_is_kept() -> None:
    """A reader may use its buffer again, and give it back, at once."""
    for stream in (
        QEMU_START + QEMU_PART + (word(0x28) + bytes(PAGE)) * 20,
        table(3, 24 + 8 + 3 * PAGE) + bytes(24) + bytes(2 * PAGE),
        multifd_init() + multifd_packet([PAGE] * 9),
    ):
        buffer = bytearray(stream[:-100])
        spans = StreamParser().feed(memoryview(buffer), final=False)
        copies = [array.copy() for array in spans[1:4]]
        buffer[:] = bytes(len(buffer))
        assert all((array == copy).all() for array, copy in zip(spans[1:4], copies, strict=True))
        buffer.clear()  # raises BufferError while anything views it


def test_nothing_of_a_piece_is_kept_by_a_parser_that_goes_on() -> None:
    for stream in (
        QEMU_START + QEMU_PART,
        table(300, 8 + 300 * 8 + 300 * PAGE) + bytes(1000),
        multifd_init() + bytes(9),
    ):
        parser = StreamParser()
        buffer = bytearray(stream)
        parser.feed(memoryview(buffer), final=False)
        buffer.clear()

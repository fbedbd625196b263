"""What the parser of QEMU's main stream understands, what it carries as it is, and what it says of it."""

import json
import struct

import pytest

from proxy.limits import QEMU_BLOCKS_MAX, QEMU_FOOTERS_TRIED_MAX
from tests.proxy.streams.describing import Described, cut, describe, pieces_of
from tests.proxy.streams.made import (
    BLOCKS,
    EOS,
    PAGE,
    Ram,
    block_list,
    capabilities,
    command,
    footer,
    number_of,
    page,
    qemu,
    qemu_header,
    ram,
    section,
    subsection,
    text,
    vector,
    word,
)

RAM_BLOCK = number_of(b"pc.ram")
PAGES = [Ram("page", PAGE * number, b"pc.ram" if number == 0 else None) for number in range(40)]
START = qemu_header() + section(1, 2, b"ram", block_list(BLOCKS) + EOS)
REAL = ["q10-plain.qemu", "q10-q35.qemu", "q10-bitmap.qemu", "q10-ignore-shared.qemu", "q10-uuid.qemu"]


def seen(stream: bytes) -> Described:
    return describe(cut(stream))


def opaque(stream: bytes) -> str | None:
    return seen(stream).facts.opaque_reason


# ------------------------------------------------------------------ pages


def test_pages_and_zero_pages_with_their_place_in_the_guest() -> None:
    records = [
        Ram("zero", 2 * PAGE, b"pc.bios"),
        Ram("zero", 3 * PAGE),
        Ram("page", PAGE, b"pc.ram"),
        Ram("page", 63 * PAGE),
        Ram("zero", 5 * PAGE),
        Ram("page", 0, b"x" * 255),
    ]
    stream = qemu(BLOCKS, [records])
    said = seen(stream)
    bios, long = number_of(b"pc.bios"), number_of(b"x" * 255)
    assert [pfn for _, pfn in said.pages] == [RAM_BLOCK | 1, RAM_BLOCK | 63, long]
    assert said.marked == [bios | 2, bios | 3, RAM_BLOCK | 5]
    for (at, _), number in zip(said.pages, [1, 63, 0], strict=True):
        assert stream[at : at + PAGE] == page(number)
    assert said.facts.records["RAM_ZERO"] == said.facts.pages_zero_marked == 3
    assert said.facts.opaque_reason is None
    assert {block.name: block.size_bytes for block in said.facts.blocks.values()} == {
        name.decode(): size for name, size in BLOCKS.items()
    }


@pytest.mark.parametrize("kind", ["page", "zero"])
@pytest.mark.parametrize("count", [1, 5, 6, 7, 63, 64, 70, 71, 500, 5000])
def test_long_runs_of_one_kind(kind: str, count: int) -> None:
    """Which are read all at once, up to the first header that is another."""
    blocks = {b"pc.ram": 8192 * PAGE}
    run = [Ram(kind, PAGE * number, None if number else b"pc.ram") for number in range(count)]
    other = Ram("zero" if kind == "page" else "page", PAGE * 8000)
    stream = qemu(blocks, [[*run, other, Ram("xbzrle", PAGE, content=b"x"), *run[1:3]]])
    said = seen(stream)
    numbers = [RAM_BLOCK | number for number in [*range(count), *range(1, 3)[: count - 1]]]
    found = [pfn for _, pfn in said.pages] if kind == "page" else said.marked
    assert [pfn for pfn in found if pfn != RAM_BLOCK | 8000][:count] == numbers[:count]
    assert said.facts.records["RAM_XBZRLE"] == 1
    assert said.facts.opaque_reason is None
    assert describe(pieces_of(stream, 5000)).same(said)


def test_a_run_ends_where_a_page_looks_like_a_header() -> None:
    """A zero page's place is a page's inside, and the other way round: only the chain from the start is believed."""
    trap = word(0x28) * 512
    content = b"".join(word(PAGE * number | 0x28) + trap for number in range(1, 30))
    stream = START + b"\x03" + struct.pack(">I", 2) + PAGES[0].pack() + content + EOS + footer(2) + b"\0"
    assert len(seen(stream).pages) == 30
    assert opaque(stream) is None


def test_a_page_beyond_its_block_is_a_surprise_in_a_run_and_alone() -> None:
    for before in (0, 50):
        records = [*PAGES[:1], *[Ram("page", PAGE)] * before, Ram("page", BLOCKS[b"pc.ram"]), *PAGES[1:]]
        said = seen(qemu(BLOCKS, [records]))
        assert said.facts.opaque_reason == "page_offset"
        assert len(said.pages) == 1 + before


def test_differences_and_compressed_pages_are_marked() -> None:
    records = [Ram("xbzrle", PAGE, b"pc.ram", b"\1\2\3"), Ram("compress", 2 * PAGE, content=b"zlib"), *PAGES]
    said = seen(qemu(BLOCKS, [records, [Ram("flush"), Ram("hook"), Ram("flush")]]))
    assert said.marked == [RAM_BLOCK | 1, RAM_BLOCK | 2]
    assert (said.facts.pages_xbzrle, said.facts.pages_compressed, said.facts.pages_data) == (1, 1, 40)
    assert said.facts.records["RAM_MULTIFD_FLUSH"] == 2
    assert said.facts.opaque_reason is None


def test_the_block_stays_over_sections() -> None:
    """QEMU's CONTINUE means the block of the page before, whichever section that stood in."""
    said = seen(qemu(BLOCKS, [PAGES[:3], [Ram("page", 9 * PAGE)]]))
    assert said.pages[-1][1] == RAM_BLOCK | 9


# ------------------------------------------------------------------ block lists


def test_page_sizes_in_the_list_when_postcopy_was_announced() -> None:
    advise = command(3, word(PAGE) + word(PAGE))
    for extras in ({}, {b"pc.ram": word(2 << 20)}, {b"x" * 255: word(1 << 30)}, {name: word(PAGE) for name in BLOCKS}):
        start = section(1, 2, b"ram", block_list(BLOCKS, extras) + word(0x200) + EOS)
        stream = qemu_header() + command(1) + advise + start + section(3, 2, None, ram(PAGES[:2])) + b"\0"
        said = seen(stream)
        assert said.facts.opaque_reason is None
        assert len(said.pages) == 2
        assert describe(pieces_of(stream, 1)).same(said)


def test_postcopy_of_bitmaps_alone_changes_no_list() -> None:
    stream = qemu_header() + command(3) + START[len(qemu_header()) :] + section(3, 2, None, ram(PAGES))
    assert len(seen(stream).pages) == 40


def test_addresses_in_the_list_when_shared_memory_stays() -> None:
    start = section(1, 2, b"ram", block_list(BLOCKS, {name: word(0x1234_5000) for name in BLOCKS}) + EOS)
    stream = qemu_header(b"pc", capabilities(b"x-ignore-shared")) + start + section(3, 2, None, ram(PAGES))
    assert len(seen(stream).pages) == 40
    assert opaque(stream) is None


def test_more_blocks_than_any_guest_has() -> None:
    blocks = {str(number).encode(): PAGE for number in range(QEMU_BLOCKS_MAX + 1)}
    assert opaque(qemu(blocks, [])) == "block_list"
    blocks.popitem()
    assert opaque(qemu(blocks, [])) is None


# ------------------------------------------------------------------ sections


def test_device_state_is_passed_up_to_its_footer() -> None:
    devices = [b"", b"\x7e", footer(11), footer(11) + b"\x09", footer(10) + b"\x02\0\0\0\x09", bytes(70_000)]
    said = seen(qemu(BLOCKS, [PAGES], devices=devices))
    assert said.facts.records["SECTION_FULL"] == len(devices)
    assert said.facts.records["EOF"] == said.facts.records["VMDESCRIPTION"] == 1
    assert said.facts.opaque_reason is None


def test_ram_goes_on_behind_other_iterative_sections() -> None:
    """Dirty bitmaps and VFIO devices send sections of unknown length between those of RAM."""
    between = b"".join(
        [
            section(1, 3, b"dirty-bitmap", b"\x20" * 50),
            section(2, 2, None, ram(PAGES[:3])),
            section(2, 3, None, footer(2) + b"\x02\0\0\0\x02" + bytes(200)),
            section(2, 2, None, ram(PAGES[:1])),
            section(3, 3, None, b"\x01"),
        ]
    )
    stream = qemu(BLOCKS, [PAGES[:5]], between=between)
    said = seen(stream)
    assert len(said.pages) == 9
    assert said.facts.opaque_reason is None
    assert describe(pieces_of(stream, 1)).same(said)


def test_a_false_footer_costs_bytes_on_the_wire_and_none_of_the_stream() -> None:
    """Device state that looks like its own end with a section behind it is believed; what follows makes it opaque."""
    liar = footer(10) + b"\x02\0\0\0\x02" + word(0x400) + bytes(100)
    stream = qemu(BLOCKS, [PAGES], devices=[liar])
    assert opaque(stream) == "ram_flags"
    assert seen(stream).size == len(stream)


def test_a_section_full_of_look_alikes_is_given_up() -> None:
    content = (footer(10) + b"\xff" * 5) * (QEMU_FOOTERS_TRIED_MAX + 1)
    assert opaque(qemu(BLOCKS, [PAGES], devices=[content])) == "footer"
    assert opaque(qemu(BLOCKS, [PAGES], devices=[content[:-10]])) is None


def test_a_machine_without_footers_shows_its_ram() -> None:
    start = b"\x01" + struct.pack(">I", 2) + text(b"ram") + struct.pack(">II", 0, 4) + block_list(BLOCKS) + EOS
    part = b"\x02" + struct.pack(">I", 2) + ram(PAGES)
    stream = qemu_header() + start + part + part
    assert len(seen(stream).pages) == 80
    assert opaque(stream) is None
    assert opaque(stream + b"\x04" + struct.pack(">I", 5) + text(b"dev") + bytes(8)) == "no_footers"


def test_a_package_is_passed_by_its_length() -> None:
    package = section(4, 5, b"dev", footer(9) * 3)
    postcopy = command(2, bytes(4)) + command(7, struct.pack(">I", len(package))) + package + command(5)
    stream = START + section(2, 2, None, ram(PAGES)) + postcopy + section(3, 2, None, ram(PAGES)) + b"\0"
    said = seen(stream)
    assert len(said.pages) == 80
    assert said.facts.opaque_reason is None
    assert "SECTION_FULL" not in said.facts.records


def test_who_it_is_as_far_as_the_stream_tells() -> None:
    named = subsection(b"uuid", bytes(range(16)))
    said = seen(qemu_header(b"pc-q35-10.0", named) + START[len(qemu_header()) :])
    assert said.facts.vm_uuid == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert said.facts.machine == "pc-q35-10.0"
    assert said.facts.vm_name is None
    assert seen(qemu_header(b"\xff\n")).facts.machine == ""


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"QEVM" + struct.pack(">I", 2), "version"),
        (qemu_header() + b"\x09", "section_kind"),
        (START + b"\x05" + text(b"configuration/uuid"), "section_kind"),
        (qemu_header() + b"\x02" + struct.pack(">I", 2), "section_number"),
        (qemu_header() + section(1, 1 << 16, b"dev", b""), "section_number"),
        (qemu_header() + section(1, 2, b"ram", b"", version=3), "ram_version"),
        (qemu_header() + section(4, 2, b"ram", b""), "ram_version"),
        (qemu_header(b"x" * 257), "configuration"),
        (qemu_header(b"pc", subsection(b"news", b"")), "configuration"),
        (qemu_header(b"pc", subsection(b"capabilities", struct.pack(">I", 65))), "configuration"),
        (qemu_header(b"pc", subsection(b"target-page-bits", struct.pack(">I", 14))), "page_size"),
        (qemu_header(b"pc", capabilities(b"mapped-ram")), "mapped_ram"),
        (qemu_header() + section(1, 2, b"ram", word(PAGE | 4) + text(b"") + word(PAGE)), "block_list"),
        (qemu_header() + section(1, 2, b"ram", word(PAGE | 4) + text(b"a") + word(2 * PAGE)), "block_list"),
        (
            qemu_header(b"pc", capabilities(b"x-ignore-shared"))
            + command(3, bytes(16))
            + section(1, 2, b"ram", block_list(BLOCKS)),
            "block_list",
        ),
        (START + section(2, 2, None, ram([Ram("page", 0)])), "page_offset"),
        (START + section(2, 2, None, ram([Ram("page", 0, b"other")])), "unknown_block"),
        (START + section(2, 2, None, word(0x400)), "ram_flags"),
        (START + section(2, 2, None, word(0x0A)), "ram_flags"),
        (START + section(2, 2, None, word(0x30)), "ram_flags"),
        (START + section(2, 2, None, word(0x40) + text(b"pc.ram") + b"\x02\0\0"), "xbzrle"),
        (START + section(2, 2, None, word(0x40) + text(b"pc.ram") + b"\x01\x10\x01"), "xbzrle"),
        (START + section(2, 2, None, word(0x100) + text(b"pc.ram") + b"\0\0\x20\x01"), "compressed_length"),
        (START + b"\x02" + struct.pack(">I", 2) + EOS + footer(3), "footer"),
        (START + b"\0\x07", "after_end"),
        (qemu(BLOCKS, [PAGES]) + b"!", "after_end"),
    ],
)
def test_what_surprises_makes_the_rest_opaque(stream: bytes, reason: str) -> None:
    said = seen(stream)
    assert said.facts.opaque_reason == reason
    assert said.size == len(stream)


# ------------------------------------------------------------------ real ones


@pytest.mark.parametrize("name", REAL)
def test_a_real_stream_has_the_sections_that_its_own_description_names(name: str) -> None:
    stream = vector(name)
    said = seen(stream)
    assert said.facts.opaque_reason is None
    described = json.loads(stream[stream.rindex(b'{"configuration"') :] if b'{"configuration"' in stream else b"{}")
    devices = described.get("devices")
    assert devices is None or len(devices) == said.facts.records["SECTION_FULL"]
    for at, pfn in said.pages:
        assert stream[at : at + PAGE] == (struct.pack(">Q", pfn) * 512 if pfn % 3 else bytes(PAGE))


def test_a_real_stream_with_a_uuid() -> None:
    assert seen(vector("q10-uuid.qemu")).facts.vm_uuid == "3c8c0f2e-1111-4222-8333-123456789abc"


def test_a_real_postcopy_migration() -> None:
    said = seen(vector("q10-postcopy.qemu"))
    assert said.facts.opaque_reason is None
    assert said.facts.records["SECTION_PART"] == 3
    assert said.facts.records["SECTION_END"] == said.facts.records["EOF"] == 1
    assert "VMDESCRIPTION" not in said.facts.records


def test_a_real_stream_with_dirty_bitmaps() -> None:
    said = seen(vector("q10-bitmap.qemu"))
    assert said.facts.records["SECTION_START"] == said.facts.records["SECTION_END"] == 2
    assert said.facts.records["RAM_EOS"] == 22643

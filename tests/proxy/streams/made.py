"""Small streams of every format, made from the specifications' words, and hypothesis strategies of them.

Written apart from the parsers: nothing of theirs is used but the names of formats.
"""

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import zstandard
from hypothesis import strategies as st

VECTORS = Path(__file__).parents[3] / "tests" / "vectors" / "streams"
PAGE = 4096
GO = b"domain is yours, you are cleared to unpause\0"


@cache
def vector(name: str) -> bytes:
    """A real stream in small (tests/vectors/README.md)."""
    return zstandard.ZstdDecompressor().decompress((VECTORS / f"{name}.zst").read_bytes())


def page(number: int) -> bytes:
    """Some page."""
    return struct.pack(">Q", number * 0x9E3779B97F4A7C15 & 0xFFFF_FFFF_FFFF_FFFF) * 512


# ---------------------------------------------------------------------- Xen


def record(kind: int, body: bytes = b"", order: str = "<") -> bytes:
    """A record of libxc or libxl with its padding."""
    return struct.pack(f"{order}II", kind, len(body)) + body + bytes(-len(body) % 8)


def page_data(entries: Sequence[tuple[int, int]], order: str = "<") -> bytes:
    """A PAGE_DATA record of (PFN, type)."""
    table = struct.pack(f"{order}{len(entries)}Q", *(pfn | kind << 60 for pfn, kind in entries))
    pages = b"".join(page(pfn) for pfn, kind in entries if kind < 0xD)
    return record(1, struct.pack(f"{order}II", len(entries), 0) + table + pages, order)


def libxc_header(
    order: str = "<", *, version: int = 3, kind: int = 1, shift: int = 12, xen: tuple[int, int] = (4, 17)
) -> bytes:
    """Image header and domain header."""
    image = struct.pack(">8s4sIH6x", b"\xff" * 8, b"XENF", version, int(order == ">"))
    return image + struct.pack(f"{order}IHHII", kind, shift, 0, *xen)


def libxc(*records: bytes, order: str = "<", **header: Any) -> bytes:
    """A libxc stream with these records and END."""
    return libxc_header(order, **header) + b"".join(records) + record(0, order=order)


def libxl_header(order: str = "<", *, version: int = 2) -> bytes:
    return struct.pack(">8sII", b"LibxlFmt", version, int(order == ">"))


def libxl(image: bytes, *records: bytes, order: str = "<") -> bytes:
    """A libxl stream around a libxc image, with records behind that and END."""
    return libxl_header(order) + record(1, order=order) + image + b"".join(records) + record(0, order=order)


def xl_header(config: bytes, order: str = "<", *, mandatory: int = 3) -> bytes:
    """xl's header with the configuration behind it."""
    sized = struct.pack(f"{order}I", len(config)) + config
    head = struct.pack(f"{order}4I", 0x01020304, mandatory, 0, len(sized))
    return b"Xen saved domain, xl format\n \0 \r" + head + sized


def config(name: Any = "guest", uuid: Any = "0f9c2f1e-0000-4000-8000-00000000abcd") -> bytes:
    """A domain's configuration as xl sends it, in little."""
    return (
        json.dumps({"c_info": {"type": "pv", "name": name, "uuid": uuid}, "b_info": {"max_memkb": 1}}).encode() + b"\0"
    )


# ---------------------------------------------------------------------- QEMU


def word(number: int) -> bytes:
    return struct.pack(">Q", number)


def text(name: bytes) -> bytes:
    return bytes([len(name)]) + name


def footer(number: int) -> bytes:
    return b"\x7e" + struct.pack(">I", number)


def section(kind: int, number: int, name: bytes | None, content: bytes, *, version: int = 4) -> bytes:
    """A section with its footer; START and FULL have a name."""
    named = text(name) + struct.pack(">II", 0, version) if name is not None else b""
    return bytes([kind]) + struct.pack(">I", number) + named + content + footer(number)


def qemu_header(machine: bytes = b"pc-i440fx-10.0", *subsections: bytes) -> bytes:
    named = b"\x07" + struct.pack(">I", len(machine)) + machine
    return b"QEVM" + struct.pack(">I", 3) + named + b"".join(subsections)


def subsection(name: bytes, content: bytes) -> bytes:
    return b"\x05" + text(b"configuration/" + name) + struct.pack(">I", 1) + content


def capabilities(*names: bytes) -> bytes:
    return subsection(b"capabilities", struct.pack(">I", len(names)) + b"".join(text(name) for name in names))


def command(number: int, content: bytes = b"") -> bytes:
    return b"\x08" + struct.pack(">HH", number, len(content)) + content


EOS = word(0x10)


def block_list(blocks: dict[bytes, int], extras: dict[bytes, bytes] | None = None) -> bytes:
    """MEM_SIZE and its list; ``extras`` stand behind the blocks they are named for."""
    listed = b"".join(text(name) + word(size) + (extras or {}).get(name, b"") for name, size in blocks.items())
    return word(sum(blocks.values()) | 0x04) + listed


@dataclass(frozen=True)
class Ram:
    """One RAM record.

    Args:
        kind: page, zero, xbzrle, compress, flush or hook.
        block: its name, or None for the same as before.
    """

    kind: str
    offset: int = 0
    block: bytes | None = None
    content: bytes = b""

    def pack(self) -> bytes:
        if self.kind in ("flush", "hook"):
            return word(0x200 if self.kind == "flush" else 0x80)
        flag = {"page": 0x08, "zero": 0x02, "xbzrle": 0x40, "compress": 0x100}[self.kind]
        named = text(self.block) if self.block is not None else b""
        head = word(self.offset | flag | (0x20 if self.block is None else 0)) + named
        match self.kind:
            case "page":
                return head + page(self.offset // PAGE)
            case "zero":
                return head + b"\0"
            case "xbzrle":
                return head + b"\x01" + struct.pack(">H", len(self.content)) + self.content
        return head + struct.pack(">I", len(self.content)) + self.content


def ram(records: Sequence[Ram]) -> bytes:
    return b"".join(each.pack() for each in records) + EOS


def qemu(
    blocks: dict[bytes, int],
    rounds: Sequence[Sequence[Ram]],
    *,
    devices: Sequence[bytes] = (),
    between: bytes = b"",
    description: bytes | None = b'{"devices": []}',
) -> bytes:
    """A whole main stream; ``devices`` are contents of FULL sections, ``between`` stands behind the first section."""
    parts = [qemu_header(), section(1, 2, b"ram", block_list(blocks) + EOS), between]
    parts += [section(2, 2, None, ram(records)) for records in rounds[:-1]]
    parts += [section(3, 2, None, ram(records)) for records in rounds[-1:]]
    parts += [section(4, 10 + number, b"dev", content) for number, content in enumerate(devices)]
    end = b"\0" if description is None else b"\0\x06" + struct.pack(">I", len(description)) + description
    return b"".join(parts) + end


def number_of(name: bytes) -> int:
    """What stands above bit 40 of the PFNs of a block."""
    return (zlib.crc32(name) & 0xFFFFFF) << 40


# ---------------------------------------------------------------------- multifd


def multifd_init(uuid: bytes = bytes(16), number: int = 0) -> bytes:
    return struct.pack(">IIB", 0x11223344, 1, 0)[:8] + uuid + bytes([number]) + bytes(39)


def multifd_packet(
    normal: Sequence[int] = (),
    zero: Sequence[int] = (),
    *,
    block: bytes = b"pc.ram",
    flags: int = 0,
    allocated: int = 128,
    compressed: bytes | None = None,
    size: int | None = None,
) -> bytes:
    """A packet of pages at these offsets. ``allocated`` 0 is what newer SYNC packets say; they have 128."""
    data = b"".join(page(offset // PAGE) for offset in normal) if compressed is None else compressed
    head = struct.pack(">IIIII", 0x11223344, 1, flags, allocated, len(normal))
    head += struct.pack(">IQII", len(data) if size is None else size, 7, len(zero), 0) + bytes(24)
    offsets = [*normal, *zero]
    table = struct.pack(f">{len(offsets)}Q", *offsets) + bytes(8 * ((allocated or 128) - len(offsets)))
    return head + block + bytes(256 - len(block)) + table + data


def multifd_device(content: bytes) -> bytes:
    """A packet of device state (QEMU 10 and later)."""
    return struct.pack(">III256sII", 0x11223344, 1, 1 << 6, b"vfio", 0, len(content)) + content


# ---------------------------------------------------------------------- strategies

TYPES = [0x0] * 6 + [0x1, 0x4, 0x9, 0xC, 0xD, 0xE, 0xF, 0xF]
ENTRIES = st.lists(st.tuples(st.integers(0, 2**52 - 1), st.sampled_from(TYPES)), min_size=1, max_size=12)
ORDERS = st.sampled_from("<>")
BLOCKS = {b"pc.ram": 64 * PAGE, b"pc.bios": 4 * PAGE, b"x" * 255: PAGE}


@st.composite
def libxc_streams(draw: st.DrawFn, order: str | None = None) -> bytes:
    order = draw(ORDERS) if order is None else order
    some = st.one_of(
        ENTRIES.map(lambda entries: page_data(entries, order)),
        st.builds(
            record, st.sampled_from([2, 7, 9, 0xA, 0xD, 0x12, 0x80000007]), st.binary(max_size=40), st.just(order)
        ),
        st.just(record(0xE, order=order)),
    )
    return libxc(*draw(st.lists(some, max_size=4)), order=order, version=draw(st.sampled_from([2, 3])))


@st.composite
def libxl_streams(draw: st.DrawFn) -> bytes:
    order = draw(ORDERS)
    emulator = record(3, struct.pack(f"{order}II", 2, 0) + draw(st.binary(max_size=30)), order)
    checkpoints = draw(st.integers(0, 2))
    again = record(0xE, order=order) + emulator + record(4, order=order) + page_data(draw(ENTRIES), order)
    image = libxc(page_data(draw(ENTRIES), order), *[again] * checkpoints, order=order)
    return libxl(image, emulator, order=order)


@st.composite
def xl_streams(draw: st.DrawFn) -> bytes:
    name = draw(st.one_of(st.text(max_size=9), st.just("guest")))
    return xl_header(config(name)) + draw(libxl_streams()) + draw(st.sampled_from([b"", GO]))


@st.composite
def ram_rounds(draw: st.DrawFn) -> list[Ram]:
    """The records of one section, the first of each with its block; runs long enough to be scanned at once."""
    found: list[Ram] = []
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(sorted(BLOCKS)))
        kind = draw(st.sampled_from(["page", "zero", "zero", "xbzrle", "compress", "flush"]))
        for number in range(draw(st.integers(1, 20))):
            offset = PAGE * draw(st.integers(0, BLOCKS[name] // PAGE - 1))
            same = bool(found) and number and draw(st.booleans() if number == 1 else st.just(True))
            content = draw(st.binary(max_size=20)) if kind in ("xbzrle", "compress") else b""
            found.append(Ram(kind, offset, None if same else name, content))
    return found


@st.composite
def qemu_streams(draw: st.DrawFn) -> bytes:
    rounds = draw(st.lists(ram_rounds(), max_size=2))
    devices = draw(st.lists(st.binary(max_size=60), max_size=2))
    bitmap = draw(st.sampled_from([b"", section(1, 3, b"dirty-bitmap", b"\x10"), command(2, bytes(4))]))
    return qemu(BLOCKS, rounds, devices=devices, between=bitmap)


@st.composite
def multifd_streams(draw: st.DrawFn) -> bytes:
    offsets = st.lists(st.integers(0, 2**20).map(lambda number: number * PAGE), max_size=4)
    packets = st.one_of(
        st.builds(multifd_packet, offsets, offsets),
        st.builds(multifd_packet, flags=st.just(1), allocated=st.sampled_from([0, 128])),
        st.builds(multifd_packet, offsets, compressed=st.binary(max_size=50), flags=st.sampled_from([2, 4, 8])),
        st.builds(multifd_device, st.binary(max_size=50)),
    )
    return multifd_init() + b"".join(draw(st.lists(packets, max_size=3)))


STREAMS = st.one_of(libxc_streams(), libxl_streams(), xl_streams(), qemu_streams(), multifd_streams())

"""QEMU's main stream: sections, and within those of RAM its pages. Sans-IO.

Follows docs/devel/migration/main.rst, migration/savevm.c and migration/ram.c of QEMU. Sections of devices do not tell
their length: they are passed up to their footer, where the next section's head must follow (docs/streams.md).
"""

import struct
from typing import Final

import numpy as np

from chunking.pages import PAGE_BYTES
from proxy.limits import (
    QEMU_BLOCKS_MAX,
    QEMU_CAPABILITIES_MAX,
    QEMU_COMPRESSED_BYTES_MAX,
    QEMU_FOOTERS_TRIED_MAX,
    QEMU_MACHINE_BYTES_MAX,
    QEMU_SECTIONS_MAX,
)
from proxy.streams.facts import StreamFacts
from proxy.streams.formats import QEMU_MAGIC, QEMU_SECTION_EOF, QEMU_SECTION_FOOTER
from proxy.streams.multifd import BLOCK_SHIFT, note_block, note_uuid
from proxy.streams.reader import Reader, Steps, Surprise
from proxy.streams.scan import scan
from proxy.streams.vtpm import VtpmWatch

QEMU_VERSION: Final = 3
SECTION_START: Final = 0x01
SECTION_PART: Final = 0x02
SECTION_END: Final = 0x03
SECTION_FULL: Final = 0x04
SUBSECTION: Final = 0x05
VMDESCRIPTION: Final = 0x06
CONFIGURATION: Final = 0x07
COMMAND: Final = 0x08
_SECTIONS: Final = {
    SECTION_START: "SECTION_START",
    SECTION_PART: "SECTION_PART",
    SECTION_END: "SECTION_END",
    SECTION_FULL: "SECTION_FULL",
}

MIG_CMD_POSTCOPY_ADVISE: Final = 3
MIG_CMD_PACKAGED: Final = 7
_COMMANDS_MAX: Final = 64  # QEMU knows about a dozen

RAM_ID: Final = b"ram"
RAM_VERSION: Final = 4
RAM_SAVE_FLAG_ZERO: Final = 0x02
RAM_SAVE_FLAG_MEM_SIZE: Final = 0x04
RAM_SAVE_FLAG_PAGE: Final = 0x08
RAM_SAVE_FLAG_EOS: Final = 0x10
RAM_SAVE_FLAG_CONTINUE: Final = 0x20
RAM_SAVE_FLAG_XBZRLE: Final = 0x40
RAM_SAVE_FLAG_HOOK: Final = 0x80
RAM_SAVE_FLAG_COMPRESS_PAGE: Final = 0x100
RAM_SAVE_FLAG_MULTIFD_FLUSH: Final = 0x200
_BARE: Final = {  # records that are nothing but their word
    RAM_SAVE_FLAG_HOOK: "RAM_HOOK",
    RAM_SAVE_FLAG_MULTIFD_FLUSH: "RAM_MULTIFD_FLUSH",
}
_PAGED: Final = {
    RAM_SAVE_FLAG_ZERO: "RAM_ZERO",
    RAM_SAVE_FLAG_PAGE: "RAM_PAGE",
    RAM_SAVE_FLAG_XBZRLE: "RAM_XBZRLE",
    RAM_SAVE_FLAG_COMPRESS_PAGE: "RAM_COMPRESS_PAGE",
}
_FLAGS: Final = PAGE_BYTES - 1
ENCODING_FLAG_XBZRLE: Final = 0x01

TARGET_PAGE_BITS: Final = 12
CAPABILITY_IGNORE_SHARED: Final = b"x-ignore-shared"
CAPABILITY_MAPPED_RAM: Final = b"mapped-ram"

_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_U64: Final = struct.Struct(">Q")
_HEAD_BYTES: Final = 5  # a section's byte and number, which follow a footer


def qemu_steps(reader: Reader, facts: StreamFacts, watch: VtpmWatch | None = None) -> Steps[None]:
    """A main stream: header, configuration, sections up to EOF, description; ``watch`` is shown the guest's vTPM."""
    reader.big_endian = True
    magic, version = struct.unpack(">4sI", (yield from reader.take(8)))
    if magic != QEMU_MAGIC:
        raise Surprise("magic")
    if version != QEMU_VERSION:
        raise Surprise("version")
    facts.hypervisor = f"QEMU, stream version {version}"
    yield from _Qemu(reader, facts, watch).sections()


class _Qemu:
    """The state of one main stream."""

    def __init__(self, reader: Reader, facts: StreamFacts, watch: VtpmWatch | None) -> None:
        self._reader = reader
        self._watch = watch
        self._facts = facts
        self._is_ram: dict[int, bool] = {}  # sections begun, by number
        self._block = 0  # number of the block that CONTINUE means, in its place within a PFN
        self._block_bytes = 0  # its size; 0: there is none yet
        self._sizes: dict[bytes, int] = {}
        self._postcopy = False
        self._ignore_shared = False
        self._footers = True
        self._footers_tried = 0

    # ------------------------------------------------------------------ sections

    def sections(self) -> Steps[None]:
        """All up to EOF and the description behind it."""
        reader, facts = self._reader, self._facts
        seen = b""  # of the next section, what was read while looking for it
        last = 0
        while True:
            kind = seen[0] if seen else (yield from reader.take(1))[0]
            ahead = seen[1:]
            seen = b""
            if ahead:
                reader.unread(ahead)
            if kind == QEMU_SECTION_EOF:
                break
            if kind == CONFIGURATION:
                yield from self._configuration()
            elif kind == SUBSECTION and last in (CONFIGURATION, SUBSECTION):
                yield from self._subsection()
            elif kind == COMMAND:
                yield from self._command()
            elif kind in _SECTIONS:
                facts.count(_SECTIONS[kind])
                seen = yield from self._section(kind)
            else:
                raise Surprise("section_kind")
            last = kind
        facts.count("EOF")
        if (yield from reader.take(1))[0] != VMDESCRIPTION:
            raise Surprise("after_end")
        facts.count("VMDESCRIPTION")
        (size,) = _U32.unpack((yield from reader.take(4)))
        yield from reader.skip(size) if self._watch is None else self._watch.end(reader, size)

    def _section(self, kind: int) -> Steps[bytes]:
        """One section with its footer; returns what was read behind that."""
        reader = self._reader
        (number,) = _U32.unpack((yield from reader.take(4)))
        if kind in (SECTION_START, SECTION_FULL):
            name = yield from self._text()
            instance, version = struct.unpack(">II", (yield from reader.take(8)))
            if number > QEMU_SECTIONS_MAX:
                raise Surprise("section_number")
            self._is_ram[number] = name == RAM_ID
            if name == RAM_ID and (kind != SECTION_START or version != RAM_VERSION):
                raise Surprise("ram_version")
            if kind == SECTION_FULL and self._watch is not None:
                return (yield from self._watched(self._watch, number, (name, instance, version)))
        elif number not in self._is_ram:
            raise Surprise("section_number")
        if not self._is_ram[number]:
            return (yield from self._device(number))
        yield from self._ram()
        mark = yield from reader.take(1)
        if mark[0] != QEMU_SECTION_FOOTER:
            self._footers = False
            return mark
        reader.unread(mark)
        return (yield from self._footer(number))

    def _watched(self, watch: VtpmWatch, number: int, head: tuple[bytes, int, int]) -> Steps[bytes]:
        """A full section, shown to ``watch``."""
        begin = self._reader.position
        if watch.section(*head) and (yield from watch.take(self._reader)):
            if not self._footers:
                raise Surprise("no_footers")
            behind = yield from self._footer(number)
        else:
            behind = yield from self._device(number)
        watch.ended(self._reader.position - len(behind) - _HEAD_BYTES - begin)
        return behind

    def _footer(self, number: int) -> Steps[bytes]:
        """The footer of a section whose end is known."""
        if (yield from self._reader.take(_HEAD_BYTES)) != bytes([QEMU_SECTION_FOOTER]) + _U32.pack(number):
            raise Surprise("footer")
        return b""

    def _device(self, number: int) -> Steps[bytes]:
        """Device state of unknown length: up to the section's footer where the head of a section follows it."""
        if not self._footers:
            raise Surprise("no_footers")
        mark = bytes([QEMU_SECTION_FOOTER]) + _U32.pack(number)
        while True:
            head = yield from self._reader.find(mark, _HEAD_BYTES)
            if self._plausible(head):
                return head
            self._footers_tried += 1
            if self._footers_tried > QEMU_FOOTERS_TRIED_MAX:
                raise Surprise("footer")
            self._reader.unread(head)

    def _plausible(self, head: bytes) -> bool:
        """Whether a section may begin so: a new number, one begun before, a command, or EOF and the description."""
        number: int = _U32.unpack_from(head, 1)[0]
        match head[0]:
            case 0x01 | 0x04:
                return number <= QEMU_SECTIONS_MAX and number not in self._is_ram
            case 0x02 | 0x03:
                return number in self._is_ram
            case 0x08:
                return 0 < number >> 16 <= _COMMANDS_MAX
        return head[0] == QEMU_SECTION_EOF and head[1] == VMDESCRIPTION

    def _text(self) -> Steps[bytes]:
        """A string behind its length byte."""
        size = (yield from self._reader.take(1))[0]
        return (yield from self._reader.take(size)) if size else b""

    def _command(self) -> Steps[None]:
        """A command tells its length; a package, which holds device state, that of its content besides."""
        self._facts.count("COMMAND")
        command, size = struct.unpack(">HH", (yield from self._reader.take(4)))
        if command == MIG_CMD_PACKAGED and size == _U32.size:
            (size,) = _U32.unpack((yield from self._reader.take(4)))
        elif command == MIG_CMD_POSTCOPY_ADVISE and size:
            self._postcopy = True
        yield from self._reader.skip(size)

    # ------------------------------------------------------------------ configuration

    def _configuration(self) -> Steps[None]:
        self._facts.count("CONFIGURATION")
        (size,) = _U32.unpack((yield from self._reader.take(4)))
        if size > QEMU_MACHINE_BYTES_MAX:
            raise Surprise("configuration")
        machine = (yield from self._reader.take(size)).decode("ascii", "replace")
        self._facts.machine = machine if machine.isprintable() else ""

    def _subsection(self) -> Steps[None]:
        """Subsections of the configuration; one that is not known has no known length."""
        reader = self._reader
        self._facts.count("SUBSECTION")
        name = yield from self._text()
        yield from reader.skip(4)
        if name == b"configuration/target-page-bits":
            if _U32.unpack((yield from reader.take(4)))[0] != TARGET_PAGE_BITS:
                raise Surprise("page_size")
        elif name == b"configuration/uuid":
            note_uuid(self._facts, (yield from reader.take(16)))
        elif name == b"configuration/capabilities":
            (count,) = _U32.unpack((yield from reader.take(4)))
            if count > QEMU_CAPABILITIES_MAX:
                raise Surprise("configuration")
            for _ in range(count):
                capability = yield from self._text()
                self._ignore_shared |= capability == CAPABILITY_IGNORE_SHARED
                if capability == CAPABILITY_MAPPED_RAM:
                    raise Surprise("mapped_ram")
        else:
            raise Surprise("configuration")

    # ------------------------------------------------------------------ RAM

    def _ram(self) -> Steps[None]:
        """The records of one RAM section, up to its EOS."""
        reader, facts = self._reader, self._facts
        while True:
            if self._block_bytes and reader.scannable and reader.end - reader.at > _U64.size:
                scan(reader, facts, self._block, self._block_bytes)
            (word,) = _U64.unpack((yield from reader.word()))
            flags = word & _FLAGS
            if flags == RAM_SAVE_FLAG_EOS:
                facts.count("RAM_EOS")
                return
            if flags == RAM_SAVE_FLAG_MEM_SIZE:
                yield from self._mem_size(word - flags)
            elif flags in _BARE:
                facts.count(_BARE[flags])
            elif flags & ~RAM_SAVE_FLAG_CONTINUE in _PAGED:
                yield from self._page(word - flags, flags)
            else:
                raise Surprise("ram_flags")

    def _mem_size(self, left: int) -> Steps[None]:
        """The list of RAM blocks.

        With postcopy each block of another page size than most tells that. Such a number is told from whatever
        else may follow a block: it is a power of two and at least a page, and they begin with a length that is not
        zero or are words with a flag.
        """
        reader, facts = self._reader, self._facts
        facts.count("RAM_MEM_SIZE")
        if self._postcopy and self._ignore_shared:
            raise Surprise("block_list")
        self._sizes.clear()
        while left:
            name = yield from self._text()
            (size,) = _U64.unpack((yield from reader.take(8)))
            if not name or size > left or len(self._sizes) >= QEMU_BLOCKS_MAX or size >> (BLOCK_SHIFT + 12):
                raise Surprise("block_list")
            left -= size
            self._sizes[name] = size
            note_block(facts, name, size)
            if self._ignore_shared:
                yield from reader.skip(8)
            elif self._postcopy:
                next_bytes = yield from reader.take(8)
                (number,) = _U64.unpack(next_bytes)
                if number < PAGE_BYTES or number & (number - 1):
                    reader.unread(next_bytes)

    def _page(self, offset: int, flags: int) -> Steps[None]:
        """One page's record, whole or cut by the end of a piece."""
        reader, facts = self._reader, self._facts
        if not flags & RAM_SAVE_FLAG_CONTINUE:
            name = yield from self._text()
            size = self._sizes.get(name, 0)
            if not size:
                raise Surprise("unknown_block")
            self._block, self._block_bytes = note_block(facts, name, size) << BLOCK_SHIFT, size
        if offset >= self._block_bytes:
            raise Surprise("page_offset")
        kind = flags & ~RAM_SAVE_FLAG_CONTINUE
        facts.count(_PAGED[kind])
        pfns = np.array([self._block | offset // PAGE_BYTES], np.uint64)
        if kind == RAM_SAVE_FLAG_PAGE:
            yield from reader.pages(pfns)
            return
        reader.mark(pfns)
        if kind == RAM_SAVE_FLAG_ZERO:
            facts.pages_zero_marked += 1
            yield from reader.skip(1)
        elif kind == RAM_SAVE_FLAG_XBZRLE:
            facts.pages_xbzrle += 1
            encoding, size = struct.unpack(">BH", (yield from reader.take(3)))
            if encoding != ENCODING_FLAG_XBZRLE or size > PAGE_BYTES:
                raise Surprise("xbzrle")
            yield from reader.skip(size)
        else:
            facts.pages_compressed += 1
            (size,) = _U32.unpack((yield from reader.take(4)))
            if size > QEMU_COMPRESSED_BYTES_MAX:
                raise Surprise("compressed_length")
            yield from reader.skip(size)

"""QEMU's multifd channels: packets of up to 128 pages beside the main stream. Sans-IO.

Follows migration/multifd.h of QEMU 4.0 to 10.1 (MultiFDInit_t, MultiFDPacket_t, MultiFDPacketDeviceState_t).
"""

import struct
import zlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chunking.pages import PAGE_BYTES
from proxy.limits import MULTIFD_PAGES_MAX, QEMU_BLOCKS_MAX
from proxy.streams.facts import Block, StreamFacts
from proxy.streams.formats import MULTIFD_MAGIC
from proxy.streams.reader import Reader, Steps, Surprise

MULTIFD_VERSION: Final = 1
MULTIFD_PACKET_PAGES: Final = 128  # MULTIFD_PACKET_SIZE of 512 KiB: a SYNC packet of newer versions does not say
MULTIFD_FLAG_SYNC: Final = 1 << 0
MULTIFD_FLAG_COMPRESSION_MASK: Final = 0x1F << 1
MULTIFD_FLAG_DEVICE_STATE: Final = 1 << 6
MULTIFD_FLAG_ALL: Final = MULTIFD_FLAG_SYNC | MULTIFD_FLAG_COMPRESSION_MASK | MULTIFD_FLAG_DEVICE_STATE

_INIT: Final = struct.Struct(">4sI16sB39x")
_HEADER: Final = struct.Struct(">4sII")
_PAGES: Final = struct.Struct(">IIIQI4x24x256s")
_DEVICE: Final = struct.Struct(">256sII")
_OFFSET: Final = np.dtype(">u8")

BLOCK_SHIFT: Final = 40  # a PFN of a QEMU guest is the block's number above its page within the block
_BLOCK_BITS: Final = 64 - BLOCK_SHIFT
_PAGE_SHIFT: Final = np.uint64(12)


def block_number(name: bytes) -> int:
    """A RAM block's number, which every channel of the guest's migration arrives at by itself: 24 bits of its name.

    Two names with one number would only make worse bases for differences.
    """
    return zlib.crc32(name) & ((1 << _BLOCK_BITS) - 1)


def note_block(facts: StreamFacts, name: bytes, size_bytes: int) -> int:
    """The number of a block, after writing it down."""
    number = block_number(name)
    if number not in facts.blocks or facts.blocks[number].size_bytes != size_bytes:
        if len(facts.blocks) >= QEMU_BLOCKS_MAX:
            raise Surprise("too_many_blocks")
        facts.blocks[number] = Block(name.decode("ascii", "replace"), size_bytes)
    return number


def multifd_steps(reader: Reader, facts: StreamFacts) -> Steps[None]:
    """A multifd channel; it ends where its packets end."""
    reader.big_endian = True
    magic, version, uuid, _ = _INIT.unpack((yield from reader.take(_INIT.size)))
    if magic != MULTIFD_MAGIC:
        raise Surprise("magic")
    if version != MULTIFD_VERSION:
        raise Surprise("version")
    facts.hypervisor = "QEMU"
    facts.count("INIT")
    note_uuid(facts, uuid)
    while True:
        magic, version, flags = _HEADER.unpack((yield from reader.take(_HEADER.size)))
        if magic != MULTIFD_MAGIC:
            raise Surprise("magic")
        if version != MULTIFD_VERSION:
            raise Surprise("version")
        if flags & ~MULTIFD_FLAG_ALL:
            raise Surprise("multifd_flags")
        if flags & MULTIFD_FLAG_DEVICE_STATE:
            facts.count("DEVICE_STATE")
            _, _, size = _DEVICE.unpack((yield from reader.take(_DEVICE.size)))
            yield from reader.skip(size)
        else:
            facts.count("SYNC" if flags & MULTIFD_FLAG_SYNC else "PACKET")
            yield from _packet(reader, facts, flags)


def note_uuid(facts: StreamFacts, uuid: bytes) -> None:
    """A guest without a UUID sends zeros."""
    if any(uuid):
        digits = uuid.hex()
        facts.vm_uuid = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _packet(reader: Reader, facts: StreamFacts, flags: int) -> Steps[None]:
    """A packet of pages: the offsets of pages with data, then those of zero pages, then the data."""
    allocated, normal, size, _, zero, field = _PAGES.unpack((yield from reader.take(_PAGES.size)))
    allocated = allocated or MULTIFD_PACKET_PAGES
    if allocated > MULTIFD_PAGES_MAX or normal + zero > allocated:
        raise Surprise("multifd_pages")
    compressed = flags & MULTIFD_FLAG_COMPRESSION_MASK
    if normal and not compressed and size != normal * PAGE_BYTES:
        raise Surprise("page_size")
    offsets: list[NDArray[np.uint64]] = []
    left = allocated
    while left:
        table = yield from reader.words(left, _OFFSET)
        left -= len(table)
        offsets.append(table.astype(np.uint64))
        del table  # it lies in the piece
    pfns = np.concatenate(offsets)[: normal + zero]
    if len(pfns):
        if (pfns & np.uint64(PAGE_BYTES - 1)).any() or int(pfns.max()) >> (BLOCK_SHIFT + 12):
            raise Surprise("page_offset")
        number = note_block(facts, field.split(b"\0", 1)[0], 0)
        pfns = (pfns >> _PAGE_SHIFT) | np.uint64(number << BLOCK_SHIFT)
    if zero:
        facts.pages_zero_marked += zero
        reader.mark(pfns[normal:])
    if compressed and normal:
        facts.count("COMPRESSED")
        reader.mark(pfns[:normal])
        facts.pages_compressed += normal
        yield from reader.skip(size)
    elif normal:
        yield from reader.pages(pfns[:normal])

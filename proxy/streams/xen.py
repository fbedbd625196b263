"""Xen's streams: xl's header and configuration, libxl's records, libxc's image within them. Sans-IO.

Follows docs/specs/libxl-migration-stream.pandoc (revision 2), docs/specs/libxc-migration-stream.pandoc (revision 3) and
tools/xl of Xen. As the latter asks, reserved fields and padding are not looked at.
"""

import json
import re
import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from chunking.pages import PAGE_BYTES, WORD_BYTES
from proxy.limits import VM_NAME_CHARACTERS_MAX, XEN_RECORD_BYTES_MAX, XL_CONFIG_BYTES_MAX
from proxy.streams.facts import StreamFacts
from proxy.streams.formats import LIBXC_MAGIC, LIBXL_MAGIC, XL_GO, XL_MAGIC
from proxy.streams.reader import Reader, Steps, Surprise

XL_HEADER_BYTES: Final = 48
XL_BYTE_ORDER: Final = 0x01020304
XL_MANDATORY_FLAG_JSON: Final = 1 << 0
XL_MANDATORY_FLAG_STREAMV2: Final = 1 << 1
XL_MANDATORY_FLAG_ALL: Final = XL_MANDATORY_FLAG_JSON | XL_MANDATORY_FLAG_STREAMV2

LIBXL_VERSION: Final = 2
LIBXL_END: Final = 0
LIBXL_LIBXC_CONTEXT: Final = 1
LIBXL_CHECKPOINT_END: Final = 4
LIBXL_RECORDS: Final = {
    LIBXL_END: "LIBXL_END",
    LIBXL_LIBXC_CONTEXT: "LIBXL_LIBXC_CONTEXT",
    2: "LIBXL_EMULATOR_XENSTORE_DATA",
    3: "LIBXL_EMULATOR_CONTEXT",
    LIBXL_CHECKPOINT_END: "LIBXL_CHECKPOINT_END",
    5: "LIBXL_CHECKPOINT_STATE",
}
_LIBXL_LAST: Final = (LIBXL_END, LIBXL_CHECKPOINT_END)
_LIBXL_EMPTY: Final = (*_LIBXL_LAST, LIBXL_LIBXC_CONTEXT)

LIBXC_VERSIONS: Final = (2, 3)
LIBXC_PAGE_SHIFT: Final = 12
LIBXC_TYPES: Final = {1: "x86 PV", 2: "x86 HVM"}
LIBXC_END: Final = 0x00
LIBXC_PAGE_DATA: Final = 0x01
LIBXC_CHECKPOINT: Final = 0x0E
LIBXC_RECORDS: Final = {
    LIBXC_END: "END",
    LIBXC_PAGE_DATA: "PAGE_DATA",
    0x02: "X86_PV_INFO",
    0x03: "X86_PV_P2M_FRAMES",
    0x04: "X86_PV_VCPU_BASIC",
    0x05: "X86_PV_VCPU_EXTENDED",
    0x06: "X86_PV_VCPU_XSAVE",
    0x07: "SHARED_INFO",
    0x08: "X86_TSC_INFO",
    0x09: "HVM_CONTEXT",
    0x0A: "HVM_PARAMS",
    0x0B: "TOOLSTACK",
    0x0C: "X86_PV_VCPU_MSRS",
    0x0D: "VERIFY",
    LIBXC_CHECKPOINT: "CHECKPOINT",
    0x0F: "CHECKPOINT_DIRTY_PFN_LIST",
    0x10: "STATIC_DATA_END",
    0x11: "X86_CPUID_POLICY",
    0x12: "X86_MSR_POLICY",
}
RECORD_OPTIONAL: Final = 1 << 31  # both streams

PAGE_DATA_HEADER_BYTES: Final = 8
PAGE_DATA_PFN_MASK: Final = np.uint64((1 << 52) - 1)
PAGE_DATA_TYPE_SHIFT: Final = np.uint64(60)
PAGE_TYPE_RESERVED: Final = range(0x5, 0x9)
PAGE_TYPE_BROKEN: Final = 0xD  # this and the two above it carry no page
PAGE_TYPE_XALLOC: Final = 0xE
PAGE_TYPE_XTAB: Final = 0xF

_LENGTH_BYTES: Final = 4  # before xl's configuration
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


# ---------------------------------------------------------------------- xl


def xl_steps(reader: Reader, facts: StreamFacts) -> Steps[None]:
    """An xl stream: header, configuration, libxl stream, and in a migration the source's GO."""
    header = yield from reader.take(XL_HEADER_BYTES)
    if not header.startswith(XL_MAGIC):
        raise Surprise("magic")
    order = "<" if struct.unpack_from("<I", header, 32)[0] == XL_BYTE_ORDER else ">"
    byte_order, mandatory, _, size = struct.unpack_from(f"{order}4I", header, 32)
    if byte_order != XL_BYTE_ORDER:
        raise Surprise("byte_order")
    if mandatory & ~XL_MANDATORY_FLAG_ALL:
        raise Surprise("mandatory_flags")
    if mandatory & XL_MANDATORY_FLAG_JSON and _LENGTH_BYTES <= size <= XL_CONFIG_BYTES_MAX:
        config = yield from reader.take(size)
        _identify(config, order, facts)
    else:
        yield from reader.skip(size)
    if mandatory & XL_MANDATORY_FLAG_STREAMV2:
        yield from libxl_steps(reader, facts)
    else:
        yield from libxc_steps(reader, facts)
    go = yield from reader.take(len(XL_GO))
    if go != XL_GO:
        raise Surprise("after_end")
    facts.count("XL_GO")


def _identify(config: bytes, order: str, facts: StreamFacts) -> None:
    """Name and UUID from the domain's configuration; what is ambiguous or no name is left out."""
    facts.vm_told = True
    size = struct.unpack_from(f"{order}I", config)[0]
    if size > len(config) - _LENGTH_BYTES:
        return
    text = config[_LENGTH_BYTES:][:size].split(b"\0", 1)[0]  # xl reads it as a C string
    try:
        found = json.loads(text.decode(), object_pairs_hook=_unambiguous, parse_int=_number, parse_float=_number)
    except (ValueError, RecursionError):
        return
    info = found.get("c_info") if isinstance(found, dict) else None
    if not isinstance(info, dict):
        return
    name, uuid = info.get("name"), info.get("uuid")
    if isinstance(name, str) and 0 < len(name) <= VM_NAME_CHARACTERS_MAX and name.isprintable():
        facts.vm_name = name
    if isinstance(uuid, str) and _UUID.fullmatch(uuid.lower()):
        facts.vm_uuid = uuid.lower()


def _number(_: str) -> None:
    """Numbers are not looked at, however long they are."""


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's members without those that stand there twice: libxl takes the first, other readers the last."""
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                members.pop(key, None)
            seen.add(key)
    return members


# ---------------------------------------------------------------------- libxl


def libxl_steps(reader: Reader, facts: StreamFacts) -> Steps[None]:
    """A libxl stream, which ends with END."""
    magic, version, options = struct.unpack(">8sII", (yield from reader.take(16)))
    if magic != LIBXL_MAGIC:
        raise Surprise("magic")
    if version != LIBXL_VERSION:
        raise Surprise("version")
    yield from _Libxl(reader, facts, ">" if options & 1 else "<").records(LIBXL_END)


@dataclass(frozen=True, slots=True)
class _Libxl:
    """libxl's records, in the byte order that the header tells."""

    reader: Reader
    facts: StreamFacts
    order: str

    def records(self, last: int) -> Steps[None]:
        """Records up to one of type ``last``."""
        while True:
            kind, size = struct.unpack(f"{self.order}II", (yield from self.reader.take(8)))
            if kind not in LIBXL_RECORDS and not kind & RECORD_OPTIONAL:
                raise Surprise("mandatory_record")
            self.facts.count(LIBXL_RECORDS.get(kind, "LIBXL_OPTIONAL"))
            if size > XEN_RECORD_BYTES_MAX or (size and kind in _LIBXL_EMPTY):
                raise Surprise("record_length")
            if kind != last and kind in _LIBXL_LAST:
                raise Surprise("record_order")
            if kind == last:
                return
            if kind == LIBXL_LIBXC_CONTEXT:
                if last != LIBXL_END:
                    raise Surprise("record_order")
                yield from libxc_steps(self.reader, self.facts, self)
            else:
                yield from self.reader.skip(_padded(size))


def _padded(size: int) -> int:
    return size + -size % 8


# ---------------------------------------------------------------------- libxc


def libxc_steps(reader: Reader, facts: StreamFacts, outer: _Libxl | None = None) -> Steps[None]:
    """A libxc stream, which ends with END; within libxl's, each CHECKPOINT is followed by libxl's own records."""
    magic, version, options = struct.unpack(">12sIH6x", (yield from reader.take(24)))
    if magic != LIBXC_MAGIC:
        raise Surprise("magic")
    if version not in LIBXC_VERSIONS:
        raise Surprise("version")
    order = ">" if options & 1 else "<"
    kind, shift, major, minor = struct.unpack(f"{order}IHxxII", (yield from reader.take(16)))
    if kind not in LIBXC_TYPES:
        raise Surprise("domain_type")
    if shift != LIBXC_PAGE_SHIFT:
        raise Surprise("page_size")
    facts.machine = LIBXC_TYPES[kind]
    facts.hypervisor = f"Xen {major}.{minor}" if major else "Xen before 4.6, converted"
    reader.big_endian = order == ">"
    yield from _Libxc(reader, facts, order, outer).records()


@dataclass(frozen=True, slots=True)
class _Libxc:
    """libxc's records, in the byte order that the image header tells."""

    reader: Reader
    facts: StreamFacts
    order: str
    outer: _Libxl | None

    def records(self) -> Steps[None]:
        """Records up to END."""
        while True:
            kind, size = struct.unpack(f"{self.order}II", (yield from self.reader.take(8)))
            if kind not in LIBXC_RECORDS and not kind & RECORD_OPTIONAL:
                raise Surprise("mandatory_record")
            self.facts.count(LIBXC_RECORDS.get(kind, "OPTIONAL"))
            if size > XEN_RECORD_BYTES_MAX or (size and kind in (LIBXC_END, LIBXC_CHECKPOINT)):
                raise Surprise("record_length")
            if kind == LIBXC_END:
                return
            if kind == LIBXC_PAGE_DATA:
                yield from self._page_data(size)
            elif kind == LIBXC_CHECKPOINT and self.outer is not None:
                yield from self.outer.records(LIBXL_CHECKPOINT_END)
            else:
                yield from self.reader.skip(_padded(size))

    def _page_data(self, size: int) -> Steps[None]:
        """PAGE_DATA: count, the PFNs with their types, the pages of those that carry one."""
        if size <= PAGE_DATA_HEADER_BYTES:
            raise Surprise("page_data_length")
        (count,) = struct.unpack(f"{self.order}I4x", (yield from self.reader.take(PAGE_DATA_HEADER_BYTES)))
        pages, odd = divmod(size - PAGE_DATA_HEADER_BYTES - WORD_BYTES * count, PAGE_BYTES)
        if odd or not 0 <= pages <= count or not count:
            raise Surprise("page_data_length")
        dtype = np.dtype(f"{self.order}u8")
        carried: list[NDArray[np.uint64]] = []
        found, left = 0, count
        while left:
            table = yield from self.reader.words(left, dtype)
            left -= len(table)
            pfns = self._entries(table)
            del table  # it lies in the piece
            if len(pfns):
                carried.append(pfns)
                found += len(pfns)
            if found > pages:
                raise Surprise("page_data_length")
        if found != pages:
            raise Surprise("page_data_length")
        if carried:
            pfns = carried[0] if len(carried) == 1 else np.concatenate(carried)
            yield from self.reader.pages(pfns)

    def _entries(self, table: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The PFNs that carry a page; the others are counted."""
        types = (table >> PAGE_DATA_TYPE_SHIFT).astype(np.uint8)
        if not types.any():
            return (table & PAGE_DATA_PFN_MASK).astype(np.uint64)
        counts = np.bincount(types, minlength=16).tolist()
        if any(counts[kind] for kind in PAGE_TYPE_RESERVED):
            raise Surprise("page_type")
        self.facts.entries_broken += counts[PAGE_TYPE_BROKEN]
        self.facts.entries_xalloc += counts[PAGE_TYPE_XALLOC]
        self.facts.entries_xtab += counts[PAGE_TYPE_XTAB]
        if sum(counts[PAGE_TYPE_BROKEN:]) == len(table):
            return np.empty(0, np.uint64)
        return (table[types < PAGE_TYPE_BROKEN] & PAGE_DATA_PFN_MASK).astype(np.uint64)

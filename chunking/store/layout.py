"""How a segment lies on the disk: three files of one name in its tenant's folder.

    SEGMENT.key     the segment's key and a note (which tenant, which machine, when), wrapped
    SEGMENT.data    the kept pages in blocks of BLOCK_PAGES, each sealed: part DATA
    SEGMENT.index   magic ‖ summary ‖ ids ‖ columns, each sealed: parts SUMMARY, IDS, COLUMNS

The index is SEGMENT.partial until it is whole, and nothing without an index is a segment. SEGMENT.damaged, empty, says
that something of it did not open. Integers are little-endian.

    summary   one piece of SUMMARY_BYTES, padded: all the sizes of the rest
    ids       16 bytes a kept page, in pieces of ID_CHUNK_PAGES
    columns   four pieces: fingerprints of the kept pages, ascending (u64); their places in the data, in that order
              (u32); the page table in runs (first PFN u64, first ordinal u32, length u32, segment u32: 0 is this one,
              k the k-th of the summary's references); which ordinals are kept, a bit each, if not all are
"""

import re
import struct
from pathlib import Path
from typing import Final, NamedTuple

from chunking.limits import SEGMENT_PAGES_MAX, STORE_NAME_BYTES_MAX, VIEW_SEGMENTS_MAX
from chunking.pages import PAGE_BYTES
from chunking.store.keys import SEAL_BYTES, WRAP_BYTES

SEGMENT_NAME_BYTES: Final = 16
BLOCK_PAGES: Final = 16  # 64 KiB: see docs/store.md for what was measured
ID_BYTES: Final = 16
ID_CHUNK_PAGES: Final = 1024
SUMMARY_BYTES: Final = 1024
NOTE_BYTES: Final = 640
KEY_FILE_BYTES: Final = NOTE_BYTES + WRAP_BYTES
MAGIC: Final = b"KORORA\x00\x01"

PART_DATA: Final = 0
PART_SUMMARY: Final = 1
PART_IDS: Final = 2
PART_COLUMNS: Final = 3
COLUMN_FINGERPRINTS: Final = 0
COLUMN_ORDER: Final = 1
COLUMN_RUNS: Final = 2
COLUMN_KEPT: Final = 3
RUN_BYTES: Final = 8 + 4 + 4 + 4

KEY: Final = ".key"
DATA: Final = ".data"
INDEX: Final = ".index"
PARTIAL: Final = ".partial"
DAMAGED: Final = ".damaged"
_FILE = re.compile(r"([0-9a-f]{32})(\.key|\.data|\.index|\.partial|\.damaged)")
_FOLDER = re.compile(r"[0-9a-f]{32}")

_SUMMARY_OFFSET: Final = len(MAGIC)
_IDS_OFFSET: Final = _SUMMARY_OFFSET + SUMMARY_BYTES + SEAL_BYTES
_NOTE = struct.Struct("<HdHH")  # version, created, bytes of the tenant's name, of the machine's
_SUMMARY = struct.Struct("<HQQIIHH")  # version, pages, kept, block pages, runs, references, bytes of the machine's name
_VERSION: Final = 1
_UNNAMED: Final = 0xFFFF  # in place of a name's length: the machine is not known


class Note(NamedTuple):
    """What a key file says of its segment. ``created`` is in seconds since 1970; ``vm`` is None if not known."""

    created: float
    tenant: str
    vm: str | None


class Summary(NamedTuple):
    """What an index says of its segment.

    Args:
        pages: ordinals that the segment has.
        kept: how many of those it holds.
        block_pages: pages of a block.
        runs: of the page table.
        references: names of the segments that the page table points into.
        vm: the machine's name, None if it never became known.
    """

    pages: int
    kept: int
    block_pages: int
    runs: int
    references: tuple[bytes, ...]
    vm: str | None

    @property
    def kept_bytes(self) -> int:
        """Bytes of the column that says which are kept; none where all are."""
        return 0 if self.kept == self.pages else -(-self.pages // 8)


def pack_note(note: Note) -> bytes:
    """The note, padded: its length says nothing.

    Raises:
        ValueError: a name is too long.
    """
    tenant, vm = name_bytes(note.tenant), b"" if note.vm is None else name_bytes(note.vm)
    head = _NOTE.pack(_VERSION, note.created, len(tenant), _UNNAMED if note.vm is None else len(vm))
    return (head + tenant + vm).ljust(NOTE_BYTES, b"\x00")


def unpack_note(content: bytes) -> Note:
    """The note that ``pack_note`` gave.

    Raises:
        ValueError: it is none.
    """
    if len(content) != NOTE_BYTES:
        raise ValueError("a note has the wrong length")
    version, created, tenant_bytes, vm_bytes = _NOTE.unpack_from(content)
    if version != _VERSION or tenant_bytes > STORE_NAME_BYTES_MAX:
        raise ValueError("a note of another version")
    tenant, end = _name(content, _NOTE.size, tenant_bytes)
    vm, _ = _name(content, end, vm_bytes) if vm_bytes != _UNNAMED else (None, end)
    return Note(created, tenant, vm)


def pack_summary(summary: Summary) -> bytes:
    """The summary, padded."""
    vm = b"" if summary.vm is None else name_bytes(summary.vm)
    head = _SUMMARY.pack(
        _VERSION,
        summary.pages,
        summary.kept,
        summary.block_pages,
        summary.runs,
        len(summary.references),
        _UNNAMED if summary.vm is None else len(vm),
    )
    return (head + b"".join(summary.references) + vm).ljust(SUMMARY_BYTES, b"\x00")


def unpack_summary(content: bytes) -> Summary:
    """The summary that ``pack_summary`` gave.

    Raises:
        ValueError: it is none, or beyond the limits.
    """
    if len(content) != SUMMARY_BYTES:
        raise ValueError("a summary has the wrong length")
    version, pages, kept, block_pages, runs, references, vm_bytes = _SUMMARY.unpack_from(content)
    if version != _VERSION or not 1 <= block_pages <= ID_CHUNK_PAGES or references > VIEW_SEGMENTS_MAX:
        raise ValueError("a summary of another version")
    if not kept <= pages <= SEGMENT_PAGES_MAX:
        raise ValueError("a summary beyond the limits")
    end = _SUMMARY.size
    names = []
    for _ in range(references):
        names.append(content[end : end + SEGMENT_NAME_BYTES])
        end += SEGMENT_NAME_BYTES
    vm = _name(content, end, vm_bytes)[0] if vm_bytes != _UNNAMED else None
    return Summary(pages, kept, block_pages, runs, tuple(names), vm)


def name_bytes(name: str) -> bytes:
    """A tenant's or a machine's name as it is stored.

    Raises:
        ValueError: it is too long, or cannot be written in UTF-8.
    """
    encoded = name.encode()
    if len(encoded) > STORE_NAME_BYTES_MAX:
        raise ValueError(f"a name of {len(encoded)} bytes: at most {STORE_NAME_BYTES_MAX}")
    return encoded


def data_bytes(summary: Summary) -> int:
    """The length of the data file."""
    return summary.kept * PAGE_BYTES + -(-summary.kept // summary.block_pages) * SEAL_BYTES


def block_place(summary: Summary, block: int) -> tuple[int, int]:
    """Where a block lies in the data file, and how many pages it holds."""
    pages = min(summary.block_pages, summary.kept - block * summary.block_pages)
    return block * (summary.block_pages * PAGE_BYTES + SEAL_BYTES), pages


def summary_place() -> tuple[int, int]:
    """Where the sealed summary lies in the index, and its length."""
    return _SUMMARY_OFFSET, SUMMARY_BYTES + SEAL_BYTES


def id_chunk_place(kept: int, chunk: int) -> tuple[int, int]:
    """Where a sealed piece of ids lies in the index, and how many ids it holds."""
    ids = min(ID_CHUNK_PAGES, kept - chunk * ID_CHUNK_PAGES)
    return _IDS_OFFSET + chunk * (ID_CHUNK_PAGES * ID_BYTES + SEAL_BYTES), ids


def column_places(summary: Summary) -> list[tuple[int, int]]:
    """Where each sealed column lies in the index, and its length unsealed."""
    offset = _IDS_OFFSET + summary.kept * ID_BYTES + -(-summary.kept // ID_CHUNK_PAGES) * SEAL_BYTES
    places = []
    for size in (summary.kept * 8, summary.kept * 4, summary.runs * RUN_BYTES, summary.kept_bytes):
        places.append((offset, size))
        offset += size + SEAL_BYTES if size else 0  # a column of nothing is not there: nothing would tell it altered
    return places


def index_bytes(summary: Summary) -> int:
    """The length of the index file."""
    offset, size = column_places(summary)[COLUMN_KEPT]
    return offset + size + SEAL_BYTES if size else offset


def is_folder(name: str) -> bool:
    """Whether a name in the store's folder is that of a tenant's folder."""
    return _FOLDER.fullmatch(name) is not None


def parsed(file: str) -> tuple[bytes, str] | None:
    """The segment and the suffix of a file's name; None for a file that is not the store's."""
    match = _FILE.fullmatch(file)
    return (bytes.fromhex(match[1]), match[2]) if match else None


def path(folder: Path, segment: bytes, suffix: str) -> Path:
    """Where a segment's file is."""
    return folder / (segment.hex() + suffix)


def _name(content: bytes, start: int, size: int) -> tuple[str, int]:
    if size > STORE_NAME_BYTES_MAX:
        raise ValueError("a name is too long")
    return content[start : start + size].decode(), start + size

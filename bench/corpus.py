"""The real migration streams that page-aware encoding is measured on, and one made stream that nothing can shrink.

The captured streams are large and no part of the repository: KORORA_SHARED names the directory above their corpus/.
They are kept compressed and unpacked for a run. The made one is a Xen stream of random pages: the worst guest there is.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zstandard

from bench.processes import REPOSITORY, BenchError
from chunking.pages import PAGE_BYTES, Spans
from proxy.limits import FRAME_BYTES_MAX
from proxy.streams.facts import StreamFacts
from proxy.streams.formats import XL_GO
from proxy.streams.parser import StreamParser

MiB: Final = 1024 * 1024
KEPT_WINDOW_BYTES_MAX: Final = 1 << 27  # they were compressed with zstd --long=27
STREAM_BYTES_MAX: Final = 4 * 1024 * MiB  # unpacked; the largest has a twentieth of it
SUFFIX: Final = ".zst"

IDLE_A, IDLE_B, BUSY = "xen idle-a", "xen idle-b", "xen busy"
QEMU_A, QEMU_B, QEMU_FILES = "qemu idle-a", "qemu idle-b", "qemu files"
FILES: Final = {
    IDLE_A: "xen417-live-idle-a.xlmig-up",
    IDLE_B: "xen417-live-idle-b.xlmig-up",
    BUSY: "xen417-live-busy.xlmig-up",
    "xen pvh": "xen417-live-pvh.xlmig-up",
    "xen save": "xen417-save.xlsave",
    QEMU_A: "q10_idle_a.qemu",
    QEMU_B: "q10_idle_b.qemu",
    "qemu xbzrle": "q10_touch_xbzrle.qemu",
    QEMU_FILES: "q10_files.qemu",
}
RANDOM: Final = "random"
RANDOM_MIB: Final = 256
_BATCH_PAGES: Final = 1024  # what Xen sends at once
_PAGE_DATA: Final = 1  # records of a libxc stream (docs/specs/libxc-migration-stream.pandoc)
_END: Final = 0


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream, unpacked.

    Args:
        name: in every table.
        path: its bytes.
        bytes: how many.
        pages: page records in it, markers of zero pages and pages in formats of QEMU's own included.
        answered: whether the other side answers: ``xl migrate``, not ``xl save``.
    """

    name: str
    path: Path
    bytes: int
    pages: int
    answered: bool = False

    @property
    def guest_bytes(self) -> int:
        """Guest memory that it moves."""
        return PAGE_BYTES * self.pages

    def read(self) -> memoryview:
        """All of it, in memory."""
        return memoryview(self.path.read_bytes())


def corpus_directory(env: Mapping[str, str] = os.environ) -> Path:
    """Where the captured streams are, if they are anywhere."""
    return Path(env.get("KORORA_SHARED") or REPOSITORY.parent / "shared") / "corpus"


def pieces(data: memoryview, parser: StreamParser | None = None) -> Iterator[tuple[memoryview, Spans]]:
    """A stream cut as the relay cuts one that arrives without pause: pieces of at most 4 MiB, and where pages lie."""
    parser = parser or StreamParser()
    at = 0
    while at < len(data):
        piece = data[at : at + FRAME_BYTES_MAX]
        spans = parser.feed(piece, final=at + len(piece) == len(data))
        yield piece[: spans.used], spans
        at += spans.used


def stream_at(name: str, path: Path) -> Stream:
    """A stream in a file, its pages counted."""
    parser, data = StreamParser(), memoryview(path.read_bytes())
    for _ in pieces(data, parser):
        pass
    return Stream(name, path, len(data), page_records(parser.facts), bytes(data[-len(XL_GO) :]) == XL_GO)


def page_records(facts: StreamFacts) -> int:
    """Pages that a stream tells of, in whatever form."""
    return facts.pages_data + facts.pages_zero_marked + facts.pages_xbzrle + facts.pages_compressed


def unpack(directory: Path, into: Path, names: Iterable[str] = FILES) -> tuple[dict[str, Stream], dict[str, str]]:
    """Unpack captured streams.

    Returns:
        The streams by name, in the order of ``names``, and the reasons for those that are not there.
    """
    found: dict[str, Stream] = {}
    absent: dict[str, str] = {}
    for name in names:
        kept, target = directory / (FILES[name] + SUFFIX), into / FILES[name]
        if not kept.is_file():
            absent[name] = f"no {kept.name} in {directory} (KORORA_SHARED names the directory above it)"
            continue
        try:
            _decompress(kept, target)
        except (OSError, zstandard.ZstdError) as error:
            absent[name] = f"{kept.name}: {error}"
            continue
        found[name] = stream_at(name, target)
    return found, absent


def _decompress(kept: Path, target: Path) -> None:
    decompressor, size = zstandard.ZstdDecompressor(max_window_size=KEPT_WINDOW_BYTES_MAX), 0
    with kept.open("rb") as source, target.open("wb") as out:
        for piece in decompressor.read_to_iter(source):
            size += len(piece)
            if size > STREAM_BYTES_MAX:
                raise BenchError(f"{kept.name} unpacks to more than {STREAM_BYTES_MAX} bytes")
            out.write(piece)


def make_random(path: Path, mib: int = RANDOM_MIB, *, seed: int = 1) -> Stream:
    """A libxc stream (revision 3) of random pages, each once."""
    source = random.Random(seed)
    with path.open("wb") as out:
        out.write(struct.pack(">Q4sIHHI", 0xFFFF_FFFF_FFFF_FFFF, b"XENF", 3, 0, 0, 0))
        out.write(struct.pack("<IHHII", 1, 12, 0, 4, 17))  # x86 PV, pages of 2^12 bytes, Xen 4.17
        for first in range(0, mib * MiB // PAGE_BYTES, _BATCH_PAGES):
            count = min(_BATCH_PAGES, mib * MiB // PAGE_BYTES - first)
            out.write(struct.pack("<II", _PAGE_DATA, 8 + (8 + PAGE_BYTES) * count) + struct.pack("<II", count, 0))
            out.write(struct.pack(f"<{count}Q", *range(first, first + count)))
            out.write(source.randbytes(PAGE_BYTES * count))
        out.write(struct.pack("<II", _END, 0))
    return stream_at(RANDOM, path)

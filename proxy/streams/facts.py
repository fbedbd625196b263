"""What a parser has learnt of a stream: for reports, metrics, policy and `korora inspect`."""

from dataclasses import dataclass, field
from typing import NamedTuple

from proxy.streams.formats import StreamFormat


class Block(NamedTuple):
    """A RAM block of a QEMU guest.

    Args:
        name: as QEMU calls it, e.g. ``pc.ram``.
        size_bytes: its used length; 0 where the stream does not tell (multifd).
    """

    name: str
    size_bytes: int


@dataclass(slots=True)
class StreamFacts:
    """Counters and names; only its parser writes them.

    Args:
        format: what the stream is.
        hypervisor: who wrote it and in which version, e.g. ``Xen 4.17``; empty until read.
        machine: ``x86 PV``, ``x86 HVM`` or QEMU's machine type; empty until read.
        vm_name: xl streams only, from the domain's configuration; None until read, or where it is none.
        vm_uuid: in lower case with hyphens; None until read, or where the stream tells none.
        vm_told: whether the configuration has been read, which tells both, or does not.
        records: how many of each type, by the specification's names.
        blocks: QEMU's RAM blocks by the number that stands in bits 40 and up of their pages' PFNs.
        stream_bytes: described so far.
        page_bytes: of these, whole pages.
        opaque_bytes: of these, what came after the parser gave up.
        opaque_reason: why it gave up, as a short code (docs/streams.md); None while it follows.
        pages_data: pages that came with their 4096 bytes.
        pages_zero_marked: pages of which the stream says that they are zero (QEMU).
        pages_xbzrle: pages that came as a difference of QEMU's own.
        pages_compressed: pages that came compressed by QEMU, on the main stream or in multifd packets.
        entries_xtab, entries_xalloc, entries_broken: entries of Xen's PFN lists that carry no page.
    """

    format: StreamFormat
    hypervisor: str = ""
    machine: str = ""
    vm_name: str | None = None
    vm_uuid: str | None = None
    vm_told: bool = False
    records: dict[str, int] = field(default_factory=dict)
    blocks: dict[int, Block] = field(default_factory=dict)
    stream_bytes: int = 0
    page_bytes: int = 0
    opaque_bytes: int = 0
    opaque_reason: str | None = None
    pages_data: int = 0
    pages_zero_marked: int = 0
    pages_xbzrle: int = 0
    pages_compressed: int = 0
    entries_xtab: int = 0
    entries_xalloc: int = 0
    entries_broken: int = 0

    def count(self, record: str, number: int = 1) -> None:
        """``number`` more records of this type."""
        self.records[record] = self.records.get(record, 0) + number

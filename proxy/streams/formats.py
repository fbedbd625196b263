"""What a stream is, by its first bytes, and whether it ends as its format ends.

Enough to tell a whole migration from one whose hypervisor died: a killed process closes its sockets as cleanly as a
finished one. Formats whose end cannot be told are never called cut.
"""

from enum import Enum, unique
from typing import Final

HEAD_BYTES: Final = 32
TAIL_BYTES: Final = 64

XL_MAGIC: Final = b"Xen saved domain, xl format"
LIBXL_MAGIC: Final = b"LibxlFmt"
LIBXC_MAGIC: Final = b"\xff" * 8 + b"XENF"
QEMU_MAGIC: Final = b"QEVM"
MULTIFD_MAGIC: Final = b"\x11\x22\x33\x44"

XL_GO: Final = b"domain is yours, you are cleared to unpause\0"
XEN_END_RECORD: Final = bytes(8)  # type 0, length 0: the END record of libxl and libxc streams
QEMU_SECTION_EOF: Final = 0x00
QEMU_SECTION_FOOTER: Final = 0x7E
_QEMU_FOOTER_BYTES: Final = 5  # 7E and the section's number, before the EOF byte
_QEMU_SECTIONS_MAX: Final = 0xFFFF


@unique
class StreamFormat(Enum):
    """Formats recognised by their first bytes (docs: Xen's libxl and libxc stream specifications, QEMU migration)."""

    OPAQUE = "opaque"
    XL = "xl"
    LIBXL = "libxl"
    LIBXC = "libxc"
    QEMU = "qemu"
    QEMU_MULTIFD = "qemu-multifd"


MAGICS: Final = (
    (XL_MAGIC, StreamFormat.XL),
    (LIBXL_MAGIC, StreamFormat.LIBXL),
    (LIBXC_MAGIC, StreamFormat.LIBXC),
    (QEMU_MAGIC, StreamFormat.QEMU),
    (MULTIFD_MAGIC, StreamFormat.QEMU_MULTIFD),
)


def recognise(head: bytes) -> StreamFormat:
    """The format of a stream that begins with ``head`` (``HEAD_BYTES`` bytes, or all there are)."""
    for magic, kind in MAGICS:
        if head.startswith(magic):
            return kind
    return StreamFormat.OPAQUE


class EndWatch:
    """Follows one stream's first and last bytes."""

    def __init__(self) -> None:
        self._head = b""
        self._tail = b""

    def feed(self, data: memoryview) -> None:
        """The next bytes of the stream; only a few at either end are copied."""
        if len(self._head) < HEAD_BYTES:
            self._head += bytes(data[: HEAD_BYTES - len(self._head)])
        if len(data) >= TAIL_BYTES:
            self._tail = bytes(data[-TAIL_BYTES:])
        else:
            self._tail = (self._tail + bytes(data))[-TAIL_BYTES:]

    @property
    def format(self) -> StreamFormat:
        """What the stream is, as far as it has come."""
        return recognise(self._head)

    def cut(self, *, answered: bool) -> bool:
        """Whether a stream that ends here is certainly not whole.

        Args:
            answered: whether the other direction carried anything: an xl stream that was answered is a migration,
                which ends with the source's GO; an unanswered one is a saved domain, which ends with END.
        """
        match self.format:
            case StreamFormat.QEMU:
                return not (self._qemu_description() or self._qemu_eof())
            case StreamFormat.XL:
                return not self._tail.endswith(XL_GO if answered else XEN_END_RECORD)
            case StreamFormat.LIBXL | StreamFormat.LIBXC:
                return not self._tail.endswith(XEN_END_RECORD)
        return False

    def _qemu_description(self) -> bool:
        """After EOF a precopy stream describes its sections in JSON (migration/savevm.c): it ends so."""
        return self._tail.endswith((b"]}", b"] }")) and all(0x20 <= byte < 0x7F for byte in self._tail[-16:])

    def _qemu_eof(self) -> bool:
        """A postcopy stream, or one without that description, ends with a section's footer and EOF."""
        ending = self._tail[-_QEMU_FOOTER_BYTES - 1 :]
        if len(ending) <= _QEMU_FOOTER_BYTES or ending[-1] != QEMU_SECTION_EOF or ending[0] != QEMU_SECTION_FOOTER:
            return False
        return int.from_bytes(ending[1:5], "big") <= _QEMU_SECTIONS_MAX

"""The relays' wire format as an attacker on the path knows it: written from the format, not from the relays' parsers.

control   TLS records: type u8, version u16, length u16, then `length` bytes
lane      source to destination first "KRL1" and a token of 16 bytes; then, both ways, sealed records:
          version u8, type u8, flags u16, lane u16, epoch u16, sequence u64, length u32, ciphertext, tag of 16
resume    source to destination first "KRS1" and a route of 16 bytes; then as control
"""

import struct
from dataclasses import dataclass
from enum import Enum

LANE_MAGIC = b"KRL1"
RESUME_MAGIC = b"KRS1"
PREFIX_BYTES = 20
HEADER = struct.Struct(">BBHHHQI")
HEADER_BYTES = 20
TAG_BYTES = 16
HELLO, LANE_OK, FRAME, ACK, FINAL = 1, 2, 3, 4, 5

TLS_HEADER_BYTES = 5
TLS_HANDSHAKE = 22
TLS_APPLICATION = 23

FRAME_HEADER = struct.Struct(">BBHHBBQQQII16sQ")
FRAME_HEADER_BYTES = 64
DATA, END = 1, 2
END_BYTES = FRAME_HEADER_BYTES + 32  # an END frame: its header and the full digest
WHOLE, FIRST, LAST = 3, 1, 2
RECORD_BYTES = 1024 * 1024 + 64  # a longer frame goes in several records

ACK_ENTRY = struct.Struct(">HBxQQ")


class Kind(Enum):
    """What a connection is, by its first byte."""

    CONTROL = "control"
    RESUME = "resume"
    LANE = "lane"
    OTHER = "other"

    @classmethod
    def of(cls, first: bytes) -> "Kind":
        """By the first bytes the client sends."""
        if first[0] == TLS_HANDSHAKE:
            return cls.CONTROL
        if first[0] == LANE_MAGIC[0]:
            return cls.RESUME if first.startswith(RESUME_MAGIC) else cls.LANE
        return cls.OTHER


class Way(Enum):
    """Source to destination, or back."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class Unit:
    """One whole TLS record, lane prefix or sealed record that passes the attacker.

    `lane` counts the lane connections (0 is the first; -1 for others); `index` counts this connection's units of this
    kind in this way, so that a sealed record's is its sequence number.
    """

    kind: Kind
    way: Way
    lane: int
    what: str
    index: int
    data: bytes

    @property
    def type(self) -> int:
        """The record's type byte, sealed or TLS; 0 for anything else."""
        return {"record": self.data[1], "tls": self.data[0]}.get(self.what, 0)

    @property
    def is_end(self) -> bool:
        """Whether it is, by its length, the record of an END frame (no test sends 32 bytes of data in one frame)."""
        return self.what == "record" and self.type == FRAME and len(self.data) == HEADER_BYTES + END_BYTES + TAG_BYTES

    @property
    def is_data(self) -> bool:
        """Whether it is the record of a DATA frame."""
        return self.what == "record" and self.type == FRAME and not self.is_end


class Splitter:
    """Cuts one way of one connection into units."""

    def __init__(self, kind: Kind, way: Way, lane: int) -> None:
        self._kind, self._way, self._lane = kind, way, lane
        self._buffer = bytearray()
        self._index = 0
        self._prefix_due = kind in {Kind.LANE, Kind.RESUME} and way is Way.FORWARD

    def feed(self, data: bytes) -> list[Unit]:
        """The units that `data` completes."""
        self._buffer += data
        units = []
        while (size := self._size()) and len(self._buffer) >= size:
            what = {Kind.CONTROL: "tls", Kind.RESUME: "tls", Kind.LANE: "record"}.get(self._kind, "raw")
            index = self._index
            if self._prefix_due:
                what, self._prefix_due = "prefix", False
            else:
                self._index += 1
            units.append(Unit(self._kind, self._way, self._lane, what, index, bytes(self._buffer[:size])))
            del self._buffer[:size]
        return units

    def rest(self) -> bytes:
        """What is left at the end: an incomplete unit."""
        return bytes(self._buffer)

    def _size(self) -> int:
        """Bytes of the unit that begins the buffer; 0 while that cannot be told."""
        if self._prefix_due:
            return PREFIX_BYTES
        if self._kind in {Kind.CONTROL, Kind.RESUME} and len(self._buffer) >= TLS_HEADER_BYTES:
            return TLS_HEADER_BYTES + int.from_bytes(self._buffer[3:5], "big")
        if self._kind is Kind.LANE and len(self._buffer) >= HEADER_BYTES:
            return HEADER_BYTES + int(HEADER.unpack_from(self._buffer)[-1]) + TAG_BYTES
        return len(self._buffer) if self._kind is Kind.OTHER else 0


def flip(data: bytes, bit: int) -> bytes:
    """`data` with one bit turned; bit 0 is the most significant of the first byte."""
    byte, within = divmod(bit, 8)
    changed = bytearray(data)
    changed[byte] ^= 0x80 >> within
    return bytes(changed)

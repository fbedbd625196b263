"""What lanes carry inside sealed records: lane hellos, frames, acknowledgements. docs/wire-format.md draws them.

Sans-IO: buffers in, values out; every length is checked before it is used.
"""

import struct
from enum import IntEnum, IntFlag, unique
from typing import Final, NamedTuple, NewType

from crypto.keys import Direction
from proxy.errors import ProtocolViolation
from proxy.limits import ACK_ENTRIES_MAX, CHANNELS_MAX, FRAME_BODY_SLACK_BYTES, FRAME_BYTES_MAX

ChannelId = NewType("ChannelId", int)

# ---- the first bytes of a connection
TLS_FIRST_BYTE: Final = 0x16  # a TLS handshake record
LANE_MAGIC: Final = b"KRL1"
RESUME_MAGIC: Final = b"KRS1"  # then the route of ACCEPT, then TLS
LANE_FIRST_BYTE: Final = LANE_MAGIC[0]
LANE_TOKEN_BYTES: Final = 16
LANE_PREFIX_BYTES: Final = len(LANE_MAGIC) + LANE_TOKEN_BYTES  # before a hello's sealed record, or before TLS

# ---- frames
FRAME_HEADER: Final = struct.Struct(">BBHHBBQQQII16sQ")
FRAME_HEADER_BYTES: Final = FRAME_HEADER.size
FRAME_DIGEST_BYTES: Final = 16
DIGEST_BYTES: Final = 32

ACK_ENTRY: Final = struct.Struct(">HBxQQ")


class FrameFlags(IntFlag):
    """Flags of a FRAME record: which part of a frame it holds."""

    FIRST = 1
    LAST = 2


WHOLE_FRAME: Final = FrameFlags.FIRST | FrameFlags.LAST


@unique
class FrameKind(IntEnum):
    """What a frame says about its stream."""

    DATA = 1
    END = 2


@unique
class Codec(IntEnum):
    """How a frame's body encodes the stream's bytes."""

    OPAQUE = 0  # as they are
    PAGES = 1  # columns of a page-aware frame (chunking/)


class FrameHeader(NamedTuple):
    """The first 64 bytes of a frame.

    Args:
        kind: DATA or END.
        codec: how the body is encoded.
        channel: 0 to ``CHANNELS_MAX`` - 1.
        direction: which way the stream runs.
        number: frames of this channel and direction before this one.
        cache_order: frames of this session and direction before this one, all channels together.
        offset: bytes of the stream before this frame; in an END, the stream's byte count.
        raw_bytes: stream bytes this frame stands for; 0 in an END.
        body_bytes: bytes that follow the header: ``raw_bytes`` if OPAQUE, at most ``FRAME_BODY_SLACK_BYTES`` more if
            PAGES; ``DIGEST_BYTES`` in an END, the full digest.
        digest: first 16 bytes of the running BLAKE3 up to the end of this frame.
    """

    kind: FrameKind
    codec: Codec
    channel: ChannelId
    direction: Direction
    number: int
    cache_order: int
    offset: int
    raw_bytes: int
    body_bytes: int
    digest: bytes

    def pack_into(self, buffer: memoryview) -> None:
        """Write the header into the first 64 bytes of ``buffer``."""
        FRAME_HEADER.pack_into(
            buffer,
            0,
            self.kind,
            self.codec,
            0,
            self.channel,
            self.direction,
            0,
            self.number,
            self.cache_order,
            self.offset,
            self.raw_bytes,
            self.body_bytes,
            self.digest,
            0,
        )

    @classmethod
    def parse(cls, frame: memoryview | bytes) -> "FrameHeader":
        """Read and bound the header at the start of ``frame``.

        Raises:
            ProtocolViolation: too short, an unknown kind, codec or direction, or a length over its limit.
        """
        if len(frame) < FRAME_HEADER_BYTES:
            raise ProtocolViolation(f"a frame of {len(frame)} bytes, its header has {FRAME_HEADER_BYTES}")
        (kind, codec, flags, channel, direction, reserved, number, cache_order, offset, raw, body, digest, spare) = (
            FRAME_HEADER.unpack_from(frame)
        )
        if kind not in _KINDS or codec not in _CODECS or direction > 1 or flags or reserved or spare:
            raise ProtocolViolation(f"frame kind {kind}, codec {codec}, direction {direction}, flags {flags:#x}")
        if channel >= CHANNELS_MAX or raw > FRAME_BYTES_MAX or body > raw + FRAME_BODY_SLACK_BYTES:
            raise ProtocolViolation(f"frame on channel {channel} of {raw} bytes in {body}")
        if kind == FrameKind.END and (raw != 0 or body != DIGEST_BYTES or codec != Codec.OPAQUE):
            raise ProtocolViolation(f"an END frame of {raw} bytes in {body}, codec {codec}")
        if kind == FrameKind.DATA and (raw == 0 or body == 0 or (codec == Codec.OPAQUE and raw != body)):
            raise ProtocolViolation(f"a frame of {raw} bytes in {body}, codec {codec}")
        return cls(
            _KINDS[kind],
            _CODECS[codec],
            ChannelId(channel),
            _DIRECTIONS[direction],
            number,
            cache_order,
            offset,
            raw,
            body,
            digest,
        )


# Look-ups cost a tenth of calling the enumerations.
_KINDS: Final = {int(kind): kind for kind in FrameKind}
_CODECS: Final = {int(codec): codec for codec in Codec}
_DIRECTIONS: Final = (Direction.FORWARD, Direction.BACKWARD)


class Ack(NamedTuple):
    """What a receiver has taken of one channel and direction.

    Args:
        channel: the channel.
        direction: the direction of the acknowledged frames.
        frames: frames decoded, checked and written: all below this number.
        credit: the stream offset up to which the sender may now send.
    """

    channel: ChannelId
    direction: Direction
    frames: int
    credit: int


def pack_acks(acks: list[Ack]) -> bytes:
    """The payload of an ACK record."""
    return b"".join(ACK_ENTRY.pack(ack.channel, ack.direction, ack.frames, ack.credit) for ack in acks)


def parse_acks(payload: memoryview | bytes) -> list[Ack]:
    """Read an ACK record.

    Raises:
        ProtocolViolation: not a whole number of entries, none, too many, or a field out of range.
    """
    count, rest = divmod(len(payload), ACK_ENTRY.size)
    if rest or not 1 <= count <= ACK_ENTRIES_MAX:
        raise ProtocolViolation(f"an ACK record of {len(payload)} bytes")
    acks = []
    for channel, direction, frames, credit in ACK_ENTRY.iter_unpack(payload):
        if channel >= CHANNELS_MAX or direction > 1:
            raise ProtocolViolation(f"an acknowledgement of channel {channel}, direction {direction}")
        acks.append(Ack(ChannelId(channel), _DIRECTIONS[direction], frames, credit))
    return acks

"""Messages of the control connection and their framing, sans-IO.

Each is a MessagePack map with its type's name under "type", behind a big-endian u32 of its length. Strings and
lists are bounded by the types themselves: msgspec refuses what does not fit before anything is acted on.
"""

import struct
from typing import Annotated, Final, Literal

import msgspec

from chunking.limits import CHAINS_MAX, SEGMENT_PAGES_MAX
from crypto.attestation.limits import NONCE_BYTES, PCR_BANKS_MAX, PCR_COUNT
from crypto.receipts.limits import (
    CERTIFICATE_BYTES_MAX,
    CHECKPOINT_BYTES_MAX,
    HEADS_ASKED_MAX,
    PROOF_HASHES_MAX,
    RECEIPT_BYTES_MAX,
)
from proxy.errors import ProtocolViolation
from proxy.limits import (
    CHANNELS_MAX,
    CONTROL_MESSAGE_BYTES_MAX,
    EVIDENCE_PART_BYTES_MAX,
    FINDINGS_MAX,
    LANES_MAX,
    PAGES_GIVEN_MAX,
    PAGES_WANTED_MAX,
    REASON_CHARACTERS_MAX,
    SEGMENTS_MAX,
    VTPM_PART_BYTES,
    VTPM_PROOF_BYTES_MAX,
)
from proxy.preflight import Finding, HostFacts

PROTOCOL_VERSION: Final = 1

_LENGTH: Final = struct.Struct(">I")
_U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
_U63 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_ChannelNumber = Annotated[int, msgspec.Meta(ge=0, lt=CHANNELS_MAX)]
_SessionBytes = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Token = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Proof = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Chains = Annotated[int, msgspec.Meta(ge=1, le=CHAINS_MAX)]
_Ordinal = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
_Guardable = Literal["", "xl", "qmp"]
_Reason = Annotated[str, msgspec.Meta(max_length=REASON_CHARACTERS_MAX)]
Standing = Literal["open", "asked", "prepared", "voted", "committed", "done", "aborted", "doubt", "unknown", "busy"]


class _Message(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """Base of the control messages."""


class LaneGrant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Permission to open one lane: its id and the random token (16 bytes) that its hello must show."""

    lane: _U16
    token: _Token


_Grants = Annotated[tuple[LaneGrant, ...], msgspec.Meta(min_length=1, max_length=LANES_MAX)]
_GrantsOrNone = Annotated[tuple[LaneGrant, ...], msgspec.Meta(max_length=LANES_MAX)]


class LaneProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes its sender has put on one lane so far, the hello's included."""

    lane: _U16
    sent_bytes: _U63


class ChannelState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far one channel has come at the sender of this: what it has written onward, and what may follow.

    ``opened`` is whether the destination's hypervisor is connected; a source says true of what it was told of.
    """

    channel: _ChannelNumber
    frames: _U63
    credit: _U63
    opened: bool


_States = Annotated[tuple[ChannelState, ...], msgspec.Meta(max_length=CHANNELS_MAX)]


class StoredSegment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pages that an earlier session left behind: what they are called, and how many there are.

    On the wire ``name`` is an alias, good for one connection and direction (``crypto.keys.segment_alias``).
    """

    name: _SessionBytes
    pages: Annotated[int, msgspec.Meta(ge=0, le=SEGMENT_PAGES_MAX)]


_Segments = Annotated[tuple[StoredSegment, ...], msgspec.Meta(max_length=SEGMENTS_MAX)]


_Receipt = Annotated[bytes, msgspec.Meta(max_length=RECEIPT_BYTES_MAX)]
_Hash = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Path = Annotated[tuple[_Hash, ...], msgspec.Meta(max_length=PROOF_HASHES_MAX)]


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The offer as its sender has signed it, the certificate of its key, and of which sizes of the log it has heard."""

    receipt: _Receipt
    signer: Annotated[bytes, msgspec.Meta(max_length=CERTIFICATE_BYTES_MAX)]
    asked: Annotated[tuple[_U63, ...], msgspec.Meta(max_length=HEADS_ASKED_MAX)]


class LogHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The signed head of the sender's log, and the proofs that it continues those that were asked for."""

    text: Annotated[str, msgspec.Meta(max_length=CHECKPOINT_BYTES_MAX)]
    proofs: Annotated[tuple[_Path, ...], msgspec.Meta(max_length=HEADS_ASKED_MAX)]


_Bank = Literal["sha1", "sha256", "sha384", "sha512"]
_Pcrs = Annotated[
    tuple[Annotated[int, msgspec.Meta(ge=0, lt=PCR_COUNT)], ...], msgspec.Meta(min_length=1, max_length=PCR_COUNT)
]


class Bank(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PCRs of one bank, by index."""

    bank: _Bank
    pcrs: _Pcrs


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a host is to show: a quote over these PCRs, and the logs that led to them."""

    banks: Annotated[tuple[Bank, ...], msgspec.Meta(min_length=1, max_length=PCR_BANKS_MAX)]
    event_log: bool = False
    ima: bool = False


class Challenge(_Message, frozen=True, tag="challenge"):
    """Source to destination, before OFFER or RESUME: show what you are; without ``wanted`` nothing is demanded."""

    version: _U16
    session: _SessionBytes
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    wanted: Wanted | None = None


class Attested(_Message, frozen=True, tag="attested"):
    """The answer, in as many messages as it takes; and then the source's to what the last of them asks.

    ``part`` is of the evidence (MessagePack). The destination's last one asks by ``nonce`` and ``wanted``, or does not.
    """

    part: Annotated[bytes, msgspec.Meta(max_length=EVIDENCE_PART_BYTES_MAX)]
    more: bool
    nonce: Annotated[bytes, msgspec.Meta(max_length=NONCE_BYTES)] = b""
    wanted: Wanted | None = None


class Offer(_Message, frozen=True, tag="offer"):
    """Source to destination, first: what it would like to send.

    ``cache_bytes`` is the page cache it would keep, 0 for none; ``chains`` how many contexts it would compress in;
    ``tenant`` whose stored pages may be referred to, empty for nobody's, and ``segments`` what of them is here.
    ``handover`` is the kind of hypervisor whose hand-over it can guard, empty for none. ``evidence`` is there where its
    host signs receipts. ``vtpm`` says that it moves the machine's vTPM along, if it has one. ``host`` is what its host
    says of itself.
    """

    version: _U16
    session: _SessionBytes
    suites: Annotated[tuple[_U16, ...], msgspec.Meta(min_length=1, max_length=16)]
    codecs: Annotated[tuple[_U16, ...], msgspec.Meta(min_length=1, max_length=16)]
    egress: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")]
    lanes: Annotated[int, msgspec.Meta(ge=1, le=LANES_MAX)]
    resume_seconds: _U16
    xl_flags: Annotated[str, msgspec.Meta(pattern=r"^[edp]{0,3}\Z")] = ""
    cache_bytes: _U63 = 0
    chains: _Chains = 1
    tenant: Annotated[str, msgspec.Meta(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,62})?\Z")] = ""
    segments: _Segments = ()
    handover: _Guardable = ""
    evidence: Evidence | None = None
    vtpm: bool = False
    host: HostFacts | None = None


class Accept(_Message, frozen=True, tag="accept"):
    """Destination to source: the session is open, with this suite, codec and these lanes.

    With codec PAGES both keep a page cache of ``cache_bytes``, and the pages of ``segments``, which the source offered
    and the destination has too, may be referred to, in the order given. ``handover`` is what was offered, if both can
    guard it; else the hypervisors hand over unguarded. ``evidence`` is the offer's with the destination's signature,
    and ``head`` is of its log, if both sign receipts. ``vtpm`` says that it will ask for the machine's vTPM. ``host``
    is what its host says of itself.
    """

    suite: _U16
    codec: _U16
    lanes: _Grants
    resume_seconds: _U16
    route: _Token
    cache_bytes: _U63 = 0
    chains: _Chains = 1
    segments: _Segments = ()
    handover: _Guardable = ""
    evidence: Evidence | None = None
    head: LogHead | None = None
    vtpm: bool = False
    host: HostFacts | None = None


class Resume(_Message, frozen=True, tag="resume"):
    """Source to destination, first on a new control connection: go on with a session that lost its last one.

    ``received`` is the cache order of the next frame expected; everything below has arrived. ``channels`` is what the
    sender's receiving halves have written onward.
    """

    version: _U16
    session: _SessionBytes
    proof: _Proof
    received: _U63
    channels: _States


class Resumed(_Message, frozen=True, tag="resumed"):
    """The answer: the session goes on with these lanes. ``phase`` is the destination's: open, finishing or closed."""

    proof: _Proof
    received: _U63
    channels: _States
    lanes: _GrantsOrNone
    phase: Literal["open", "finishing", "closed"]


class Refuse(_Message, frozen=True, tag="refuse"):
    """Destination to source instead of ACCEPT or RESUMED: no, with the exit code it stands for."""

    code: _U16
    reason: _Reason


class LaneRequest(_Message, frozen=True, tag="lane_request"):
    """Source to destination: a lane's hello failed, a lane was lost or one more is wanted; grant one."""


class LaneGranted(_Message, frozen=True, tag="lane_granted"):
    """The answer to a LaneRequest."""

    grant: LaneGrant


class LaneLost(_Message, frozen=True, tag="lane_lost"):
    """Either way: a lane has broken here; what was under way on it will be sent again."""

    lane: _U16


class ChannelOpen(_Message, frozen=True, tag="channel_open"):
    """Source to destination: the hypervisor has connected once more. ``credit`` is for backward bytes."""

    channel: _ChannelNumber
    credit: _U63


class ChannelOpened(_Message, frozen=True, tag="channel_opened"):
    """The answer: the egress is connected. ``credit`` is for forward bytes."""

    channel: _ChannelNumber
    credit: _U63


class Heartbeat(_Message, frozen=True, tag="heartbeat"):
    """Each way every few seconds; ``lanes`` lets the receiver tell a lying length from a slow lane."""

    number: _U63
    lanes: Annotated[tuple[LaneProgress, ...], msgspec.Meta(max_length=LANES_MAX)]


class PagesWanted(_Message, frozen=True, tag="pages_wanted"):
    """Destination to source: stored pages that frame ``order`` refers to cannot be read here; ordinals, ascending."""

    order: _U63
    ordinals: Annotated[tuple[_Ordinal, ...], msgspec.Meta(min_length=1, max_length=PAGES_WANTED_MAX)]


class PagesGiven(_Message, frozen=True, tag="pages_given"):
    """The answer, in as many messages as it takes: some of those pages, 4096 bytes each."""

    order: _U63
    ordinals: Annotated[tuple[_Ordinal, ...], msgspec.Meta(min_length=1, max_length=PAGES_GIVEN_MAX)]
    pages: Annotated[bytes, msgspec.Meta(max_length=PAGES_GIVEN_MAX * 4096)]


class Shown(_Message, frozen=True, tag="shown"):
    """Source to destination, after ACCEPT and again whenever it comes back: the head of its log."""

    head: LogHead


class Facts(_Message, frozen=True, tag="facts"):
    """Destination to source, when all has arrived: what it has to say, and wants to be stated."""

    facts: _Receipt


class Statement(_Message, frozen=True, tag="statement"):
    """The answer: the statement of both, with the source's signature."""

    receipt: _Receipt


class Countersigned(_Message, frozen=True, tag="countersigned"):
    """The answer to that: with the destination's signature, too. It has been logged."""

    receipt: _Receipt


class VtpmWanted(_Message, frozen=True, tag="vtpm_wanted"):
    """Destination to source, when all of the machine has arrived: its vTPM, wrapped for this key (``crypto.hpke``)."""

    recipient: Annotated[bytes, msgspec.Meta(min_length=1216, max_length=1216)]


class VtpmGiven(_Message, frozen=True, tag="vtpm_given"):
    """The answer, in as many messages as it takes; ``rest`` are still to come. Empty where the machine has none."""

    part: Annotated[bytes, msgspec.Meta(max_length=VTPM_PART_BYTES)]
    rest: Annotated[int, msgspec.Meta(ge=0, le=63)]


class VtpmProved(_Message, frozen=True, tag="vtpm_proved"):
    """Destination to source: it is here, and these are its own quotes."""

    proof: Annotated[bytes, msgspec.Meta(max_length=VTPM_PROOF_BYTES_MAX)]


class Finish(_Message, frozen=True, tag="finish", omit_defaults=True):
    """Source to destination: all channels have ended both ways and everything is acknowledged.

    ``receipt`` is the outcome with the source's signature, where receipts are signed.
    """

    receipt: _Receipt = b""


class Finished(_Message, frozen=True, tag="finished", omit_defaults=True):
    """The answer: the local ends have taken it for good (file renamed, command's status 0).

    ``receipt`` is the outcome with the destination's signature, too.
    """

    receipt: _Receipt = b""


class Word(_Message, frozen=True, tag="word", omit_defaults=True):
    """Either way, about the hand-over: where its sender stands (``proxy.handover``). May be repeated and late.

    A source says ``asked`` where its own hypervisor is the one to say that all is there; a destination ``unknown`` of
    a hand-over that it has no record of, and ``busy`` where another of its processes is at work on it.

    ``paused`` comes with ``asked``: the machine's operator had paused it, and it is to stay so.
    """

    state: Standing
    why: _Reason = ""
    paused: bool = False


class Recover(_Message, frozen=True, tag="recover"):
    """Source to destination, first on a new control connection: the session is over, its hand-over is not.

    ``state`` is where the source stands, and both say Words until it has nothing more to say.
    """

    version: _U16
    session: _SessionBytes
    state: Standing
    why: _Reason = ""


class Survey(_Message, frozen=True, tag="survey"):
    """Source to destination, first on a new control connection: could a machine go, and what would be in its way?

    Nothing goes, and nothing is kept of it. ``need_bytes`` is the machine's memory, -1 where that is not known.
    """

    version: _U16
    egress: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")]
    host: HostFacts
    need_bytes: Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)] = -1


class Surveyed(_Message, frozen=True, tag="surveyed"):
    """The answer: what the destination says of itself, and has found; no facts to a host that may not send there."""

    host: HostFacts | None
    findings: Annotated[tuple[Finding, ...], msgspec.Meta(max_length=FINDINGS_MAX)]


class Abort(_Message, frozen=True, tag="abort"):
    """Either way: the session is over; ``code`` is the sender's exit code."""

    code: _U16
    reason: _Reason


Message = (
    Challenge
    | Attested
    | Offer
    | Accept
    | Refuse
    | Resume
    | Resumed
    | LaneRequest
    | LaneGranted
    | LaneLost
    | ChannelOpen
    | ChannelOpened
    | Heartbeat
    | PagesWanted
    | PagesGiven
    | Shown
    | Facts
    | Statement
    | Countersigned
    | VtpmWanted
    | VtpmGiven
    | VtpmProved
    | Finish
    | Finished
    | Word
    | Recover
    | Survey
    | Surveyed
    | Abort
)

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final[msgspec.msgpack.Decoder[Message]] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """A message with its length before it."""
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


class MessageReader:
    """Cuts a byte stream into messages.

    Holds at most one incomplete message: ``CONTROL_MESSAGE_BYTES_MAX`` plus what one ``feed`` brought.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def partial(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[Message]:
        """Take plaintext, return the messages it completes.

        Raises:
            ProtocolViolation: a length over the limit, or a body that is no known message.
        """
        self._buffer += data
        messages: list[Message] = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > CONTROL_MESSAGE_BYTES_MAX:
                raise ProtocolViolation(f"a control message of {length} bytes, {CONTROL_MESSAGE_BYTES_MAX} allowed")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                messages.append(_DECODER.decode(body))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ProtocolViolation(printable(f"a control message that is none: {error}")) from None
        return messages


def printable(reason: str) -> str:
    """A peer's words, made safe for a terminal and a log: one line, no control characters, bounded."""
    clean = "".join(character if character.isprintable() else "?" for character in reason)
    return clean[:REASON_CHARACTERS_MAX]

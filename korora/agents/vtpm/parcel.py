"""What passes between the agents of two hosts: the vTPM, wrapped, and the proof that it has arrived. Sans-IO.

parcel = epoch (8 bytes, big-endian) ‖ HPKE(MessagePack of Parcel; info = label ‖ session ‖ machine ‖ epoch)
voucher = the same, of Voucher and with another label, where the machine's own stream carries the vTPM
proof  = MessagePack of Proof: quotes of the vTPM itself, over all its PCRs, made from what has arrived
quoted = SHA-256(label ‖ session ‖ machine ‖ epoch ‖ nonce), the nonce being in the parcel or voucher
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, TypeVar
from uuid import UUID

import msgspec

from crypto.attestation.quote import verify_quote
from crypto.attestation.structures import Selection
from crypto.errors import AttestationError, WrapBroken
from crypto.hpke import Recipient, wrap
from korora.agents.vtpm.commands import PCR_BYTES, PCRS, Hierarchy
from korora.agents.vtpm.ctrl import BLOB_BYTES_MAX, Blob, StateBlob
from proxy.errors import VtpmRefused

VERSION: Final = 1
PROOF_BYTES_MAX: Final = 16 * 1024  # two quotes, and 24 digests
_QUOTED: Final = b"korora-vtpm-v1"
_EPOCH: Final = struct.Struct(">Q")
_ALL: Final = Selection.of({"sha256": range(PCRS)})

_Bytes32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_State = Annotated[bytes, msgspec.Meta(min_length=1, max_length=BLOB_BYTES_MAX)]
_Structure = Annotated[bytes, msgspec.Meta(min_length=1, max_length=2048)]


class Parcel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A vTPM on its way; see ``epochs.Entry`` for ``identity``, ``ctrl.StateBlob`` for the flags."""

    LABEL: ClassVar = b"korora vtpm v1"

    version: int
    nonce: _Bytes32
    identity: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{68})?\Z")]
    permanent: _State
    permanent_flags: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
    volatile: _State
    volatile_flags: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]

    @property
    def blobs(self) -> tuple[StateBlob, ...]:
        """As the emulator takes them."""
        return (
            StateBlob(Blob.PERMANENT, self.permanent_flags, self.permanent),
            StateBlob(Blob.VOLATILE, self.volatile_flags, self.volatile),
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the state, in hex."""
        return digest_of(self.blobs)


class Voucher(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is said of a vTPM that the machine's stream has carried; ``digest`` is of its state (``digest_of``)."""

    LABEL: ClassVar = b"korora vtpm v1 carried"

    version: int
    nonce: _Bytes32
    identity: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{68})?\Z")]
    digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Quoted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One identity key's quote; see ``rehearsal.KeyQuote``."""

    hierarchy: int
    public: _Structure
    quote: _Structure
    signature: _Structure


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a vTPM says of itself where it has arrived."""

    quotes: Annotated[tuple[Quoted, ...], msgspec.Meta(min_length=1, max_length=len(Hierarchy))]
    pcrs: Annotated[bytes, msgspec.Meta(min_length=PCRS * PCR_BYTES, max_length=PCRS * PCR_BYTES)]


_Held = TypeVar("_Held", Parcel, Voucher)


@dataclass(frozen=True, slots=True)
class Passage:
    """One vTPM's way in one session under one epoch."""

    session: str
    uuid: str
    epoch: int

    def context(self) -> bytes:
        """What all that is said of it is bound to: session, machine and epoch, 40 bytes."""
        return bytes.fromhex(self.session) + UUID(self.uuid).bytes + _EPOCH.pack(self.epoch)

    def wrap(self, parcel: Parcel | Voucher, recipient: bytes) -> bytes:
        """For the destination alone.

        Raises:
            WrapBroken: its key is none.
        """
        body = wrap(msgspec.msgpack.encode(parcel), recipient, parcel.LABEL + self.context())
        return _EPOCH.pack(self.epoch) + body

    def quoted(self, nonce: bytes) -> bytes:
        """What the vTPM has to quote, 32 bytes."""
        return hashlib.sha256(_QUOTED + self.context() + nonce).digest()


def digest_of(blobs: tuple[StateBlob, ...]) -> str:
    """SHA-256 of a state, in hex: of each part its type, flags and length (u32 each), then its bytes."""
    running = hashlib.sha256()
    for blob in blobs:
        running.update(struct.pack(">III", blob.type, blob.flags, len(blob.data)) + blob.data)
    return running.hexdigest()


def unwrap(session: str, uuid: str, wrapped: bytes, recipient: Recipient) -> tuple[Passage, Parcel]:
    """What came, at the destination.

    Raises:
        WrapBroken: it does not open as that session's, machine's and epoch's.
        VtpmRefused: what was in it is no parcel.
    """
    return _unwrap(session, uuid, wrapped, recipient, kind=Parcel)


def unwrap_voucher(session: str, uuid: str, wrapped: bytes, recipient: Recipient) -> tuple[Passage, Voucher]:
    """The same of a voucher."""
    return _unwrap(session, uuid, wrapped, recipient, kind=Voucher)


def _unwrap(
    session: str, uuid: str, wrapped: bytes, recipient: Recipient, *, kind: type[_Held]
) -> tuple[Passage, _Held]:
    if len(wrapped) < _EPOCH.size:
        raise WrapBroken("a vTPM's parcel is cut short")
    passage = Passage(session, uuid, int(_EPOCH.unpack_from(wrapped)[0]))
    if not 1 <= passage.epoch < 2**63:
        raise VtpmRefused(f"epoch {passage.epoch} is none")
    body = recipient.unwrap(wrapped[_EPOCH.size :], kind.LABEL + passage.context())
    try:
        parcel = msgspec.msgpack.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise VtpmRefused(f"a vTPM's parcel is none: {error}") from None
    if parcel.version != VERSION:
        raise VtpmRefused(f"a vTPM's parcel of version {parcel.version}, this relay knows {VERSION}")
    return passage, parcel


def read_proof(content: bytes) -> Proof:
    """A peer's proof.

    Raises:
        VtpmRefused: it is none.
    """
    if len(content) > PROOF_BYTES_MAX:
        raise VtpmRefused(f"a vTPM's proof of {len(content)} bytes, {PROOF_BYTES_MAX} allowed")
    try:
        return msgspec.msgpack.decode(content, type=Proof)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise VtpmRefused(f"a vTPM's proof is none: {error}") from None


def verify(proof: Proof, qualifying: bytes) -> None:
    """Every quote in it is over its PCRs and ``qualifying``, by the key beside it.

    Raises:
        VtpmRefused: one is not.
    """
    pcrs = {index: proof.pcrs[PCR_BYTES * index : PCR_BYTES * (index + 1)] for index in range(PCRS)}
    for said in proof.quotes:
        try:
            verify_quote(
                said.quote,
                said.signature,
                said.public,
                qualifying=qualifying,
                selection=_ALL,
                pcrs={"sha256": pcrs},
            )
        except AttestationError as error:
            raise VtpmRefused(f"the vTPM's quote is not good: {error.told}") from None


def same(ours: Proof, theirs: Proof) -> None:
    """Both are of one vTPM, in one run of it: the same keys, and every PCR as it was.

    Raises:
        VtpmRefused: they are not; what differs is named.
    """
    if [(said.hierarchy, said.public) for said in ours.quotes] != [
        (said.hierarchy, said.public) for said in theirs.quotes
    ]:
        raise VtpmRefused("what the destination has is another vTPM, or another run of it")
    for index in range(PCRS):
        piece = slice(PCR_BYTES * index, PCR_BYTES * (index + 1))
        if ours.pcrs[piece] != theirs.pcrs[piece]:
            raise VtpmRefused(f"PCR {index} of the vTPM is not what it was")


def identity_of(proof: Proof) -> str:
    """Name of its endorsement seed's key, in hex (Part 1 §16); empty where that was not to be had."""
    for said in proof.quotes:
        if said.hierarchy == Hierarchy.ENDORSEMENT:
            return identity_of_key(said.public)
    return ""


def identity_of_key(public: bytes) -> str:
    """Name of a key that SHA-256 names, in hex (Part 1 §16)."""
    return "000b" + hashlib.sha256(public).hexdigest()

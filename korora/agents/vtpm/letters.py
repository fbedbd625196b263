"""What crosses between two hosts as files, where no relay carries a vTPM. Sans-IO.

    destination                                       source
      request  a key to wrap for, the last epoch   ─▶
               seen there, and until when
               the vTPM, wrapped; under which epoch ◀─  parcel
      answer   it is here, by its own quotes; or   ─▶
               it will never be

letter  = MessagePack of Letter: a body, and its host's signature over PAE(type ‖ kind, body) by its signing key
wrapped = HPKE(MessagePack of Luggage; info = label ‖ request ‖ machine ‖ epoch)
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from cryptography import x509
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey

from crypto.attestation.binding import Binding, Side
from crypto.attestation.limits import NONCE_BYTES
from crypto.errors import SignatureInvalid, SignerUntrusted, WrapBroken
from crypto.hpke import PLAIN_BYTES_MAX, PUBLIC_BYTES, WRAP_BYTES, Recipient, wrap
from crypto.keys import SessionId
from crypto.receipts.dsse import SIGNATURE_BYTES, pae
from crypto.receipts.limits import CERTIFICATE_BYTES_MAX
from crypto.receipts.signers import verified_signer
from korora.agents.vtpm.ctrl import BLOB_BYTES_MAX, Blob, StateBlob
from korora.agents.vtpm.parcel import PROOF_BYTES_MAX, Passage, digest_of
from proxy.errors import VtpmRefused

VERSION: Final = 1
EVIDENCE_BYTES_MAX: Final = 16 * 1024  # a quote, a key and PCRs; logs do not go in files
WRAPPED_BYTES_MAX: Final = WRAP_BYTES + PLAIN_BYTES_MAX
LETTER_BYTES_MAX: Final = WRAPPED_BYTES_MAX + 16 * 1024  # a parcel's body, its certificate and its signature
_LABEL: Final = b"korora vtpm file v1"
_TYPE: Final = "application/vnd.korora.vtpm-"

_Id = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
_Uuid = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]
_Host = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")]
_Epoch = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 2)]
_Seconds = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
_Digest = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")]
_Flags = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
_ProofBytes = Annotated[bytes, msgspec.Meta(max_length=PROOF_BYTES_MAX)]


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all of them say.

    Args:
        version: ``VERSION``.
        id: of the request, made by the destination: what a session's id is elsewhere.
        uuid: the machine's.
        to: the host that it is for.
    """

    version: Literal[1]
    id: _Id
    uuid: _Uuid
    to: _Host


class Request(_Body, frozen=True, forbid_unknown_fields=True):
    """Give that vTPM to this key.

    Args:
        recipient: the key.
        epoch: the highest that the destination has seen.
        until: when the key is thrown away, in seconds since 1970.
        evidence: of the destination's platform, as ``crypto.attestation.evidence`` encodes it; empty for none.
    """

    recipient: Annotated[bytes, msgspec.Meta(min_length=PUBLIC_BYTES, max_length=PUBLIC_BYTES)]
    epoch: _Epoch
    until: _Seconds
    evidence: Annotated[bytes, msgspec.Meta(max_length=EVIDENCE_BYTES_MAX)] = b""

    @property
    def binding(self) -> Binding:
        """What its evidence is made for: all else that it says, in the place of a connection's exporter.

        There is no nonce of the source's: it is as fresh as the key in it.
        """
        rest = msgspec.msgpack.encode(msgspec.structs.replace(self, evidence=b""))
        exporter = hashlib.sha256(pae(_TYPE + KINDS[Request], rest)).digest()
        return Binding(
            exporter, SessionId(bytes.fromhex(self.id)), Side.DESTINATION, bytes(NONCE_BYTES), self.recipient
        )


class Sent(_Body, frozen=True, forbid_unknown_fields=True):
    """The vTPM, wrapped."""

    epoch: _Epoch
    wrapped: Annotated[bytes, msgspec.Meta(max_length=WRAPPED_BYTES_MAX)]


class Answer(_Body, frozen=True, forbid_unknown_fields=True):
    """What became of it.

    Args:
        outcome: ``here``, or ``withdrawn``: the key is gone, and nothing had come.
        epoch: of what came.
        digest: SHA-256 of that, in hex.
        proof: quotes of it, made at the destination; see ``parcel.Proof``.
    """

    outcome: Literal["here", "withdrawn"]
    epoch: _Epoch = 0
    digest: _Digest = ""
    proof: _ProofBytes = b""


KINDS: Final = {Request: "request", Sent: "parcel", Answer: "answer"}
_B = TypeVar("_B", Request, Sent, Answer)


class Letter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A body and who says so.

    Args:
        kind: of ``KINDS``.
        body: MessagePack of it.
        certificate: of the signing key, DER.
        signature: Ed25519.
    """

    kind: Literal["request", "parcel", "answer"]
    body: Annotated[bytes, msgspec.Meta(max_length=LETTER_BYTES_MAX)]
    certificate: Annotated[bytes, msgspec.Meta(max_length=CERTIFICATE_BYTES_MAX)]
    signature: Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


class Luggage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is in a parcel; see ``parcel.Parcel``.

    Args:
        nonce: what the vTPM quotes at either side is over it.
        identity: see ``epochs.Entry``.
        permanent, volatile: the state; the latter empty of a machine that is off.
        permanent_flags, volatile_flags: go back with them.
        proof: its quotes at the source.
    """

    nonce: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    identity: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{68})?\Z")]
    permanent: Annotated[bytes, msgspec.Meta(min_length=1, max_length=BLOB_BYTES_MAX)]
    permanent_flags: _Flags
    volatile: Annotated[bytes, msgspec.Meta(max_length=BLOB_BYTES_MAX)]
    volatile_flags: _Flags
    proof: _ProofBytes

    @property
    def off(self) -> bool:
        """Whether its machine was off: it will start anew, and so will its PCRs."""
        return not self.volatile

    @property
    def blobs(self) -> tuple[StateBlob, ...]:
        """As an emulator takes them."""
        permanent = StateBlob(Blob.PERMANENT, self.permanent_flags, self.permanent)
        return (permanent,) if self.off else (permanent, StateBlob(Blob.VOLATILE, self.volatile_flags, self.volatile))

    @property
    def digest(self) -> str:
        """SHA-256 of the state, in hex."""
        return digest_of(self.blobs)


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose letters are believed.

    Args:
        ca: whoever signs has a signing certificate of this CA.
        crl: of that CA, verified: none that stands there counts.
        now: an aware datetime.
        name: the host that it must be; empty for any.
        pins: SHA-256 of signing keys (SubjectPublicKeyInfo): where there are any, it must be one of them.
    """

    ca: x509.Certificate
    crl: x509.CertificateRevocationList
    now: datetime
    name: str = ""
    pins: Collection[bytes] = frozenset()


def write(body: Request | Sent | Answer, certificate: bytes, key: SigningKey) -> bytes:
    """A letter."""
    kind = KINDS[type(body)]
    content = msgspec.msgpack.encode(body)
    signature = key.sign(pae(_TYPE + kind, content)).signature
    # KINDS has no other kinds than a letter may have; mypy sees text.
    return msgspec.msgpack.encode(Letter(kind, content, certificate, signature))  # type: ignore[arg-type]


def read(content: bytes, kind: type[_B], trust: Trust) -> tuple[_B, str]:
    """What a letter says, and which host says it; nothing of it is looked at before its signature.

    Args:
        content: the file.
        kind: what it has to be.
        trust: who may say it.

    Raises:
        VtpmRefused: it is no such letter.
        SignerUntrusted: whoever has signed it is not believed.
        SignatureInvalid: the signature is not over this.
    """
    letter = _decoded(content, Letter, "a letter of korora vtpm")
    if letter.kind != KINDS[kind]:
        raise VtpmRefused(f"this is {_ARTICLES[letter.kind]}, and {_ARTICLES[KINDS[kind]]} is wanted")
    signer = verified_signer(letter.certificate, trust.ca, trust.crl, trust.now, trust.name)
    if trust.pins and bytes.fromhex(signer.keyid) not in trust.pins:
        raise SignerUntrusted(f"the signing key of {signer.name} is {signer.keyid}, and not a pinned one")
    try:
        signer.key.verify(pae(_TYPE + letter.kind, letter.body), letter.signature)
    except (BadSignatureError, ValueError):
        raise SignatureInvalid(f"the signature of {signer.name} is not over this {letter.kind}") from None
    return _decoded(letter.body, kind, _ARTICLES[letter.kind]), signer.name


def pack(luggage: Luggage, passage: Passage, recipient: bytes) -> bytes:
    """Wrap a vTPM.

    Raises:
        WrapBroken: the recipient's key is none.
    """
    return wrap(msgspec.msgpack.encode(luggage), recipient, _LABEL + passage.context())


def unpack(sent: Sent, recipient: Recipient) -> tuple[Passage, Luggage]:
    """What came, at the destination.

    Raises:
        VtpmRefused: it does not open as that request's, machine's and epoch's, or is none.
    """
    passage = Passage(sent.id, sent.uuid, sent.epoch)
    try:
        body = recipient.unwrap(sent.wrapped, _LABEL + passage.context())
    except WrapBroken as error:
        raise VtpmRefused(str(error)) from None
    return passage, _decoded(body, Luggage, "a vTPM's luggage")


_ARTICLES: Final = {"request": "a request", "parcel": "a parcel", "answer": "an answer"}
_D = TypeVar("_D")


def _decoded(content: bytes, kind: type[_D], what: str) -> _D:
    if len(content) > LETTER_BYTES_MAX:
        raise VtpmRefused(f"{what} of {len(content)} bytes, {LETTER_BYTES_MAX} allowed")
    try:
        return msgspec.msgpack.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise VtpmRefused(f"this is not {what}: {error}") from None

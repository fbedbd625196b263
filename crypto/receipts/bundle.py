"""Receipts that are handed to somebody else, in one file of JSON: with all that it takes to verify them but trust.

Receipts, where each stands in its host's log and the proof of it, the log's signed head, and the certificates of those
who have signed. Whoever verifies it brings the CA's certificate, or the signers' own.
"""

import base64
import binascii
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec

from crypto.errors import ReceiptMalformed, SignerUntrusted
from crypto.receipts import checkpoint as heads
from crypto.receipts.checkpoint import Checkpoint
from crypto.receipts.dsse import Envelope, decode, encode
from crypto.receipts.limits import (
    CERTIFICATE_BYTES_MAX,
    CHECKPOINT_BYTES_MAX,
    KIB,
    PROOF_HASHES_MAX,
    SIGNERS_MAX,
    TREE_SIZE_MAX,
)
from crypto.receipts.merkle import leaf_hash, verify_inclusion
from crypto.receipts.receipt import Receipt, examine
from crypto.receipts.signers import Signer, Trust, read_signer

TYPE: Final = "korora-receipts/v1"
BUNDLE_BYTES_MAX: Final = 256 * KIB * KIB  # some 60 000 receipts: it is read whole
ENTRIES_MAX: Final = 100_000

_Hash = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One receipt.

    Args:
        index: its place in the log.
        envelope: of it, as JSON.
        proof: that it stands there (RFC 9162 §2.1.3), hashes in hexadecimal.
    """

    index: Annotated[int, msgspec.Meta(ge=0, lt=TREE_SIZE_MAX)]
    envelope: msgspec.Raw
    proof: Annotated[tuple[_Hash, ...], msgspec.Meta(max_length=PROOF_HASHES_MAX)]


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file.

    Args:
        type: what it is.
        checkpoint: the log's signed head.
        signers: certificates of those who signed, DER in base64.
        entries: the receipts.
    """

    type: Literal["korora-receipts/v1"]
    checkpoint: Annotated[str, msgspec.Meta(max_length=CHECKPOINT_BYTES_MAX)]
    signers: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=2 * CERTIFICATE_BYTES_MAX)], ...],
        msgspec.Meta(max_length=SIGNERS_MAX),
    ]
    entries: Annotated[tuple[Item, ...], msgspec.Meta(max_length=ENTRIES_MAX)]


@dataclass(frozen=True, slots=True)
class Verified:
    """A bundle that holds.

    Attributes:
        head: of the log, signed by its host.
        receipts: each with its place in the log.
    """

    head: Checkpoint
    receipts: tuple[tuple[int, Receipt], ...]


def make(checkpoint: str, entries: Iterable[tuple[int, Envelope, Sequence[bytes]]], signers: Iterable[Signer]) -> bytes:
    """The file's content.

    Args:
        checkpoint: a head of the log, signed.
        entries: receipts, each with its place and the proof that the head covers it there.
        signers: those who signed the receipts, and the log's host.

    Raises:
        ReceiptMalformed: too much for one bundle.
    """
    items = tuple(
        Item(index, msgspec.Raw(encode(envelope)), tuple(one.hex() for one in proof))
        for index, envelope, proof in entries
    )
    ders = tuple(base64.b64encode(signer.der).decode() for signer in signers)
    content = msgspec.json.encode(Bundle(TYPE, checkpoint, ders, items))
    if len(content) > BUNDLE_BYTES_MAX or len(items) > ENTRIES_MAX:
        raise ReceiptMalformed(f"a bundle of {len(items)} receipts", "export fewer sessions at once")
    return content


def read(content: bytes) -> tuple[Bundle, tuple[Signer, ...]]:
    """What is in a bundle, believed in nothing.

    Raises:
        ReceiptMalformed: it is none.
        SignerUntrusted: a certificate in it is none.
    """
    if len(content) > BUNDLE_BYTES_MAX:
        raise ReceiptMalformed(f"a bundle of {len(content)} bytes, {BUNDLE_BYTES_MAX} allowed")
    try:
        bundle = msgspec.json.decode(content, type=Bundle)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ReceiptMalformed(f"not a bundle of receipts: {error}") from None
    try:
        ders = [base64.b64decode(one, validate=True) for one in bundle.signers]
    except (binascii.Error, ValueError):
        raise SignerUntrusted("a certificate in the bundle that is not base64") from None
    return bundle, tuple(read_signer(der) for der in ders)


def verify(content: bytes, trusting: Callable[[tuple[Signer, ...]], Trust]) -> Verified:
    """Verify all of a bundle: the head's signature, that every receipt stands in that log, and its signatures.

    Args:
        content: the file's.
        trusting: tells whom to believe, given those whose certificates the bundle carries.

    Raises:
        ReceiptError: of whichever kind, naming the entry.
    """
    bundle, carried = read(content)
    trust = trusting(carried)
    owner = heads.name_of(heads.parse(bundle.checkpoint))
    head = heads.verify_any(bundle.checkpoint, f"{heads.ORIGIN_PREFIX}{owner}", trust.keys(owner))
    receipts = []
    for item in bundle.entries:
        envelope = decode(bytes(item.envelope))
        path = [bytes.fromhex(one) for one in item.proof]
        verify_inclusion(leaf_hash(encode(envelope)), item.index, head.size, path, head.root)
        receipts.append((item.index, examine(envelope, trust)))
    return Verified(head, tuple(receipts))

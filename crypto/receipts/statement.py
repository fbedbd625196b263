"""What a session did, as both hosts sign it: an in-toto Statement v1 with a predicate of our own.

docs/receipts.md tells field by field what stands in it, and a test holds that table against these structs. The bytes
are always the same for the same statement: compact JSON, members in the order below, keys of maps sorted.
"""

import hashlib
from collections.abc import Mapping
from enum import StrEnum, unique
from typing import Annotated, Final, Literal

import msgspec

from crypto.errors import ReceiptMalformed
from crypto.receipts.limits import (
    APPROVERS_MAX,
    ATTESTATIONS_MAX,
    CHECKPOINT_BYTES_MAX,
    DECISIONS_MAX,
    DIGESTS_MAX,
    FLAGS_MAX,
    ITEMS_MAX,
    PAGE_KINDS_MAX,
    PROCEDURES_MAX,
    STATEMENT_BYTES_MAX,
    SUBJECTS_MAX,
    TEXT_CHARACTERS_MAX,
)

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "urn:korora:migration:v1"
SESSION_SUBJECT: Final = "session"
"""The subject that every statement has, for some sessions end before there is anything else: SHA-256 of its id."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Text = Annotated[str, msgspec.Meta(max_length=TEXT_CHARACTERS_MAX)]
_Word = Annotated[str, msgspec.Meta(max_length=64)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
_Digest = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")]
_Hex = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{2}){1,64}\Z")]
_Session = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
_Moment = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,15}(\+00:00|Z)\Z")]
_Head = Annotated[str, msgspec.Meta(max_length=CHECKPOINT_BYTES_MAX)]
_Uid = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
_Side = Literal["source", "destination"]


@unique
class Stage(StrEnum):
    """When a statement is made, in a session's order."""

    OFFER = "offer"  # by the source, before anything is sent
    TRANSFER = "transfer"  # all has arrived: before the destination may let the machine run
    OUTCOME = "outcome"  # how it ended


class Party(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the two hosts.

    Args:
        name: NAME in its certificates.
        pin: SHA-256 of its TLS certificate's SubjectPublicKeyInfo, in hexadecimal; empty if unknown.
        user: the uid that began the session on that host; null where that cannot be told.
    """

    name: _Name
    pin: _Digest = ""
    user: _Uid | None = None


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The virtual machine, as its stream has told.

    Args:
        name: empty where the stream has not told it.
        uuid: the same.
    """

    name: Annotated[str, msgspec.Meta(max_length=255)]
    uuid: _Word


class Policies(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The policies that the two sides decided by.

    Args:
        source, destination: digest of that side's policy, in hexadecimal; empty where it has none.
    """

    source: _Digest = ""
    destination: _Digest = ""


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one side's policy said.

    Args:
        side: whose.
        point: when it was asked.
        rule: the name of the rule that decided.
        allowed: its answer.
        reason: in words for people.
        approvers: uids on that host who had approved of it.
    """

    side: _Side
    point: Literal["offer", "identity", "handover", "resume"]
    rule: _Text
    allowed: bool
    reason: _Text = ""
    approvers: Annotated[tuple[_Uid, ...], msgspec.Meta(max_length=APPROVERS_MAX)] = ()


class Procedure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A transformation procedure that was performed.

    Args:
        subject: by whom.
        procedure: which.
        items: on what.
    """

    subject: _Text
    procedure: _Word
    items: Annotated[tuple[_Word, ...], msgspec.Meta(max_length=ITEMS_MAX)] = ()


class Attestation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was found of one host's integrity.

    Args:
        side: of whom.
        kind: of what.
        passed: the verdict of the other side.
        reason: in words for people.
    """

    side: _Side
    kind: _Word
    passed: bool
    reason: _Text = ""


class Octets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much was carried.

    Args:
        forward, backward: bytes of the hypervisors' streams in that direction.
    """

    forward: _Count = 0
    backward: _Count = 0


class Heads(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What each host showed the other of its log.

    Args:
        source, destination: text of its log's signed head in this session; empty where it had shown none.
    """

    source: _Head = ""
    destination: _Head = ""


class Predicate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a session did, as far as its stage.

    Args:
        stage: when this is said.
        session: its id, 32 hexadecimal digits.
        source: the host that the machine leaves.
        destination: the host where it arrives.
        vm: the machine; null before its stream has told.
        started: ISO 8601 in UTC, by the clock of who made the statement.
        ended: the same; null while it runs.
        policies: each side's.
        decisions: in the order in which they were made.
        procedures: in the order in which they were performed.
        attestations: of both hosts.
        pages: how many memory pages were sent in each way.
        bytes: of the streams, as they entered the pair of relays.
        outcome: how it ended; empty before.
        error: why, in words for people.
        flags: ``recovered`` where it was decided after the session; placeholders for items that could not be accepted.
        heads: of both logs.
    """

    stage: Stage
    session: _Session
    source: Party
    destination: Party
    vm: Machine | None
    started: _Moment
    ended: _Moment | None = None
    policies: Policies = Policies()
    decisions: Annotated[tuple[Decision, ...], msgspec.Meta(max_length=DECISIONS_MAX)] = ()
    procedures: Annotated[tuple[Procedure, ...], msgspec.Meta(max_length=PROCEDURES_MAX)] = ()
    attestations: Annotated[tuple[Attestation, ...], msgspec.Meta(max_length=ATTESTATIONS_MAX)] = ()
    pages: Annotated[dict[_Word, _Count], msgspec.Meta(max_length=PAGE_KINDS_MAX)] = {}
    bytes: Octets = Octets()
    outcome: Literal["", "done", "refused", "failed", "aborted", "doubt"] = ""
    error: _Text = ""
    flags: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=FLAGS_MAX)] = ()
    heads: Heads = Heads()


class Subject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A thing that the statement is about (in-toto ResourceDescriptor).

    Args:
        name: ``session``, or of what was carried: ``channel/0/forward`` is channel 0's stream to the destination,
            ``vtpm/7`` the state of the machine's vTPM, which has epoch 7 from then on.
        digest: by algorithm, in hexadecimal.
    """

    name: _Text
    digest: Annotated[dict[_Word, _Hex], msgspec.Meta(min_length=1, max_length=DIGESTS_MAX)]


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An in-toto Statement v1.

    Args:
        _type: what it is.
        subject: the session, and what it carried.
        predicateType: which predicate.
        predicate: what the session did.
    """

    type: Literal["https://in-toto.io/Statement/v1"] = msgspec.field(name="_type")
    subject: Annotated[tuple[Subject, ...], msgspec.Meta(min_length=1, max_length=SUBJECTS_MAX)]
    predicateType: Literal["urn:korora:migration:v1"]  # noqa: N815 - the standard's name
    predicate: Predicate


_ENCODER: Final = msgspec.json.Encoder(order="deterministic")
_DECODER: Final = msgspec.json.Decoder(Statement)


def build(predicate: Predicate, digests: Mapping[str, Mapping[str, str]]) -> bytes:
    """A statement's bytes, ready to be signed.

    Args:
        predicate: what the session did.
        digests: of what it carried, by name: ``{"channel/0/forward": {"blake3": "…"}}``. The session itself is added.

    Raises:
        ReceiptMalformed: a value is out of its bounds, or all are too much for ``STATEMENT_BYTES_MAX``.
    """
    named: dict[str, Mapping[str, str]] = {SESSION_SUBJECT: session_digest(predicate.session), **digests}
    subjects = tuple(Subject(name, dict(digest)) for name, digest in named.items())
    content = _ENCODER.encode(Statement(STATEMENT_TYPE, subjects, PREDICATE_TYPE, predicate))
    parse(content)  # what we sign, we accept ourselves
    return content


def parse(payload: bytes) -> Statement:
    """A statement, strictly: no member unknown, none twice, every value within bounds, and no other spelling of it.

    Raises:
        ReceiptMalformed: it is none of ours.
    """
    if len(payload) > STATEMENT_BYTES_MAX:
        raise ReceiptMalformed(f"a statement of {len(payload)} bytes, {STATEMENT_BYTES_MAX} allowed")
    try:
        statement = _DECODER.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ReceiptMalformed(f"not a statement of a migration: {error}") from None
    if _ENCODER.encode(statement) != payload:
        raise ReceiptMalformed("a statement that is spelled in another way than its values are")
    names = [subject.name for subject in statement.subject]
    if len(set(names)) != len(names):
        raise ReceiptMalformed("a statement with two subjects of one name")
    expected = session_digest(statement.predicate.session)
    if not any(one.name == SESSION_SUBJECT and one.digest == expected for one in statement.subject):
        raise ReceiptMalformed("a statement whose subject is not the session that it tells of")
    return statement


def session_digest(session: str) -> dict[str, str]:
    """The digest of the subject ``session``: SHA-256 of the id's 16 bytes.

    Raises:
        ReceiptMalformed: no session has that id.
    """
    try:
        return {"sha256": hashlib.sha256(bytes.fromhex(session)).hexdigest()}
    except ValueError:
        raise ReceiptMalformed("a session's id is 32 hexadecimal digits") from None

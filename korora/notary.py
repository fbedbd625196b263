"""Signs what this host's sessions did, holds its peers to what they have signed, and logs both (``proxy.witness``)."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Final, Literal, Self

import msgspec
import structlog
from cryptography.hazmat.primitives.serialization import Encoding

from crypto.errors import CryptoError, HeadMalformed, LogForked, LogTruncated, ReceiptMalformed
from crypto.identity import Identity
from crypto.receipts import dsse, statement
from crypto.receipts.dsse import Envelope
from crypto.receipts.limits import ATTESTATIONS_MAX, DECISIONS_MAX, PROCEDURES_MAX, TEXT_CHARACTERS_MAX
from crypto.receipts.log import ReceiptLog
from crypto.receipts.peers import PeerHeads, Seen
from crypto.receipts.signers import Signer, Signers, read_signer, verified_signer
from crypto.receipts.statement import (
    Attestation,
    Decision,
    Heads,
    Machine,
    Octets,
    Party,
    Policies,
    Predicate,
    Procedure,
    Stage,
    Statement,
)
from korora.refusals import Refusals
from korora.watched import Unwatched, Watch
from proxy.authority import Act, Question
from proxy.control import Evidence, LogHead
from proxy.errors import PeerRefused, StreamCorrupt
from proxy.handover.record import Record
from proxy.handover.table import Side, State
from proxy.report import SessionReport
from proxy.session import Role

log = structlog.get_logger("korora.receipts")

RECEIPTS: Final = "receipts"
"""Folder in the state directory, where the log is."""

FACTS_BYTES_MAX: Final = 16 * 1024  # of the destination: the same tables as in a statement, of one side

SHOWN_MAX: Final = 4  # identities: a connection is greeted within seconds, and reloads are further apart

RECOVERED: Final = "recovered"
"""Flag of an outcome that was decided after the session."""

Outcome = Literal["", "done", "refused", "failed", "aborted", "doubt"]
_SideName = Literal["source", "destination"]

_OUTCOMES: Final[Mapping[str, Outcome]] = {"done": "done", "refused": "refused", "interrupted": "aborted"}


class _Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a destination has to say: its half of the statement."""

    policy: str
    decisions: tuple[Decision, ...]
    procedures: tuple[Procedure, ...]
    attestations: tuple[Attestation, ...] = ()


_FACTS: Final = msgspec.json.Decoder(_Facts)


class Notary:
    """Of a process.

    Args:
        identity: signs.
        folder: the state directory.
        watch: is told of what is logged and what cannot be, and of peers' logs that are not what they were.
    """

    def __init__(self, identity: Identity, folder: Path, watch: Watch | None = None) -> None:
        self.identity = identity
        self._shown = [_Own.of(identity)]
        """Identities that connections may have been made by, the newest last."""
        self.log = ReceiptLog(folder / RECEIPTS, lambda words: log.warning("the log of receipts", what=words))
        self.peers = PeerHeads(folder / RECEIPTS)
        self.signers = Signers(folder / RECEIPTS)
        self.watch = watch or Unwatched()
        self._ours: dict[str, Deed] = {}
        """Of sessions that are not over, by session and role."""
        self._refusals, self._turn = Refusals(), Lock()

    def reload(self, identity: Identity) -> None:
        """Connections that are made from now on are signed for by this identity."""
        self.identity = identity
        own = _Own.of(identity)
        self._shown = [*(one for one in self._shown if one.leaf != own.leaf), own][-SHOWN_MAX:]

    def own(self, leaf: str = "") -> "_Own":
        """The identity whose certificate a peer was shown; today's, where that is not known any more."""
        return next((one for one in reversed(self._shown) if one.leaf == leaf), self._shown[-1])

    def begin(self, question: Question, report: SessionReport) -> "Deed":
        """See ``witness.Notary.begin``."""
        deed = self._ours[_key(report)] = Deed(self, question, report)
        return deed

    def refused(self, report: SessionReport, reason: str) -> None:
        """See ``witness.Notary.refused``. Of one peer, only so many an hour are logged."""
        report.ended, report.outcome, report.error = datetime.now(UTC), "refused", reason
        peer = report.peer or ""
        with self._turn:
            logged = self._refusals.leaves_receipt(peer, report.ended)
            news = not logged and self._refusals.is_news(peer)
        if logged:
            self.ended(report)
            return
        self._ours.pop(_key(report), None)
        self.watch.receipt_spared()
        if news:
            log.warning("a peer is refused so often that no more receipts are kept of it", peer=peer, reason=reason)

    def ended(self, report: SessionReport) -> None:
        """A session is over, and its report is whole: an outcome that both have not signed is signed by us alone.

        It reads and writes the disk. A log that does not take it is told of, and changes nothing: all is over.
        """
        deed = self._ours.pop(_key(report), None)
        if deed is None:
            return
        try:
            deed.end()
            self.log.checkpoint(self.identity.name, self.identity.signing_key)  # it covers the outcome
        except CryptoError as error:
            self._failed(report.session_id, error)

    def knows(self, record: Record) -> bool:
        """Whether the session of a hand-over is not over here: its own outcome will tell."""
        return f"{record.head.session}-{record.head.side}" in self._ours

    def settled(self, record: Record, acts: Sequence[Act] = ()) -> None:
        """A hand-over was decided without its session, by recovery or by an operator: that is signed by us alone.

        Args:
            record: of the hand-over.
            acts: what was performed on it.

        It reads and writes the disk; what the log does not take is told of.
        """
        source = record.side is Side.SOURCE
        here, there = Party(self.identity.name, self.identity.spki_sha256.hex()), Party(record.head.peer)
        predicate = Predicate(
            stage=Stage.OUTCOME,
            session=record.head.session,
            source=here if source else there,
            destination=there if source else here,
            vm=Machine(record.vm.name, record.vm.uuid) if record.vm.name or record.vm.uuid else None,
            started=record.head.began,
            ended=datetime.now(UTC).isoformat(),
            procedures=tuple(Procedure(act.subject, act.procedure, act.items) for act in acts)[:PROCEDURES_MAX],
            outcome="done" if record.state is State.DONE else "aborted",
            error=record.why[:TEXT_CHARACTERS_MAX],
            flags=(RECOVERED,),
        )
        try:
            self.signers.keep(self.own().signer.der)
            envelope = dsse.sign(statement.build(predicate, {}), self.identity.signing_key)
            self.keep(envelope, Role(record.side.value), Stage.OUTCOME, both=False)
            self.log.checkpoint(self.identity.name, self.identity.signing_key)
        except CryptoError as error:
            self._failed(record.head.session, error)

    def keep(self, envelope: Envelope, role: Role, stage: Stage, *, both: bool) -> None:
        """Log a receipt, signed by both hosts or by this one alone.

        Raises:
            LogUnusable: the disk does not take it.
        """
        self.log.append(envelope)
        self.watch.receipt_logged(role.value, stage.value, both=both)

    def _failed(self, session: str, error: CryptoError) -> None:
        self.watch.receipt_failed()
        log.error("a session's outcome cannot be logged", session=session, reason=str(error))


class Deed:
    """One session's receipts at one side; see ``witness.Witness``.

    Args:
        notary: of this process.
        question: which session it is, and who began it.
        report: filled in while it runs.
    """

    def __init__(self, notary: Notary, question: Question, report: SessionReport) -> None:
        self._notary, self._question, self._report = notary, question, report
        own = notary.own(question.own)  # a reload while the peer was greeted must not have us sign as somebody else
        self._identity, self._signer = own.identity, own.signer
        self._source = question.role is Role.SOURCE
        self._peer: Signer | None = None
        self._known: tuple[Seen, ...] = ()
        """Heads that the peer has shown before, and continues in this session."""
        self._heads = {"source": "", "destination": ""}
        self._theirs: _Facts | None = None
        self._initiator: int | None = None
        self._told = _Facts("", (), ())
        """What the source was told: when it comes back it is judged again, perhaps by other rules; stated it is not."""
        self._sent: bytes = b""
        """The envelope that we have signed, and wait for."""
        self._last, self._ended = Lock(), False
        """Whose turn it is to log the outcome: a session that is cancelled may leave a thread at it."""
        self._by_both = False

    # ---- the offer

    def offer(self) -> Evidence:
        """See ``witness.Witness``."""
        self._known = self._notary.peers.known(self._question.peer)
        self._sent = self._signed(self._predicate(Stage.OFFER))
        return Evidence(self._sent, self._signer.der, tuple(seen.head.size for seen in self._known))

    def accept(self, evidence: Evidence) -> tuple[Evidence, LogHead]:
        """See ``witness.Witness``."""
        peer = self._meet(evidence.signer)
        envelope, made = self._verified(evidence.receipt, Stage.OFFER, {peer.keyid})
        self._initiator = made.predicate.source.user  # the source's word; it has to stand by it
        self._agrees(made)
        receipt = self._countersigned(envelope, Stage.OFFER)
        self._known = self._notary.peers.known(self._question.peer)
        head = self._head(evidence.asked)
        self._heads["destination"] = head.text
        asked = tuple(seen.head.size for seen in self._known)
        return Evidence(receipt, self._signer.der, asked), head

    def accepted(self, evidence: Evidence, head: LogHead) -> LogHead:
        """See ``witness.Witness``."""
        self._meet(evidence.signer)
        self._ours_again(evidence.receipt, Stage.OFFER)
        self._follow(head)
        self._heads["destination"] = head.text
        shown = self._head(evidence.asked)
        self._heads["source"] = shown.text
        return shown

    def met(self, head: LogHead) -> None:
        """See ``witness.Witness``."""
        self._follow(head)
        self._heads["source"] = head.text

    # ---- what was transferred

    def facts(self) -> bytes:
        """See ``witness.Witness``."""
        self._told = _Facts(self._report.policy or "", self._decisions(), self._procedures(), self._attestations())
        return msgspec.json.encode(self._told)

    def state(self, facts: bytes, digests: Sequence[str]) -> bytes:
        """See ``witness.Witness``."""
        if len(facts) > FACTS_BYTES_MAX:
            raise ReceiptMalformed(f"facts of {len(facts)} bytes, {FACTS_BYTES_MAX} allowed")
        try:
            self._theirs = _FACTS.decode(facts)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ReceiptMalformed(f"the destination's facts are none: {error}") from None
        if any(decision.side != "destination" for decision in self._theirs.decisions):
            raise ReceiptMalformed("the destination tells of decisions that are not its own")
        if any(found.side != "source" for found in self._theirs.attestations):
            raise ReceiptMalformed("the destination attests to what is not this host")
        mine = _digests(self._report)
        self._sent = self._signed(self._predicate(Stage.TRANSFER), {name: mine[name] for name in digests})
        return self._sent

    def countersign(self, receipt: bytes, digests: Sequence[str]) -> bytes:
        """See ``witness.Witness``."""
        envelope, made = self._verified(receipt, Stage.TRANSFER, {self._other.keyid})
        self._agrees(made, digests)
        return self._countersigned(envelope, Stage.TRANSFER)

    def countersigned(self, receipt: bytes) -> None:
        """See ``witness.Witness``."""
        self._ours_again(receipt, Stage.TRANSFER)

    # ---- how it ended

    def conclude(self) -> bytes:
        """See ``witness.Witness``."""
        self._sent = self._signed(self._predicate(Stage.OUTCOME, "done"), _digests(self._report))
        return self._sent

    def concluded(self, receipt: bytes) -> bytes:
        """See ``witness.Witness``."""
        with self._concluding():
            envelope, made = self._verified(receipt, Stage.OUTCOME, {self._other.keyid})
            self._agrees(made, _digests(self._report))
            return self._countersigned(envelope, Stage.OUTCOME)

    def over(self, receipt: bytes) -> None:
        """See ``witness.Witness``."""
        if not self._by_both:  # the destination may say it again
            with self._concluding():
                self._ours_again(receipt, Stage.OUTCOME)

    @contextmanager
    def _concluding(self) -> Iterator[None]:
        """An outcome that both have signed is logged, and no other after it.

        Raises:
            StreamCorrupt: one is logged already.
        """
        with self._last:
            if self._ended:
                raise StreamCorrupt("the session was over here before its outcome came")
            yield
            self._ended = self._by_both = True

    def end(self) -> None:
        """It is over: where both have not signed how it ended, we sign that alone, and log it; once."""
        with self._last:
            if not self._ended:
                self._ended = True
                self._state_alone()

    def _state_alone(self) -> None:
        report = self._report
        outcome = _OUTCOMES.get(report.outcome, "failed")
        if report.handover == "doubt":
            outcome = "doubt"
        elif report.handover == "aborted" and outcome == "failed":
            outcome = "aborted"
        content = self._signed(self._predicate(Stage.OUTCOME, outcome), _digests(report))
        self._notary.keep(dsse.decode(content), self._question.role, Stage.OUTCOME, both=False)

    # ---- parts

    @property
    def _other(self) -> Signer:
        if self._peer is None:
            raise PeerRefused("the peer has signed nothing yet")
        return self._peer

    def _meet(self, certificate: bytes) -> Signer:
        """The peer's signing key: of the host that TLS has met, under the same CA."""
        identity = self._identity
        self._peer = verified_signer(certificate, identity.ca, identity.crl, datetime.now(UTC), self._question.peer)
        self._notary.signers.keep(certificate)
        return self._peer

    def _head(self, asked: Sequence[int]) -> LogHead:
        text, proofs = self._notary.log.prove(tuple(asked), self._identity.name, self._identity.signing_key)
        return LogHead(text, proofs)

    def _follow(self, head: LogHead) -> None:
        """The peer's log continues what it was, or the session ends."""
        peers = self._notary.peers
        try:
            peers.check(self._question.peer, self._other.key, head.text, self._known, head.proofs)
        except (HeadMalformed, LogForked, LogTruncated) as error:
            self._notary.watch.log_disputed(error)
            raise

    def _signed(self, predicate: Predicate, digests: Mapping[str, Mapping[str, str]] | None = None) -> bytes:
        content = statement.build(predicate, digests or {})
        self._notary.signers.keep(self._signer.der)
        return dsse.encode(dsse.sign(content, self._identity.signing_key))

    def _countersigned(self, envelope: Envelope, stage: Stage) -> bytes:
        self._notary.signers.keep(self._signer.der)
        both = dsse.countersign(envelope, self._identity.signing_key)
        self._notary.keep(both, self._question.role, stage, both=True)
        return dsse.encode(both)

    def _ours_again(self, receipt: bytes, stage: Stage) -> None:
        """What we have signed and sent has come back with the peer's signature, and nothing else: it is logged."""
        envelope, _ = self._verified(receipt, stage, {self._other.keyid, self._signer.keyid})
        if envelope.payload != dsse.decode(self._sent).payload:
            raise StreamCorrupt(f"the destination has signed another {stage.value} than this host's")
        self._notary.keep(envelope, self._question.role, stage, both=True)

    def _verified(self, receipt: bytes, stage: Stage, required: set[str]) -> tuple[Envelope, Statement]:
        keys = {self._other.keyid: self._other.key, self._signer.keyid: self._signer.key}
        envelope = dsse.decode(receipt)
        dsse.verify(envelope, keys, required=required)
        made = statement.parse(envelope.payload)
        if made.predicate.stage is not stage:
            raise ReceiptMalformed(f"a receipt of the {made.predicate.stage.value}, expected the {stage.value}")
        return envelope, made

    def _agrees(self, made: Statement, digests: Iterable[str] = ()) -> None:
        """A statement of the source's is about this session, these hosts, this machine and these bytes, all of them.

        Raises:
            StreamCorrupt: it is not.
        """
        told = made.predicate
        own = self._predicate(told.stage)
        wrong = [name for name in ("session", "source", "destination") if getattr(told, name) != getattr(own, name)]
        ended = told.stage is Stage.OUTCOME
        ours = tuple(one for one in told.decisions if one.side == "destination")
        did = self._told.procedures
        found = tuple(one for one in told.attestations if one.side == "source")
        checks = {
            "machine": told.vm == own.vm or self._called_otherwise(told.vm, own.vm),
            "policy": told.policies.destination == self._told.policy,
            "attestation of the source": found == self._told.attestations,
            "decisions of this host": ours == self._told.decisions,
            "procedures of this host": told.procedures[len(told.procedures) - len(did) :] == did,
            "bytes": told.bytes == own.bytes or not ended,  # before the end some may be under way
            "heads": told.heads == own.heads,
            "outcome": told.outcome == ("done" if ended else ""),
        }
        wrong += [name for name, holds in checks.items() if not holds]
        mine = _digests(self._report)
        wrong += [
            subject.name
            for subject in made.subject
            if subject.name != statement.SESSION_SUBJECT and mine.get(subject.name) != subject.digest
        ]
        stated = {subject.name for subject in made.subject}
        wrong += [f"nothing of {name}" for name in digests if name not in stated]
        if wrong:
            raise StreamCorrupt(f"what the source states is not what was seen here: {', '.join(wrong)}")

    def _called_otherwise(self, told: Machine | None, own: Machine | None) -> bool:
        """Whether both may be one machine all the same: a QEMU is called as its host likes, and may have no UUID."""
        if self._report.handover_kind != "qmp" or told is None or own is None:
            return False
        return told.uuid == own.uuid or not (told.uuid and own.uuid)

    def _predicate(self, stage: Stage, outcome: Outcome = "") -> Predicate:
        report, question, theirs = self._report, self._question, self._theirs
        here = Party(self._identity.name, self._identity.spki_sha256.hex(), question.user)
        there = Party(question.peer, question.pin, self._initiator)
        source, destination = (here, there) if self._source else (there, here)
        own, other = report.policy or "", "" if theirs is None else theirs.policy
        decisions, procedures = self._decisions(), self._procedures()
        if theirs is not None:
            decisions, procedures = decisions + theirs.decisions, procedures + theirs.procedures
        found = self._attestations() + (() if theirs is None else theirs.attestations)
        later = stage is not Stage.OFFER
        return Predicate(
            stage=stage,
            session=report.session_id,
            source=source,
            destination=destination,
            vm=Machine(report.vm or "", report.vm_uuid or "") if later and (report.vm or report.vm_uuid) else None,
            started=report.started.isoformat(),
            ended=None if report.ended is None else report.ended.isoformat(),
            policies=Policies(*((own, other) if self._source else (other, own))),
            decisions=decisions,
            procedures=procedures[:PROCEDURES_MAX],
            attestations=found[:ATTESTATIONS_MAX],
            pages=dict(report.pages) if later else {},
            bytes=Octets(report.bytes_in["forward"], report.bytes_in["backward"]) if later else Octets(),
            outcome=outcome,
            error=(report.error or "")[:TEXT_CHARACTERS_MAX],
            heads=Heads(**self._heads),
        )

    def _decisions(self) -> tuple[Decision, ...]:
        side: _SideName = "source" if self._source else "destination"
        return tuple(
            Decision(side, one.point, one.rule, one.allowed, one.reason[:TEXT_CHARACTERS_MAX], tuple(one.approvers))
            for one in self._report.decisions[-(DECISIONS_MAX // 2) :]
        )

    def _attestations(self) -> tuple[Attestation, ...]:
        """What this side has found of the other's platform."""
        proved = self._report.attested
        if not proved:
            return ()
        other: _SideName = "destination" if self._source else "source"
        return (Attestation(other, proved.partition(" ")[0], passed=True, reason=proved[:TEXT_CHARACTERS_MAX]),)

    def _procedures(self) -> tuple[Procedure, ...]:
        return tuple(Procedure(act.subject, act.procedure, act.items) for act in self._report.procedures)[
            : PROCEDURES_MAX // 2
        ]


@dataclass(frozen=True, slots=True)
class _Own:
    """One of this host's identities: SHA-256 of its TLS certificate, in hexadecimal, and by whom it signs."""

    leaf: str
    identity: Identity
    signer: Signer

    @classmethod
    def of(cls, identity: Identity) -> Self:
        leaf = hashlib.sha256(identity.certificate.public_bytes(Encoding.DER)).hexdigest()
        return cls(leaf, identity, read_signer(identity.signing_certificate.public_bytes(Encoding.DER)))


def _digests(report: SessionReport) -> dict[str, dict[str, str]]:
    streams = {
        f"channel/{channel}/{direction}": {"blake3": digest}
        for channel, digests in report.digest_blake3.items()
        for direction, digest in digests.items()
    }
    return streams | ({f"vtpm/{report.vtpm_epoch}": {"sha256": report.vtpm_sha256}} if report.vtpm_sha256 else {})


def _key(report: SessionReport) -> str:
    return f"{report.session_id}-{report.role}"

"""A receipt: an envelope whose statement and signatures have been looked at, and whose signers had a part in it."""

from dataclasses import dataclass
from datetime import datetime

from nacl.signing import VerifyKey

from crypto.errors import ReceiptMalformed, SignatureMissing, SignerUntrusted
from crypto.receipts.dsse import Envelope, verify
from crypto.receipts.signers import Trust
from crypto.receipts.statement import Stage, Statement, parse


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was signed, and by whom.

    Attributes:
        statement: the contents.
        signed: names of the hosts whose signatures hold.
        unknown: ids of keys that nobody knows, whose signatures count for nothing.
    """

    statement: Statement
    signed: frozenset[str]
    unknown: tuple[str, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the hosts that have a part in it and have not signed, the source first."""
        predicate = self.statement.predicate
        names = dict.fromkeys((predicate.source.name, predicate.destination.name))
        return tuple(name for name in names if name not in self.signed)


def examine(envelope: Envelope, trust: Trust) -> Receipt:
    """Parse and verify a receipt.

    An offer has to be signed by its source, what was transferred by both, an outcome by whoever tells of it.

    Args:
        envelope: of the receipt.
        trust: tells whose keys are whose.

    Raises:
        ReceiptMalformed: its payload is no statement of ours.
        SignatureInvalid: a signature of a known key does not hold.
        SignatureMissing: who has to sign has not, as far as keys are known.
        SignerUntrusted: a key is not to be believed at that time, or is of a host that has no part in it.
    """
    statement = parse(envelope.payload)
    predicate = statement.predicate
    parties = {predicate.source.name, predicate.destination.name}
    moment = moment_of(statement)
    names: dict[str, str] = {}
    keys: dict[str, VerifyKey] = {}
    for signature in envelope.signatures:
        signer = trust.signer(signature.keyid, moment)
        if signer is None:
            continue
        if signer.name not in parties:
            raise SignerUntrusted(f"signed by {signer.name}, who has no part in a session of {' and '.join(parties)}")
        names[signature.keyid], keys[signature.keyid] = signer.name, signer.key
    signed = frozenset(names[one] for one in verify(envelope, keys))
    required = {Stage.OFFER: {predicate.source.name}, Stage.TRANSFER: parties}.get(predicate.stage, set())
    unknown = tuple(one.keyid for one in envelope.signatures if one.keyid not in keys)
    if not signed or not required <= signed:
        missing = " and ".join(sorted(required - signed)) or "any host that has a part in it"
        keys_unknown = f"; {len(unknown)} of its signatures are of keys that are not known" if unknown else ""
        raise SignatureMissing(
            f"a receipt of stage {predicate.stage.value} without the signature of {missing}{keys_unknown}",
            "give signing certificates by --signer NAME=FILE" if unknown else "",
        )
    return Receipt(statement, signed, unknown)


def moment_of(statement: Statement) -> datetime:
    """When it was signed, as its signers say: when the session ended, or else when it began.

    Raises:
        ReceiptMalformed: that is no time.
    """
    told = statement.predicate.ended or statement.predicate.started
    try:
        return datetime.fromisoformat(told)
    except ValueError:
        raise ReceiptMalformed(f"a statement with a time {told!r}") from None

"""Keys, statements and envelopes for tests of receipts."""

from pathlib import Path

from nacl.signing import SigningKey

from crypto.receipts.dsse import Envelope, countersign, keyid, sign
from crypto.receipts.log import ReceiptLog
from crypto.receipts.signers import Signer, Trust
from crypto.receipts.statement import Machine, Party, Predicate, Stage, build

ALPHA, BETA, STRANGER = (SigningKey(bytes([number]) * 32) for number in (1, 2, 3))


def predicate(number: int = 0, stage: Stage = Stage.OUTCOME) -> Predicate:
    """Of a migration from alpha to beta."""
    return Predicate(
        stage=stage,
        session=f"{number:032x}",
        source=Party("alpha"),
        destination=Party("beta"),
        vm=Machine("guest", "6a7b"),
        started="2026-01-02T03:04:05.678+00:00",
        outcome="done" if stage is Stage.OUTCOME else "",
    )


def statement(number: int = 0, stage: Stage = Stage.OUTCOME) -> bytes:
    """Its bytes."""
    return build(predicate(number, stage), {"channel/0/forward": {"blake3": f"{number:064x}"}})


def receipt(number: int = 0) -> Envelope:
    """Signed by both."""
    return countersign(sign(statement(number), ALPHA), BETA)


def filled(folder: Path, entries: int) -> ReceiptLog:
    """A log with receipts of the sessions 0, 1, 2 and so on."""
    log = ReceiptLog(folder)
    for number in range(entries):
        assert log.append(receipt(number)) == number
    return log


class Known(Trust):
    """Believes the keys above to be alpha's and beta's."""

    def __init__(self) -> None:
        """Without certificates, which nothing here asks for."""
        names = {"alpha": ALPHA, "beta": BETA}
        super().__init__(
            Signer(name, key.verify_key, keyid(key.verify_key), None)  # type: ignore[arg-type]
            for name, key in names.items()
        )

"""Who has a vTPM: each time it may change hosts it gets a new epoch, and no host takes an epoch twice. Sans-IO.

A host's ledger of one vTPM is a file of lines, each with its sum. An offer spends an epoch whatever comes of it: given,
it is the destination's; kept, the source goes on under it. So an epoch names one holder, and what comes under an epoch
that is not above all that were seen is a second use, a rollback or a fork.
"""

import zlib
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

import msgspec

from korora.agents.vtpm.handover import TABLE, Action, Event, Holding
from proxy.errors import VtpmFailed, VtpmRefused

EPOCH_MAX: Final = 2**63 - 1  # what a line takes; only a source that makes them up comes there
LEDGER_BYTES_MAX: Final = 1024 * 1024  # some 3000 lines: a thousand migrations of one machine
_Hex = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32}|[0-9a-f]{64}|[0-9a-f]{68})?\Z")]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where this host stands with the vTPM.

    Args:
        holding: of ``Holding``.
        epoch: 1 and more.
        at: ISO 8601, UTC.
        session: the migration's id, in hex; empty where none is under way.
        peer: the other host's name.
        identity: name of its endorsement seed's identity key (TPM2B_NAME, in hex), empty where that was not to be had.
        digest: SHA-256 of the state that moved, in hex; of what stayed: empty.
    """

    holding: Literal["here", "leaving", "gone", "arriving", "wiped"]
    epoch: Annotated[int, msgspec.Meta(ge=1, le=EPOCH_MAX)]
    at: str
    session: _Hex = ""
    peer: str = ""
    identity: _Hex = ""
    digest: _Hex = ""


@dataclass(slots=True)
class Ledger:
    """One host's entries of one vTPM, the oldest first."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def holding(self) -> Holding:
        """Where the host stands."""
        return Holding(self.entries[-1].holding) if self.entries else Holding.UNKNOWN

    @property
    def epoch(self) -> int:
        """The highest that was seen; 0 for none."""
        return max((entry.epoch for entry in self.entries), default=0)

    @property
    def identity(self) -> str:
        """The last that was known."""
        return next((entry.identity for entry in reversed(self.entries) if entry.identity), "")

    def concerns(self, session: str) -> bool:
        """Whether the last that happened is that session's; what an older one still has to say is over."""
        return bool(self.entries) and self.entries[-1].session == session

    def depart(self, session: str, peer: str, *, identity: str, digest: str, at: str) -> Entry:
        """It is offered to ``peer``, under an epoch that is spent by that.

        Raises:
            VtpmRefused: it is not this host's to give, or not the one that this host had.
        """
        if (self.holding, Event.DEPART) not in TABLE:
            raise _refused(f"the vTPM is not here to be given: it is {self._stands()}")
        self._same(identity)
        if self.epoch >= EPOCH_MAX:  # a line of the next one could not be read any more
            raise VtpmRefused("the vTPM came under the last epoch that there is: korora vtpm forget on all its hosts")
        return Entry("leaving", self.epoch + 1, at, session, peer, identity, digest)

    def arrive(self, epoch: int, session: str, peer: str, *, identity: str, digest: str, at: str) -> Entry:
        """``peer`` has given it under ``epoch``.

        Raises:
            VtpmRefused: it was here under that epoch or a later one, it is here, or it is another one.
        """
        known = next((entry for entry in reversed(self.entries) if entry.epoch == epoch), None)
        if known is not None:
            how = "a second use" if known.digest == digest else "a fork"
            raise _refused(f"epoch {epoch} of the vTPM was seen here already ({known.holding}): {how} of it")
        if epoch <= self.epoch:
            raise _refused(f"epoch {epoch} of the vTPM is older than epoch {self.epoch}, seen here: a rollback")
        self.require_elsewhere()
        self._same(identity)
        return Entry("arriving", epoch, at, session, peer, identity, digest)

    def require_elsewhere(self) -> None:
        """That this host has no part in it, and may be given it.

        Raises:
            VtpmRefused: it has.
        """
        if (self.holding, Event.ARRIVE) not in TABLE:
            raise _refused(f"the vTPM is {self._stands()} here, and there can be only one")

    def follow(self, event: Event, at: str) -> tuple[Entry | None, tuple[Action, ...]]:
        """What the machine's hand-over asks for: the entry to write, and what is to be done in which order.

        What has no place in the table changes nothing: it was done, or another session's.
        """
        step = TABLE.get((self.holding, event))
        if step is None:
            return None, ()
        last = self.entries[-1]
        entry = Entry(step.holding.value, last.epoch, at, last.session, last.peer, last.identity, last.digest)  # type: ignore[arg-type]  # UNKNOWN is nobody's next
        return entry if Action.WRITE in step.actions else None, step.actions

    def _same(self, identity: str) -> None:
        if identity and self.identity and identity != self.identity:
            raise VtpmRefused(
                f"another vTPM than the one known here: its identity is {identity[-16:]}, not {self.identity[-16:]}; "
                "if it was made anew on purpose, korora vtpm forget"
            )

    def _stands(self) -> str:
        last = self.entries[-1]
        return f"{last.holding} (epoch {last.epoch}, with {last.peer or 'nobody'})"


def _refused(words: str) -> VtpmRefused:
    """A machine may have been made anew, or have come and gone by ways that no relay saw: then an operator says so."""
    return VtpmRefused(f"{words}; if that is as it should be: korora vtpm forget")


def line(entry: Entry) -> bytes:
    """One line of the file."""
    body = msgspec.json.encode(entry)
    return body + f" {zlib.crc32(body):08x}\n".encode()


def read(content: bytes) -> tuple[Ledger, int]:
    """A file's ledger, and how many of its bytes are good: a last line that a crash has torn was never acted upon.

    Raises:
        VtpmFailed: any other line is wrong.
    """
    if len(content) > LEDGER_BYTES_MAX:
        raise VtpmFailed(f"a vTPM's ledger of {len(content)} bytes, {LEDGER_BYTES_MAX} allowed")
    ledger, good = Ledger(), 0
    *lines, tail = content.split(b"\n")
    for number, text in enumerate(lines, 1):
        body, _, total = text.rpartition(b" ")
        try:
            if total != b"%08x" % zlib.crc32(body):
                raise ValueError("its sum is wrong")
            ledger.entries.append(msgspec.json.decode(body, type=Entry))
        except (ValueError, msgspec.DecodeError) as error:
            if number == len(lines) and not tail and b"\0" in text:
                break  # torn, although its newline is there: sectors are written in any order
            raise VtpmFailed(
                f"line {number} of a vTPM's ledger: {error}",
                "keep it; find out which host has the vTPM before anything",
            ) from None
        good += len(text) + 1
    return ledger, good

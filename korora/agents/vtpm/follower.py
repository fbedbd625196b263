"""Follows a machine's hand-over with its vTPM: what is the same whether that is moved, or carried and verified."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

import structlog

from crypto.hpke import Recipient
from korora.agents.vtpm import parcel
from korora.agents.vtpm.ctrl import StateBlob
from korora.agents.vtpm.epochs import Entry
from korora.agents.vtpm.handover import Action, Event
from korora.agents.vtpm.ledger import LedgerFile, Ledgers, now
from korora.agents.vtpm.parcel import Proof, Quoted
from korora.agents.vtpm.rehearsal import Keys, rehearse
from proxy.errors import VtpmRefused

log = structlog.get_logger("korora.vtpm")

Beat = Callable[[str], None]
"""Told of each step as it has been done; tests end the process there."""


class Follower(ABC):
    """One side of one session's vTPM.

    Args:
        ledgers: of this host.
        beat: told of each step.
        recipient: the key that was made for the session before it began; None to make one.
        session, peer: which migration it is of.
    """

    def __init__(self, ledgers: Ledgers, beat: Beat, recipient: Recipient | None, session: str, peer: str) -> None:
        self._ledgers, self._beat, self._recipient = ledgers, beat, recipient
        self._session, self._peer = session, peer
        self._left: tuple[bytes, bytes] | None = None
        """For whose key it was wrapped, and that."""
        self._arrived: tuple[bytes, bytes] | None = None
        """What came, and the proof that was given for it."""
        self._ours: Proof | None = None
        self._expected = b""
        self.moving: tuple[int, str] | None = None
        """See ``proxy.vtpm.Carrier``."""
        self._turn = threading.Lock()

    # ---- source

    def check(self, uuid: str, proof: bytes) -> None:
        """See ``proxy.vtpm.Carrier``."""
        if self._ours is None:
            raise VtpmRefused(f"a proof of the vTPM of {uuid}, which was not given")
        said = parcel.read_proof(proof)
        parcel.verify(said, self._expected)
        parcel.same(self._ours, said)

    def part(self, uuid: str) -> None:
        """See ``proxy.vtpm.Carrier``."""
        self._follow(uuid, Event.PART)

    def stay(self, uuid: str) -> None:
        """See ``proxy.vtpm.Carrier``."""
        self._follow(uuid, Event.STAY)

    def given(self, uuid: str) -> None:
        """See ``proxy.vtpm.Carrier``."""
        self._follow(uuid, Event.GIVEN)

    # ---- destination

    def recipient(self) -> bytes:
        """See ``proxy.vtpm.Carrier``."""
        with self._turn:
            if self._recipient is None:
                self._recipient = Recipient()
            return self._recipient.public

    def release(self, uuid: str) -> None:
        """See ``proxy.vtpm.Carrier``."""
        self._follow(uuid, Event.RELEASE)

    def wipe(self, uuid: str) -> None:
        """See ``proxy.vtpm.Carrier``."""
        self._follow(uuid, Event.WIPE)

    # ---- both

    def _given_before(self, recipient: bytes) -> bytes | None:
        """What was given, if anything was.

        Raises:
            VtpmRefused: for another key.
        """
        if self._left is None:
            return None
        if self._left[0] != recipient:
            raise VtpmRefused("the destination wants the vTPM under another key than before")
        return self._left[1]

    def _proved_before(self, wrapped: bytes) -> bytes | None:
        """The proof of what has arrived, if it has.

        Raises:
            VtpmRefused: of something else.
        """
        if self._arrived is None:
            return None
        if self._arrived[0] != wrapped:
            raise VtpmRefused("another vTPM than before")
        return self._arrived[1]

    def _asked(self) -> Recipient:
        """The key that what comes was asked for with.

        Raises:
            VtpmRefused: nothing was.
        """
        if self._recipient is None:
            raise VtpmRefused("a vTPM that was not asked for")
        return self._recipient

    @abstractmethod
    def _act(self, action: Action, uuid: str, file: LedgerFile, entry: Entry | None) -> None:
        """Do what a step asks for."""

    def _follow(self, uuid: str, event: Event) -> None:
        """Do what the machine's hand-over asks for; nothing where this vTPM has no part in it, or not any more."""
        if not uuid:
            return
        with self._turn:
            if not self._ledgers.read(uuid).concerns(self._session):
                return
            with self._ledgers.locked(uuid) as file:
                if not file.ledger.concerns(self._session):
                    return
                entry, actions = file.ledger.follow(event, now())
                for action in actions:
                    self._act(action, uuid, file, entry)
                    self._beat(f"{event.value} {action.value}")
            if entry is not None:
                log.info("vtpm", holding=entry.holding, vm=uuid, epoch=entry.epoch, peer=self._peer)


def prove(
    blobs: tuple[StateBlob, ...], keys: Keys, qualifying: bytes, *, off: bool = False, sealed: bool = True
) -> Proof:
    """What the vTPM of that state says of itself; see ``rehearsal.rehearse``.

    Raises:
        VtpmFailed: it does not come up, or does not answer.
    """
    told = rehearse(blobs, keys, qualifying, off=off, sealed=sealed)
    quotes = tuple(Quoted(int(said.hierarchy), said.public, said.quote, said.signature) for said in told.quotes)
    return Proof(quotes, b"".join(told.pcrs))

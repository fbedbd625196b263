"""The receipts of one session: who says what when, so that nothing goes on unsigned. The signing is ``witness``'s.

    source                                       destination
    OFFER with its offer, signed       ───────▶
                                       ◀───────  ACCEPT with it signed by both, and the head of its log
    SHOWN: the head of its log         ───────▶  opens no channel before that
                                       ◀───────  FACTS, when all has arrived
    STATEMENT of both, signed          ───────▶  agrees, signs, logs; only now it may be prepared
    logs; only now it is prepared      ◀───────  COUNTERSIGNED
    FINISH with the outcome            ───────▶  agrees, signs, logs
    logs                               ◀───────  FINISHED

A connection that is lost may take any of these with it: whoever waits for an answer says it again on the next one, and
whoever hears something again answers as before.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, Protocol

from proxy.authority import Point
from proxy.control import Countersigned, Facts, LogHead, Message, Shown, Statement
from proxy.errors import PolicyRefused, ProtocolViolation
from proxy.handover.table import Side
from proxy.hypervisors.base import Vm
from proxy.session import Role
from proxy.shell.oversight import Oversight
from proxy.shell.waiting import Signal
from proxy.witness import Witness

_HEARD: Final = {Role.SOURCE: (Facts, Countersigned), Role.DESTINATION: (Shown, Statement)}


class Session(Protocol):
    """What is needed of the session."""

    async def say(self, message: Message) -> None:
        """Send a control message, if the peer is there."""

    def serve(self, work: Coroutine[Any, Any, None], name: str) -> object:
        """Do ``work`` beside the session; its failure is the session's."""

    def account(self) -> None:
        """Write what the session has done so far into its report."""

    async def until_complete(self) -> None:
        """Wait until no further channel can come, where all has to have ended before it may be signed.

        Raises:
            HypervisorFailed: the hand-over is guarded, and its machine has not been sent yet.
        """

    @property
    def digested(self) -> tuple[str, ...]:
        """Streams whose digests both sides know by now: the names of their subjects."""


class Testimony:
    """One session's receipts, and its questions at the hand-over, which come just before they are signed.

    Args:
        session: that is told of.
        role: which side of it this is.
        oversight: who has a say on it.
        witness: who signs; None where nobody does.
    """

    def __init__(self, session: Session, role: Role, oversight: Oversight, witness: Witness | None) -> None:
        self._session, self._role, self._oversight, self.witness = session, role, oversight, witness
        self._said: Message | None = None
        """What the peer has not answered yet."""
        self._heard: bytes | None = None
        self._changed = Signal()
        self._turn = asyncio.Lock()
        self._pending: dict[type[Message], Message] = {}
        """What was heard and waits for its turn: nobody has more than one of a kind to say."""
        self._asking = asyncio.Lock()
        self._asked = False
        self._refused: PolicyRefused | None = None
        self._met = witness is None or role is Role.SOURCE
        self._signed = witness is None

    # ---- what the session waits for

    async def until_met(self) -> None:
        """Wait until the source's log is known to continue what it was."""
        while not self._met:
            await self._changed.wait()

    async def approve(self, side: Side, vm: Vm) -> None:
        """See ``guard.Approval``: those who have a say agree, and both have signed what was transferred."""
        del side
        await self.agree(vm if vm.name or vm.uuid else None)

    async def agree(self, vm: Vm | None = None) -> None:
        """The hand-over may be, and both have signed what was transferred.

        Raises:
            PolicyRefused: it may not.
            CryptoError, RelayError: what the peer signs is not what happened here, or cannot be logged.
        """
        await self.ask(vm)
        if self._role is Role.DESTINATION and self.witness is not None and self._said is None and not self._signed:
            self._session.account()
            await self._say(Facts(await asyncio.to_thread(self.witness.facts)))
        while not self._signed:
            await self._changed.wait()

    async def ask(self, vm: Vm | None = None) -> None:
        """May the hand-over be? It is asked once.

        Raises:
            PolicyRefused: no.
        """
        async with self._asking:  # whoever comes second waits for the answer as well
            if self._refused is not None:
                raise self._refused
            if self._asked:
                return
            try:
                await self._oversight.ask(Point.HANDOVER, vm)
            except PolicyRefused as refusal:
                self._refused = refusal
                raise
            self._asked = True

    # ---- what passes

    def show(self, head: LogHead) -> None:
        """Source: what the destination is to see first; said when the connection is attached."""
        self._said = Shown(head)

    def repeat(self) -> None:
        """There is a connection, perhaps another one."""
        if self._said is not None:
            self._session.serve(self._session.say(self._said), "testify")

    def hear(self, message: Message) -> None:
        """The peer testifies; what it says is looked at beside the session, one after the other.

        Raises:
            ProtocolViolation: that has no place here.
        """
        witness = self.witness
        if witness is None:
            raise ProtocolViolation(f"{type(message).__name__}, and nobody here signs receipts")
        if type(message) not in _HEARD[self._role]:
            raise ProtocolViolation(f"{type(message).__name__} has no place here")
        waiting = self._pending.setdefault(type(message), message)
        if waiting is not message:
            if waiting != message:
                raise ProtocolViolation(f"another {type(message).__name__} than before")
            return  # said again on another connection: it is answered once
        self._session.serve(self._take(witness, message), "take a testimony")

    async def _take(self, witness: Witness, message: Message) -> None:
        async with self._turn:
            del self._pending[type(message)]
            match message:
                case Shown(head):
                    if not self._met:
                        await asyncio.to_thread(witness.met, head)
                        self._met = True
                case Facts(facts):
                    await self._state(witness, facts)
                case Statement(receipt):
                    await self._countersign(witness, receipt)
                case Countersigned(receipt):
                    if not self._signed and isinstance(self._said, Statement):
                        await asyncio.to_thread(witness.countersigned, receipt)
                        self._said, self._signed = None, True
            self._changed.wake()

    async def _state(self, witness: Witness, facts: bytes) -> None:
        if self._signed or isinstance(self._said, Statement):
            if self._heard != facts:
                raise ProtocolViolation("other facts than before")
            if self._said is not None:
                await self._session.say(self._said)
            return
        self._heard = facts
        await self._session.until_complete()
        await self.ask()
        self._session.account()
        await self._say(Statement(await asyncio.to_thread(witness.state, facts, self._session.digested)))

    async def _countersign(self, witness: Witness, receipt: bytes) -> None:
        if isinstance(self._said, Countersigned):
            if self._heard != receipt:
                raise ProtocolViolation("another statement than before")
            await self._session.say(self._said)
            return
        if not isinstance(self._said, Facts):
            raise ProtocolViolation("a statement that was not asked for")
        self._heard = receipt
        self._session.account()  # another channel may have come and gone since the facts
        await self._say(Countersigned(await asyncio.to_thread(witness.countersign, receipt, self._session.digested)))
        self._signed = True

    async def _say(self, message: Message) -> None:
        self._said = message
        await self._session.say(message)

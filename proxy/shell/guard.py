"""What stands between a session and its hypervisors at the hand-over: lets nothing pass that the table does not allow.

While the session runs it only goes forward. Whatever turns it back ends the session first, and then, with nobody else
at the hypervisor's connection any more, ``settle`` sees it through to an end that the journal knows.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, Protocol

from proxy.control import Word, printable
from proxy.endpoints.base import Connection
from proxy.errors import (
    EXIT_HYPERVISOR,
    HypervisorFailed,
    PeerAborted,
    PeerLost,
    PolicyRefused,
    RelayError,
    SessionCancelled,
)
from proxy.handover.record import Kind
from proxy.handover.table import Event, Side, State
from proxy.handover.words import event_of
from proxy.hypervisors.base import Hypervisor, Vm
from proxy.limits import (
    APPROVAL_SECONDS_MAX,
    REASON_CHARACTERS_MAX,
    RECOVERY_SECONDS,
)
from proxy.process import written_down
from proxy.shell.journal import JournalFile
from proxy.shell.party import Bare, Party
from proxy.shell.waiting import Signal

Approval = Callable[[Side, Vm], Awaitable[None]]
"""Has a say before a machine changes hosts; raises a RelayError for no."""

_CLOSING: Final = (State.ASKED, State.PREPARED, State.VOTED, State.COMMITTED)

# What a peer's word means for a session that is under way; what turns it back ends it first.
_FORWARD: Final = frozenset({Event.WHOLE, Event.PEER_PREPARED, Event.PEER_VOTED, Event.PEER_COMMITTED, Event.PEER_DONE})


class Session(Protocol):
    """What a guard needs of the session that it guards."""

    async def say_word(self, state: State, why: str, *, paused: bool = False) -> None:
        """Tell the peer, if it is there; does not raise."""

    def serve(self, work: Coroutine[Any, Any, None], name: str) -> object:
        """Do ``work`` beside the session; its failure is the session's."""

    def fail(self, error: BaseException) -> None:
        """End the session."""

    @property
    def met(self) -> bool:
        """Whether the peer is there."""

    async def until_delivered(self) -> None:
        """Wait until the destination's hypervisor has all that this one has sent.

        Raises:
            HypervisorFailed: it takes too long.
        """


class Guard:
    """One session's hand-over; ``hands`` of its own ``Party`` while the hypervisor's connection is there.

    Args:
        file: the journal, begun.
        hypervisor: the local one.
        session: guarded.
        approvals: who has a say here.
    """

    def __init__(
        self, file: JournalFile, hypervisor: Hypervisor, session: Session, approvals: Sequence[Approval] = ()
    ) -> None:
        self._hypervisor, self._session, self._approvals = hypervisor, session, tuple(approvals)
        self.bare = Bare(hypervisor, paused=file.record.head.paused, tool=file.tool)
        self.party = Party(file, hypervisor, self, session.say_word)
        self.detached = False
        """Whether the session has ended: events may turn it back from now on."""
        self.left = Signal()
        self._turning: Event | None = None
        self._ended_by = ""
        """Why the session has ended, in words for people."""
        self._words: dict[Event, Word] = {}
        """What the peer has said and nobody has listened to yet; to say it again says no more."""
        self._listening = False
        self._naming = False
        """Whether the machine's name is on its way into the journal."""
        self._identified = False
        """Whether the stream has told which machine it is."""
        self._pinned: Vm | None = None
        """That machine and its copy, at the source."""
        self._told = Signal()
        self.connection: Connection | None = None
        """The hypervisor's, once the channel is open."""
        self.stopping = False
        self.unverified = False
        """Whether it was left to recovery to see that the source's copy runs."""
        self.heard_of = False
        """Whether the source has come to ask, after the session."""
        self.dead = False
        """Whether the hypervisor's own tool at this end is known to have died."""

    @property
    def kind(self) -> Kind:
        """The hypervisor's, as OFFER and ACCEPT call it."""
        return self.party.record.head.kind

    def connected(self, connection: Connection) -> None:
        """The destination's hypervisor has taken its connection."""
        self.connection = connection
        pid = getattr(connection, "pid", None)
        if pid is not None and self._hypervisor.kind == "xl":
            self.party.works(written_down(pid))

    async def whole(self) -> None:
        """Source: all that was to be sent of the machine, before the hypervisors' last handshake, has arrived.

        Raises:
            HypervisorFailed: it has not, and the destination goes on as if it had.
        """

    # ---- hands: what is the same for every hypervisor

    holds = True
    """Whether the hypervisor's connections have a part in what follows the session's end; else they end with it."""

    async def begin(self) -> None:
        """Guard the local hypervisor: before the destination connects to it, or the source reads what it says.

        Raises:
            HypervisorFailed: it cannot be guarded, and the session must not begin.
        """

    async def read(self, piece: memoryview) -> bool:
        """The local hypervisor has said ``piece``: whether it may go to the peer now, or with what follows it.

        Raises:
            HypervisorFailed: it may not go, and neither may the session.
            JournalError: the disk does not take what has to be written first.
        """
        raise NotImplementedError

    def ended(self) -> None:
        """The local hypervisor says no more.

        Raises:
            HypervisorFailed: it had more to say.
        """

    def arrived(self, body: memoryview) -> None:
        """The peer's hypervisor has said ``body``, which is to be written to the local one.

        Raises:
            HypervisorFailed: the local one must not hear that.
        """

    @property
    def free(self) -> bool:
        """Whether all that arrives may be written without asking ``passable``."""
        return True

    async def passable(self, size: int) -> int:
        """Wait until some of the next ``size`` bytes may be written to the local hypervisor: how many."""
        return size

    def wrote(self, size: int) -> None:
        """They were."""

    async def approve(self) -> None:
        """See ``Hands.approve``; a no, or the session's end meanwhile, is told once the session has ended.

        Raises:
            HypervisorFailed: not all has arrived, or the stream does not say which machine it is.
            RelayError: somebody said no.
        """
        try:
            await self._unless_detached(self._approved())
        except RelayError as error:
            # Whatever turns back must find nobody at the hypervisor's connection: the session ends first.
            if not self.detached:
                self._session.fail(error)
            while not self.detached:
                await self.left.wait()
            raise

    async def _approved(self) -> None:
        """Everything that has a say.

        Raises:
            RelayError: somebody said no.
        """
        await self.whole()
        side = self.party.handover.side
        if not self._identified and self._hypervisor.kind == "xl":
            raise HypervisorFailed("the stream does not tell which machine it is")
        try:
            async with asyncio.timeout(APPROVAL_SECONDS_MAX):
                await self._pin(side)
                for approval in self._approvals:
                    await approval(side, self.party.vm)
        except TimeoutError:
            raise PolicyRefused(f"nobody has approved of it within {APPROVAL_SECONDS_MAX:.0f} s") from None

    async def _which(self) -> None:
        """The destination's copy is there: which one is it?

        Raises:
            HypervisorFailed: it is not, or cannot be told.
        """
        self.party.vm = await self._hypervisor.pin(self.party.vm, Side.DESTINATION)

    async def _pin(self, side: Side) -> None:
        """Nothing is promised of a copy before it is written down which one is meant.

        Raises:
            HypervisorFailed: it cannot be told.
        """
        if side is Side.DESTINATION:
            await self._which()
            return
        self.party.vm = await self.leaving()

    async def leaving(self) -> Vm:
        """Source: the machine, once it is known which copy is meant.

        The hypervisor was asked when the stream began, and may take its time: a small machine can have arrived by then.
        """
        while self._identified and self._pinned is None:
            await self._told.wait()
        return self._pinned or self.party.vm

    async def _unless_detached(self, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work`` while the session lasts.

        Raises:
            HypervisorFailed: it has ended.
        """
        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(self.left.wait())
        try:
            if not self.detached:
                await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise HypervisorFailed(self._ended_by or "the session is over")
            working.result()
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def release(self, state: State) -> None:
        """See ``Hands.release``: whoever waits looks at the state."""

    async def take(self, vm: Vm) -> bool:
        """See ``Hands.take``."""
        return await self.bare.take(vm)

    async def start(self, vm: Vm) -> None:
        """See ``Hands.start``."""
        await self.bare.start(vm)

    async def destroy(self, vm: Vm) -> None:
        """See ``Hands.destroy``."""
        await self.bare.destroy(vm)

    async def revive(self, vm: Vm) -> None:
        """See ``Hands.revive``: its own hypervisor does it if it can; only what it left undone is done here."""
        await self.bare.revive(vm, hurry=self.dead)

    async def remove(self, vm: Vm) -> None:
        """See ``Hands.remove``."""
        await self.bare.remove(vm, hurry=self.dead)

    # ---- while the session runs

    def told(self, vm: Vm) -> None:
        """The stream has told which machine it is: that is written down."""
        self._identified = self._naming = True
        self._session.serve(self._name(vm), "name the machine")

    def hear(self, word: Word) -> None:
        """The peer has said where it stands, within the session. However often it does, it is kept once."""
        event = self.meaning(word)
        if event is None:
            return
        self._words.setdefault(event, word)
        if not self._listening:
            self._listening = True
            self._session.serve(self._listen(), "hear the peer's words")

    async def _listen(self) -> None:
        while self._words:
            await self.heard(self._words.pop(next(iter(self._words))))
        self._listening = False

    async def _name(self, vm: Vm) -> None:
        """Write down which machine it is, and at the source, whose copy is there, which copy.

        Raises:
            HypervisorFailed: the source's hypervisor has no such machine.
        """
        if self.party.handover.side is Side.SOURCE:
            vm = self._pinned = await self._hypervisor.pin(vm, Side.SOURCE)
            self._told.wake()
        await self.party.named(vm)
        self._naming = False
        self.party.changed.wake()

    def meaning(self, word: Word) -> Event | None:
        """What the peer's word means here; None where it says nothing that counts."""
        return event_of(word)

    async def heard(self, word: Word) -> None:
        """Take one word."""
        event = self.meaning(word)
        if event is None:
            return
        why = printable(word.why)
        if event in _FORWARD or self.detached:
            await self.party.tell(event, why)
            self._judge()
        else:
            self._turning = event
            self._session.fail(PeerAborted(EXIT_HYPERVISOR, why or "its hand-over has ended"))

    def _judge(self) -> None:
        """A side that was led to an end or into trouble by an event ends its session."""
        if self.detached:
            return
        if self.party.state in (State.ABORTED, State.UNDOING, State.DOUBT):
            self._session.fail(HypervisorFailed(self.party.trouble or self.party.record.why or "turned back"))

    async def repeat(self) -> None:
        """The peer is there again, and may not have heard."""
        word = self.party.handover.word
        if word is not None:
            await self._session.say_word(word, "")

    async def until_decided(self) -> None:
        """Wait until it is certain which copy runs on."""
        while not self.party.decided:
            await self.party.changed.wait()

    # ---- afterwards

    def _ending(self, failure: BaseException) -> Event:
        """What the end of a session means for its hand-over."""
        if self._turning is not None:
            return self._turning
        return Event.LOST if isinstance(failure, PeerLost) else Event.FAILED

    async def see_through(self, failure: BaseException) -> None:
        """The session has ended early, its tasks are gone: turn back if that may be, else wait for what decides it."""
        why = self._ended_by = (str(failure) or type(failure).__name__)[:REASON_CHARACTERS_MAX]
        self.detached = True
        self.left.wake()
        await self.party.idle()
        if not self.party.decided:
            await self.party.tell(self._ending(failure), why)
        if self.party.handover.may_turn_back:
            await self.party.tell(Event.FAILED, why)  # what the peer said has no place in the table
        await self._until_over()

    async def _until_over(self) -> None:
        """Wait until it is decided and everybody knows, or this process is to end."""
        while not self.party.decided and not self.stopping:
            await self._change()
        if not self.party.trouble:
            await self.party.settle()

    async def _change(self) -> None:
        """Wait until something has changed; what could not be done to the local copy is tried again meanwhile."""
        try:
            async with asyncio.timeout(RECOVERY_SECONDS):
                await self.party.changed.wait()
        except TimeoutError:
            await self.party.again()

    @property
    def closing(self) -> bool:
        """Whether the last handshake is under way: from a machine that is whole until it is decided."""
        return not self.detached and self.party.state in _CLOSING

    @property
    def leaves(self) -> bool:
        """Whether this process goes before it is decided: what it leaves has to be there for whoever takes it up."""
        return self.holds and self.stopping and self.party.state in (*_CLOSING, State.DOUBT)

    def stop(self) -> None:
        """This process is to end: what is not decided stays in the journal."""
        self.stopping = True
        self.party.changed.wake()

    async def answered(self, event: Event, why: str) -> None:
        """The source has come back without the session (``Handovers.answer``)."""
        await self._tell_without(PeerLost("the source has come back without the session"), event, why)

    async def ordered(self, event: Event, why: str) -> None:
        """An operator has said which copy is to run (``proxy.shell.orders``).

        Raises:
            PolicyRefused: the peer is there, and may run its copy at any moment.
        """
        if event is Event.RUN_HERE and self._session.met:
            raise PolicyRefused(
                "the other relay is connected and at work: its copy is not gone. Wait, 15 s if its host is off"
            )
        await self._tell_without(SessionCancelled("an operator decides which copy of the machine runs"), event, why)

    async def _tell_without(self, end: RelayError, event: Event, why: str) -> None:
        """Tell an event that may turn back: the session, if it still runs, ends first."""
        if not self.detached and not self.party.decided:
            self._session.fail(end)
            while not self.detached:
                await self.left.wait()
        await self.party.tell(event, why)

    async def finish(self) -> None:
        """All went well, the session is over and the hypervisor's connection closed: leave nothing behind."""
        await self.party.settle()

    def close(self) -> None:
        """Let the journal go."""
        self.party.close()

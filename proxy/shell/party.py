"""One side of one hand-over at work: each state on the disk, then what follows from it."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

import structlog

from proxy.errors import HypervisorFailed, JournalError, RelayError
from proxy.handover.machine import Handover
from proxy.handover.record import Record
from proxy.handover.table import WRITTEN, Action, Event, Side, State
from proxy.hypervisors.base import CopyState, Hypervisor, Vm
from proxy.limits import HYPERVISOR_ATTEMPTS_MAX, HYPERVISOR_PAUSE_SECONDS, RESUMED_SECONDS_MAX
from proxy.process import lives
from proxy.shell.journal import JournalFile
from proxy.shell.waiting import Signal
from proxy.vtpm import Carrier

log = structlog.get_logger("korora.handover")

Say = Callable[[State, str], Awaitable[None]]
VtpmEnd = Literal["stay", "given", "release", "wipe"]
"""How a vTPM's part in a hand-over ends: methods of ``Carrier``."""


class Hands(Protocol):
    """How the actions are done. Each method may raise HypervisorFailed; ``approve`` any RelayError."""

    async def approve(self) -> None:
        """Everybody who has a say here says yes, or this raises."""

    async def release(self, state: State) -> None:
        """The hypervisors may take the step that ``state`` allows."""

    async def take(self, vm: Vm) -> bool:
        """Give the destination's copy the machine's name; whether that is done, or will be told later."""

    async def start(self, vm: Vm) -> None:
        """Run the destination's copy."""

    async def destroy(self, vm: Vm) -> None:
        """Destroy the destination's copy."""

    async def revive(self, vm: Vm) -> None:
        """See to it that the source's copy runs."""

    async def remove(self, vm: Vm) -> None:
        """See to it that the source's copy is gone."""


class Bare:
    """Hands that have nothing but the toolstack: of a hand-over whose session is over.

    Args:
        hypervisor: the local one.
        paused: whether the machine stays paused where it arrives.
        alone: at the source, raises HypervisorFailed where another hand-over of this host has that copy now.
        theirs: at the destination, likewise, or says that it is another's.
        tool: the xl process that may still do by itself what is asked for, as ``proxy.process`` writes it down;
            empty if that is not known.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        *,
        paused: bool,
        alone: Callable[[Vm], Awaitable[None]] | None = None,
        theirs: Callable[[Vm], Awaitable[bool]] | None = None,
        tool: str = "",
    ) -> None:
        self._hypervisor, self._paused, self._alone, self._tool = hypervisor, paused, alone, tool
        self.theirs = theirs

    async def approve(self) -> None:
        """See ``Hands``; a session that is over gets no approval any more."""
        raise HypervisorFailed("the session is over")

    async def release(self, state: State) -> None:
        """See ``Hands``; nobody waits."""

    async def take(self, vm: Vm) -> bool:
        """See ``Hands``."""
        await self._hypervisor.take(vm)
        return True

    async def start(self, vm: Vm) -> None:
        """See ``Hands``."""
        if not (self._paused or vm.paused):
            await self._hypervisor.start(vm)
        elif await self._hypervisor.arriving(vm) is CopyState.ABSENT:
            raise HypervisorFailed(f"{vm.name} is not there")

    async def destroy(self, vm: Vm) -> None:
        """See ``Hands``; before it is known which copy is meant, there is none."""
        if self._known(vm) and (vm.copy or self._hypervisor.kind != "xl"):
            await self._hypervisor.destroy(vm)
        elif self._known(vm) and (own := await self._left_by_xl(vm)) is not None:
            await self._hypervisor.destroy(own)

    async def _left_by_xl(self, vm: Vm) -> Vm | None:
        """What an xl that was killed has left of a copy that nobody had pinned: the one by that name, if it is ours.

        Pinned before it is asked whose it is: whoever makes one has written down of which machine before.
        """
        if await self._hypervisor.arriving(vm) is not CopyState.INCOMING:
            return vm  # by its own name it is no such copy, and a hypervisor that could have two knows it
        own = await self._hypervisor.pin(vm, Side.DESTINATION)
        if await self._hypervisor.arriving(own) is not CopyState.INCOMING:
            return None
        return None if self.theirs is not None and await self.theirs(own) else own

    def _known(self, vm: Vm) -> bool:
        return bool(vm.name if self._hypervisor.kind == "xl" else vm.copy)

    async def revive(self, vm: Vm, *, hurry: bool = False) -> None:
        """See ``Hands``; before that it ran, and does. Unless ``hurry``, xl is given its time to do so by itself."""
        if self._known(vm):
            await self._patiently(vm, (CopyState.RUNNING, CopyState.PAUSED, CopyState.ABSENT), hurry=hurry)
            if self._alone is not None and await self._hypervisor.departing(vm) is CopyState.SUSPENDED:
                await self._alone(vm)  # it may have run on, and be leaving once more
            await self._hypervisor.revive(vm)

    async def remove(self, vm: Vm, *, hurry: bool = False) -> None:
        """See ``Hands``; likewise."""
        await self._patiently(vm, (CopyState.ABSENT,), hurry=hurry)
        await self._hypervisor.remove(vm)

    async def _patiently(self, vm: Vm, wanted: tuple[CopyState, ...], *, hurry: bool) -> None:
        if self._hypervisor.kind != "xl":
            return  # nobody else is at work on it
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (HYPERVISOR_PAUSE_SECONDS if hurry else RESUMED_SECONDS_MAX)
        while True:
            dead = self._tool != "" and not lives(self._tool)  # before the look: what it did last is seen
            if await self._hypervisor.departing(vm) in wanted or dead or loop.time() > deadline:
                return
            await asyncio.sleep(HYPERVISOR_PAUSE_SECONDS)


class Party:
    """One side of one hand-over. One event at a time, in the order told, each done to its end.

    Whoever tells an event may be cancelled: what follows from it goes on. A state is seen from outside once it is on
    the disk, and not before.

    Args:
        file: its journal, locked; closed by ``close``.
        hypervisor: the local one, asked how its copy stands when an action fails.
        hands: how actions are done; may be exchanged between events.
        say: tells the peer; must not raise.
    """

    def __init__(self, file: JournalFile, hypervisor: Hypervisor, hands: Hands, say: Say) -> None:
        record = file.record
        self._file, self.hypervisor = file, hypervisor
        self.hands, self.say = hands, say
        self.vm = record.vm
        self.handover = Handover(record.side, record.state)
        self.changed = Signal()
        self.trouble = ""
        """What could not be done to the local copy although it has to be; tried again by recovery."""
        self.peer_stands = ""
        """Where the peer said last that it stands."""
        self.peer_agrees = False
        """Whether the peer has said that it ended the same way."""
        self.carrier: Carrier | None = None
        """Who moves the machine's vTPM; it is told how the hand-over goes before the hypervisor is."""
        self._lock = asyncio.Lock()
        self._working: set[asyncio.Task[None]] = set()
        self._closing = False
        self.ended: Callable[[Record], None] | None = None
        """Told when the journal has how it ended; it says so once, whichever process comes to that."""
        self.permit: Callable[[Record], None] | None = None
        """Asked before it is committed, of a hand-over whose session is over; raises PolicyRefused."""
        self._undone: Action | None = None
        """What could not be done to the local copy, if that is still to be done."""
        self.log = log.bind(session=record.head.session[:8], side=record.head.side)

    @property
    def record(self) -> Record:
        """What the journal has of it."""
        return self._file.record

    @property
    def state(self) -> State:
        """Where this side stands."""
        return self.handover.state

    @property
    def decided(self) -> bool:
        """Whether it is certain which copy runs on."""
        return self.handover.decided

    async def tell(self, event: Event, why: str = "") -> None:
        """Take an event, and do all that follows from it.

        Raises:
            JournalError: the disk does not take the state that follows; nothing was done.
            PolicyRefused: it may not be committed here; likewise.
        """
        await self._to_its_end(self._tell(event, why))

    async def again(self) -> None:
        """Try once more what could not be done to the local copy."""
        await self._to_its_end(self._again())

    async def _to_its_end(self, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work`` whether or not the caller lives to see its end.

        A thread that writes cannot be called back, and a copy that is being started must not be left half started with
        nobody to hear of it.
        """
        task = asyncio.ensure_future(work)
        self._working.add(task)
        task.add_done_callback(self._worked)
        await asyncio.shield(task)

    def _worked(self, task: asyncio.Task[None]) -> None:
        self._working.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.log.debug("a step of a hand-over failed", reason=str(error))  # if nobody waits for it any more
        if self._closing and not self._working:
            self._close()

    async def _tell(self, event: Event, why: str) -> None:
        async with self._lock:
            await self._follow((event, why))

    async def _again(self) -> None:
        async with self._lock:
            if self._undone is not None:
                await self._follow(*await self._act(self._undone, "tried again"))
                self.changed.wake()

    async def _follow(self, *events: tuple[Event, str]) -> None:
        pending = deque(events)
        while pending:
            event, why = pending.popleft()
            self._hear(event)
            await self._step(event, why, pending)

    def _hear(self, event: Event) -> None:
        if (event, self.state) in _AGREED:
            self.peer_agrees = True

    async def _step(self, event: Event, why: str, pending: deque[tuple[Event, str]]) -> None:
        before = self.handover.state
        actions = self.handover.step(event)
        after, self.handover.state = self.handover.state, before
        if self.permit is not None and after is State.COMMITTED is not before:
            self.permit(self.record)
        if Action.WRITE in actions:
            await self._write(after, event, why)
        self.handover.state = after
        self._hear(event)
        for action in actions:
            if action is not Action.WRITE:
                pending.extend(await self._act(action, why))
        self.changed.wake()

    async def _write(self, state: State, event: Event, why: str) -> None:
        try:
            await self._keep(state, why or event.value)
        except JournalError as error:
            if state not in (State.DONE, State.ABORTED) or event in (Event.RUN_HERE, Event.GIVE_UP):
                raise
            # What is decided is so without being written: whoever takes the older state up comes to the same end,
            # unless it was an operator who ended it.
            self.log.warning("the end of a hand-over is not written down", reason=str(error))
        self.log.info("hand-over", state=state.value, on=event.value, vm=self.vm.name, why=why)

    async def _keep(self, state: State, why: str, *, settled: bool = False) -> None:
        before = self.record.state
        await asyncio.to_thread(self._file.write, state, why, self.vm, settled=settled)
        if self.ended is not None and state in _ENDS and before not in _ENDS:
            self.ended(self.record)

    async def _act(self, action: Action, why: str) -> list[tuple[Event, str]]:
        match action:
            case Action.APPROVE:
                try:
                    await self.hands.approve()
                except RelayError as error:
                    self.trouble = str(error)
                    return [(Event.FAILED, str(error))]
                return [(Event.APPROVED, "")]
            case Action.RELEASE:
                return await self._release()
            case Action.SAY:
                word = self.handover.word
                if word is not None:
                    await self.say(word, why)
            case Action.TAKE:
                return await self._take()
            case Action.START:
                return await self._bring(action, self._start, Event.STARTED)
            case Action.DESTROY:
                return await self._bring(action, self._destroy, Event.DESTROYED)
            case Action.REVIVE:
                await self._bring(action, self._revive, None)
            case Action.REMOVE:
                await self._bring(action, self._remove, None)
            case _:
                raise ValueError(action)
        return []

    # ---- the vTPM goes before: where that fails the hypervisor is not told, and both are tried again

    async def _release(self) -> list[tuple[Event, str]]:
        """From here on the destination may be told to run its copy, so the source's vTPM must answer nobody."""
        if self.carrier is not None and self.handover.side is Side.SOURCE and self.state is State.VOTED:
            try:
                await asyncio.to_thread(self.carrier.part, self.vm.uuid)
            except HypervisorFailed as error:
                self.trouble = str(error)
                return [(Event.FAILED, str(error))]
        await self.hands.release(self.state)
        return []

    async def _start(self, vm: Vm) -> None:
        await self._vtpm("release", vm)
        await self.hands.start(vm)

    async def _destroy(self, vm: Vm) -> None:
        await self._vtpm("wipe", vm)
        await self.hands.destroy(vm)

    async def _revive(self, vm: Vm) -> None:
        await self._vtpm("stay", vm)
        await self.hands.revive(vm)

    async def _remove(self, vm: Vm) -> None:
        await self._vtpm("given", vm)
        await self.hands.remove(vm)

    async def _vtpm(self, step: VtpmEnd, vm: Vm) -> None:
        carrier = self.carrier
        if carrier is not None:
            steps = {"stay": carrier.stay, "given": carrier.given, "release": carrier.release, "wipe": carrier.wipe}
            await asyncio.to_thread(steps[step], vm.uuid)

    async def _take(self) -> list[tuple[Event, str]]:
        if self.state is State.COMMITTED:
            return await self._bring(Action.TAKE, self.hands.take, Event.TOOK)  # there is no way back any more
        try:
            return [(Event.TOOK, "")] if await self.hands.take(self.vm) else []
        except HypervisorFailed as error:
            return await self._how_it_stands(error, [(Event.FAILED, str(error))])

    async def _bring(
        self, action: Action, act: Callable[[Vm], Awaitable[bool | None]], follows: Event | None
    ) -> list[tuple[Event, str]]:
        """Do what has to be done, more than once if need be; what cannot be done is told, and left to ``again``."""
        self._undone = action
        for attempt in range(1, HYPERVISOR_ATTEMPTS_MAX + 1):
            try:
                told_later = await act(self.vm) is False
            except HypervisorFailed as error:
                self.trouble = f"cannot {action.value} {self.vm.name or 'the machine'}: {error}"
                self.log.warning("the local copy", attempt=attempt, reason=self.trouble)
                gone = await self._how_it_stands(error, [])
                if gone:
                    self._undone = None
                    return gone if follows is not None else []
            else:
                self.trouble, self._undone = "", None
                return [] if follows is None or told_later else [(follows, "")]
            await asyncio.sleep(HYPERVISOR_PAUSE_SECONDS * attempt)
        return []

    async def _how_it_stands(self, error: Exception, otherwise: list[tuple[Event, str]]) -> list[tuple[Event, str]]:
        """MISSING if the copy is not there: a source's that has ended cannot be revived, however often it is tried."""
        look = self.hypervisor.arriving if self.handover.side is Side.DESTINATION else self.hypervisor.departing
        try:
            if await look(self.vm) is CopyState.ABSENT:
                return [(Event.MISSING, str(error))]
        except HypervisorFailed as silent:
            self.log.warning("the hypervisor cannot be asked", reason=str(silent))
        return otherwise

    def works(self, tool: str) -> None:
        """An xl process sends or receives the machine; written down with what is written next."""
        self._file.tool = tool

    async def named(self, vm: Vm) -> None:
        """The stream has told which machine it is.

        Raises:
            JournalError: the disk does not take it.
        """
        await self._to_its_end(self._named(vm))

    async def _named(self, vm: Vm) -> None:
        async with self._lock:
            self.vm = vm
            if self.state in WRITTEN:
                await asyncio.to_thread(self._file.write, self.state, "named", vm)

    async def settle(self, why: str = "") -> None:
        """Nothing is left to be done about it.

        Raises:
            JournalError: the disk does not take it.
            HypervisorFailed: something is left of the vTPM where it must not be, or it is not where it must be.
        """
        await self._to_its_end(self._settle(why))

    async def _settle(self, why: str) -> None:
        async with self._lock:
            if self.decided and not self.record.settled:
                # A copy that was found missing was neither removed nor destroyed: its vTPM is seen to here.
                await self._vtpm(_LAST[self.handover.side, self.state], self.vm)
                await self._keep(self.state, why or self.record.why, settled=True)

    async def idle(self) -> None:
        """Wait until nothing is being done."""
        async with self._lock:
            pass

    def close(self) -> None:
        """Let the journal and the hypervisor go, as soon as nothing is being done any more."""
        self._closing = True
        if not self._working:
            self._close()

    def _close(self) -> None:
        self._file.close()
        self.hypervisor.let_go()


_LAST: Final[Mapping[tuple[Side, State], VtpmEnd]] = MappingProxyType(
    {
        (Side.SOURCE, State.DONE): "given",
        (Side.SOURCE, State.ABORTED): "stay",
        (Side.DESTINATION, State.DONE): "release",
        (Side.DESTINATION, State.ABORTED): "wipe",
    }
)
_ENDS: Final = frozenset({State.DONE, State.ABORTED})
_AGREED: Final = frozenset(
    {
        (Event.PEER_ABORTED, State.ABORTED),
        (Event.PEER_UNKNOWN, State.ABORTED),
        (Event.PEER_DONE, State.DONE),
    }
)

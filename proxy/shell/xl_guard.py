"""xl's last handshake under guard: READY, GO and the report pass when the table says so (docs/handover.md)."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from structlog.typing import FilteringBoundLogger

from proxy.endpoints.base import Connection
from proxy.errors import HypervisorFailed
from proxy.handover.table import Event, State
from proxy.handover.xl import BANNER, FAILED, GO, READY_END, SUCCEEDED, Answers, Part, Permission
from proxy.hypervisors.base import CopyState, Hypervisor, Vm
from proxy.limits import HANDOVER_SECONDS_MAX, HYPERVISOR_PAUSE_SECONDS
from proxy.shell.guard import Approval, Guard, Session
from proxy.shell.journal import JournalFile
from proxy.shell.party import Bare
from proxy.streams.formats import XEN_END_RECORD, XL_MAGIC

_GIVE_SECONDS_MAX: Final = 5.0  # xl reads its pipe at once, or never
_POLL_SECONDS: Final = 0.05


class XlEnd:
    """The pipes of a source's xl, once nobody else reads or writes them.

    Args:
        connection: xl's.
        given: bytes that xl has been told of what the destination's says.
        log: of the hand-over.
    """

    def __init__(self, connection: Connection, given: int, log: FilteringBoundLogger) -> None:
        self._connection, self._given, self._log = connection, given, log
        self.dead = False
        """Whether nobody reads them any more."""

    async def give(self, answer: bytes) -> None:
        """Tell xl the rest of what it has not heard of ``answer``, and close; it may be dead, or not read."""
        rest = memoryview(answer)[max(0, self._given - READY_END) :]
        try:
            async with asyncio.timeout(_GIVE_SECONDS_MAX):
                while rest:
                    took = self._connection.write(rest)
                    rest = rest[took:]
                    if rest and not took:
                        await asyncio.sleep(_POLL_SECONDS)
        except (OSError, TimeoutError, HypervisorFailed) as error:
            self.dead = not isinstance(error, TimeoutError)
            self._log.warning("xl does not hear how it ended", reason=str(error) or "it does not read")
        await self._connection.abort()


class XlBack(Bare):
    """Hands of a source whose session another process had: xl's pipes have come back, READY has passed.

    Args:
        hypervisor: the local one.
        end: the pipes.
        alone, theirs, tool: see ``Bare``.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        end: XlEnd,
        alone: Callable[[Vm], Awaitable[None]] | None = None,
        theirs: Callable[[Vm], Awaitable[bool]] | None = None,
        tool: str = "",
    ) -> None:
        super().__init__(hypervisor, paused=False, alone=alone, theirs=theirs, tool=tool)
        self._end = end

    async def revive(self, vm: Vm, *, hurry: bool = False) -> None:
        """See ``Hands.revive``."""
        await self._end.give(FAILED)
        await super().revive(vm, hurry=hurry or self._end.dead)

    async def remove(self, vm: Vm, *, hurry: bool = False) -> None:
        """See ``Hands.remove``."""
        await self._end.give(SUCCEEDED)
        await super().remove(vm, hurry=hurry or self._end.dead)


class XlSourceGuard(Guard):
    """The source's end: READY waits for PREPARED, GO for VOTED, the report for DONE.

    Args:
        file, hypervisor, session, approvals: see ``Guard``.
        errand: goes to the destination until it is decided and both know it (``proxy.shell.errand``).
    """

    def __init__(
        self,
        file: JournalFile,
        hypervisor: Hypervisor,
        session: Session,
        approvals: Sequence[Approval],
        errand: "Callable[[Guard], Awaitable[None]]",
    ) -> None:
        super().__init__(file, hypervisor, session, approvals)
        self._errand = errand
        self._answers, self._permission = Answers(), Permission()
        self._given = 0
        """Bytes that xl has been told."""
        self._head, self._tail = b"", b""

    # ---- what passes

    @property
    def _ready(self) -> bool:
        return self._given >= READY_END

    async def read(self, piece: memoryview) -> bool:
        """See ``Guard.read``."""
        if not self._ready:
            self._see(piece)
            return True
        if not self._permission.feed(piece):
            return False
        await self.party.tell(Event.GAVE_UP)
        if self.party.state not in (State.VOTED, State.COMMITTED, State.DONE):
            raise HypervisorFailed("xl has given the machine up, and that could not be written down")
        return True

    def _see(self, piece: memoryview) -> None:
        if len(self._head) < len(XL_MAGIC):
            self._head = (self._head + bytes(piece[: len(XL_MAGIC)]))[: len(XL_MAGIC)]
        self._tail = (self._tail + bytes(piece[-len(XEN_END_RECORD) :]))[-len(XEN_END_RECORD) :]

    def ended(self) -> None:
        """See ``Guard.ended``: what comes after GO is for the destination to say, and needs no xl here."""
        self.dead = self.party.state is not State.DONE
        if self._ready and self.party.state in (State.PREPARED, State.ASKED, State.OPEN):
            raise HypervisorFailed("xl migrate ended before it gave the machine up")

    @property
    def free(self) -> bool:
        """See ``Guard.free``."""
        return False

    def arrived(self, body: memoryview) -> None:
        """See ``Guard.arrived``: a destination that failed says so by its word, and lets no such report pass."""
        if Part.FAILED in self._answers.feed(body):
            raise HypervisorFailed("the destination passes on that its xl failed, in place of its word")

    async def passable(self, size: int) -> int:
        """See ``Guard.passable``."""
        while True:
            room = self._limit() - self._given
            if room > 0:
                return min(size, room)
            await self.party.changed.wait()

    def _limit(self) -> int:
        match self.party.state:
            case State.OPEN | State.ASKED:
                return len(BANNER)
            case State.PREPARED | State.VOTED | State.COMMITTED | State.DOUBT:
                return READY_END
            case State.DONE if not self.detached:
                return READY_END + len(SUCCEEDED)
        return 0

    def wrote(self, size: int) -> None:
        """See ``Guard.wrote``."""
        self._given += size

    # ---- hands

    async def whole(self) -> None:
        """See ``Guard.whole``."""
        if self._head == XL_MAGIC and self._tail != XEN_END_RECORD:
            raise HypervisorFailed("the destination says that it has the whole machine, and the stream has not ended")
        await self._session.until_delivered()

    async def revive(self, vm: Vm) -> None:
        """See ``Guard.revive``: before READY an end is enough for xl to resume; afterwards it has to be told.

        The shell that xl has started us by holds the pipes as well: xl sees their end when this process ends, or the
        one that has brought them. So nothing may be waited for here; recovery sees to it that the machine runs.
        """
        connection, self.connection = self.connection, None
        if not self._ready:
            if connection is not None:
                await connection.abort()
            self.unverified = True
            return
        await self._tell(connection, FAILED)
        await super().revive(vm)

    async def _tell(self, connection: Connection | None, answer: bytes) -> None:
        if connection is not None:
            end = XlEnd(connection, self._given, self.party.log)
            await end.give(answer)
            self.dead = self.dead or end.dead

    async def remove(self, vm: Vm) -> None:
        """See ``Guard.remove``: xl does it, once the report has passed or is given."""
        if not self.detached:
            return
        connection, self.connection = self.connection, None
        await self._tell(connection, SUCCEEDED)
        await super().remove(vm)

    # ---- afterwards

    async def _until_over(self) -> None:
        if self.party.state is State.DONE and self.connection is not None:
            await self.remove(self.party.vm)
        if not self.unverified:
            await self._errand(self)

    async def finish(self) -> None:
        """See ``Guard.finish``."""
        self.detached, self.connection = True, None
        await self.remove(self.party.vm)
        await super().finish()


class XlDestinationGuard(Guard):
    """The destination's end: READY waits for PREPARED, the report for DONE; xl migrate-receive never unpauses."""

    def __init__(
        self, file: JournalFile, hypervisor: Hypervisor, session: Session, approvals: Sequence[Approval] = ()
    ) -> None:
        super().__init__(file, hypervisor, session, approvals)
        self._answers = Answers()
        self._permission = Permission()
        self._allowed = 0
        """How many bytes of GO xl has been given."""

    async def read(self, piece: memoryview) -> bool:
        """See ``Guard.read``."""
        for part in self._answers.feed(piece):
            match part:
                case Part.READY:
                    await self.party.tell(Event.WHOLE)
                    if self.party.state is not State.PREPARED:
                        raise HypervisorFailed(self.party.trouble or "the hand-over was refused here")
                case Part.SUCCEEDED:
                    await self._took()
                    await self._until_done()
                case Part.FAILED:
                    raise HypervisorFailed("xl migrate-receive could not take the machine")
                case Part.BANNER:
                    pass
        return self._answers.whole

    async def _took(self) -> None:
        """xl says that the copy has the machine's name and is paused: is it so?"""
        standing = await self._hypervisor.arriving(self.party.vm)
        if standing is not CopyState.PAUSED:
            raise HypervisorFailed(f"xl migrate-receive reports success, and the copy is {standing.value}")
        await self.party.tell(Event.TOOK)

    async def _until_done(self) -> None:
        while self.party.state is not State.DONE:
            await self._change()

    def ended(self) -> None:
        """See ``Guard.ended``."""
        if self.party.state in (State.OPEN, State.ASKED, State.PREPARED):
            raise HypervisorFailed("xl migrate-receive ended before it had the whole machine")

    def arrived(self, body: memoryview) -> None:
        """See ``Guard.arrived``."""
        if self.party.state is State.PREPARED:
            self._permission.feed(body)

    @property
    def free(self) -> bool:
        """See ``Guard.free``: xl makes a domain once it has the configuration, and then the journal has its name.

        From READY on it is counted what xl is given, which is GO.
        """
        return self.party.state is State.OPEN and not self._naming

    async def passable(self, size: int) -> int:
        """See ``Guard.passable``."""
        while self._naming:
            await self.party.changed.wait()
        return size

    def wrote(self, size: int) -> None:
        """See ``Guard.wrote``."""
        if self.party.state is not State.OPEN:
            self._allowed += size

    # ---- hands

    async def take(self, vm: Vm) -> bool:
        """See ``Hands.take``: while the session runs, GO comes by itself and the report tells."""
        if not self.detached:
            return self.party.state is State.COMMITTED
        if self.connection is not None:
            await self._clear(self.connection)
        return await super().take(vm)

    async def _clear(self, connection: Connection) -> None:
        """The source has given the machine up and its session is gone: give xl what did not come of the permission."""
        try:
            buffer = memoryview(bytearray(256))
            async with asyncio.timeout(HANDOVER_SECONDS_MAX):
                while self._allowed < len(GO):
                    self._allowed += connection.write(memoryview(GO)[self._allowed :])
                    if self._allowed < len(GO):
                        await asyncio.sleep(_POLL_SECONDS)
                while True:
                    got = connection.read_into(buffer)
                    if got == 0 or (got and Part.SUCCEEDED in self._answers.feed(buffer[:got])):
                        return
                    await asyncio.sleep(_POLL_SECONDS)
        except (OSError, TimeoutError) as error:
            raise HypervisorFailed(f"xl migrate-receive does not answer: {error}") from None

    async def start(self, vm: Vm) -> None:
        """See ``Hands.start``."""
        await self._let_end()
        await super().start(vm)

    async def _let_end(self) -> None:
        """xl migrate-receive ends by itself once it has reported; afterwards nobody reads what it says."""
        if self.detached and self.connection is not None:
            connection, self.connection = self.connection, None
            await connection.abort()

    async def destroy(self, vm: Vm) -> None:
        """See ``Hands.destroy``: xl destroys its copy by itself if its input ends; else it is destroyed."""
        connection, self.connection = self.connection, None
        if connection is not None:
            await connection.abort()
            await asyncio.sleep(HYPERVISOR_PAUSE_SECONDS / 10)
        await super().destroy(vm)

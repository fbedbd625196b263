"""QEMU's hand-over under guard: no byte is held back, its monitor is told when it may go on (docs/operations.md).

The source halts before its switch-over, its machine stopped, with the devices' state still to come: that is where both
sides agree. So the destination is asked before it has everything, and says by itself once it has (``TOOK``). A session
that ends takes the hypervisors' connections with it at once: nothing that follows needs them, and a migration that can
no longer arrive has failed for both.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from proxy.control import Word
from proxy.errors import HypervisorFailed
from proxy.handover.table import Event, Side, State
from proxy.hypervisors.base import CopyState, Vm
from proxy.hypervisors.qmp import QemuMonitor
from proxy.shell.guard import Approval, Guard, Session
from proxy.shell.journal import JournalFile


class QemuGuard(Guard):
    """What is the same for both sides: all bytes pass, whenever they come.

    Args:
        file, session, approvals: see ``Guard``.
        monitor: of the local QEMU, for this hand-over alone.
    """

    holds = False

    def __init__(
        self, file: JournalFile, monitor: QemuMonitor, session: Session, approvals: Sequence[Approval]
    ) -> None:
        super().__init__(file, monitor, session, approvals)
        self._monitor = monitor
        self.vouched: Callable[[], Awaitable[None]] | None = None
        """Waits until the vTPM that QEMU carried is known to be the same at both ends; None where nobody verifies."""

    async def read(self, piece: memoryview) -> bool:
        """See ``Guard.read``."""
        return True

    async def _known(self) -> None:
        """Write down which QEMU it is."""
        await self.party.named(await self._monitor.pin(self.party.vm, self.party.handover.side))

    async def _vouch(self) -> None:
        """Nothing is voted for before that.

        Raises:
            RelayError: it is not the same, or that cannot be told.
        """
        if self.vouched is not None:
            await self.vouched()

    async def _missing(self, why: HypervisorFailed) -> None:
        """Something failed: if that is because the local QEMU has ended, say so."""
        look = self._monitor.departing if self.party.handover.side is Side.SOURCE else self._monitor.arriving
        try:
            standing = await look(self.party.vm)
        except HypervisorFailed:
            return  # it cannot be asked: nothing is known
        if standing is CopyState.ABSENT:
            await self.party.tell(Event.MISSING, str(why))


class QemuSourceGuard(QemuGuard):
    """The source's end: halts before the switch-over until PREPARED, ends its QEMU once DONE.

    Args:
        file, monitor, session, approvals: see ``QemuGuard``.
        errand: goes to the destination until it is decided and both know it (``proxy.shell.errand``).
    """

    def __init__(
        self,
        file: JournalFile,
        monitor: QemuMonitor,
        session: Session,
        approvals: Sequence[Approval],
        errand: "Callable[[Guard], Awaitable[None]]",
    ) -> None:
        super().__init__(file, monitor, session, approvals)
        self._errand = errand
        self._asks = False
        """Whether QEMU has halted: the destination is asked until it answers."""
        self._early: Word | None = None
        """The destination's vote, where it came before ours."""

    # ---- while the session runs

    async def begin(self) -> None:
        """See ``Guard.begin``: the connection has come, nothing has been read from it."""
        await self._monitor.migrates()
        await self._known()
        self._session.serve(self._depart(), "wait for QEMU's switch-over")

    async def _depart(self) -> None:
        try:
            ran = await self._monitor.until_switchover()
        except HypervisorFailed as error:
            await self._missing(error)
            raise
        if not ran:
            await self.party.named(replace(self.party.vm, paused=True))
        self._asks = True
        await self._ask()

    async def _ask(self) -> None:
        await self._session.say_word(State.ASKED, "", paused=self.party.vm.paused)

    async def repeat(self) -> None:
        """See ``Guard.repeat``."""
        if self._asks and self.party.state is State.OPEN:
            await self._ask()
        await super().repeat()

    async def whole(self) -> None:
        """See ``Guard.whole``: QEMU halts once it has sent its memory."""
        if not self._asks:
            raise HypervisorFailed("the destination says that it has the machine's memory, and QEMU still sends it")

    async def heard(self, word: Word) -> None:
        """See ``Guard.heard``: a vote that comes before ours counts with it, and need not be asked for once more."""
        if word.state == "voted" and self.party.state is State.PREPARED and not self.detached:
            self._early = word
            return
        await super().heard(word)

    async def release(self, state: State) -> None:
        """See ``Hands.release``."""
        if state is State.PREPARED and not self.detached:
            self._session.serve(self._give_up(), "let QEMU give its machine up")

    async def _give_up(self) -> None:
        try:
            await self._monitor.go_on()
            await self._monitor.until_given_up()
        except HypervisorFailed as error:
            await self._missing(error)
            if self.party.state is State.DOUBT:
                return  # the destination may have got everything before: then its word decides
            raise
        await self._vouch()
        await self.party.tell(Event.GAVE_UP)
        if self._early is not None and self.party.state is State.VOTED:
            await super().heard(self._early)
        if self.party.state not in (State.VOTED, State.COMMITTED, State.DONE):
            raise HypervisorFailed("QEMU has given its machine up, and that could not be written down")

    # ---- afterwards

    async def remove(self, vm: Vm) -> None:
        """See ``Hands.remove``: while the session lasts its end has to pass through QEMU's connections."""
        if self.detached:
            await super().remove(vm)

    async def _leave_nothing(self) -> None:
        try:
            await super().remove(self.party.vm)
        except HypervisorFailed as error:  # recovery will try again
            self.party.trouble = f"cannot remove {self.party.vm.name or 'the machine'}: {error}"
            self.party.log.warning("the local copy", reason=self.party.trouble)

    async def _until_over(self) -> None:
        if self.party.state is State.DONE:
            await self._leave_nothing()
        self._monitor.let_go()  # it is asked again only if the errand brings news
        await self._errand(self)

    async def finish(self) -> None:
        """See ``Guard.finish``."""
        self.detached = True
        await self._leave_nothing()
        if not self.party.trouble:
            await super().finish()


class QemuDestinationGuard(QemuGuard):
    """The destination's end: the machine arrives paused, and runs once COMMITTED."""

    async def begin(self) -> None:
        """See ``Guard.begin``: nothing is connected to QEMU's incoming socket yet."""
        await self._monitor.guard_arrival()
        await self._known()

    def meaning(self, word: Word) -> Event | None:
        """See ``Guard.meaning``: all of the memory has been sent, and the source waits for us."""
        return Event.WHOLE if word.state == "asked" else super().meaning(word)

    async def heard(self, word: Word) -> None:
        """See ``Guard.heard``."""
        if word.state == "asked" and word.paused:
            self.party.vm = replace(self.party.vm, paused=True)
        if word.state == "committed" and self.party.state is State.VOTED and not self.detached:
            # From here on a copy that is gone may have run: one that has gone before must be told of now.
            await self._missing(HypervisorFailed("QEMU has ended before its machine could run"))
        await super().heard(word)

    async def _which(self) -> None:
        """See ``Guard._which``: it was written down as the session began."""
        standing = await self._monitor.arriving(self.party.vm)
        if standing is not CopyState.INCOMING:
            raise HypervisorFailed(f"the QEMU that was to take the machine is {standing.value}")

    async def release(self, state: State) -> None:
        """See ``Hands.release``."""
        if state is State.PREPARED and not self.detached:
            self._session.serve(self._arrive(), "wait for QEMU's machine")

    async def _arrive(self) -> None:
        try:
            await self._monitor.until_arrived()
        except HypervisorFailed as error:
            await self._missing(error)
            raise
        await self._vouch()
        await self.party.tell(Event.TOOK)

    async def take(self, vm: Vm) -> bool:
        """See ``Hands.take``: while the session runs it is told by ``_arrive``."""
        if not self.detached and self.party.state is not State.COMMITTED:
            return False
        return await super().take(vm)

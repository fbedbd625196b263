"""The vTPM that QEMU carries in its stream: the same at both ends, by its own word, before either side votes.

The exchange is ``Custody``'s, but that it ends later: the devices' state follows the hand-over's agreement. The
destination asks before it, for the machine stands still from then on; the source brings the vTPM up as soon as its own
end of the stream has had it, and gives a challenge and not the state; what the destination's QEMU has loaded by then
has to answer that. Until then either side may turn back.
"""

import asyncio

from proxy.errors import PolicyRefused, VtpmFailed, VtpmRefused
from proxy.handover.table import Side
from proxy.hypervisors.base import Vm
from proxy.hypervisors.qmp import QemuMonitor
from proxy.limits import APPROVAL_SECONDS_MAX
from proxy.shell.custody import Custody, Session
from proxy.shell.guard import Guard
from proxy.streams.vtpm import VtpmWatch
from proxy.vtpm import Verifier


class Verification(Custody):
    """One session's vTPM, verified.

    Args:
        session, guard, agreed: see ``Custody``.
        monitor: of the local QEMU, which says whether there is one.
        verifier: who brings up what the stream had.
        watch: follows this side's stream.
    """

    def __init__(
        self,
        session: Session,
        guard: Guard,
        monitor: QemuMonitor,
        verifier: Verifier,
        watch: VtpmWatch,
        *,
        agreed: bool,
    ) -> None:
        super().__init__(session, guard, monitor, verifier, agreed=agreed)
        self._monitor, self._verifier, self._watch = monitor, verifier, watch
        self._there: bool | None = None
        """Whether QEMU has said that the machine has a vTPM."""
        self._gives = False
        """Whether the source will answer what it was asked."""
        if self._side is Side.SOURCE:
            watch.notify = self._changed.wake  # its stream is read in the loop

    async def approve(self, side: Side, vm: Vm) -> None:
        """See ``Custody.approve``: nothing of it has come yet; but it must be possible to tell afterwards.

        Raises:
            PolicyRefused: the machine has one, and the peer does not verify it.
        """
        if not await self._has(vm):
            return
        if not self.agreed:
            raise PolicyRefused(
                f'{vm.name} has a vTPM, and the peer\'s relay does not verify it: let both have carried = "verify" in '
                "vtpm.toml, or neither"
            )
        if side is Side.DESTINATION:
            await self._ask()

    async def verified(self) -> None:
        """The vTPM is the same at both ends: the one that the stream had here is the one that it had there.

        Raises:
            VtpmRefused: it is another one, or not the one that this host knows.
            VtpmFailed: it cannot be told.
        """
        vm = self._guard.party.vm
        if not await self._has(vm):
            return
        try:
            async with asyncio.timeout(APPROVAL_SECONDS_MAX):
                if self._side is Side.SOURCE:
                    await self._until_proved()
                else:
                    self._look(vm)
                    if self._said is None:
                        await self._ask()
                    await self._answer(vm)
        except TimeoutError:
            raise VtpmFailed(f"the peer's relay says nothing of the vTPM of {vm.name}") from None
        if self._side is Side.DESTINATION and not self._whole:
            raise VtpmRefused(f"the source's relay says that {vm.name} has no vTPM, and one has arrived")

    async def _has(self, vm: Vm) -> bool:
        """See ``Custody``: the stream's word counts, and QEMU's, which is asked before that has come."""
        del vm
        if self._there is None:
            self._there = await self._monitor.has_vtpm()
        return self._there or self._watch.carried is not None

    async def _give(self, recipient: bytes) -> None:
        if self._gives:
            return
        self._gives = True
        try:
            while not self._watch.told:
                await self._changed.wait()
            if await self._has(self._guard.party.vm):
                self._look(self._guard.party.vm)
            await super()._give(recipient)
        finally:
            self._gives = False

    def _look(self, vm: Vm) -> None:
        """Take what this side's stream had.

        Raises:
            VtpmFailed: nobody knows what it had.
        """
        carried = self._watch.carried
        if carried is None:
            raise VtpmFailed(
                f"the vTPM of {vm.name} cannot be verified: {self._watch.trouble or 'the stream has none'}",
                "it is read where QEMU's stream comes to the relay unencrypted, and is not sent by --encode opaque",
            )
        self._verifier.saw(carried)

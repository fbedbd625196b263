"""A machine's vTPM while its session lasts: given, received and proved before the destination promises anything.

    destination                                      source
    VTPM_WANTED: a key of its own, once all   ───▶   its machine is suspended: the vTPM is read, written down as
    of the machine has arrived                       leaving, and wrapped for that key
    kept, not answering; which one it is      ◀───   VTPM_GIVEN, in parts; one that is empty if it has none
    was seen in a rehearsal
    VTPM_PROVED: quotes of the vTPM           ───▶   it is that very one: only now the source approves

What follows from how the hand-over ends is ``Party``'s. A connection that is lost may take any of these with it: the
destination says again what it said last, and is answered as before.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, Protocol

from crypto.errors import CryptoError
from proxy.control import Message, VtpmGiven, VtpmProved, VtpmWanted
from proxy.errors import HypervisorFailed, PolicyRefused, ProtocolViolation, RelayError, VtpmFailed, VtpmRefused
from proxy.handover.table import Side
from proxy.hypervisors.base import CopyState, Hypervisor, Vm
from proxy.limits import VTPM_BYTES_MAX, VTPM_PART_BYTES
from proxy.report import SessionReport
from proxy.shell.guard import Guard
from proxy.shell.waiting import Signal
from proxy.vtpm import Carrier

_HEARD: Final = {Side.SOURCE: (VtpmWanted, VtpmProved), Side.DESTINATION: (VtpmGiven,)}


class Session(Protocol):
    """What is needed of the session."""

    async def say(self, message: Message) -> None:
        """Send a control message, if the peer is there."""

    def serve(self, work: Coroutine[Any, Any, None], name: str) -> object:
        """Do ``work`` beside the session; its failure is the session's."""

    report: SessionReport
    """Has which vTPM state moves, for whoever signs."""

    vouched: bytes | None
    """The key that the destination's TPM has vouched for; None where it did not have to attest."""


class Custody:
    """One session's vTPM.

    Args:
        session: that it is part of.
        guard: of its hand-over.
        hypervisor: the local one, asked whether the machine is suspended.
        carrier: who moves vTPMs here.
        agreed: whether the peer moves them, too.
    """

    def __init__(
        self, session: Session, guard: Guard, hypervisor: Hypervisor, carrier: Carrier, *, agreed: bool
    ) -> None:
        self._session, self._guard = session, guard
        self._hypervisor, self._carrier, self.agreed = hypervisor, carrier, agreed
        self._side = guard.party.handover.side
        self._said: Message | None = None
        """Destination: what it said last."""
        self._parts = bytearray()
        self._whole: bytes | None = None
        self._changed = Signal()
        self._proved = False
        self._failed: RelayError | None = None
        self._turn = asyncio.Lock()

    async def approve(self, side: Side, vm: Vm) -> None:
        """See ``guard.Approval``: the vTPM, if there is one, is at the destination, and is the one that left.

        Raises:
            RelayError: it is not.
        """
        if side is Side.SOURCE:
            await self._approve_source(vm)
        elif self.agreed:
            await self._receive(vm)

    async def _approve_source(self, vm: Vm) -> None:
        if not await self._has(vm):
            return
        if not self.agreed:
            raise PolicyRefused(
                f"{vm.name} has a vTPM, and the destination's relay does not take any: give it a vtpm.toml, too"
            )
        await self._until_proved()

    async def _has(self, vm: Vm) -> bool:
        """Whether the machine has a vTPM."""
        return await asyncio.to_thread(self._carrier.has, vm.uuid)

    async def _until_proved(self) -> None:
        """Source: wait until the destination's vTPM is known to be the one that left.

        Raises:
            RelayError: it is not.
        """
        while not self._proved:
            if self._failed is not None:
                raise self._failed
            await self._changed.wait()

    async def _receive(self, vm: Vm) -> None:
        await self._ask()
        await self._answer(vm)

    async def _ask(self) -> None:
        await self._say(VtpmWanted(await asyncio.to_thread(self._carrier.recipient)))

    async def _answer(self, vm: Vm) -> None:
        while self._whole is None:
            await self._changed.wait()
        if self._whole:
            try:
                proof = await asyncio.to_thread(self._carrier.arrive, vm.uuid, self._whole)
            except CryptoError as error:
                raise VtpmRefused(str(error)) from None
            self._note()
            await self._say(VtpmProved(proof))

    async def _say(self, message: Message) -> None:
        self._said = message
        await self._session.say(message)

    def _note(self) -> None:
        if self._carrier.moving is not None:
            self._session.report.vtpm_epoch, self._session.report.vtpm_sha256 = self._carrier.moving

    def repeat(self) -> None:
        """There is a connection, perhaps another one."""
        if self._said is not None and not self._guard.party.decided:
            self._parts.clear()  # of an answer that was cut short; the whole of it comes again
            self._session.serve(self._session.say(self._said), "say it again of a vTPM")

    def hear(self, message: Message) -> None:
        """The peer says something of the vTPM.

        Raises:
            ProtocolViolation: that has no place here.
        """
        if not self.agreed or not isinstance(message, _HEARD[self._side]):
            raise ProtocolViolation(f"{type(message).__name__} has no place here")
        match message:
            case VtpmGiven(part, rest):
                self._take(part, rest)
            case VtpmWanted(recipient):
                self._session.serve(self._give(recipient), "give the vTPM")
            case VtpmProved(proof):
                self._session.serve(self._check(proof), "check the vTPM's proof")

    def _take(self, part: bytes, rest: int) -> None:
        if self._said is None:
            raise ProtocolViolation("a vTPM that was not asked for")
        self._parts += part
        if len(self._parts) > VTPM_BYTES_MAX:
            raise ProtocolViolation(f"a vTPM of more than {VTPM_BYTES_MAX} bytes")
        if not rest:
            whole = bytes(self._parts)
            self._parts.clear()
            if self._whole is None:
                self._whole = whole
                self._changed.wake()

    async def _give(self, recipient: bytes) -> None:
        if self._session.vouched not in (None, recipient):
            raise VtpmRefused("the destination asks for a vTPM by a key that its TPM has not vouched for")
        async with self._turn:
            vm = await self._guard.leaving()
            if not await self._has(vm):
                self._failed = VtpmFailed(f"the destination was told that {vm.name} has no vTPM, and now it has one")
                await self._session.say(VtpmGiven(b"", 0))
                return
            if await self._hypervisor.departing(vm) is CopyState.RUNNING:
                raise HypervisorFailed(f"the destination asks for the vTPM of {vm.name}, which still runs here")
            try:
                wrapped = await asyncio.to_thread(self._carrier.depart, vm.uuid, recipient)
            except CryptoError as error:
                raise VtpmRefused(str(error)) from None
            self._note()
            if not wrapped:  # it was there a moment ago: the destination is told, and its machine does not go without
                self._failed = VtpmFailed(f"the vTPM of {vm.name} went away while it was asked for")
                self._changed.wake()
            count = max(1, -(-len(wrapped) // VTPM_PART_BYTES))
            for number in range(count):
                part = wrapped[number * VTPM_PART_BYTES : (number + 1) * VTPM_PART_BYTES]
                await self._session.say(VtpmGiven(part, count - 1 - number))

    async def _check(self, proof: bytes) -> None:
        async with self._turn:
            if self._proved:
                return
            try:
                await asyncio.to_thread(self._carrier.check, (await self._guard.leaving()).uuid, proof)
            except RelayError as error:
                self._failed = error
                raise
            else:
                self._proved = True
            finally:
                self._changed.wake()

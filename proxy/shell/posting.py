"""Guards are posted when a session begins; and a source whose session is over is talked to about its hand-over."""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import structlog

from crypto.errors import CryptoError
from crypto.keys import SessionId
from proxy.control import Recover, Refuse, Word, printable
from proxy.endpoints.base import Connection, Egress
from proxy.errors import PeerLost, PolicyRefused, ProtocolViolation, RelayError, exit_code_of
from proxy.handover.record import Head, Kind
from proxy.hypervisors.base import Hypervisor
from proxy.hypervisors.qmp import QemuMonitor
from proxy.limits import VISIT_SECONDS_MAX, WORDS_MAX
from proxy.process import sender_above
from proxy.shell.arrival import DestinationRunner
from proxy.shell.contact import Contact
from proxy.shell.custody import Custody
from proxy.shell.departure import SourceRunner
from proxy.shell.guard import Guard
from proxy.shell.handovers import Handovers
from proxy.shell.journal import now
from proxy.shell.link import ControlLink
from proxy.shell.qemu_guard import QemuDestinationGuard, QemuGuard, QemuSourceGuard
from proxy.shell.runner import Runner
from proxy.shell.verification import Verification
from proxy.shell.xl_guard import XlDestinationGuard, XlSourceGuard
from proxy.streams.vtpm import VtpmWatch

log = structlog.get_logger("korora.handover")


async def guard_departure(
    runner: SourceRunner,
    handovers: Handovers,
    kind: Kind,
    route: bytes,
    *,
    contact: Callable[[], Contact],
    monitor: str,
    holder: str,
    first: Connection,
    vtpm: bool = False,
) -> None:
    """Write down that a session has a hand-over, and stand guard over it.

    Args:
        runner: the session, before its first byte.
        handovers: of this process.
        kind, route: as ACCEPT says.
        contact: how the destination is reached now.
        monitor: where the local hypervisor is asked, if not by its kind.
        holder: the process that holds xl's pipes, if it is not this one.
        first: its connection.
        vtpm: whether the destination takes vTPMs.

    Raises:
        JournalError: it cannot be written down.
    """
    where = contact().where
    head = Head(
        session=runner.report.session_id,
        side="source",
        kind=kind,
        peer=runner.peer.name,
        address=where.address,
        monitor=monitor,
        route=route.hex(),
        holder=holder,
        paused="p" in where.xl_flags,
        began=now(),
    )
    file = await handovers.begin(head)
    hypervisor = handovers.toolstack(kind, monitor)
    if kind == "xl":
        file.tool = sender_above(int(holder.partition(" ")[0]) if holder else os.getpid())
    approvals = (*handovers.approvals, runner.keep_vtpm, runner.testimony.approve)
    guard: QemuSourceGuard | XlSourceGuard
    if isinstance(hypervisor, QemuMonitor):
        guard = QemuSourceGuard(file, hypervisor, runner, approvals, handovers.errand(contact))
    else:
        guard = XlSourceGuard(file, hypervisor, runner, approvals, handovers.errand(contact))
    guard.connection = first
    handovers.guards(guard)
    _entrust(runner, guard, hypervisor, handovers, agreed=vtpm)
    runner.guard, runner.let_go = guard, handovers.released
    runner.report.handover_kind = guard.kind


async def guard_arrival(
    runner: DestinationRunner, handovers: Handovers | None, egress: Egress, monitor: str, *, required: bool
) -> None:
    """The same at the destination, if both ends can.

    Args:
        runner: the session, before ACCEPT.
        handovers: of this process; None to guard none.
        egress: where the machine is handed over.
        monitor: where the QEMU behind it is asked; empty for none.
        required: whether no session is taken here that is not guarded.

    Raises:
        JournalError: it cannot be written down.
        PolicyRefused: it cannot be guarded, and here it has to be.
    """
    kind: Kind | Literal[""] = "qmp" if monitor else egress.handover
    if kind == "xl" and (handovers is None or runner.offer.handover != kind):
        # Its receiver is always told to leave the domain paused: nobody would start it.
        raise PolicyRefused("this egress takes only migrations whose hand-over both relays guard: update the source's")
    if handovers is None or not kind or runner.offer.handover != kind:
        if required:
            raise PolicyRefused(
                "this egress takes only migrations whose hand-over both relays guard: name the QEMU's monitor (--qmp) "
                "at both ends"
            )
        log.info("handover: unguarded", session=runner.report.session_id[:8], peer=runner.peer.name)
        return
    head = Head(
        session=runner.report.session_id,
        side="destination",
        kind=kind,
        peer=runner.peer.name,
        monitor=monitor,
        paused="p" in runner.offer.xl_flags or egress.paused,
        began=now(),
    )
    file = await handovers.begin(head)
    hypervisor = handovers.toolstack(kind, monitor)
    approvals = (*handovers.approvals, runner.keep_vtpm, runner.testimony.approve)
    guard: QemuDestinationGuard | XlDestinationGuard
    if isinstance(hypervisor, QemuMonitor):
        guard = QemuDestinationGuard(file, hypervisor, runner, approvals)
    else:
        guard = XlDestinationGuard(file, hypervisor, runner, approvals)
    handovers.guards(guard)
    _entrust(runner, guard, hypervisor, handovers, agreed=runner.offer.vtpm)
    runner.guard, runner.let_go = guard, handovers.released
    runner.report.handover_kind = guard.kind


def _entrust(runner: Runner, guard: Guard, hypervisor: Hypervisor, handovers: Handovers, *, agreed: bool) -> None:
    """The machine's vTPM goes where the machine does; where QEMU carries it, it is seen that it did."""
    head = guard.party.record.head
    if isinstance(guard, QemuGuard) and isinstance(hypervisor, QemuMonitor):
        verifier, watch = handovers.verifier(head), VtpmWatch()
        if verifier is not None:
            guard.party.carrier = verifier
            custody = Verification(runner, guard, hypervisor, verifier, watch, agreed=agreed)
            runner.custody, guard.vouched = custody, custody.verified
            if runner.guest is not None:
                runner.guest.vtpm = watch
            else:
                watch.lose("the stream is not read where its bytes are sent as they are")
    elif (carrier := handovers.carrier(head)) is not None:
        guard.party.carrier = carrier
        runner.custody = Custody(runner, guard, hypervisor, carrier, agreed=agreed)


async def talk(link: ControlLink, handovers: Handovers | None, peer: str, recovery: Recover) -> None:
    """A source whose session is over comes about its hand-over: do what follows, and say where this side stands.

    Args:
        link: authenticated; closed at the end.
        handovers: of this process; None if it keeps no journal.
        peer: the name in the source's certificate.
        recovery: what it said first.
    """
    link.mark_open()
    word: Word | Recover = recovery
    try:
        async with asyncio.timeout(2 * VISIT_SECONDS_MAX):
            for _ in range(WORDS_MAX):
                session = SessionId(recovery.session)
                answer = Word("unknown") if handovers is None else await handovers.answer(peer, session, word)
                await link.send(answer)
                message = await link.receive()
                if not isinstance(message, Word):
                    raise ProtocolViolation(f"{type(message).__name__} in a visit about a hand-over")
                word = message
    except PeerLost:
        pass  # it has nothing more to say
    except (CryptoError, RelayError, TimeoutError) as error:
        log.warning("a hand-over could not be talked about", peer=peer, reason=str(error) or "it took too long")
        with suppress(RelayError, CryptoError):
            await link.send(Refuse(exit_code_of(error), printable(str(error))))
    finally:
        await link.close()

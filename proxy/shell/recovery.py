"""A hand-over that is taken up where its journal ends: how its copy here stands, and what follows from that."""

import asyncio

from proxy.errors import HypervisorFailed
from proxy.handover.record import Record
from proxy.handover.table import Event, Side, State
from proxy.hypervisors.base import FATES, CopyState, Fate
from proxy.limits import HYPERVISOR_PAUSE_SECONDS, RESTART_SECONDS_MAX
from proxy.shell.journal import Journal
from proxy.shell.party import Party
from proxy.shell.whose import until_received


async def standing_here(party: Party) -> CopyState:
    """How this side's copy stands, as its hypervisor says.

    Raises:
        HypervisorFailed: it cannot be asked.
    """
    source, hypervisor = party.handover.side is Side.SOURCE, party.hypervisor
    return await (hypervisor.departing(party.vm) if source else hypervisor.arriving(party.vm))


async def settle(party: Party, standing: CopyState | None) -> None:
    """Close what is decided, if both know it and nothing is left to be done; a copy that was lost is lost."""
    source = party.handover.side is Side.SOURCE
    if not party.decided or (source and not party.peer_agrees):
        return
    if source and party.state is State.ABORTED and standing is CopyState.ABSENT:
        why = FATES[await party.hypervisor.fate(party.vm)]
        party.log.warning("the copy that was to leave is not there any more", vm=party.vm.name, reason=why)
        await party.settle(why)
    elif not party.trouble:
        await party.settle()


def began(record: Record) -> bool:
    """Whether the hypervisor can be asked about it, or must be."""
    return record.begun or record.state not in (State.OPEN, State.ABORTED)


async def never_began(party: Party) -> None:
    """It was not known yet which machine it is, or not written down: no copy here was given up or taken.

    The destination of one that leaves may none the less have it whole, and wait to be told.
    """
    if party.state is State.ABORTED:
        return
    if party.handover.side is Side.SOURCE:
        await party.tell(Event.RESTARTED, "it had not begun")
    else:
        party.handover.state = State.ABORTED


async def look(party: Party) -> None:
    """After a restart: how does the local copy stand, and what follows from that?

    Raises:
        HypervisorFailed: it cannot be asked, or somebody is still at work on it.
    """
    await until_received(party)
    if await standing_here(party) is not CopyState.ABSENT:
        await party.tell(Event.RESTARTED, "taken up again")
    elif await _runs_again(party):
        await party.tell(Event.RESTARTED, FATES[Fate.AGAIN])
    else:
        await party.tell(Event.MISSING, "its copy is not there")


async def _runs_again(party: Party) -> bool:
    """Whether the machine runs here none the less, started anew, while no other copy can have run yet.

    Then the one that waits at the destination is older than the disks: whatever was promised, it must not run. Until
    the stream has been approved of a guest may reboot by itself, and xl takes a while to make it anew.

    Raises:
        HypervisorFailed: it cannot be asked.
    """
    if party.handover.side is not Side.SOURCE or not party.handover.may_turn_back:
        return False
    patient = party.state is State.OPEN and party.hypervisor.kind == "xl"
    loop = asyncio.get_running_loop()
    deadline = loop.time() + (RESTART_SECONDS_MAX if patient else 0.0)
    while True:
        fate = await party.hypervisor.fate(party.vm)
        if fate is Fate.AGAIN or loop.time() >= deadline:
            return fate is Fate.AGAIN
        await asyncio.sleep(HYPERVISOR_PAUSE_SECONDS)


async def look_again(party: Party, journal: Journal) -> None:
    """``look``, and do not go on towards a second copy: what was given away may have been started here since.

    A host that crashes starts its machines as it comes up, those too that it had committed to another.

    Raises:
        HypervisorFailed: it was, or that cannot be asked.
    """
    await look(party)
    head = party.record.head
    given = party.handover.side is Side.SOURCE and party.state in (State.COMMITTED, State.DOUBT)
    if not given or journal.has(head.session, Side.DESTINATION):
        return
    gone = await standing_here(party) is CopyState.ABSENT
    if gone and await party.hypervisor.fate(party.vm) is Fate.AGAIN:
        raise HypervisorFailed(
            f"{party.vm.name} was started anew here after it had been given to {head.peer}, and may run there: see "
            "to it that one of them is gone for good, then korora handover resolve"
        )

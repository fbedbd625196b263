"""Whose a copy is, where hand-overs of one machine meet: it left again, or came again, after one that broke off."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypedDict

from proxy.errors import HypervisorFailed
from proxy.handover.record import Record
from proxy.handover.table import Side, State
from proxy.hypervisors.base import Vm
from proxy.limits import WIND_DOWN_SECONDS_MAX, XL_GONE_POLL_SECONDS
from proxy.process import lives
from proxy.shell.journal import Journal
from proxy.shell.party import Party


class Whose(TypedDict):
    """See ``Bare``."""

    alone: Callable[[Vm], Awaitable[None]]
    theirs: Callable[[Vm], Awaitable[bool]]
    tool: str


def whose(journal: Journal, record: Record) -> Whose:
    """What ``Bare`` has to know of a hand-over besides its machine."""
    return {"alone": alone(journal, record), "theirs": theirs(journal, record), "tool": record.tool}


def alone(journal: Journal, record: Record) -> Callable[[Vm], Awaitable[None]]:
    """See ``Bare``. What turned back, and was not settled because its destination is away, ran on and may be
    leaving to another one: suspended by that migration, it must not be revived for the sake of the earlier."""

    async def look(vm: Vm) -> None:
        for other in await asyncio.to_thread(journal.records):
            if (
                other.side is Side.SOURCE
                and other.head.session != record.head.session
                and not other.settled
                and other.state is not State.ABORTED
                and (not other.vm.name or (other.vm.name, other.vm.uuid) == (vm.name, vm.uuid))
            ):
                raise HypervisorFailed(
                    f"{vm.name} is leaving once more, by the hand-over {other.head.session[:8]}: that one decides"
                )

    return look


def theirs(journal: Journal, record: Record) -> Callable[[Vm], Awaitable[bool]]:
    """See ``Bare``. A retry makes a copy of the same name, and may be at it: what nobody has pinned is the last
    one's, for xl makes none while there is one of that name; that one clears up whatever there is."""

    async def look(vm: Vm) -> bool:
        for other in await asyncio.to_thread(journal.records):
            if other.side is not Side.DESTINATION or other.head.session == record.head.session:
                continue
            if other.vm.copy:
                if other.vm.pinned == vm.pinned:
                    return True
            elif _later(other, record) and not other.settled and other.state in (State.OPEN, State.UNDOING):
                if not other.vm.name and other.head.kind == "xl":
                    raise HypervisorFailed(
                        f"{vm.name}--incoming may be of the hand-over {other.head.session[:8]}, which just begins"
                    )
                if (other.vm.name, other.vm.uuid) == (vm.name, vm.uuid):
                    return True
        return False

    return look


def _later(other: Record, record: Record) -> bool:
    """Whether it began later; two of one millisecond have an order, too."""
    return (other.head.began, other.head.session) > (record.head.began, record.head.session)


async def until_received(party: Party) -> None:
    """An xl migrate-receive whose relay has ended may be destroying its copy: what is seen before its end says nothing.

    Raises:
        HypervisorFailed: it does not end.
    """
    tool = party.record.tool
    if party.handover.side is not Side.DESTINATION or not lives(tool):
        return
    party.log.info("xl migrate-receive is waited for", process=tool.partition(" ")[0])
    try:
        async with asyncio.timeout(WIND_DOWN_SECONDS_MAX):
            while lives(tool):  # noqa: ASYNC110 - it is nobody's child any more
                await asyncio.sleep(XL_GONE_POLL_SECONDS)
    except TimeoutError:
        raise HypervisorFailed(
            f"xl migrate-receive, the process {tool.partition(' ')[0]}, is still at work on its copy of "
            f"{party.vm.name}: if it hangs, kill it"
        ) from None

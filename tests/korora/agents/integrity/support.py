"""Whole sessions as scripts: who performs what on which items."""

from collections.abc import Iterable

from korora.agents.integrity.items import Item
from korora.agents.integrity.monitor import Monitor, Performed
from korora.agents.integrity.procedures import Procedure

PEER = "host:alpha"
RELAY = "relay"
OPERATOR = "uid:1000"
SECOND = "uid:1001"

Step = tuple[str, Procedure, frozenset[Item]]


def step(subject: str, procedure: Procedure, *items: Item) -> Step:
    return subject, procedure, frozenset(items)


OFFER = step(PEER, Procedure.OFFER, Item.OFFER)
ACCEPT = step(RELAY, Procedure.ACCEPT, Item.OFFER)
IDENTIFY = step(RELAY, Procedure.IDENTIFY, Item.CONFIGURATION)
TRANSFER = step(PEER, Procedure.TRANSFER, Item.STREAM)
VERIFY = step(RELAY, Procedure.VERIFY, Item.STREAM, Item.MEMORY, Item.DISKS)
APPROVE = step(OPERATOR, Procedure.APPROVE, Item.CONFIGURATION, Item.MEMORY)
COMMIT = step(RELAY, Procedure.COMMIT, Item.CONFIGURATION, Item.MEMORY, Item.JOURNAL)
RECORD = step(RELAY, Procedure.RECORD, Item.RECEIPTS)
RECOVER = step(RELAY, Procedure.RECOVER, Item.JOURNAL, Item.CONFIGURATION, Item.MEMORY)
RESUME = step(PEER, Procedure.RESUME, Item.OFFER, Item.STREAM)
RESOLVE = step(OPERATOR, Procedure.RESOLVE, Item.JOURNAL, Item.MEMORY, Item.REASON)

ARRIVING = (OFFER, ACCEPT, IDENTIFY, TRANSFER, VERIFY, COMMIT, RECORD)
DEPARTING = (
    step(OPERATOR, Procedure.OFFER, Item.OFFER),
    ACCEPT,
    IDENTIFY,
    step(RELAY, Procedure.TRANSFER, Item.STREAM, Item.MEMORY, Item.DISKS),
    step(RELAY, Procedure.VERIFY, Item.STREAM, Item.MEMORY),
    COMMIT,
    RECORD,
)


def perform(monitor: Monitor, session: str, steps: Iterable[Step]) -> list[Performed]:
    return [monitor.perform(session, subject, procedure, items) for subject, procedure, items in steps]

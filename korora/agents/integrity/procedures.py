"""Transformation procedures (TPs) and how each of them touches items; integrity verification procedures (IVPs)."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum, unique
from types import MappingProxyType
from typing import Final

from korora.agents.integrity.items import Item
from korora.agents.integrity.levels import Attribute


@unique
class Procedure(StrEnum):
    """A TP: the only way to touch an item."""

    OFFER = "offer"  # ask for a migration
    ACCEPT = "accept"  # take the offer for true: its sender is authenticated, the policy agrees
    IDENTIFY = "identify"  # take the machine's name and UUID for true, as both relays read them
    TRANSFER = "transfer"  # pass the stream on
    VERIFY = "verify"  # the stream's digests agree: what was received is the machine
    APPROVE = "approve"  # look at it, and say yes
    COMMIT = "commit"  # decide the hand-over
    RESUME = "resume"  # come back after a loss
    RECOVER = "recover"  # take up what a crash has left
    RESOLVE = "resolve"  # say what is to become of a hand-over in doubt
    RECORD = "record"  # put a receipt on record


@unique
class Check(StrEnum):
    """An IVP: confirms that an item is as it should be."""

    STREAM_DIGEST = "stream-digest"  # running and whole digests of every channel, by both relays
    RECEIPT_LOG = "receipt-log"  # Merkle tree and signed heads of the log of receipts


CHECKS: Final = MappingProxyType(
    {Item.STREAM: Check.STREAM_DIGEST, Item.MEMORY: Check.STREAM_DIGEST, Item.RECEIPTS: Check.RECEIPT_LOG}
)
"""Which IVP confirms which item. The configuration's, the disks' and the vTPM's come with their agents."""


@dataclass(frozen=True, slots=True)
class Use:
    """How a procedure touches an item.

    Attributes:
        attributes: the accesses that it needs.
        raises: it takes the item for true: from there on it stands as high as what the relay itself has made. This is
            the only way by which unconstrained data becomes constrained (C5).
        made_from: it makes the item, if it is not there, out of that one, which it reads.
    """

    attributes: frozenset[Attribute]
    raises: bool = False
    made_from: Item | None = None


_READ: Final = Use(frozenset({Attribute.READ}))
_APPEND: Final = Use(frozenset({Attribute.APPEND}))
_WRITE: Final = Use(frozenset({Attribute.WRITE}))
_BELIEVE: Final = Use(frozenset({Attribute.READ}), raises=True)
_FROM_STREAM: Final = Use(frozenset({Attribute.APPEND}), made_from=Item.STREAM)
_FROM_JOURNAL: Final = Use(frozenset({Attribute.READ}), made_from=Item.JOURNAL)

USES: Final[Mapping[Procedure, Mapping[Item, Use]]] = MappingProxyType(
    {
        Procedure.OFFER: {Item.OFFER: _APPEND},
        Procedure.ACCEPT: {Item.OFFER: _BELIEVE},
        Procedure.IDENTIFY: {Item.CONFIGURATION: _BELIEVE},
        Procedure.TRANSFER: {
            Item.STREAM: _APPEND,
            Item.CONFIGURATION: _READ,
            Item.MEMORY: _READ,
            Item.DISKS: _READ,
            Item.VTPM: _READ,
        },
        Procedure.VERIFY: {
            Item.STREAM: _BELIEVE,
            Item.CONFIGURATION: _READ,
            Item.MEMORY: _FROM_STREAM,
            Item.DISKS: _FROM_STREAM,
            Item.VTPM: _READ,
        },
        Procedure.APPROVE: {
            Item.CONFIGURATION: _READ,
            Item.MEMORY: _READ,
            Item.DISKS: _READ,
            Item.VTPM: _READ,
            Item.JOURNAL: _READ,
        },
        Procedure.COMMIT: {
            Item.CONFIGURATION: _READ,
            Item.MEMORY: _READ,
            Item.DISKS: _READ,
            Item.VTPM: _READ,
            Item.JOURNAL: _WRITE,
        },
        Procedure.RESUME: {Item.OFFER: _READ, Item.STREAM: _READ},
        Procedure.RECOVER: {
            Item.JOURNAL: _WRITE,
            Item.CONFIGURATION: _BELIEVE,
            Item.MEMORY: _FROM_JOURNAL,
            Item.DISKS: _FROM_JOURNAL,
        },
        Procedure.RESOLVE: {Item.JOURNAL: _READ, Item.MEMORY: _READ, Item.REASON: _APPEND},
        Procedure.RECORD: {Item.RECEIPTS: _APPEND, Item.JOURNAL: _READ},
    }
)
"""What each procedure may touch, and how; it touches no other item."""

"""The data of a migration (Clark and Wilson's constrained and unconstrained items), its subjects, how each stands."""

import re
from enum import StrEnum, unique
from types import MappingProxyType
from typing import Final

from korora.agents.integrity.levels import Level, Standing


@unique
class Item(StrEnum):
    """What a procedure may touch."""

    CONFIGURATION = "configuration"  # which machine it is, and what it is made of
    MEMORY = "memory"
    DISKS = "disks"
    VTPM = "vtpm"
    RECEIPTS = "receipts"  # this host's log of them
    JOURNAL = "journal"  # of hand-overs
    OFFER = "offer"  # what a peer, or a local user, asks for
    STREAM = "stream"  # bytes from the peer
    REASON = "reason"  # words of the peer, or of an operator


CONSTRAINED: Final = frozenset({Item.CONFIGURATION, Item.MEMORY, Item.DISKS, Item.VTPM, Item.RECEIPTS, Item.JOURNAL})
"""CDIs: no subject touches them but by a certified procedure. The others are UDIs: anybody may have written them."""


@unique
class Kind(StrEnum):
    """Of subjects, which are written `KIND:NAME`; there is only one `relay`."""

    RELAY = "relay"
    HOST = "host"
    UID = "uid"


RELAY: Final = Kind.RELAY.value

LEVELS: Final = MappingProxyType(
    {Kind.RELAY: Level.TRUSTED_AUTHORITY, Kind.HOST: Level.RELYING_PARTY, Kind.UID: Level.USER_AGENT}
)
"""c_s. Nobody in a session is an identity provider: that is the CA, and who certifies."""

TRUSTED: Final = Standing(Level.TRUSTED_AUTHORITY)
"""Of what this relay has made, or checked."""

CLAIMED: Final = MappingProxyType(
    {
        Item.OFFER: Standing(Level.USER_AGENT),
        Item.REASON: Standing(Level.USER_AGENT),
        Item.STREAM: Standing(Level.RELYING_PARTY),
    }
)
"""c_o of the unconstrained items, until a procedure has taken them over."""

_SUBJECT: Final = re.compile(r"relay|host:[A-Za-z0-9][A-Za-z0-9._-]{0,62}|uid:[0-9]{1,10}", re.ASCII)


def kind_of(subject: str) -> Kind:
    """Of a subject.

    Raises:
        ValueError: it is no subject.
    """
    if _SUBJECT.fullmatch(subject) is None:
        raise ValueError(f"{subject!r} is no subject; expected relay, host:NAME or uid:NUMBER")
    return Kind(subject.partition(":")[0])

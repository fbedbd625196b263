"""Mutants that spin cannot tell from the table, each with the reason: nothing that the table is for depends on it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_NEVER_HEARD: Final = "the peer never says that of itself where this side stands there"
_SAID_AGAIN: Final = "turning back ends the session, and the errand says it again"
_ENDS_ALL_THE_SAME: Final = "the end of the session, which follows, leads to the same"
_SAME_END: Final = "whoever takes up the state before it comes to the same end: the order is kept for all states alike"

EQUIVALENT: Final[Mapping[str, str]] = MappingProxyType(
    {
        # of ``named``
        "source done peer_aborted: turns back": _NEVER_HEARD,
        "source committed peer_aborted: in doubt": "the errand asks again, and DOUBT heeds the answer",
        "source prepared peer_voted: commits": _NEVER_HEARD,
        "destination voted peer_prepared: starts": _NEVER_HEARD,
        "destination doubt restarted: starts": "it is in doubt because its copy is gone: that is MISSING",
        "destination asked peer_committed: starts": _NEVER_HEARD,
        "destination committed peer_aborted: undoes": _NEVER_HEARD,
        "destination done peer_aborted: undoes": _NEVER_HEARD,
        "destination doubt peer_aborted: destroys nothing": "it is in doubt because its copy is gone",
    }
)

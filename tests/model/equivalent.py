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
        # of ``of_entries``; those from (VOTED, FAILED) of the source on have not been searched yet
        "source open failed: without say": _SAID_AGAIN,
        "source open lost: without say": _SAID_AGAIN,
        "source open restarted: without say": _SAID_AGAIN,
        "source open peer_aborted: ignored": _ENDS_ALL_THE_SAME,
        "source open peer_aborted: without say": _SAID_AGAIN,
        "source open missing: without say": _SAID_AGAIN,
        "source asked failed: without say": _SAID_AGAIN,
        "source asked lost: ignored": "an answer of those who have a say follows, in a bounded time",
        "source asked lost: without say": _SAID_AGAIN,
        "source asked missing: without say": _SAID_AGAIN,
        "source asked peer_aborted: ignored": _ENDS_ALL_THE_SAME,
        "source asked peer_aborted: without say": _SAID_AGAIN,
        "source prepared gave_up: without say": "the errand says it, or GO does",
        "source prepared failed: without say": _SAID_AGAIN,
        "source prepared lost: without say": _SAID_AGAIN,
        "source prepared restarted: without say": _SAID_AGAIN,
        "source prepared peer_aborted: ignored": _ENDS_ALL_THE_SAME,
        "source prepared peer_aborted: without say": _SAID_AGAIN,
        "source voted failed: ignored": _ENDS_ALL_THE_SAME,
    }
)

# A record that is missing or late here breaks the rule that it comes first, which is checked, and has no other effect.
ORDER_ONLY: Final[Mapping[str, str]] = MappingProxyType(
    {
        "source open failed: write last": _SAME_END,
        "source open lost: write last": _SAME_END,
        "source open restarted: write last": _SAME_END,
        "source open peer_aborted: write last": _SAME_END,
        "source open missing: write last": _SAME_END,
        "source asked approved: without write": _SAME_END,
        "source asked approved: write last": _SAME_END,
        "source asked failed: write last": _SAME_END,
        "source asked lost: write last": _SAME_END,
        "source asked missing: write last": _SAME_END,
        "source asked peer_aborted: write last": _SAME_END,
        "source prepared failed: write last": _SAME_END,
        "source prepared lost: write last": _SAME_END,
        "source prepared restarted: write last": _SAME_END,
        "source prepared peer_aborted: write last": _SAME_END,
        "source prepared missing: write last": _SAME_END,
        "source voted failed: write last": _SAME_END,
    }
)

"""What a network may do to the connections of two relays, and what it has done."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tests.attacks.wire import Kind, Way


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens to one direction of one connection. Offsets count its bytes from the first one carried."""

    flip_at: int | None = None
    """One bit of the byte at this offset arrives wrong."""
    flip_odds: float = 0.0
    """Chance of a wrong bit in each piece that is read (256 KiB at most)."""
    stall_at: int | None = None
    """From here on nothing arrives any more; the connection stays open."""
    swallow: bool = True
    """Whether what is stalled is read and dropped; otherwise its sender is held up."""
    reset_at: int | None = None
    """Both relays see a reset once this much has arrived."""
    shut_at: int | None = None
    """The receiver sees a clean end here (a half-close); the rest is dropped."""
    split_bytes: int = 0
    """Written on in pieces of 1 to so many bytes, each a segment of its own."""
    delay_seconds: float = 0.0
    jitter_seconds: float = 0.0
    """Up to so much more delay; the order stays."""
    bytes_per_second: float = 0.0
    """0 is no limit."""


QUIET: Final = Faults()


@dataclass(frozen=True, slots=True)
class Plan:
    """Both directions of one connection: forward is from the source's relay to the destination's."""

    forward: Faults = QUIET
    backward: Faults = QUIET

    def of(self, way: Way) -> Faults:
        """One direction's."""
        return self.forward if way is Way.FORWARD else self.backward


CALM: Final = Plan()


@dataclass(slots=True)
class Did:
    """What the proxy has done so far."""

    links: int = 0
    unreached: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    flips: int = 0
    resets: int = 0
    shuts: int = 0
    stalls: int = 0
    swallowed_bytes: int = 0
    splits: int = 0
    blackouts: int = 0
    refusals: int = 0


@dataclass(eq=False, slots=True)
class Link:
    """One connection through the proxy.

    `index` counts the connections of its kind: the lanes are 0, 1, ... whatever control connections there were.
    """

    number: int
    kind: Kind
    index: int
    client: socket.socket
    server: socket.socket
    plan: Plan = CALM
    task: asyncio.Task[None] | None = None
    stalled: dict[Way, bool] = field(default_factory=dict)
    """Directions that carry nothing now, and whether their bytes are swallowed."""
    freed: asyncio.Event = field(default_factory=asyncio.Event)
    flip_next: set[Way] = field(default_factory=set)
    last_piece: dict[Way, int] = field(default_factory=dict)
    """Ways that are stalled behind the next piece of so many bytes or more."""
    shut: set[Way] = field(default_factory=set)
    carried: dict[Way, int] = field(default_factory=lambda: {Way.FORWARD: 0, Way.BACKWARD: 0})
    over: bool = False

    def ends(self, way: Way) -> tuple[socket.socket, socket.socket]:
        """Where the bytes of one direction come from and go to."""
        return (self.client, self.server) if way is Way.FORWARD else (self.server, self.client)


Chooser = Callable[[Link], Plan]
"""Makes the plan of a connection that has just said its first bytes."""


def calm(_: Link) -> Plan:
    """Nothing happens."""
    return CALM


def only(kind: Kind, plan: Plan, indices: range = range(1_000_000)) -> Chooser:
    """That plan for the connections of one kind, or for the first few of them; nothing happens to the others."""
    return lambda link: plan if link.kind is kind and link.index in indices else CALM

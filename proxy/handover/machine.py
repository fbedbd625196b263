"""One side of one hand-over: steps through the table."""

from proxy.handover.table import HEARD, TABLES, WRITTEN, Action, Event, Side, State


class Handover:
    """Where one side stands.

    Args:
        side: which copy this end has.
        state: where it stood, after a restart.

    Raises:
        ValueError: no journal says so.
    """

    def __init__(self, side: Side, state: State = State.OPEN) -> None:
        if state not in WRITTEN:
            raise ValueError(f"a hand-over is not found {state.value}")
        self.side, self.state = side, state

    def step(self, event: Event) -> tuple[Action, ...]:
        """Take an event; what is not in the table changes nothing, and asks for nothing.

        Returns:
            what has to be done, in that order.
        """
        step = TABLES[self.side].get((self.state, event))
        if step is None:
            return ()
        self.state = step.state
        return step.actions

    def takes(self, event: Event) -> bool:
        """Whether the event changes anything, or asks for anything, where this side stands."""
        return (self.state, event) in TABLES[self.side]

    @property
    def word(self) -> State | None:
        """What this side may say of itself; None while it has nothing to say."""
        return self.state if self.state in HEARD else None

    @property
    def decided(self) -> bool:
        """Whether it is certain which copy runs on."""
        return self.state in (State.DONE, State.ABORTED)

    @property
    def may_turn_back(self) -> bool:
        """Whether this side may still end it without the peer's word."""
        if self.side is Side.SOURCE:
            return self.state in (State.OPEN, State.ASKED, State.PREPARED, State.VOTED)
        return self.state in (State.OPEN, State.ASKED)

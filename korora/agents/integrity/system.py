"""Σ(R, I, W, z0) (14, 15): every state that the rules can lead to from a secure one, in a world that is bounded.

``reach`` is an exhaustive search. That it finds nothing is the theorem for that world: whatever is asked, in whatever
order, every state is secure and every change was made by somebody entitled to it.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from korora.agents.integrity.properties import PROPERTIES, Property, entitled
from korora.agents.integrity.requests import Answer, Give, Request, Rescind
from korora.agents.integrity.rules import RULES, Rule, respond
from korora.agents.integrity.state import State

ANSWERED: Final = "answered by one rule"
"""Of a request (11): what neither QUESTION nor ERROR says."""
ENTITLED: Final = "entitled"

Entitlement = Callable[[State, str, State], bool]


@dataclass(frozen=True, slots=True)
class World:
    """What is there, and what may be asked.

    Attributes:
        name: of the world.
        initial: its z0; all are to be secure.
        requests: R.
    """

    name: str
    initial: tuple[State, ...]
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Reached:
    """How far a search went.

    Attributes:
        states: different ones.
        changes: requests that were answered by YES and another state: members of W (11).
    """

    states: int
    changes: int


class Insecure(Exception):
    """A state, or a change, that should not be.

    Args:
        violated: which property.
        path: the requests that lead there from an initial state.
    """

    def __init__(self, violated: str, path: Sequence[Request]) -> None:
        super().__init__(f"not {violated} after {', '.join(map(str, path)) or 'nothing'}")
        self.violated = violated
        self.path = tuple(path)


def actor(request: Request) -> str:
    """Whose request it is."""
    return request.giver if isinstance(request, Give | Rescind) else request.subject


class _Search:
    def __init__(self, properties: Mapping[str, Property]) -> None:
        self._properties = properties
        self.seen: dict[State, tuple[State, Request] | None] = {}
        self.open: deque[State] = deque()

    def add(self, state: State, came: tuple[State, Request] | None) -> None:
        if state in self.seen:
            return
        self.seen[state] = came
        for name, holds in self._properties.items():
            if not holds(state):
                raise Insecure(name, self.path(state))
        self.open.append(state)

    def path(self, state: State) -> list[Request]:
        steps: list[Request] = []
        while (came := self.seen[state]) is not None:
            state = came[0]
            steps.append(came[1])
        return steps[::-1]


def reach(
    world: World,
    rules: Sequence[Rule[Any]] = RULES,
    properties: Mapping[str, Property] = PROPERTIES,
    entitlement: Entitlement = entitled,
) -> Reached:
    """Look at every state of a world.

    Args:
        world: bounded.
        rules: ω.
        properties: what every state must have.
        entitlement: what every change must be.

    Raises:
        Insecure: one does not.
    """
    search = _Search(properties)
    changes = 0
    for initial in world.initial:
        search.add(initial, None)
    while search.open:
        state = search.open.popleft()
        for request in world.requests:
            answer, after = respond(rules, request, state)
            if answer in (Answer.QUESTION, Answer.ERROR):
                raise Insecure(ANSWERED, [*search.path(state), request])
            if answer is Answer.NO or after == state:
                continue
            changes += 1
            if not entitlement(state, actor(request), after):
                raise Insecure(ENTITLED, [*search.path(state), request])
            search.add(after, (state, request))
    return Reached(len(search.seen), changes)

"""ω, the rules of the formal machine (10, 11), as data: a request, what must hold, and what then follows.

Every comparison of standings is a ``Comparison`` of its own with a name, and everything else that must hold a ``Fact``.
So the tests can take away or turn round each of them, and see that some state that can be reached is then not secure:
the rules look only at what a request changes, ``properties`` at the whole state.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeVar

from korora.agents.integrity.levels import MODIFIES, OBSERVES, TAKES, Attribute, Standing
from korora.agents.integrity.requests import (
    Answer,
    ChangeObject,
    ChangeSubject,
    Create,
    Delete,
    Get,
    Give,
    Release,
    Request,
    Rescind,
)
from korora.agents.integrity.state import Access, State

R = TypeVar("R")

Pairs = Iterable[tuple[Standing, Standing]]
"""Of which the first has to dominate the second."""


@dataclass(frozen=True, slots=True)
class Comparison(Generic[R]):
    """Standings of which one must dominate the other.

    Attributes:
        name: of this one.
        pairs: what is compared.
        order: the comparison itself.
    """

    name: str
    pairs: Callable[[R, State], Pairs]
    order: Callable[[Standing, Standing], bool] = Standing.dominates

    def holds(self, request: R, state: State) -> bool:
        """Whether all of them do."""
        order = self.order
        return all(order(upper, lower) for upper, lower in self.pairs(request, state))


@dataclass(frozen=True, slots=True)
class Fact(Generic[R]):
    """Something that must hold and is no comparison of standings."""

    name: str
    holds: Callable[[R, State], bool]


@dataclass(frozen=True, slots=True)
class Rule(Generic[R]):
    """e_i: R × T → I × T (10).

    Attributes:
        name: of the rule.
        request: the kind of request that it deals with.
        conditions: all of which must hold; later ones may rely on earlier ones.
        effect: the next state.
    """

    name: str
    request: type[R]
    conditions: tuple[Comparison[R] | Fact[R], ...]
    effect: Callable[[R, State], State]

    def answer(self, request: object, state: State) -> tuple[Answer, State]:
        """Its answer; QUESTION if it cannot deal with such a request."""
        if not isinstance(request, self.request):
            return Answer.QUESTION, state
        if not all(condition.holds(request, state) for condition in self.conditions):
            return Answer.NO, state
        return Answer.YES, self.effect(request, state)


def respond(rules: Sequence[Rule[Any]], request: Request, state: State) -> tuple[Answer, State]:
    """W(ω) (11): the answer of the only rule that deals with it.

    Returns:
        the answer and the next state, which is another one on YES only; ERROR if several rules deal with the request,
        QUESTION if none does.
    """
    match [rule for rule in rules if isinstance(request, rule.request)]:
        case []:
            return Answer.QUESTION, state
        case [only]:
            return only.answer(request, state)
    return Answer.ERROR, state


# ---------------------------------------------------------------- get, release


def _read_object(request: Get, state: State) -> Pairs:
    if request.attribute in OBSERVES:
        yield state.of_object(request.obj), state.of_subject(request.subject)


def _written_object(request: Get, state: State) -> Pairs:
    if request.attribute in MODIFIES:
        yield state.of_subject(request.subject), state.of_object(request.obj)


def _taken_beside(request: Get, state: State) -> Pairs:
    if request.attribute in TAKES:
        mine = state.of_object(request.obj)
        yield from ((mine, modified) for modified in state.modified(request.subject))


def _modified_beside(request: Get, state: State) -> Pairs:
    if request.attribute in MODIFIES:
        mine = state.of_object(request.obj)
        yield from ((taken, mine) for taken in state.taken(request.subject))


def _access(request: Get | Release | Give | Rescind) -> Access:
    return Access(request.subject, request.obj, request.attribute)


_GET: Final[Rule[Get]] = Rule(
    "get",
    Get,
    (
        Fact("get: in the matrix", lambda request, state: _access(request) in state.matrix),
        Comparison("get: no read down", _read_object),
        Comparison("get: no write up", _written_object),
        Comparison("get: taken beside what is modified", _taken_beside),
        Comparison("get: modified beside what is taken", _modified_beside),
    ),
    lambda request, state: replace(state, accesses=state.accesses | {_access(request)}),
)

_RELEASE: Final[Rule[Release]] = Rule(
    "release",
    Release,
    (),
    lambda request, state: replace(state, accesses=state.accesses - {_access(request)}),
)

# ---------------------------------------------------------------- give, rescind


_GIVE: Final[Rule[Give]] = Rule(
    "give",
    Give,
    (
        Fact("give: controls it", lambda request, state: state.controls(request.giver, request.obj)),
        Fact("give: to a subject", lambda request, state: request.subject in state.subjects),
    ),
    lambda request, state: replace(state, matrix=state.matrix | {_access(request)}),
)

_RESCIND: Final[Rule[Rescind]] = Rule(
    "rescind",
    Rescind,
    (Fact("rescind: controls it", lambda request, state: state.controls(request.giver, request.obj)),),
    lambda request, state: replace(
        state, matrix=state.matrix - {_access(request)}, accesses=state.accesses - {_access(request)}
    ),
)

# ---------------------------------------------------------------- create, delete


def _created(request: Create, state: State) -> State:
    return replace(
        state,
        objects=state.objects.with_entry(request.obj, request.standing),
        parents=state.parents.with_entry(request.obj, request.parent),
    )


def _deleted(request: Delete, state: State) -> State:
    return replace(
        state,
        accesses=frozenset(access for access in state.accesses if access.obj != request.obj),
        matrix=frozenset(access for access in state.matrix if access.obj != request.obj),
        objects=state.objects.without(request.obj),
        parents=state.parents.without(request.obj),
    )


def _parent_written(request: Create, state: State) -> bool:
    return Access(request.subject, request.parent, Attribute.WRITE) in state.accesses


_CREATE: Final[Rule[Create]] = Rule(
    "create",
    Create,
    (
        Fact("create: is new", lambda request, state: request.obj not in state.objects),
        Fact("create: writes to its parent", _parent_written),
        Comparison(
            "create: not above its parent", lambda request, state: [(state.of_object(request.parent), request.standing)]
        ),
    ),
    _created,
)

_DELETE: Final[Rule[Delete]] = Rule(
    "delete",
    Delete,
    (
        Fact("delete: controls it", lambda request, state: state.controls(request.subject, request.obj)),
        Fact("delete: has nothing below it", lambda request, state: not any(state.children(request.obj))),
    ),
    _deleted,
)

# ---------------------------------------------------------------- change level


def _above(request: ChangeObject, state: State) -> Pairs:
    parent = state.parents.get(request.obj)
    if parent is not None:
        yield state.of_object(parent), request.standing


def _below(request: ChangeObject, state: State) -> Pairs:
    return ((request.standing, state.of_object(child)) for child in state.children(request.obj))


def _accessors(request: ChangeObject, state: State, attributes: frozenset[Attribute]) -> Iterator[str]:
    return (had.subject for had in state.accesses if had.obj == request.obj and had.attribute in attributes)


def _readers(request: ChangeObject, state: State) -> Pairs:
    return ((request.standing, state.of_subject(subject)) for subject in _accessors(request, state, OBSERVES))


def _writers(request: ChangeObject, state: State) -> Pairs:
    return ((state.of_subject(subject), request.standing) for subject in _accessors(request, state, MODIFIES))


def _others(request: ChangeObject, state: State, subject: str, attributes: frozenset[Attribute]) -> Iterator[Standing]:
    """c_o of what else that subject has accesses to."""
    return (
        state.of_object(had.obj)
        for had in state.accesses
        if had.subject == subject and had.attribute in attributes and had.obj != request.obj
    )


def _modified_by_takers(request: ChangeObject, state: State) -> Pairs:
    for subject in _accessors(request, state, TAKES):
        yield from ((request.standing, modified) for modified in _others(request, state, subject, MODIFIES))


def _taken_by_modifiers(request: ChangeObject, state: State) -> Pairs:
    for subject in _accessors(request, state, MODIFIES):
        yield from ((taken, request.standing) for taken in _others(request, state, subject, TAKES))


_CHANGE_OBJECT: Final[Rule[ChangeObject]] = Rule(
    "change object",
    ChangeObject,
    (
        Fact("change object: controls it", lambda request, state: state.controls(request.subject, request.obj)),
        Comparison("change object: not above its parent", _above),
        Comparison("change object: not below its children", _below),
        Comparison("change object: its readers do not read down", _readers),
        Comparison("change object: its writers do not write up", _writers),
        Comparison("change object: taken beside what is modified", _modified_by_takers),
        Comparison("change object: modified beside what is taken", _taken_by_modifiers),
    ),
    lambda request, state: replace(state, objects=state.objects.with_entry(request.obj, request.standing)),
)


_CHANGE_SUBJECT: Final[Rule[ChangeSubject]] = Rule(
    "change subject",
    ChangeSubject,
    (
        Fact("change subject: is one", lambda request, state: request.subject in state.subjects),
        Comparison(
            "change subject: downwards only",
            lambda request, state: [(state.of_subject(request.subject), request.standing)],
        ),
        Comparison(
            "change subject: does not write up",
            lambda request, state: [(request.standing, modified) for modified in state.modified(request.subject)],
        ),
    ),
    lambda request, state: replace(state, subjects=state.subjects.with_entry(request.subject, request.standing)),
)

RULES: Final[tuple[Rule[Any], ...]] = (
    _GET,
    _RELEASE,
    _GIVE,
    _RESCIND,
    _CREATE,
    _DELETE,
    _CHANGE_OBJECT,
    _CHANGE_SUBJECT,
)
"""ω (11): one rule for each kind of request."""

"""What could be wrong with the rules: each condition missing or turned round, each comparison made of one half only.

`CONDITIONS` is the list by name: a rule that compares something else fails the test until it stands here too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from korora.agents.integrity.levels import Standing
from korora.agents.integrity.requests import Delete, Rescind
from korora.agents.integrity.rules import RULES, Comparison, Fact, Rule
from korora.agents.integrity.state import State
from korora.agents.integrity.system import ANSWERED, ENTITLED

Rules = tuple[Rule[Any], ...]
Condition = Comparison[Any] | Fact[Any]

FACT: Final = ("missing", "turned round")
COMPARISON: Final = (*FACT, "levels only", "categories only")

CONDITIONS: Final[Mapping[str, tuple[str, str, tuple[str, ...]]]] = MappingProxyType(
    {
        "get: in the matrix": ("discretionary", "matrix", FACT),
        "get: no read down": ("simple security", "accesses", COMPARISON),
        "get: no write up": ("simple security", "accesses", COMPARISON),
        "get: taken beside what is modified": ("star", "accesses", COMPARISON),
        "get: modified beside what is taken": ("star", "accesses", COMPARISON),
        "give: controls it": (ENTITLED, "matrix", FACT),
        "give: to a subject": ("well formed", "matrix", FACT),
        "rescind: controls it": (ENTITLED, "matrix", FACT),
        "create: is new": ("well formed", "hierarchy", FACT),
        "create: writes to its parent": (ENTITLED, "hierarchy", FACT),
        "create: not above its parent": ("compatible", "hierarchy", COMPARISON),
        "delete: controls it": (ENTITLED, "hierarchy", FACT),
        "delete: has nothing below it": ("well formed", "hierarchy", FACT),
        "change object: controls it": (ENTITLED, "levels", FACT),
        "change object: not above its parent": ("compatible", "hierarchy", COMPARISON),
        "change object: not below its children": ("compatible", "hierarchy", COMPARISON),
        "change object: its readers do not read down": ("simple security", "levels", COMPARISON),
        "change object: its writers do not write up": ("simple security", "levels", COMPARISON),
        "change object: taken beside what is modified": ("star", "levels", COMPARISON),
        "change object: modified beside what is taken": ("star", "levels", COMPARISON),
        "change subject: is one": (ENTITLED, "levels", FACT),
        "change subject: downwards only": (ENTITLED, "levels", COMPARISON),
        "change subject: does not write up": ("simple security", "levels", COMPARISON),
    }
)
"""Every condition of every rule: the property that it keeps, the world that shows it, the ways it can be wrong."""

EFFECTS: Final = (
    "rescind: leaves the access",
    "delete: leaves the accesses",
    "delete: leaves the matrix",
    "delete: leaves the place",
)
"""What a rule could forget to do."""

TURNED: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "get": ("discretionary", "matrix"),
        "give": (ENTITLED, "matrix"),
        "rescind": (ENTITLED, "matrix"),
        "create": (ENTITLED, "hierarchy"),
        "delete": (ENTITLED, "hierarchy"),
        "change object": (ENTITLED, "hierarchy"),
        "change subject": (ENTITLED, "levels"),
    }
)
"""Rules that say yes where they should say no: the property that then does not hold, and the world that shows it.

`release` says yes to everything; that it would say no shows in the figures only, for it is secure, and of no use.
"""


@dataclass(frozen=True, slots=True)
class Mutant:
    """Rules with one thing wrong.

    Attributes:
        name: what is wrong.
        rules: all of them.
        keeps: the property that what is wrong was there for.
        world: where it shows.
    """

    name: str
    rules: Rules
    keeps: str
    world: str


def conditions(rules: Sequence[Rule[Any]] = RULES) -> Iterator[Condition]:
    """Of all rules."""
    for rule in rules:
        yield from rule.conditions


def _changed(name: str, change: Callable[[Condition], Condition | None]) -> Rules:
    """The rules with that condition changed, or without it."""
    rules = []
    for rule in RULES:
        kept = (change(condition) if condition.name == name else condition for condition in rule.conditions)
        rules.append(replace(rule, conditions=tuple(condition for condition in kept if condition is not None)))
    return tuple(rules)


def _turned(condition: Condition) -> Condition:
    if isinstance(condition, Comparison):
        return replace(condition, order=lambda upper, lower: lower.dominates(upper))
    holds = condition.holds
    return replace(condition, holds=lambda request, state: not holds(request, state))


def _halved(order: Callable[[Standing, Standing], bool]) -> Callable[[Condition], Condition]:
    return lambda condition: replace(condition, order=order)


_CHANGES: Final[Mapping[str, Callable[[Condition], Condition | None]]] = MappingProxyType(
    {
        "missing": lambda condition: None,
        "turned round": _turned,
        "levels only": _halved(lambda upper, lower: upper.level >= lower.level),
        "categories only": _halved(lambda upper, lower: upper.categories >= lower.categories),
    }
)


def of_conditions() -> Iterator[Mutant]:
    for name, (keeps, world, ways) in CONDITIONS.items():
        for way in ways:
            yield Mutant(f"{name}: {way}", _changed(name, _CHANGES[way]), keeps, world)


def of_properties() -> Iterator[Mutant]:
    """Rules that do not care about a property at all."""
    for property_, world in {keeps: world for keeps, world, _ in CONDITIONS.values()}.items():
        names = {name for name, (keeps, *_) in CONDITIONS.items() if keeps == property_}
        rules = (
            replace(rule, conditions=tuple(one for one in rule.conditions if one.name not in names)) for rule in RULES
        )
        yield Mutant(f"{property_}: disregarded", tuple(rules), property_, world)


def _with_effect(name: str, effect: Callable[[Any, State], State]) -> Rules:
    return tuple(replace(rule, effect=effect) if rule.name == name else rule for rule in RULES)


def _rescinded(request: Rescind, state: State) -> State:
    rule = next(rule for rule in RULES if rule.name == "rescind")
    return replace(rule.effect(request, state), accesses=state.accesses)


def _left(field: str) -> Callable[[Delete, State], State]:
    rule = next(rule for rule in RULES if rule.name == "delete")

    def effect(request: Delete, state: State) -> State:
        after: State = rule.effect(request, state)
        return replace(after, **{field: getattr(state, field)})

    return effect


def of_effects() -> Iterator[Mutant]:
    rescind, accesses, matrix, place = EFFECTS
    yield Mutant(rescind, _with_effect("rescind", _rescinded), "discretionary", "matrix")
    yield Mutant(accesses, _with_effect("delete", _left("accesses")), "discretionary", "hierarchy")
    yield Mutant(matrix, _with_effect("delete", _left("matrix")), "well formed", "hierarchy")
    yield Mutant(place, _with_effect("delete", _left("parents")), "well formed", "hierarchy")


def _refused(rule: Rule[Any]) -> Rule[Any]:
    """Says yes exactly where the rule says no."""
    conditions = rule.conditions

    def holds(request: Any, state: State) -> bool:
        return not all(condition.holds(request, state) for condition in conditions)

    return replace(rule, conditions=(Fact("turned round", holds),))


def turned_round(name: str) -> Rules:
    """The rules, one of which says yes exactly where it should say no."""
    return tuple(_refused(rule) if rule.name == name else rule for rule in RULES)


def of_rules() -> Iterator[Mutant]:
    for rule in RULES:
        rest = tuple(other for other in RULES if other is not rule)
        world = TURNED.get(rule.name, ("", "matrix"))[1]
        yield Mutant(f"rule {rule.name}: missing", rest, ANSWERED, world)
        yield Mutant(f"rule {rule.name}: twice", (*RULES, rule), ANSWERED, world)
    for name, (keeps, world) in TURNED.items():
        yield Mutant(f"rule {name}: turned round", turned_round(name), keeps, world)


def all_mutants() -> tuple[Mutant, ...]:
    return (*of_conditions(), *of_properties(), *of_effects(), *of_rules())

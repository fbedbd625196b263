"""Every state that can be reached is secure, and would not be if anything in the rules were missing or turned round."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from korora.agents.integrity import rules as module
from korora.agents.integrity.levels import Level, Standing
from korora.agents.integrity.properties import PROPERTIES, entitled, secure
from korora.agents.integrity.requests import Answer, ChangeObject, Get, Give, Release, Request
from korora.agents.integrity.rules import RULES, respond
from korora.agents.integrity.state import UNKNOWN, Access, State
from korora.agents.integrity.system import ANSWERED, ENTITLED, Insecure, Reached, World, reach
from tests.korora.agents.integrity.mutants import CONDITIONS, TURNED, Mutant, all_mutants, conditions, turned_round
from tests.korora.agents.integrity.worlds import HIGHEST, LOWEST, A, E, R, W, large, state, worlds

PAGE = Path(__file__).parents[4] / "docs" / "clark-wilson.md"
WORLDS = {world.name: world for world in worlds()}


def told(name: str) -> Reached:
    """What docs/clark-wilson.md says of a world."""
    row = re.search(rf"^\| {name} \| .* \| ([\d,]+) \| ([\d,]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert row, name
    return Reached(*(int(count.replace(",", "")) for count in row.groups()))


def anybody(before: State, subject: str, after: State) -> bool:
    """Every change is anybody's."""
    return True


# ---- the theorem


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", WORLDS)
def test_every_state_that_is_reached_is_secure(name: str) -> None:
    found = reach(WORLDS[name])
    print(f"{name}: {found.states} states, {found.changes} changes, all secure")
    assert found == told(name)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", large(), ids=lambda world: world.name)
def test_and_in_larger_worlds(world: World) -> None:
    found = reach(world)
    print(f"{world.name}: {found.states} states, {found.changes} changes, all secure")
    assert found == told(world.name)


def test_worlds_start_from_secure_states_of_every_standing() -> None:
    for world in (*worlds(), *large()):
        assert world.initial
        assert all(map(secure, world.initial))
        assert {type(request) for request in world.requests} >= {Get, Release}
    asked = {type(request) for world in worlds() for request in world.requests}
    assert asked == {rule.request for rule in RULES} == set(Request.__args__)


# ---- the proof can fail


@pytest.mark.parametrize("mutant", all_mutants(), ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught(mutant: Mutant) -> None:
    """By the property alone that what is wrong was there for."""
    properties = {name: holds for name, holds in PROPERTIES.items() if name == mutant.keeps}
    with pytest.raises(Insecure, match=f"not {mutant.keeps} after"):
        reach(WORLDS[mutant.world], mutant.rules, properties, entitled if mutant.keeps == ENTITLED else anybody)


def test_a_release_that_is_refused_shows_in_the_figures() -> None:
    """What is refused without need is secure; the page's figures say that the search went as far as it should."""
    assert reach(WORLDS["hierarchy"], turned_round("release")).changes < told("hierarchy").changes
    assert {rule.name for rule in RULES} == {*TURNED, "release"}


def test_every_condition_of_the_rules_is_in_the_list() -> None:
    names = [condition.name for condition in conditions()]
    assert sorted(names) == sorted(CONDITIONS)
    for condition in conditions():
        ways = CONDITIONS[condition.name][2]
        assert ("levels only" in ways) == isinstance(condition, module.Comparison), condition.name
    assert {keeps for keeps, *_ in CONDITIONS.values()} == {*PROPERTIES, ENTITLED}


def test_rules_compare_standings_nowhere_else() -> None:
    """What is no `Comparison` would not be in the list."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    orders = [node for node in ast.walk(tree) if isinstance(node, ast.Lt | ast.LtE | ast.Gt | ast.GtE)]
    assert not orders
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("dominates", "level")]
    assert [ast.unparse(node) for node in names] == ["Standing.dominates"]


def small() -> State:
    """A user who could append to what stands too high, and execute what stands too low for what it appends to."""
    matrix = [Access("user", "one", A), Access("user", "own", A), Access("user", "program", E)]
    return state({"user": LOWEST}, {"one": HIGHEST, "own": LOWEST, "program": UNKNOWN}, {}, matrix)


WITNESSES = {
    "well formed": "give: to a subject: missing",
    "simple security": "get: no write up: missing",
    "star": "get: taken beside what is modified: missing",
    "discretionary": "get: in the matrix: missing",
    "compatible": "create: not above its parent: missing",
    ENTITLED: "change object: controls it: missing",
}


@pytest.mark.parametrize("removed", [*PROPERTIES, ENTITLED])
def test_no_property_can_be_spared(removed: str) -> None:
    """Without it, something wrong would be taken for secure by all the others; with it, it is not."""
    (mutant,) = (mutant for mutant in all_mutants() if mutant.name == WITNESSES[removed])
    world = WORLDS[mutant.world]
    if mutant.world == "accesses":  # all of it without a rule is larger than need be
        asked = [Get("user", obj, A) for obj in ("one", "own")]
        world = World("small", (small(),), (*asked, Get("user", "program", E)))
    rest = {name: holds for name, holds in PROPERTIES.items() if name != removed}
    entitlement = anybody if removed == ENTITLED else entitled
    assert reach(world, mutant.rules, rest, entitlement).states
    with pytest.raises(Insecure, match=f"not {removed} after"):
        reach(world, mutant.rules)


@pytest.mark.parametrize("turned", PROPERTIES)
def test_a_property_turned_round_is_caught_at_once(turned: str) -> None:
    properties = {
        name: (lambda t, h=holds: not h(t)) if name == turned else holds for name, holds in PROPERTIES.items()
    }
    with pytest.raises(Insecure, match=f"not {turned} after nothing"):
        reach(WORLDS["levels"], properties=properties)


# ---- properties, one by one

USER = {"user": LOWEST}


def having(*accesses: Access, objects: dict[str, Standing], parents: dict[str, str] | None = None) -> dict[str, bool]:
    """Which properties hold where those are had, and allowed."""
    found = replace(state(USER, objects, parents or {}, accesses), accesses=frozenset(accesses))
    return {name: holds(found) for name, holds in PROPERTIES.items()}


MIDDLE = Standing(Level.RELYING_PARTY)


@pytest.mark.parametrize(
    ("attribute", "obj", "holds"),
    [
        (R, UNKNOWN, False),
        (R, HIGHEST, True),
        (W, MIDDLE, True),
        (W, HIGHEST, False),
        (W, UNKNOWN, False),
        (A, UNKNOWN, True),
        (A, HIGHEST, False),
        (E, UNKNOWN, True),
        (E, HIGHEST, True),
    ],
)
def test_no_read_down_and_no_write_up(attribute: object, obj: Standing, holds: bool) -> None:
    found = having(Access("user", "one", attribute), objects={"one": obj})  # type: ignore[arg-type]
    assert found.pop("simple security") is holds
    assert all(found.values())


def test_who_modifies_executes_nothing_lower() -> None:
    objects = {"program": UNKNOWN, "data": LOWEST}
    found = having(Access("user", "program", E), Access("user", "data", A), objects=objects)
    assert [name for name, holds in found.items() if not holds] == ["star"]


def test_nothing_stands_above_what_it_is_a_part_of() -> None:
    found = having(objects={"whole": LOWEST, "part": HIGHEST}, parents={"part": "whole"})
    assert [name for name, holds in found.items() if not holds] == ["compatible"]


def test_an_access_that_is_not_allowed_is_found() -> None:
    found = replace(state(USER, {"one": LOWEST}, {}, []), accesses=frozenset({Access("user", "one", R)}))
    assert [name for name, holds in PROPERTIES.items() if not holds(found)] == ["discretionary"]


@pytest.mark.parametrize(
    ("objects", "parents", "matrix"),
    [
        ({"one": LOWEST}, {"one": "one"}, []),
        ({"one": LOWEST, "two": LOWEST}, {"one": "two", "two": "one"}, []),
        ({"one": LOWEST}, {"one": "gone"}, []),
        ({"one": LOWEST}, {"gone": "one"}, []),
        ({"one": LOWEST}, {}, [Access("stranger", "one", R)]),
        ({"one": LOWEST}, {}, [Access("user", "gone", R)]),
    ],
)
def test_what_is_not_well_formed_is_found(
    objects: dict[str, Standing], parents: dict[str, str], matrix: list[Access]
) -> None:
    assert not PROPERTIES["well formed"](state(USER, objects, parents, matrix))


# ---- answers

KEPT = state({"keeper": HIGHEST}, {"root": HIGHEST, "leaf": LOWEST}, {"leaf": "root"}, [Access("keeper", "root", W)])


def test_only_yes_changes_the_state() -> None:
    got, after = respond(RULES, Get("keeper", "root", W), KEPT)
    assert got is Answer.YES
    assert after.accesses == {Access("keeper", "root", W)}
    assert respond(RULES, Get("keeper", "root", R), KEPT) == (Answer.NO, KEPT)
    assert respond(RULES, Give("keeper", "keeper", "leaf", R), KEPT) == (Answer.NO, KEPT)
    assert respond(RULES, Give("keeper", "keeper", "leaf", R), after)[0] is Answer.YES


def test_no_rule_is_a_question_and_two_are_an_error() -> None:
    request = Get("keeper", "root", W)
    assert respond([], request, KEPT) == (Answer.QUESTION, KEPT)
    assert respond((*RULES, RULES[0]), request, KEPT) == (Answer.ERROR, KEPT)
    assert respond(RULES, "something else", KEPT) == (Answer.QUESTION, KEPT)  # type: ignore[arg-type]
    refusing = replace(RULES[0], conditions=(module.Fact("never", lambda request, state: False),))
    assert respond((*RULES, refusing), request, KEPT) == (Answer.ERROR, KEPT), "a no is an answer, too"


@pytest.mark.parametrize("rules", [RULES[1:], (*RULES, RULES[0])], ids=["none", "two"])
def test_the_search_finds_a_request_that_one_rule_does_not_answer(rules: module.Sequence[module.Rule[object]]) -> None:
    with pytest.raises(Insecure, match=f"not {ANSWERED} after"):
        reach(WORLDS["hierarchy"], rules)


def test_the_search_tells_the_way() -> None:
    (mutant,) = (one for one in all_mutants() if one.name == "change object: its readers do not read down: missing")
    with pytest.raises(Insecure) as found:
        reach(WORLDS["levels"], mutant.rules)
    at = next(iter(initial for initial in WORLDS["levels"].initial if _leads(initial, found.value.path, mutant)), None)
    assert at is not None
    assert isinstance(found.value.path[-1], ChangeObject)


def _leads(initial: module.State, path: tuple[Request, ...], mutant: Mutant) -> bool:
    for request in path:
        answer, initial = respond(mutant.rules, request, initial)
        if answer is not Answer.YES:
            return False
    return not PROPERTIES["simple security"](initial)

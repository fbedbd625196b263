"""Bounded worlds. Each starts from every secure state of its shape: with that many subjects, objects and standings."""

from collections.abc import Iterable, Iterator
from itertools import product

from korora.agents.integrity.levels import Attribute, Level, Standing
from korora.agents.integrity.properties import secure
from korora.agents.integrity.requests import (
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
from korora.agents.integrity.state import UNKNOWN, Access, State, Table
from korora.agents.integrity.system import World

R, W, A, E = Attribute.READ, Attribute.WRITE, Attribute.APPEND, Attribute.EXECUTE
CATEGORIES = (frozenset[str](), frozenset({"tenant"}))
EVERY_LEVEL = tuple(Standing(level, categories) for level in Level for categories in CATEGORIES)
STANDINGS = tuple(
    standing for standing in EVERY_LEVEL if standing.level in (Level.RELYING_PARTY, Level.TRUSTED_AUTHORITY)
)
LOWEST, HIGHEST = STANDINGS[0], STANDINGS[-1]


def state(
    subjects: dict[str, Standing],
    objects: dict[str, Standing],
    parents: dict[str, str],
    matrix: Iterable[Access],
) -> State:
    return State(frozenset(), frozenset(matrix), Table(subjects), Table(objects), Table(parents))


def access(subject: str, obj: str, attributes: Iterable[Attribute]) -> Iterator[Request]:
    for attribute in attributes:
        yield Get(subject, obj, attribute)
        yield Release(subject, obj, attribute)


def accesses(name: str, standings: tuple[Standing, ...]) -> World:
    """A subject and two objects, of any standing each; whatever it may have."""
    matrix = [Access("user", obj, attribute) for obj in ("one", "two") for attribute in (R, W, A, E)]
    initial = (
        state({"user": user}, {"one": one, "two": two}, {}, matrix) for user, one, two in product(standings, repeat=3)
    )
    requests = (request for obj in ("one", "two") for request in access("user", obj, (R, W, A, E)))
    return World(name, tuple(initial), tuple(requests))


def matrix() -> World:
    """A keeper, who controls a leaf, and a user, who would like to: what may be had is given and taken away."""
    initial = (
        state(
            {"keeper": HIGHEST, "user": user},
            {"root": HIGHEST, "leaf": leaf},
            {"leaf": "root"},
            [Access("keeper", "root", W), Access("user", "root", R), Access("user", "root", E)],
        )
        for user, leaf in product(STANDINGS, repeat=2)
    )
    changes = [
        change(giver, "user", "leaf", attribute)
        for change in (Give, Rescind)
        for giver in ("keeper", "user")
        for attribute in (R, W, A)
    ]
    requests = (
        *access("keeper", "root", (W,)),
        *access("user", "root", (R, E)),
        *access("user", "leaf", (R, W, A)),
        *changes,
        Give("keeper", "stranger", "leaf", R),
        Give("keeper", "user", "root", W),
        Rescind("keeper", "user", "root", R),
    )
    return World("matrix", tuple(initial), requests)


def hierarchy() -> World:
    """A keeper of a root, below which objects come and go, one below the other."""
    matrix = [Access("keeper", "root", W), Access("keeper", "root", R)]
    initial = [
        state({"keeper": top, "user": LOWEST}, {"root": top} | leaf, parent, matrix + right)
        for top in STANDINGS
        for leaf, parent, right in (
            ({}, {}, []),
            ({"leaf": LOWEST}, {"leaf": "root"}, [Access("keeper", "leaf", W), Access("user", "leaf", W)]),
        )
    ]
    made = [
        Create("keeper", obj, parent, standing)
        for obj, parent in (("leaf", "root"), ("twig", "leaf"))
        for standing in STANDINGS
    ]
    changed = [ChangeObject("keeper", obj, standing) for obj in ("root", "leaf", "twig") for standing in STANDINGS]
    requests = (
        *access("keeper", "root", (W,)),
        *access("keeper", "leaf", (W,)),
        *access("user", "leaf", (R, W)),
        *made,
        *changed,
        *(Delete("keeper", obj) for obj in ("root", "leaf", "twig")),
        Give("keeper", "keeper", "leaf", W),
        Give("keeper", "user", "leaf", R),
        Rescind("keeper", "keeper", "leaf", W),
        Create("keeper", "root", "leaf", HIGHEST),
        Create("keeper", "leaf", "twig", LOWEST),
        Create("user", "twig", "root", LOWEST),
        Delete("user", "leaf"),
    )
    return World("hierarchy", tuple(initial), requests)


def levels() -> World:
    """A user with two objects of any standing, which a keeper changes; and the user lowers itself."""
    matrix = [
        Access("keeper", "root", W),
        *(Access("user", obj, kind) for obj in ("leaf", "other") for kind in (R, A, E)),
    ]
    initial = (
        state(
            {"keeper": HIGHEST, "user": user},
            {"root": HIGHEST, "leaf": HIGHEST, "other": other},
            {"leaf": "root", "other": "root"},
            matrix,
        )
        for user, other in product(STANDINGS, repeat=2)
    )
    requests = (
        *access("keeper", "root", (W,)),
        *(request for obj in ("leaf", "other") for request in access("user", obj, (R, A, E))),
        *(ChangeObject(subject, "leaf", standing) for subject in ("keeper", "user") for standing in STANDINGS),
        *(ChangeSubject("user", standing) for standing in STANDINGS),
        ChangeSubject("stranger", UNKNOWN),
    )
    return World("levels", tuple(initial), requests)


def together(name: str, *, wide: bool) -> World:
    """Two users of any standing, a program and a leaf that both use, and a keeper who changes the leaf's standing.

    Args:
        name: of the world.
        wide: whether they also write to the leaf and read the program, and the keeper takes rights away.
    """
    users = ("first", "second")
    of_leaf = (R, W, A) if wide else (R, A)
    of_program = (R, E) if wide else (E,)
    matrix = [
        Access("keeper", "root", W),
        *(Access(user, "leaf", kind) for user in users for kind in of_leaf),
        *(Access(user, "program", kind) for user in users for kind in of_program),
    ]
    initial = (
        state(
            {"keeper": HIGHEST, "first": first, "second": second},
            {"root": HIGHEST, "leaf": LOWEST, "program": program},
            {"leaf": "root", "program": "root"},
            matrix,
        )
        for first, second, program in product(STANDINGS, repeat=3)
    )
    requests = (
        *access("keeper", "root", (W,)),
        *(request for user in users for request in access(user, "leaf", of_leaf)),
        *(request for user in users for request in access(user, "program", of_program)),
        *(ChangeObject("keeper", "leaf", standing) for standing in STANDINGS),
        *(ChangeSubject(user, LOWEST) for user in users),
        *(Rescind("keeper", user, "leaf", A) for user in users if wide),
    )
    return World(name, tuple(initial), requests)


def _from_secure_states(*found: World) -> tuple[World, ...]:
    return tuple(World(world.name, tuple(filter(secure, world.initial)), world.requests) for world in found)


def worlds() -> tuple[World, ...]:
    """Those that every run of the tests searches."""
    return _from_secure_states(
        accesses("accesses", STANDINGS),
        accesses("every level", EVERY_LEVEL),
        matrix(),
        hierarchy(),
        levels(),
        together("together", wide=False),
    )


def large() -> tuple[World, ...]:
    """A larger one."""
    return _from_secure_states(together("together, wide", wide=True))

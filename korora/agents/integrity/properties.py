"""What a secure state is (15, 16, 18), and a transition that somebody was entitled to; each by its own name.

The paper's formula for the simple security property, c_s(s) > c_o(o) for r and w, would let subjects read *down*; its
words, before and after it, say "no read down" and "no write up", which is Biba's integrity. The words are taken here.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from korora.agents.integrity.levels import MODIFIES, OBSERVES, TAKES, Attribute
from korora.agents.integrity.state import Access, State

Property = Callable[[State], bool]


def well_formed(state: State) -> bool:
    """a and B are parts of S × O × A (3, 4), and D is a forest over O (6)."""
    return all(
        access.subject in state.subjects and access.obj in state.objects for access in state.accesses | state.matrix
    ) and all(
        obj in state.objects and parent in state.objects and _ends(obj, state) for obj, parent in state.parents.items()
    )


def _ends(obj: str, state: State) -> bool:
    """Whether a root is above it: a way longer than there are objects goes in a circle."""
    place: str | None = obj
    for _ in range(len(state.objects) + 1):
        if place is None:
            return True
        place = state.parents.get(place)
    return False


def simple_security(state: State) -> bool:
    """No read down, no write up (16, 18): what one reads stands as high as oneself, what one writes no higher."""
    return all(
        (had.attribute not in OBSERVES or state.of_object(had.obj).dominates(state.of_subject(had.subject)))
        and (had.attribute not in MODIFIES or state.of_subject(had.subject).dominates(state.of_object(had.obj)))
        for had in state.accesses
    )


def star(state: State) -> bool:
    """What acts on a subject stands as high as whatever the subject modifies meanwhile: executed programs included.

    Of what is read it follows from the simple security property; of what is executed it does not.
    """
    return all(
        state.of_object(taken.obj).dominates(state.of_object(modified.obj))
        for taken in state.accesses
        if taken.attribute in TAKES
        for modified in state.accesses
        if modified.attribute in MODIFIES and modified.subject == taken.subject
    )


def discretionary(state: State) -> bool:
    """Nobody has an access that the matrix does not allow: a is a part of B."""
    return state.accesses <= state.matrix


def compatible(state: State) -> bool:
    """Nothing stands above what it is a part of: who may change the whole changes the part."""
    return all(state.of_object(parent).dominates(state.of_object(obj)) for obj, parent in state.parents.items())


PROPERTIES: Final[Mapping[str, Property]] = MappingProxyType(
    {
        "well formed": well_formed,
        "simple security": simple_security,
        "star": star,
        "discretionary": discretionary,
        "compatible": compatible,
    }
)


def secure(state: State) -> bool:
    """All of them (15)."""
    return all(holds(state) for holds in PROPERTIES.values())


def entitled(before: State, subject: str, after: State) -> bool:
    """Whether whoever asked may have made that change of B, c or D: by writing to the parent of what is changed.

    Subjects are never made, and lower themselves only. What one has access to now (a) is for the others to judge.
    """
    objects = {
        *(access.obj for access in before.matrix ^ after.matrix),
        *(obj for obj, standing in before.objects.items() if after.objects.get(obj) != standing),
        *(obj for obj, parent in before.parents.items() if after.parents.get(obj) != parent),
    }
    made = after.objects.keys() - before.objects.keys()
    return (
        all(before.controls(subject, obj) for obj in objects)
        and all(
            obj in after.parents and Access(subject, after.parents[obj], Attribute.WRITE) in before.accesses
            for obj in made
        )
        and before.subjects.keys() == after.subjects.keys()
        and all(
            after.subjects[name] == standing or (name == subject and standing.dominates(after.subjects[name]))
            for name, standing in before.subjects.items()
        )
    )

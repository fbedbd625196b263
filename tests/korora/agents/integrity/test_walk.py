"""Worlds too large to search: four subjects, six objects, ten standings; requests at random, every state secure."""

from collections import Counter
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from korora.agents.integrity.levels import Attribute
from korora.agents.integrity.properties import PROPERTIES, entitled, secure
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
from korora.agents.integrity.rules import RULES, respond
from korora.agents.integrity.state import Access, State
from korora.agents.integrity.system import actor
from tests.korora.agents.integrity.worlds import EVERY_LEVEL, state

SUBJECTS = ("s1", "s2", "s3", "s4")
OBJECTS = ("o1", "o2", "o3", "o4", "o5", "o6")
PARENTS = {"o2": "o1", "o3": "o1", "o4": "o2"}
HIGH = EVERY_LEVEL[-3:]
WALKS = 8
STEPS = 500

subjects = st.sampled_from(SUBJECTS)
objects = st.sampled_from(OBJECTS)
attributes = st.sampled_from(Attribute)
standings = st.sampled_from(EVERY_LEVEL)
requests: st.SearchStrategy[Request] = st.one_of(
    st.builds(Get, subjects, objects, attributes),
    st.builds(Get, subjects, st.sampled_from(["o1", "o2"]), st.just(Attribute.WRITE)),
    st.builds(Release, subjects, objects, attributes),
    st.builds(Give, subjects, subjects, objects, attributes),
    st.builds(Rescind, subjects, subjects, objects, attributes),
    st.builds(Create, subjects, objects, objects, standings),
    st.builds(Delete, subjects, objects),
    st.builds(ChangeObject, subjects, objects, standings),
    st.builds(ChangeSubject, subjects, standings),
)


class Walk(RuleBasedStateMachine):
    """Whatever is asked, the state stays secure."""

    at: State

    @initialize(
        standing=st.lists(standings, min_size=10, max_size=10),
        allowed=st.sets(st.builds(Access, subjects, objects, attributes), min_size=20),
    )
    def start(self, standing: list[object], allowed: set[Access]) -> None:
        who = dict(zip(SUBJECTS, standing, strict=False))
        what = dict(zip(OBJECTS, standing[4:], strict=True))
        for child, parent in PARENTS.items():
            if not what[parent].dominates(what[child]):  # type: ignore[attr-defined]
                what[child] = what[parent]
        self.at = state(who, what, PARENTS, allowed)  # type: ignore[arg-type]
        assert secure(self.at)

    @rule(request=requests)
    def ask(self, request: Request) -> None:
        answer, after = respond(RULES, request, self.at)
        assert answer in (Answer.YES, Answer.NO)
        assert answer is Answer.YES or after == self.at
        assert entitled(self.at, actor(request), after)
        self.at = after

    @invariant()
    def stays_secure(self) -> None:
        if hasattr(self, "at"):
            assert [name for name, holds in PROPERTIES.items() if not holds(self.at)] == []


TestWalk = Walk.TestCase
TestWalk.settings = settings(stateful_step_count=50)


def _order(access: Access) -> tuple[str, str, str]:
    return access.subject, access.obj, access.attribute.value


def asked(dice: Random, at: State) -> Request:
    """Something that has a chance: mostly what the matrix allows, or what a subject controls."""
    who, other = dice.choice(SUBJECTS), dice.choice(SUBJECTS)
    obj, parent = dice.choice(OBJECTS), dice.choice(OBJECTS)
    attribute, standing = dice.choice(list(Attribute)), dice.choice(EVERY_LEVEL)
    allowed = dice.choice(sorted(at.matrix, key=_order)) if at.matrix else Access(who, obj, attribute)
    writing = [had for had in sorted(at.accesses, key=_order) if had.attribute is Attribute.WRITE]
    if writing and dice.random() < 0.7:
        who, parent, _ = dice.choice(writing)
        obj = dice.choice([*at.children(parent), obj])
    return dice.choice(
        (
            Get(*allowed),
            Get(*allowed),
            Get(who, obj, attribute),
            Release(*dice.choice(sorted(at.accesses, key=_order))) if at.accesses else Release(who, obj, attribute),
            Give(who, other, obj, attribute),
            Rescind(who, other, obj, attribute),
            Create(who, obj, parent, standing),
            Delete(who, obj),
            ChangeObject(who, obj, standing),
            ChangeSubject(who, standing) if dice.random() < 0.2 else Get(who, parent, Attribute.WRITE),
        )
    )


def test_long_walks_are_answered_both_ways_and_stay_secure() -> None:
    """Every kind of request is granted and refused often: random ones alone are nearly always refused."""
    answers: Counter[tuple[type[Request], Answer]] = Counter()
    for seed in range(WALKS):
        dice = Random(seed)
        who = {name: dice.choice(HIGH) for name in SUBJECTS}
        what = dict.fromkeys(OBJECTS, EVERY_LEVEL[-3])
        matrix = [Access(name, obj, kind) for name in SUBJECTS for obj in OBJECTS for kind in Attribute]
        at = state(who, what, PARENTS, matrix)
        for _ in range(STEPS):
            request = asked(dice, at)
            answer, after = respond(RULES, request, at)
            answers[type(request), answer] += 1
            assert entitled(at, actor(request), after)
            if after != at:
                assert secure(after), (seed, request)
            at = after
    kinds = {rule_.request for rule_ in RULES}
    assert {kind for kind in kinds if answers[kind, Answer.YES] >= 10} == kinds
    assert {kind for kind in kinds - {Release} if answers[kind, Answer.NO] >= 10} == kinds - {Release}

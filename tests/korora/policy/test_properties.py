"""What must hold of any policy: more denies never allow more, fewer allows never do, and nothing is widened later."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from korora.policy.decide import DEFAULT_RULE, Hold, decide, matches
from korora.policy.explain import explain, warnings
from korora.policy.file import Policy
from korora.policy.ledger import Usage
from proxy.authority import Point, Question
from proxy.hypervisors.base import Vm
from proxy.session import Role
from tests.korora.policy.support import UUID, policy, rule

Keys = dict[str, object]
NAMES = ("beta", "bet\u0430", "beta\n", "*", "web-1", "web-2", "")
GLOBS = ("*", "b*", "web-?", "web-1", "[!w]*", "beta")
KEYS = {
    "peer": st.lists(st.sampled_from(GLOBS), min_size=1, max_size=2),
    "pin": st.lists(st.sampled_from(["ab" * 32, "cd" * 32]), min_size=1, max_size=2),
    "user": st.lists(st.sampled_from([0, 1001, 1002]), min_size=1, max_size=2),
    "vm": st.lists(st.sampled_from(GLOBS), min_size=1, max_size=2),
    "uuid": st.lists(st.sampled_from(["*", "4f1b*", UUID]), min_size=1, max_size=2),
    "tenant": st.lists(st.sampled_from(GLOBS), min_size=1, max_size=2),
    "direction": st.sampled_from(["in", "out"]),
    "egress": st.lists(st.sampled_from(GLOBS), min_size=1, max_size=2),
    "hours": st.lists(st.sampled_from(["08:00-18:00", "22:00-06:00"]), min_size=1, max_size=2),
    "days": st.lists(st.sampled_from(["mon-fri", "sat"]), min_size=1, max_size=2),
    "not_before": st.sampled_from([datetime(2026, 11, 26, 10, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)]),
}
ALLOWS_ONLY = {
    "guarded": st.just(value=True),
    "requires_scans": st.just(["clamav"]),
    "max_running": st.integers(1, 3),
    "max_running_per_peer": st.integers(1, 3),
    "max_running_per_user": st.integers(1, 3),
    "sessions_per_hour": st.integers(1, 3),
    "approvals": st.just(1),
    "rate_limit": st.integers(1024, 2048),
}


@st.composite
def rules(draw: st.DrawFn, effect: str) -> Keys:
    """The keys of a rule."""
    choices = KEYS | (ALLOWS_ONLY if effect == "allow" else {"guarded": st.just(value=False)})
    chosen = draw(st.lists(st.sampled_from(sorted(choices)), max_size=3, unique=True))
    keys: Keys = {"effect": effect} | {key: draw(choices[key]) for key in chosen}
    return keys | ({"approvers": [1001, 1002]} if "approvals" in keys else {})


TABLES = st.lists(st.sampled_from(["allow", "deny"]).flatmap(rules), max_size=6)
QUESTIONS = st.builds(
    Question,
    point=st.sampled_from(Point),
    role=st.sampled_from(Role),
    session=st.just("00"),
    peer=st.sampled_from(NAMES),
    pin=st.sampled_from(["ab" * 32, "00" * 32]),
    egress=st.sampled_from(NAMES),
    tenant=st.sampled_from(NAMES),
    user=st.sampled_from([None, 0, 1001, 1002]),
    vm=st.none() | st.builds(Vm, st.sampled_from(NAMES), st.sampled_from([UUID, "", "x"])),
    guarded=st.booleans(),
)
TIMES = st.sampled_from(
    [datetime(2026, 11, 26, hour, tzinfo=UTC) + timedelta(days=day) for hour in (5, 12, 23) for day in (0, 2)]
)
COUNTS = st.sampled_from([0, 1, 3])
USAGES = st.builds(
    lambda run, begun: Usage(run, dict.fromkeys(NAMES, run), {}, {1001: run, 1002: 0}, dict.fromkeys(NAMES, begun)),
    COUNTS,
    COUNTS,
)


def made(tables: list[Keys]) -> Policy:
    """A policy of these rules, each with a name that stays with it."""
    return policy("".join(rule(f"r{id(keys)}", **keys) for keys in tables))  # type: ignore[arg-type]


def offered(question: Question) -> Question:
    """The same session at its offer."""
    return replace(question, point=Point.OFFER, vm=None)


@given(TABLES, st.tuples(rules("deny"), st.integers(0, 6)), QUESTIONS, TIMES, USAGES)
def test_a_deny_that_is_added_never_allows_more(
    tables: list[Keys], more: tuple[Keys, int], question: Question, now: datetime, usage: Usage
) -> None:
    extra, at = more
    before = decide(made(tables), question, now, usage)
    after = decide(made([*tables[:at], extra, *tables[at:]]), question, now, usage)
    assert before.allowed or not after.allowed
    if after.allowed:
        assert replace(after, reason="") == replace(before, reason="")


@given(TABLES, st.tuples(rules("allow"), st.integers(0, 6)), QUESTIONS, TIMES, USAGES)
def test_an_allow_that_is_taken_away_never_allows_more(
    tables: list[Keys], more: tuple[Keys, int], question: Question, now: datetime, usage: Usage
) -> None:
    extra, at = more
    after = decide(made(tables), question, now, usage)
    before = decide(made([*tables[:at], extra, *tables[at:]]), question, now, usage)
    assert before.allowed or not after.allowed


@given(TABLES, st.randoms(use_true_random=False), QUESTIONS, TIMES, USAGES)
def test_the_order_of_rules_decides_only_which_of_them_is_named(
    tables: list[Keys], random: object, question: Question, now: datetime, usage: Usage
) -> None:
    mixed = list(tables)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert decide(made(tables), question, now, usage).allowed is decide(made(mixed), question, now, usage).allowed
    denies = [keys for keys in mixed if keys["effect"] == "deny"]
    allows = [keys for keys in tables if keys["effect"] == "allow"]
    one, other = (decide(made(text), question, now, usage) for text in (denies + allows, allows + denies))
    assert one == other
    if one.allowed:
        assert one == decide(made(tables), question, now, usage)


@given(TABLES, QUESTIONS, TIMES, USAGES)
def test_nothing_that_was_refused_at_the_offer_is_allowed_later(
    tables: list[Keys], question: Question, now: datetime, usage: Usage
) -> None:
    """For the facts that were known: the machine may turn out to be any, and the hand-over to be guarded."""
    rules_ = made(tables)
    if not question.guarded:
        first = decide(rules_, offered(question), now, usage)
        for guarded in (False, True):
            later = decide(rules_, replace(question, guarded=guarded), now, usage)
            assert first.allowed or not later.allowed
    second = decide(rules_, replace(question, point=Point.IDENTITY), now, usage)
    third = decide(rules_, replace(question, point=Point.HANDOVER), now, usage)
    assert second == third


@given(TABLES, QUESTIONS, TIMES, USAGES, st.sampled_from(["user", "vm", "both"]))
def test_whoever_hides_a_fact_gains_nothing(
    tables: list[Keys], question: Question, now: datetime, usage: Usage, hidden: str
) -> None:
    rules_ = made(tables)
    asked = replace(question, point=Point.IDENTITY)
    less = replace(asked, user=None if hidden != "vm" else asked.user, vm=None if hidden != "user" else asked.vm)
    assert decide(rules_, asked, now, usage).allowed or not decide(rules_, less, now, usage).allowed


@given(TABLES, QUESTIONS, TIMES, USAGES)
def test_every_decision_is_explained(tables: list[Keys], question: Question, now: datetime, usage: Usage) -> None:
    rules_ = made(tables)
    decision = decide(rules_, question, now, usage)
    assert decision.rule in {DEFAULT_RULE, *(each.name for each in rules_.rules)}
    assert decision.rule == DEFAULT_RULE or decision.rule in decision.reason
    stands = matches(rules_, question, now, usage)
    assert [each for each, _ in stands] == list(rules_.rules)
    assert all(match.why for _, match in stands)
    assert _by(stands) == (decision.allowed, decision.rule)
    told = explain(rules_, question, now, usage)
    assert (told.allowed, told.rule, told.reason) == (decision.allowed, decision.rule, decision.reason)
    assert [each.rule for each in told.rules if each.decided] == [decision.rule] * (decision.rule != DEFAULT_RULE)


def _by(stands: tuple[tuple[object, object], ...]) -> tuple[bool, str]:
    """The decision as the contract's words have it, made anew from how the rules stand."""
    for each, match in stands:
        if not each.allows and match.hold is Hold.YES:  # type: ignore[attr-defined]
            return False, each.name  # type: ignore[attr-defined]
    for each, match in stands:
        if each.allows and match.hold is not Hold.NO:  # type: ignore[attr-defined]
            return True, each.name  # type: ignore[attr-defined]
    return False, DEFAULT_RULE


@settings(max_examples=120)
@given(st.lists(st.sampled_from(["allow", "deny"]).flatmap(rules), min_size=2, max_size=3), QUESTIONS, TIMES, USAGES)
def test_a_rule_that_is_said_never_to_decide_never_does(
    tables: list[Keys], question: Question, now: datetime, usage: Usage
) -> None:
    rules_ = made(tables)
    idle = {
        each.rule
        for each in warnings(rules_, now)
        if "never decides" in each.words or "it allows nothing" in each.words
    }
    user = None if question.role is Role.DESTINATION else question.user  # of what arrives it is never told
    decision = decide(rules_, replace(question, point=Point.IDENTITY, user=user), now, usage)
    assert decision.rule not in idle

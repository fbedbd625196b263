"""A policy in words: how each of its rules stands to a question, and which of them can never decide. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from korora.policy.decide import decide, matches
from korora.policy.file import Policy
from korora.policy.ledger import Usage
from korora.policy.names import Glob
from korora.policy.rules import OBLIGATIONS, Rule
from proxy.authority import ATTESTED, Question


@dataclass(frozen=True, slots=True)
class RuleStands:
    """How one rule stands to a question.

    Attributes:
        rule, effect: of the file.
        holds: a ``Hold`` in words.
        why: what did not hold, or all that did.
        decided: whether it is the one.
    """

    rule: str
    effect: str
    holds: str
    why: str
    decided: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """An answer, and how each rule stands to the question. See ``Decision``."""

    allowed: bool
    rule: str
    reason: str
    provisional: bool
    rate_limit: int | None
    approvals: int
    approvers: tuple[int, ...]
    policy: str
    rules: tuple[RuleStands, ...]


def explain(policy: Policy, question: Question, now: datetime, usage: Usage) -> Explanation:
    """Answer a question as ``decide`` does, and say why."""
    decision = decide(policy, question, now, usage)
    wanted = decision.approvals
    return Explanation(
        decision.allowed,
        decision.rule,
        decision.reason,
        decision.provisional,
        decision.rate_limit,
        0 if wanted is None else wanted.count,
        () if wanted is None else wanted.users,
        policy.digest,
        tuple(
            RuleStands(rule.name, rule.table.effect, match.hold.value, match.why, rule.name == decision.rule)
            for rule, match in matches(policy, question, now, usage)
        ),
    )


# ---------------------------------------------------------------- rules that do not do what they seem to


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that a policy may say, and hardly anybody means.

    Attributes:
        number: of the rule in the file, from 0; None for the whole file.
        rule: its name.
        words: what is odd, and what to do about it.
    """

    number: int | None
    rule: str
    words: str


def warnings(policy: Policy, now: datetime) -> tuple[Warned, ...]:
    """All that is odd about a policy, in the file's order."""
    found = [Warned(None, "", words) for words in _of_the_file(policy)]
    for rule in policy.rules:
        found += [Warned(rule.number, rule.name, words) for words in (*_alone(rule, now), *_among(rule, policy))]
    return tuple(found)


def _of_the_file(policy: Policy) -> Iterator[str]:
    if not any(rule.allows for rule in policy.rules):
        yield "no rule allows anything: all migrations are refused"


def _alone(rule: Rule, now: datetime) -> Iterator[str]:
    table = rule.table
    if rule.allows and rule.peers is None and rule.pins is None:
        yield "it allows it to any host that has a certificate of the CA: name hosts by peer or pin"
    if rule.allows and table.requires_scans:
        yield "nothing on this host scans yet: it allows nothing"
    if rule.allows and set(table.requires_attestation or ()) - {ATTESTED}:
        yield f"nobody attests but by {ATTESTED!r}: it allows nothing"
    if rule.not_after is not None and rule.not_after <= now:
        yield "its not_after is past: it never holds again"
    if rule.users is not None or table.max_running_per_user is not None:
        if rule.allows and table.direction == "in":
            yield "of what arrives no user is told: it allows nothing"
        if not rule.allows and table.direction != "out":
            yield 'of what arrives no user is told, so it denies all of that, too: add direction = "out"'
    if rule.approvals is not None:
        users = len(rule.approvals.users)
        if users < rule.approvals.count:
            yield f"{rule.approvals.count} have to approve, and {users} may: it never comes to that"
        elif users == rule.approvals.count:
            yield "all of its approvers have to approve, so whatever one of them begins is refused: name one more"


def _among(rule: Rule, policy: Policy) -> Iterator[str]:
    before = policy.rules[: rule.number]
    if rule.allows:
        shadow = next((each for each in policy.rules if not each.allows and _covers(each, rule)), None)
        if shadow is not None:
            yield f"the rule {shadow.name} denies all of it: it allows nothing"
            return
    shadow = next((each for each in before if each.allows == rule.allows and _covers(each, rule)), None)
    if shadow is not None:
        yield f"the rule {shadow.name} before it holds for all of that: it never decides"
    wanted = policy.certification.approvals
    if rule.allows and (0 if rule.approvals is None else rule.approvals.count) < wanted:
        yield f"certification.approvals wants {wanted} before a commit: what it allows is refused at the hand-over"


_LIMITS: Final = tuple(key for key in OBLIGATIONS if key.startswith(("requires_", "max_", "sessions_")))
_GLOBS: Final = ("peers", "vms", "uuids", "tenants", "egresses")


def _covers(wide: Rule, narrow: Rule) -> bool:
    """Whether ``wide`` is sure to hold wherever ``narrow`` does; where that is hard to tell, False."""
    if any(getattr(wide.table, key) is not None for key in _LIMITS):
        return False
    for key in _GLOBS:
        if not _globs_cover(getattr(wide, key), getattr(narrow, key)):
            return False
    for few, many in ((wide.pins, narrow.pins), (wide.users, narrow.users)):
        if few is not None and (many is None or not many <= few):
            return False
    if wide.window is not None and wide.window != narrow.window:
        return False
    for key in ("direction", "guarded"):
        if getattr(wide.table, key) not in {None, getattr(narrow.table, key)}:
            return False
    begins = wide.not_before is None or (narrow.not_before is not None and narrow.not_before >= wide.not_before)
    ends = wide.not_after is None or (narrow.not_after is not None and narrow.not_after <= wide.not_after)
    return begins and ends


def _globs_cover(wide: tuple[Glob, ...] | None, narrow: tuple[Glob, ...] | None) -> bool:
    if wide is None:
        return True
    return narrow is not None and all(any(_glob_covers(one, other) for one in wide) for other in narrow)


def _glob_covers(wide: Glob, narrow: Glob) -> bool:
    literal = not set(narrow.text) & set("*?[")
    return wide == narrow or wide.text == "*" or (literal and wide.matches(narrow.text))

"""What a policy says to a question. Pure: the same policy, question, time and usage give the same answer.

A rule's keys must all hold; of a key's values, one. A deny that holds refuses, whatever else the file says; else the
first allow in the file's order that holds decides; else nobody has allowed it, and that refuses.

What a key asks for may not be known. What is not known *yet* (the machine, at the offer) makes an allow possible, and a
deny wait: the same question comes again once it is known. What will *never* be told (the machine of a stream that does
not name it, the user behind a TCP connection) makes a deny hold and an allow not: whoever hides a fact gains nothing.

So nothing that was refused is allowed at a later point for the same facts; and a rule that denies, added, or one that
allows, taken away, never allows anything more. Limits on numbers are keys like others: an allow whose limit is reached
does not hold, and the next one is asked.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, unique
from typing import Final

from korora.policy.file import Policy
from korora.policy.ledger import Usage
from korora.policy.names import Glob, spelled, telling
from korora.policy.rules import Approvals, Rule
from proxy.authority import Point, Question
from proxy.session import Role

NO_POLICY_RULE: Final = "no policy"  # the names of rules have no spaces, so that none is called like these
DEFAULT_RULE: Final = "default deny"
_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


@unique
class Hold(Enum):
    """How a key, or a rule, stands to a question."""

    YES = "holds"
    NO = "does not hold"
    LATER = "is not known yet"
    NEVER = "is not told"


@dataclass(frozen=True, slots=True)
class Match:
    """How a rule stands to a question, and why.

    Attributes:
        hold: YES, NO or LATER.
        why: what did not hold, or is not known yet; for YES, what held. For this host's operators: it shows the rules.
        lacking: what was not proved, or nothing on this host can say yet, if that alone is amiss.
    """

    hold: Hold
    why: str
    lacking: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """An answer.

    Attributes:
        allowed: whether the session may go on.
        rule: the name of the rule that decided; ``NO_POLICY_RULE`` or ``DEFAULT_RULE`` where none did.
        reason: for the logs of both hosts: it tells the rule's name and nothing of its keys.
        rate_limit: bytes a second that the session may send at most; None for no limit of the rule's own.
        approvals: who has to agree, from the identity on; None for nobody.
        provisional: whether another rule may yet decide, when more is known: then none of the two above count yet.
    """

    allowed: bool
    rule: str
    reason: str
    rate_limit: int | None = None
    approvals: Approvals | None = None
    provisional: bool = False


def decide(policy: Policy, question: Question, now: datetime, usage: Usage) -> Decision:
    """Answer a question.

    Args:
        policy: that counts.
        question: at whatever point.
        now: with its zone.
        usage: as far as that session is concerned (``Ledger.usage``).
    """
    if not policy.configured:
        return Decision(True, NO_POLICY_RULE, "no policy is configured")
    asked = _Asked(policy, question, now, usage)
    for rule in policy.rules:
        if not rule.allows and asked.match(rule).hold is Hold.YES:
            return Decision(False, rule.name, f"the rule {rule.name} denies it")
    lacking = ""
    for rule in policy.rules:
        if not rule.allows:
            continue
        match = asked.match(rule)
        if match.hold in {Hold.YES, Hold.LATER}:
            provisional = match.hold is Hold.LATER
            words = f"the rule {rule.name} " + ("may allow it once more is known" if provisional else "allows it")
            if provisional:
                return Decision(True, rule.name, words, provisional=True)
            approvals = None if question.point is Point.OFFER else rule.approvals
            return Decision(True, rule.name, words, rule.rate_limit, approvals)
        if match.lacking and not lacking:
            lacking = f"; the rule {rule.name} would, but wants {match.lacking}"
    return Decision(False, DEFAULT_RULE, f"no rule allows it{lacking}")


def matches(policy: Policy, question: Question, now: datetime, usage: Usage) -> tuple[tuple[Rule, Match], ...]:
    """How each rule stands to a question, in the file's order. See ``decide``, which goes by the same."""
    asked = _Asked(policy, question, now, usage)
    return tuple((rule, asked.match(rule)) for rule in policy.rules)


_Key = tuple[str, Hold, str]
"""A key's name, how it stands, and the fact it was held against, in words."""


class _Asked:
    """One question, its facts made ready."""

    def __init__(self, policy: Policy, question: Question, now: datetime, usage: Usage) -> None:
        self._question, self._now, self._usage = question, now, usage
        vm = question.vm
        self._vm = vm.name if vm is not None and telling(vm.name, unicode=policy.unicode_names) else None
        self._uuid = vm.uuid if vm is not None and _UUID.fullmatch(vm.uuid) else None
        # A source that comes back may have been lost before its stream told; the hand-over asks in any case.
        self._early = question.point is Point.OFFER or (question.point is Point.RESUME and vm is None)

    def match(self, rule: Rule) -> Match:
        """How a rule stands."""
        later: list[str] = []
        held: list[str] = []
        for name, hold, fact in self._keys(rule):
            counts = hold
            if hold is Hold.NEVER:
                counts = Hold.NO if rule.allows else Hold.YES
            if counts is Hold.NO:
                return Match(Hold.NO, f"{name}: {fact}")
            (later if counts is Hold.LATER else held).append(f"{name}: {fact}")
        lacking = self._lacking(rule)
        if lacking:
            return Match(Hold.NO, lacking, "" if later else lacking)
        if later:
            return Match(Hold.LATER, "; ".join(later))
        return Match(Hold.YES, "; ".join(held) or "it asks for nothing")

    def _keys(self, rule: Rule) -> Iterator[_Key]:
        """Each key that the rule has, in the order of the file's reference."""
        asked = self._question
        yield from self._named("peer", rule.peers, asked.peer)
        if rule.pins is not None:
            yield "pin", _yes(asked.pin.lower() in rule.pins), asked.pin[:16] or "none"
        if rule.users is not None:
            known = asked.user is not None
            yield (
                "user",
                _yes(asked.user in rule.users) if known else Hold.NEVER,
                str(asked.user) if known else "not told",
            )
        yield from self._told("vm", rule.vms, self._vm)
        yield from self._told("uuid", rule.uuids, self._uuid)
        yield from self._named("tenant", rule.tenants, asked.tenant)
        if rule.table.direction is not None:
            direction = "out" if asked.role is Role.SOURCE else "in"
            yield "direction", _yes(direction == rule.table.direction), direction
        yield from self._named("egress", rule.egresses, asked.egress)
        yield from self._times(rule)
        if rule.table.guarded is not None:
            yield self._guarded(wanted=rule.table.guarded)
        yield from self._limits(rule)

    def _named(self, key: str, globs: tuple[Glob, ...] | None, name: str) -> Iterator[_Key]:
        if globs is not None:
            yield key, _yes(any(glob.matches(name) for glob in globs)), spelled(name) or "none"

    def _told(self, key: str, globs: tuple[Glob, ...] | None, name: str | None) -> Iterator[_Key]:
        if globs is None:
            return
        if self._early and self._question.vm is None:
            yield key, Hold.LATER, "not known yet"
        elif name is None:
            yield key, Hold.NEVER, "not told by its stream"
        else:
            yield from self._named(key, globs, name)

    def _times(self, rule: Rule) -> Iterator[_Key]:
        if rule.window is not None:
            local = self._now.astimezone(rule.window.zone)
            key = "hours" if rule.window.hours else "days"
            yield key, _yes(rule.window.holds(self._now)), f"{local:%a %H:%M} {rule.table.timezone}"
        words = f"it is {self._now.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        if rule.not_before is not None:
            yield "not_before", _yes(self._now >= rule.not_before), words
        if rule.not_after is not None:
            yield "not_after", _yes(self._now < rule.not_after), words

    def _guarded(self, *, wanted: bool) -> _Key:
        """At the offer the peer has not said yet whether it guards, too."""
        guarded = self._question.guarded
        hold = Hold.LATER if self._question.point is Point.OFFER and not guarded else _yes(guarded == wanted)
        return "guarded", hold, "yes" if guarded else "no"

    def _limits(self, rule: Rule) -> Iterator[_Key]:
        table, asked, usage = rule.table, self._question, self._usage
        counts: tuple[tuple[str, int | None, Callable[[], int], str], ...] = (
            ("max_running", table.max_running, lambda: usage.running, "run"),
            ("max_running_per_peer", table.max_running_per_peer, lambda: usage.peers.get(asked.peer, 0), "run"),
            ("max_running_per_tenant", table.max_running_per_tenant, lambda: usage.tenants.get(asked.tenant, 0), "run"),
            ("sessions_per_hour", table.sessions_per_hour, lambda: usage.started.get(asked.peer, 0), "have begun"),
        )
        for key, most, count, verb in counts:
            if most is not None:
                yield key, _yes(count() < most), f"{count()} of {most} {verb}"
        most = table.max_running_per_user
        if most is not None:
            known = 0 if asked.user is None else usage.users.get(asked.user, 0)
            hold = Hold.NEVER if asked.user is None else _yes(known < most)
            yield "max_running_per_user", hold, "user not told" if asked.user is None else f"{known} of {most} run"

    def _lacking(self, rule: Rule) -> str:
        """What the peer has not proved, and what agents have to say that are not there yet."""
        proved = self._question.attested.partition(" ")[0]
        wanted = [
            *(
                f"the attestation {name}, which the peer has not proved"
                for name in rule.table.requires_attestation or ()
                if name != proved
            ),
            *(f"the scan {name}, which nothing here can say yet" for name in rule.table.requires_scans or ()),
        ]
        return " and ".join(wanted)


def _yes(held: bool) -> Hold:
    return Hold.YES if held else Hold.NO

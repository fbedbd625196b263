"""Who decides: a deny before any allow, the first allow of the file, and nobody is a no. What is hidden never helps."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from korora.policy.decide import DEFAULT_RULE, NO_POLICY_RULE, decide, matches
from korora.policy.file import NO_POLICY
from korora.policy.ledger import Usage
from proxy.authority import Point, Question
from proxy.hypervisors.base import Vm
from proxy.session import Role
from tests.korora.policy.support import ASKED, NOW, UUID, ask, policy, rule, told

ALL = rule("all", "allow")
LATER = [Point.IDENTITY, Point.HANDOVER]


def answer(text: str, question: Question = ASKED, **more: object) -> tuple[bool, str]:
    decision = ask(text, question, **more)  # type: ignore[arg-type]
    assert decision.reason
    return decision.allowed, decision.rule


def test_without_a_file_an_authenticated_peer_is_allowed() -> None:
    decision = decide(NO_POLICY, ASKED, NOW, Usage())
    assert (decision.allowed, decision.rule) == (True, NO_POLICY_RULE)


def test_an_empty_file_allows_nobody() -> None:
    assert answer("") == (False, DEFAULT_RULE)
    assert ask("").reason == "no rule allows it"


def test_the_first_allow_names_the_rule_and_any_deny_goes_before() -> None:
    one, two = rule("one", "allow", peer=["beta"]), rule("two", "allow")
    assert answer(one + two) == (True, "one")
    assert answer(two + one) == (True, "two")
    deny = rule("no", "deny", peer=["beta"])
    for text in (one + deny, deny + one):
        assert answer(text) == (False, "no")
    assert answer(one + rule("no", "deny", peer=["gamma"])) == (True, "one")


@pytest.mark.parametrize(
    ("keys", "good", "bad"),
    [
        ({"peer": ["be*", "x"]}, {}, {"peer": "gamma"}),
        ({"pin": ["sha256:" + "AB" * 32]}, {}, {"pin": "cd" * 32}),
        ({"user": ["ann", 1005]}, {"user": 1005}, {"user": 1002}),
        ({"tenant": ["blue"]}, {}, {"tenant": ""}),
        ({"tenant": ["?*"]}, {}, {"tenant": ""}),
        ({"direction": "out"}, {}, {"role": Role.DESTINATION}),
        ({"direction": "in"}, {"role": Role.DESTINATION}, {"role": Role.SOURCE}),
        ({"egress": ["def*"]}, {}, {"egress": "other"}),
        ({"guarded": True}, {"guarded": True, "point": Point.HANDOVER}, {"guarded": False, "point": Point.HANDOVER}),
        ({"vm": ["web-*"]}, {"vm": Vm("web-1", UUID)}, {"vm": Vm("db-1", UUID)}),
        ({"uuid": ["4F1B*"]}, {"vm": Vm("web-1", UUID)}, {"vm": Vm("web-1", "00000000" + UUID[8:])}),
        ({"uuid": [UUID]}, {"vm": Vm("", UUID)}, {"vm": Vm("web-1", UUID[:-1] + "0")}),
    ],
)
def test_each_key(keys: dict[str, object], good: dict[str, object], bad: dict[str, object]) -> None:
    text = rule("it", "allow", **keys)
    base = replace(ASKED, point=Point.IDENTITY, vm=Vm("x", UUID)) if "vm" in bad else ASKED
    assert answer(text, replace(base, **good)) == (True, "it")  # type: ignore[arg-type]
    assert answer(text, replace(base, **bad)) == (False, DEFAULT_RULE)  # type: ignore[arg-type]
    if "guarded" not in keys:
        deny = ALL + rule("no", "deny", **keys)
        assert answer(deny, replace(base, **good)) == (False, "no")  # type: ignore[arg-type]
        assert answer(deny, replace(base, **bad)) == (True, "all")  # type: ignore[arg-type]


def test_all_keys_of_a_rule_must_hold() -> None:
    text = rule("it", "allow", peer=["beta"], tenant=["blue"], vm=["web-*"])
    assert answer(text, told()) == (True, "it")
    for changes in ({"peer": "x"}, {"tenant": "x"}):
        assert answer(text, told(**changes)) == (False, DEFAULT_RULE)  # type: ignore[arg-type]
    assert answer(text, told("db-1")) == (False, DEFAULT_RULE)


# ---------------------------------------------------------------- what is not known


def test_at_the_offer_an_allow_that_asks_for_the_machine_is_possible_and_a_deny_waits() -> None:
    text = rule("web", "allow", vm=["web-*"]) + rule("no", "deny", vm=["web-13"])
    decision = ask(text)
    assert (decision.allowed, decision.rule, decision.provisional) == (True, "web", True)
    assert "may allow it" in decision.reason
    assert answer(text, told("web-1")) == (True, "web")
    assert answer(text, told("web-13")) == (False, "no")
    assert answer(text, told("db-1")) == (False, DEFAULT_RULE)


def test_what_is_known_already_at_the_offer_decides_there() -> None:
    assert answer(rule("web", "allow", peer=["gamma"], vm=["web-*"])) == (False, DEFAULT_RULE)


@pytest.mark.parametrize("point", LATER)
@pytest.mark.parametrize("vm", [None, Vm("", ""), Vm("web-1\n", "no uuid"), Vm("web-1\u200b", UUID.upper())])
def test_a_machine_that_is_not_told_is_denied_by_whatever_asks_for_it(point: Point, vm: Vm | None) -> None:
    question = replace(ASKED, point=point, vm=vm)
    for key, pattern in (("vm", "web-*"), ("vm", "*"), ("uuid", "*")):
        assert answer(rule("it", "allow", **{key: [pattern]}), question) == (False, DEFAULT_RULE)
        assert answer(ALL + rule("no", "deny", **{key: ["zzz" if key == "vm" else "dead*"]}), question) == (False, "no")
    assert answer(ALL, question) == (True, "all")


def test_a_source_that_comes_back_before_its_stream_told_is_not_turned_away() -> None:
    text = rule("web", "allow", vm=["web-*"]) + rule("no", "deny", vm=["web-13"])
    assert answer(text, replace(ASKED, point=Point.RESUME)) == (True, "web")
    assert answer(text, told("web-13", point=Point.RESUME)) == (False, "no")


def test_a_user_who_is_not_told_is_denied_by_whatever_asks_for_him() -> None:
    question = replace(ASKED, user=None)
    assert answer(rule("it", "allow", user=["ann"]), question) == (False, DEFAULT_RULE)
    assert answer(ALL + rule("no", "deny", user=["ben"]), question) == (False, "no")


def test_at_the_offer_nobody_knows_whether_the_peer_guards() -> None:
    text = rule("it", "allow", guarded=True)
    assert answer(text, ASKED) == (True, "it")
    assert answer(text, told()) == (False, DEFAULT_RULE)
    assert answer(text, told(guarded=True)) == (True, "it")
    deny = ALL + rule("no", "deny", guarded=False)
    assert answer(deny, ASKED) == (True, "all")
    assert answer(deny, told()) == (False, "no")
    assert answer(deny, told(guarded=True)) == (True, "all")


WANTS = (
    "no rule allows it; the rule it would, but wants the attestation vtpm-quote, which the peer has not proved and the "
    "scan clamav, which nothing here can say yet"
)


def test_facts_that_no_agent_gives_yet_refuse_and_say_so() -> None:
    text = rule("it", "allow", requires_attestation=["vtpm-quote"], requires_scans=["clamav"])
    decision = ask(text)
    assert (decision.allowed, decision.rule) == (False, DEFAULT_RULE)
    assert decision.reason == WANTS
    assert ask(rule("it", "allow", peer=["x"], requires_scans=["clamav"])).reason == "no rule allows it"


@pytest.mark.parametrize(
    ("attested", "allowed"),
    [("tpm2 ak 000b pcrs sha256:0", True), ("", False), ("tpm2x", False), ("none tpm2", False)],
)
def test_what_the_peer_has_proved(attested: str, allowed: bool) -> None:
    text = rule("it", "allow", requires_attestation=["tpm2"])
    assert answer(text, replace(told(), attested=attested))[0] is allowed


# ---------------------------------------------------------------- hostile names


@pytest.mark.parametrize("name", ["web-1", "WEB-1", " web-1", "web-1 ", "web-1/", "web-[1]", "web-?"])
def test_only_the_very_name_is_that_name(name: str) -> None:
    assert answer(rule("it", "allow", vm=["web-1"]), told(name))[0] is (name == "web-1")


@pytest.mark.parametrize("name", ["*", "?????", "[!x]*", "web-*", "*'", "\\*"])
def test_a_machine_named_like_a_pattern_gains_nothing(name: str) -> None:
    assert answer(rule("it", "allow", vm=["web-1", "db-?"]), told(name)) == (False, DEFAULT_RULE)


@pytest.mark.parametrize(
    "name", ["pr\u043ed-1", "prod\u200b-1", "prod-1\n", "pro\u0064\u0307-1", "\u202eprod-1", "ｐrod-1"]
)
def test_a_name_that_looks_like_one_that_is_denied_is_denied(name: str) -> None:
    """The deny that asks for a name holds where the name is none; so an attacker cannot dodge it by a homoglyph."""
    text = ALL + rule("no", "deny", vm=["prod-*"])
    assert answer(text, told(name)) == (False, "no")
    assert answer(rule("it", "allow", vm=["prod-*", "*"]), told(name)) == (False, DEFAULT_RULE)


def test_names_beyond_ascii_where_the_operator_wants_them() -> None:
    text = "unicode_names = true\n" + rule("it", "allow", vm=["caf\u00e9-*"])
    assert answer(text, told("caf\u00e9-1")) == (True, "it")
    assert answer(text, told("cafe\u0301-1")) == (False, DEFAULT_RULE)  # looks the same, and is not
    assert answer(text, told("cafe-1")) == (False, DEFAULT_RULE)


def test_no_reason_tells_a_peer_what_the_rules_ask_for() -> None:
    text = rule("it", "allow", peer=["secret-host"], vm=["secret-*"]) + rule("no", "deny", peer=["beta"])
    for question in (ASKED, told(), replace(ASKED, peer="x")):
        assert "secret" not in ask(text, question).reason
    assert "\n" not in ask(rule("it", "allow"), told("x\ny")).reason


# ---------------------------------------------------------------- times and numbers


@pytest.mark.parametrize(
    ("keys", "at", "holds"),
    [
        ({"hours": ["08:00-18:00"]}, "2026-11-26T08:00Z", True),
        ({"hours": ["08:00-18:00"]}, "2026-11-26T18:00Z", False),
        ({"hours": ["08:00-18:00"]}, "2026-11-26T07:59:59Z", False),
        ({"hours": ["22:00-06:00"], "days": ["fri"]}, "2026-11-27T23:00Z", True),
        ({"hours": ["22:00-06:00"], "days": ["fri"]}, "2026-11-28T05:59Z", True),  # the night of Friday
        ({"hours": ["22:00-06:00"], "days": ["fri"]}, "2026-11-27T05:59Z", False),  # the night of Thursday
        ({"hours": ["22:00-06:00"], "days": ["fri"]}, "2026-11-28T23:00Z", False),
        ({"hours": ["20:00-24:00"]}, "2026-11-26T23:59Z", True),
        ({"days": ["sat-mon"]}, "2026-11-29T12:00Z", True),
        ({"days": ["sat-mon"]}, "2026-12-01T12:00Z", False),
        ({"days": ["mon", "thu"]}, "2026-11-26T12:00Z", True),
        ({"hours": ["08:00-18:00"], "timezone": "Pacific/Auckland"}, "2026-11-25T20:00Z", True),  # 09:00 there
        ({"hours": ["08:00-18:00"], "timezone": "Pacific/Auckland"}, "2026-11-26T08:00Z", False),
        ({"hours": ["01:00-03:00"], "timezone": "Europe/Berlin"}, "2026-10-25T00:30Z", True),  # 02:30, the first time
        ({"hours": ["01:00-03:00"], "timezone": "Europe/Berlin"}, "2026-10-25T01:30Z", True),  # 02:30 again
        ({"hours": ["01:00-03:00"], "timezone": "Europe/Berlin"}, "2026-10-25T02:30Z", False),
    ],
)
def test_hours_and_days(keys: dict[str, object], at: str, holds: bool) -> None:
    now = datetime.fromisoformat(at)
    assert answer(rule("it", "allow", **keys), now=now)[0] is holds
    assert answer(ALL + rule("no", "deny", **keys), now=now)[0] is not holds


def test_from_and_until() -> None:
    begin, end = datetime(2026, 12, 20, tzinfo=UTC), datetime(2027, 1, 4, tzinfo=UTC)
    text = ALL + rule("freeze", "deny", not_before=begin, not_after=end)
    second = timedelta(seconds=1)
    for now, allowed in ((begin - second, True), (begin, False), (end - second, False), (end, True)):
        assert answer(text, now=now)[0] is allowed
    local = (
        rule("it", "allow", timezone="Pacific/Auckland") + "not_after = 2026-11-26T12:00:00\n"
    )  # 23:00 UTC of the 25th
    assert not answer(local)[0]
    assert answer(local, now=NOW - timedelta(hours=14))[0]


def test_numbers() -> None:
    usage = Usage(3, {"beta": 2}, {"blue": 3}, {1001: 1}, {"beta": 5})
    for key, most in (
        ("max_running", 3),
        ("max_running_per_peer", 2),
        ("max_running_per_tenant", 3),
        ("max_running_per_user", 1),
        ("sessions_per_hour", 5),
    ):
        assert answer(rule("it", "allow", **{key: most}), usage=usage) == (False, DEFAULT_RULE)
        assert answer(rule("it", "allow", **{key: most + 1}), usage=usage) == (True, "it")
        assert answer(rule("it", "allow", **{key: most}) + rule("more", "allow"), usage=usage) == (True, "more")
    assert answer(rule("it", "allow", max_running_per_user=9), replace(ASKED, user=None)) == (False, DEFAULT_RULE)


def test_what_an_allow_brings_along() -> None:
    text = rule("it", "allow", rate_limit="1 MiB/s", approvals=2, approvers=["ann", "ben", 1002, 9], approval_timeout=5)
    offer, identity = ask(text), ask(text, told())
    assert (offer.rate_limit, offer.approvals) == (2**20, None)  # nobody can tell yet what there is to approve of
    assert identity.approvals is not None
    assert (identity.approvals.count, identity.approvals.users, identity.approvals.seconds) == (2, (1001, 1002, 9), 5)
    assert ask(rule("it", "allow")).rate_limit is None


def test_every_rule_says_how_it_stands() -> None:
    text = rule("a", "allow", peer=["x"]) + rule("b", "deny", vm=["y"]) + rule("c", "allow", tenant=["blue"]) + ALL
    lines = matches(policy(text), ASKED, NOW, Usage())
    assert [(each.name, match.hold.name, match.why) for each, match in lines] == [
        ("a", "NO", "peer: beta"),
        ("b", "LATER", "vm: not known yet"),
        ("c", "YES", "tenant: blue"),
        ("all", "YES", "it asks for nothing"),
    ]

"""Rules that hardly anybody means are told, and those that people mean are not."""

import pytest

from korora.policy.explain import warnings
from tests.korora.policy.support import NOW, UUID, policy, rule

CERTIFIED = """[certification]
by = "security-office"
approvals = 1
[[triple]]
subject = "relay"
procedure = ["commit"]
items = ["memory"]
"""


def told(text: str) -> list[tuple[str, str]]:
    return [(each.rule, each.words) for each in warnings(policy(text), NOW)]


def allow(name: str = "it", **keys: object) -> str:
    return rule(name, "allow", **({"peer": ["beta"]} | keys))  # type: ignore[arg-type]


def deny(name: str = "no", **keys: object) -> str:
    return rule(name, "deny", **keys)


@pytest.mark.parametrize(
    "text",
    [
        allow() + allow("other", peer=["gamma"]),
        allow(vm=["web-*"]) + allow("rest"),
        allow(max_running=1) + allow("slow", rate_limit=2048),
        deny(vm=["web-13"]) + allow(vm=["web-*"]),
        deny(hours=["22:00-06:00"]) + allow(hours=["08:00-18:00"]),
        deny(direction="out", user=["ann"]) + allow(),
        allow(approvals=2, approvers=["ann", "ben", "cid"]),
        deny(uuid=["4f1b*"]) + allow(uuid=["4f*"]),
        deny(guarded=False) + allow(),
        CERTIFIED + allow(approvals=1, approvers=["ann", "ben"]),
        rule("pinned", "allow", pin=["ab" * 32]),
    ],
)
def test_of_these_nothing_is_said(text: str) -> None:
    assert told(text) == []


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("", "", "no rule allows anything"),
        (deny(vm=["x"]), "", "no rule allows anything"),
        (rule("it", "allow"), "it", "any host that has a certificate"),
        (allow(requires_scans=["clamav"]), "it", "nothing on this host scans yet"),
        (allow(requires_attestation=["sgx"]), "it", "nobody attests but by 'tpm2'"),
        (allow(not_after=NOW), "it", "its not_after is past"),
        (allow(user=["ann"], direction="in"), "it", "of what arrives no user is told: it allows nothing"),
        (allow(max_running_per_user=1, direction="in"), "it", "of what arrives no user is told: it allows nothing"),
        (allow() + deny(user=["ann"]), "no", "it denies all of that, too"),
        (allow(approvals=2, approvers=["ann", 1001]), "it", "2 have to approve, and 1 may"),
        (allow(approvals=2, approvers=["ann", "ben"]), "it", "name one more"),
        (deny() + allow(), "it", "the rule no denies all of it: it allows nothing"),
        (allow(vm=["web-1"]) + deny(vm=["web-?", "db-*"]), "it", "the rule no denies all of it"),
        (allow(uuid=[UUID]) + deny(uuid=["4f1b*"]), "it", "the rule no denies all of it"),
        (
            allow() + allow("late", vm=["web-1"]),
            "late",
            "the rule it before it holds for all of that: it never decides",
        ),
        (allow() + allow("late", max_running=2), "late", "it never decides"),
        (allow() + deny("a", vm=["*"]) + deny("b", vm=["x"]), "b", "the rule a before it holds for all of that"),
        (allow(days=["mon"]) + allow("late", days=["mon"], tenant=["blue"]), "late", "it never decides"),
        (allow(not_before=NOW) + allow("late", not_before=NOW.replace(year=2027)), "late", "it never decides"),
        (CERTIFIED + allow(), "it", "certification.approvals wants 1 before a commit"),
    ],
)
def test_of_these_it_is_said(text: str, name: str, words: str) -> None:
    assert [(rule, said) for rule, said in told(text) if rule == name and words in said], told(text)
    assert len(told(text)) == 1

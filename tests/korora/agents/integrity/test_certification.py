"""What the policy's file says of certification: taken as written, or refused with file, key and what is expected."""

import tomllib

import pytest

from korora.agents.integrity.certification import TRIPLES_MAX, Certification, parse
from korora.agents.integrity.items import Item
from korora.agents.integrity.procedures import USES, Procedure
from proxy.errors import ConfigurationError

HEAD = '[certification]\nby = "security-office"\n'
TRIPLE = '[[triple]]\nsubject = "host:alpha"\nprocedure = ["offer", "transfer"]\nitems = ["offer", "stream"]\n'


def read(text: str) -> Certification:
    return parse(tomllib.loads(text), "policy.toml")


def test_it_is_read() -> None:
    found = read('[certification]\nby = "office"\napprovals = 2\napprover_commits = true\n' + TRIPLE)
    assert (found.by, found.approvals, found.approver_commits) == ("office", 2, True)
    (triple,) = found.triples
    assert triple.subject == "host:alpha"
    assert triple.procedures == {Procedure.OFFER, Procedure.TRANSFER}
    assert triple.items == {Item.OFFER, Item.STREAM}
    assert found.permits("host:alpha", Procedure.OFFER, frozenset({Item.OFFER}))
    assert not found.permits("host:alpha", Procedure.COMMIT, frozenset({Item.JOURNAL}))


def test_without_its_tables_it_is_the_default() -> None:
    assert read('[[rule]]\nname = "x"\n') == Certification.default()


def test_the_default_touches_everything_that_procedures_do() -> None:
    for procedure, uses in USES.items():
        for item in uses:
            assert any(
                Certification.default().permits(subject, procedure, frozenset({item}))
                for subject in ("relay", "host:x", "uid:1")
            ), (procedure, item)


WRONG = {
    "no head": (TRIPLE, "policy.toml: certification: missing; expected both"),
    "no triple": (HEAD, "policy.toml: triple: missing; expected both"),
    "empty": (HEAD + "", "triple: missing"),
    "no certifier": ("[certification]\n" + TRIPLE, "policy.toml: certification: .*missing required field `by`"),
    "unknown key": (HEAD + "bye = 1\n" + TRIPLE, "policy.toml: certification: .*`bye`; its keys are by, approvals"),
    "wrong type": ("[certification]\nby = 3\n" + TRIPLE, r"policy.toml: certification.by: Expected `str`, got `int`"),
    "bad certifier": ('[certification]\nby = "a b"\n' + TRIPLE, r"policy.toml: certification.by: Expected"),
    "approvals": (HEAD + "approvals = 17\n" + TRIPLE, r"policy.toml: certification.approvals: Expected `int` <= 16"),
    "triple's key": (HEAD + TRIPLE + "x = 1\n", r"policy.toml: triple\[0\]: .*`x`; its keys are subject, procedure"),
    "no table": ("triple = 3\n" + HEAD, "policy.toml: triple: expected 1 to"),
    "list": ("triple = [3]\n" + HEAD, r"policy.toml: triple\[0\]: Expected `object`, got `int`"),
    "too many": (HEAD + TRIPLE * (TRIPLES_MAX + 1), f"policy.toml: triple: expected 1 to {TRIPLES_MAX} tables"),
    "procedure": (
        HEAD + TRIPLE.replace("transfer", "steal"),
        r"triple\[0\].procedure: expected some of offer, .*, got 'steal'",
    ),
    "item": (
        HEAD + TRIPLE.replace('"stream"', '"soul"'),
        r"triple\[0\].items: expected some of configuration, .*, got 'soul'",
    ),
    "no procedure": (
        HEAD + TRIPLE.replace('"offer", "transfer"', ""),
        r"triple\[0\].procedure: Expected `array` of length >= 1",
    ),
    "nothing to touch": (
        HEAD + TRIPLE.replace('"transfer"', '"commit"'),
        r"triple\[0\].procedure: commit touches none of these",
    ),
    "touched by none": (
        HEAD + TRIPLE.replace('"stream"', '"stream", "vtpm", "disks", "reason"'),
        r"triple\[0\].items: none of these procedures touches reason",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    text, words = WRONG[name]
    with pytest.raises(ConfigurationError, match=words) as caught:
        read(text)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "subject", ["", "*", "host", "host:a*b", "host:*a", "uid:1*", "uid:alice", "relay*", "hos*", "host:a\n", "Relay"]
)
def test_a_subject_is_written_as_one(subject: str) -> None:
    with pytest.raises(ConfigurationError, match=r"triple\[0\].subject: expected relay, host:NAME, uid:NUMBER"):
        parse(
            {
                "certification": {"by": "x"},
                "triple": [{"subject": subject, "procedure": ["offer"], "items": ["offer"]}],
            },
            "f",
        )


@pytest.mark.parametrize(
    ("by", "subject"),
    [
        ("uid:1000", "uid:1000"),
        ("uid:1000", "uid:*"),
        ("host:alpha", "host:al*"),
        ("alpha", "host:alpha"),
        ("1000", "uid:1000"),
        ("relay", "relay"),
    ],
)
def test_who_certifies_does_not_execute(by: str, subject: str) -> None:
    entry = {"subject": subject, "procedure": ["offer"], "items": ["offer"]}
    with pytest.raises(
        ConfigurationError, match=rf"f: triple\[1\].subject: .* is '{by}', who certifies and so may not execute"
    ):
        parse({"certification": {"by": by}, "triple": [{**entry, "subject": "host:zeta"}, entry]}, "f")


def test_who_certifies_may_be_anybody_else() -> None:
    parse(
        {
            "certification": {"by": "uid:1"},
            "triple": [{"subject": "uid:10", "procedure": ["offer"], "items": ["offer"]}],
        },
        "f",
    )

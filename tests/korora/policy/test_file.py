"""A policy that is wrong is refused by file, line, key and what was expected; a reload never loses a good one."""

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from korora.agents.integrity.certification import Certification
from korora.errors import remedy_of
from korora.policy import rules
from korora.policy.file import NO_POLICY, Policy, PolicyFile
from proxy.errors import ConfigurationError
from tests.korora.policy.support import WHERE, policy, rule

TRIPLE = """[certification]
by = "security-office"
[[triple]]
subject = "relay"
procedure = ["commit"]
items = ["memory"]
"""
GOOD = rule("it", "allow", peer=["beta"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rule = 1", ": rule: expected tables in double brackets, at most 1024, got 1"),
        ("x = 1", ": x: no such key; expected one of certification, rule, triple, unicode_names"),
        (
            rule("it", "allow", peers=["x"]),
            ":1: rule[0].peers: no such key; expected one of approval_timeout, approvals,",
        ),
        (GOOD + rule("b c", "allow"), ":5: rule[1].name: expected a name of 1 to 63 letters"),
        (GOOD + rule("it", "deny"), ": rule: 2 rules have the name 'it'"),
        ('[[rule]]\nname = "it"\n', ":1: rule[0].effect: missing; expected one of "),
        (rule("it", "permit"), ":1: rule[0].effect: expected one of"),
        (rule("it", "allow", peer="beta"), ":1: rule[0].peer: expected a list of 1 to 64 strings, got 'beta'"),
        (rule("it", "allow", peer=[]), ":1: rule[0].peer: expected a list of 1 to 64 strings"),
        (rule("it", "allow", peer=["x"] * 65), ":1: rule[0].peer: expected a list of 1 to 64 strings"),
        (rule("it", "allow", peer=["x" * 129]), ":1: rule[0].peer[0]: expected"),
        (rule("it", "allow", peer=["x", "[a"]), ":1: rule[0].peer[1]: '[a': a bracket is not closed"),
        (
            rule("it", "allow", pin=["abc"]),
            ":1: rule[0].pin[0]: expected a SHA-256 of 64 hexadecimal digits, got 'abc'",
        ),
        (rule("it", "allow", user=["dora"]), ":1: rule[0].user[0]: this host has no user 'dora'"),
        (rule("it", "allow", user=[-1]), ":1: rule[0].user[0]: expected"),
        (rule("it", "allow", vm=["caf\u00e9"]), ":1: rule[0].vm[0]: no name that counts as told can match it"),
        (rule("it", "allow", vm=["a\n"]), ":1: rule[0].vm[0]: no name that counts as told can match it"),
        (rule("it", "allow", uuid=["4f1b"]), ":1: rule[0].uuid[0]: '4f1b' is no whole UUID"),
        (rule("it", "allow", uuid=["web*"]), ":1: rule[0].uuid[0]: expected hexadecimal digits and dashes"),
        (rule("it", "allow", hours=["8-18"]), ":1: rule[0].hours: expected \"HH:MM-HH:MM\", got '8-18'"),
        (rule("it", "allow", hours=["08:00-25:00"]), ":1: rule[0].hours: a day ends at 24:00"),
        (rule("it", "allow", hours=["08:00-08:00"]), ":1: rule[0].hours: '08:00-08:00' is either"),
        (rule("it", "allow", days=["monday"]), ':1: rule[0].days: expected a day like "mon"'),
        (
            rule("it", "allow", days=["mon"], timezone="Mars/Base"),
            ":1: rule[0].timezone: this system knows no time zone",
        ),
        (
            rule("it", "allow", days=["mon"], timezone="../passwd"),
            ":1: rule[0].timezone: this system knows no time zone",
        ),
        (rule("it", "allow", timezone="Europe/Berlin"), ":1: rule[0].timezone: the rule names no time in it"),
        (rule("it", "allow", not_after="tomorrow"), ":1: rule[0].not_after: expected a date and time, got 'tomorrow'"),
        (
            rule(
                "it", "allow", not_before=datetime(2027, 1, 1, tzinfo=UTC), not_after=datetime(2026, 1, 1, tzinfo=UTC)
            ),
            ":1: rule[0].not_after: it is not after not_before",
        ),
        (rule("it", "allow", guarded=False), ":1: rule[0].guarded: it would allow only what is not guarded"),
        (rule("it", "deny", guarded=True), ":1: rule[0].guarded: it would refuse what is guarded"),
        (rule("it", "allow", max_running=0), ":1: rule[0].max_running: expected int ≥ 1 and ≤ 4096, got 0"),
        (rule("it", "allow", rate_limit=5), ":1: rule[0].rate_limit: expected an integer of bytes a second"),
        (rule("it", "allow", rate_limit="fast"), ":1: rule[0].rate_limit: 'fast' is no rate"),
        (rule("it", "allow", approvals=2), ":1: rule[0].approvals: approvals and approvers belong together"),
        (rule("it", "allow", approvers=["ann"]), ":1: rule[0].approvals: approvals and approvers belong together"),
        (rule("it", "allow", approvals=9, approvers=["ann"]), ":1: rule[0].approvals: expected int ≥ 1 and ≤ 8, got 9"),
        (rule("it", "deny", approvals=1, approvers=["ann"]), ":1: rule[0].approvals: a rule that denies cannot"),
        (rule("it", "deny", max_running=1), ":1: rule[0].max_running: a rule that denies cannot"),
        (rule("it", "deny", requires_scans=["x"]), ":1: rule[0].requires_scans: a rule that denies cannot"),
        ("certification = 1", ": certification: expected a table, got 1"),
        ("[certification]\nby = 'x'", ": triple: missing; expected both"),
        (TRIPLE.replace("relay", "nobody"), ":3: triple[0].subject: expected relay, host:NAME"),
        ("x = [", ": no TOML: "),
        ("x = " + "[" * 5000, ": no TOML: "),
    ],
)
def test_what_is_wrong_is_said(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        policy(text)
    assert str(caught.value).startswith(WHERE + words), str(caught.value)
    assert remedy_of(caught.value)


def test_a_line_that_is_not_certain_is_not_said() -> None:
    text = 'x = """\n[[rule]]\n"""\n' + rule("it", "allow", guarded=False)
    with pytest.raises(ConfigurationError, match=r"policy.toml: x: no such key"):
        policy(text)
    inline = 'rule = [{name = "it", effect = "allow", guarded = false}]'
    with pytest.raises(ConfigurationError, match=r"policy.toml: rule\[0\].guarded: it would"):
        policy(inline)


@given(st.binary(max_size=200) | st.text("[]=rule\n\"'{}.,x01-:T#", max_size=200).map(str.encode))
def test_no_file_raises_anything_else(content: bytes) -> None:
    with suppress(ConfigurationError):
        Policy.parse(content, WHERE)


def test_too_many_rules() -> None:
    assert len(policy("".join(rule(f"r{n}", "allow") for n in range(rules.RULES_MAX))).rules) == rules.RULES_MAX
    with pytest.raises(ConfigurationError, match="at most 1024"):
        policy("".join(rule(f"r{n}", "allow") for n in range(rules.RULES_MAX + 1)))


# ---------------------------------------------------------------- the file


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "policy.toml"
    file.write_text(GOOD)
    file.chmod(0o644)
    return file


def test_a_good_file_is_taken_by_a_reload_and_a_bad_one_changes_nothing(path: Path) -> None:
    file = PolicyFile(path)
    first = file.current
    assert file.digest == first.digest
    assert len(first.digest) == 64
    path.write_text(GOOD.replace("beta", "gamma"))
    second = file.reload()
    assert second is file.current
    assert second.digest != first.digest
    for spoil in (
        lambda: path.write_text("[[rule"),
        lambda: path.write_text(GOOD + GOOD),
        lambda: path.write_bytes(b"#" * (rules.POLICY_BYTES_MAX + 1)),
        path.unlink,
    ):
        spoil()
        with pytest.raises(ConfigurationError, match=r"policy\.toml"):
            file.reload()
        assert file.current is second


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
def test_a_file_that_others_may_write_is_refused(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match="others than its owner may write it"):
        PolicyFile(path)
    path.chmod(0o644)
    file = PolicyFile(path)
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match="others than its owner may write it"):
        file.reload()


def test_no_file_is_no_policy() -> None:
    file = PolicyFile(None)
    assert file.reload() is file.current is NO_POLICY
    assert (file.digest, file.current.configured) == ("", False)


def test_an_empty_file_is_a_policy(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.touch(0o600)
    assert PolicyFile(path).current.configured


def test_who_certifies_what_is_in_the_same_file() -> None:
    certified = policy(TRIPLE + GOOD).certification
    assert (certified.by, [triple.subject for triple in certified.triples]) == ("security-office", ["relay"])
    assert policy(GOOD).certification == NO_POLICY.certification == Certification.default()


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Is a directory"):
        PolicyFile(tmp_path)

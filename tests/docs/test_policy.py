"""docs/policy.md holds every key of a policy with its default and bounds, and its files and recipes are policies."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from korora.policy import names, rules
from korora.policy.decide import DEFAULT_RULE, NO_POLICY_RULE
from korora.policy.explain import warnings
from korora.policy.file import Policy
from proxy.authority import Point
from tests.korora.policy.support import NOW, USERS

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())
TABLES = {"The top of the file:": rules.PolicyTable, "A `[[rule]]`.": rules.RuleTable}


def rows(heading: str) -> list[list[str]]:
    """The rows of the first table of keys after the line that begins with this."""
    start = PAGE.index("| key | kind | default |", PAGE.index(f"\n{heading}"))
    lines = PAGE[start:].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("heading", TABLES)
def test_every_key_with_its_default(heading: str) -> None:
    fields = {field.encode_name: field for field in msgspec.structs.fields(TABLES[heading])}
    documented = {row[0].strip("`"): row[2] for row in rows(heading)}
    assert sorted(documented) == sorted(fields)
    for name, shown in documented.items():
        assert shown == _default(fields[name].default), name


def test_the_keys_of_a_rule_in_their_order() -> None:
    """As the file's reference, so ``explain`` names them."""
    documented = [row[0].strip("`") for row in rows("A `[[rule]]`.")]
    assert documented == [field.encode_name for field in msgspec.structs.fields(rules.RuleTable)]
    assert set(documented[documented.index("guarded") + 1 :]) == set(rules.OBLIGATIONS)


def _default(value: Any) -> str:
    if value is msgspec.NODEFAULT:
        return "–"
    if value is None:
        return "none"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _parts(kind: msgspec.inspect.Type) -> list[msgspec.inspect.Type]:
    if isinstance(kind, msgspec.inspect.Metadata):
        return _parts(kind.type)
    if isinstance(kind, msgspec.inspect.UnionType):
        return [inner for part in kind.types for inner in _parts(part)]
    return [kind]


def test_every_bound() -> None:
    info = msgspec.inspect.type_info(rules.RuleTable)
    assert isinstance(info, msgspec.inspect.StructType)
    kinds = {row[0].strip("`"): row[1] for row in rows("A `[[rule]]`.")}
    seen = 0
    for field in info.fields:
        for kind in _parts(field.type):
            if isinstance(kind, msgspec.inspect.IntType) and kind.le is not None:
                assert kinds[field.encode_name] == f"{kind.ge} to {kind.le}", field.encode_name
                seen += 1
            if isinstance(kind, msgspec.inspect.LiteralType):
                assert set(re.findall(r"`(\w+)`", kinds[field.encode_name])) == set(kind.values)
                seen += 1
    assert seen == 9


def test_the_limits_in_its_words() -> None:
    assert f"at most {rules.POLICY_BYTES_MAX // 1024} KiB and {rules.RULES_MAX} rules" in WORDS
    assert f"1 to {rules.VALUES_MAX} values of at most {names.PATTERN_CHARACTERS_MAX} characters" in WORDS
    assert f"longer than {names.NAME_CHARACTERS_MAX} characters" in WORDS
    assert f"`{DEFAULT_RULE}`" in WORDS
    assert f"`{NO_POLICY_RULE}`" in WORDS


def test_every_point() -> None:
    start = PAGE.index("| point | what is known |")
    lines = PAGE[start:].split("\n\n", 1)[0].splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == [point.value for point in Point]


def blocks() -> list[str]:
    """What is set off by four spaces."""
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() + "\n" for block in found]


POLICIES = [block for block in blocks() if "[[rule]]" in block]


def toml(text: str) -> str:
    """A recipe without the commands that follow it."""
    return re.sub(r"^korora .*$", "", text, flags=re.MULTILINE)


def first_rule(text: str) -> str:
    """The name of a recipe's first rule."""
    return str(tomllib.loads(toml(text))["rule"][0]["name"])


@pytest.mark.parametrize("text", POLICIES, ids=first_rule)
def test_every_recipe_is_a_policy_that_nothing_is_to_be_said_of(text: str) -> None:
    policy = Policy.parse(toml(text).encode(), "docs/policy.md", USERS.get)
    odd = [each.words for each in warnings(policy, NOW) if "no rule allows anything" not in each.words]
    assert odd == []


def test_there_are_recipes() -> None:
    assert len(POLICIES) >= 6


def test_what_explain_says(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The example is what the command prints for the first recipe's freeze."""
    (example,) = [block for block in blocks() if block.startswith("alpha$ korora policy explain")]
    command, *shown = example.splitlines()
    (freeze,) = [block for block in POLICIES if '"freeze"' in block]
    path = tmp_path / "policy.toml"
    path.write_text(freeze.partition("\n\n")[0] + "\n")
    path.chmod(0o600)
    from korora.cli.main import main

    arguments = shlex.split(command.removeprefix("alpha$ "))
    monkeypatch.setattr("sys.argv", [str(path) if each == "policy.toml" else each for each in arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 3
    assert capsys.readouterr().out.splitlines() == shown

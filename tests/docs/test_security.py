"""docs/security.md names tests that exist, and covers the defences that have a file of attacks."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def existing() -> dict[str, set[str]]:
    """Names of the tests of each file, by its path below tests/."""
    names: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names[str(path.relative_to(ROOT / "tests"))] = {
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
    return names


def test_every_test_that_is_named_exists() -> None:
    tests = existing()
    table = PAGE.partition("| step: defence | tests |")[2].partition("\n\n")[0]
    named = re.findall(r"`([\w/]+\.py)::(\w+\*?)`", table)
    assert named
    for file, name in named:
        assert file in tests, file
        found = {test for test in tests[file] if test == name or (name.endswith("*") and test.startswith(name[:-1]))}
        assert found, f"{file}::{name}"


def test_every_row_names_a_test() -> None:
    table = PAGE.partition("| step: defence | tests |")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert all("::" in row for row in rows)
    assert [int(row[2:].partition(":")[0]) for row in rows] == sorted(int(row[2:].partition(":")[0]) for row in rows)


def test_every_step_is_attacked() -> None:
    table = PAGE.partition("| step: defence | tests |")[2].partition("\n\n")[0]
    attacked = set(re.findall(r"^\| (\d+): ", table, re.MULTILINE))
    assert attacked == set(re.findall(r"^\*\*(\d+)\. ", PAGE, re.MULTILINE))


def test_the_steps_are_numbered_without_a_gap() -> None:
    steps = [int(number) for number in re.findall(r"^\*\*(\d+)\. ", PAGE, re.MULTILINE)]
    assert steps == list(range(1, len(steps) + 1))


def test_every_published_attack_is_answered_by_tests_that_exist() -> None:
    tests = existing()
    table = PAGE.partition("| attack | what stops it | shown by |")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w*\*?)`", row)
        assert named, row
        for file, name in named:
            assert any(name in {test, "*"} for test in tests[file]), f"{file}::{name}"

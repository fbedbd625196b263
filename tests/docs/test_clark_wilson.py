"""docs/clark-wilson.md has the tables that the code has, names what exists, and covers every statement and rule.

`.venv/bin/python -m tests.docs.test_clark_wilson` writes the code's tables anew.
"""

import importlib
import re
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest

from korora.agents.integrity import certification
from korora.agents.integrity.certification import APPROVALS_MAX, Certification
from korora.agents.integrity.levels import Attribute
from korora.agents.integrity.order import ORDER, Stage
from korora.agents.integrity.procedures import USES, Check, Procedure, Use
from korora.agents.integrity.properties import PROPERTIES
from korora.agents.integrity.system import ENTITLED
from tests.korora.agents.integrity.mutants import all_mutants

PATH: Final = Path(__file__).parents[2] / "docs" / "clark-wilson.md"
ROOM: Final = "korora.agents.integrity."


def _use(item: str, use: Use) -> str:
    said = "".join(sorted(attribute.value for attribute in use.attributes))
    if use.raises:
        said += ", true"
    if use.made_from is not None:
        said += f", made of the {use.made_from}"
    return f"{item} ({said})"


def uses() -> str:
    lines = (
        f"| `{procedure}` | {'; '.join(_use(item, use) for item, use in USES[procedure].items())} |\n"
        for procedure in Procedure
    )
    return "| procedure | touches |\n| --- | --- |\n" + "".join(lines)


def order() -> str:
    lines = []
    for stage in Stage:
        steps = {what: to for (at, what), to in ORDER.items() if at is stage and what is not Procedure.RECORD}
        said = (f"`{what}`" + (f" → {to.value}" if to is not stage else "") for what, to in steps.items())
        lines.append(f"| {stage.value} | {', '.join(said)} |\n")
    return "| the session is | may come next |\n| --- | --- |\n" + "".join(lines)


def triples() -> str:
    lines = (
        f"| `{triple.subject}` | {', '.join(sorted(triple.procedures))} | {', '.join(sorted(triple.items))} |\n"
        for triple in Certification.default().triples
    )
    return "| subject | procedures | items |\n| --- | --- | --- |\n" + "".join(lines)


PARTS: Final = (uses, order, triples)


def page() -> str:
    return PATH.read_text(encoding="utf-8")


def section(title: str) -> str:
    """What stands below a heading."""
    return page().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """Of the first table of a section."""
    table = re.search(r"^\| --- .*\n((?:\|.*\n)+)", section(title), re.MULTILINE)
    assert table
    return [[cell.strip() for cell in line.strip("|\n ").split(" | ")] for line in table[1].splitlines()]


@pytest.mark.parametrize("part", PARTS)
def test_the_tables_are_the_codes(part: object) -> None:
    assert callable(part)
    assert f"\n{part()}\n" in page()


def exists(name: str) -> bool:
    """Whether a name is one of this room's, or of another."""
    for full in (ROOM + name, name):
        module, _, symbol = full.rpartition(".")
        try:
            return hasattr(importlib.import_module(module), symbol) or bool(importlib.import_module(full))
        except ModuleNotFoundError:
            continue
    return False


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("The paper's statements", [str(number) for number in range(1, 19)]),
        ("Clark and Wilson's rules", ["C1", "C2", "C3", "C4", "C5", "E1", "E2", "E3", "E4"]),
    ],
)
def test_every_statement_is_carried_by_what_exists(title: str, expected: list[str]) -> None:
    found = rows(title)
    assert [row[0] for row in found] == expected
    for number, _, symbols in found:
        names = re.findall(r"`([\w.]+)`", symbols)
        assert names, number
        for name in names:
            assert exists(name), f"{number}: {name}"


def test_names_that_do_not_exist_would_be_found() -> None:
    assert not exists("state.Nobody")
    assert not exists("nowhere.State")


def test_every_property_is_in_words() -> None:
    assert [row[0] for row in rows("The formal machine")] == [*PROPERTIES, ENTITLED]


def test_every_check_is_named() -> None:
    assert all(f"`{check}`" in section("Items, procedures, order") for check in Check)
    assert {attribute.value for attribute in Attribute} == set("rwae")


def test_it_counts_the_mutants() -> None:
    assert f"{len(all_mutants())} mutants, rules with one thing wrong" in page()


def test_its_example_is_read() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", page(), re.DOTALL)
    found = certification.parse(tomllib.loads(example), "example")
    assert found.approvals == 2
    for procedure in Procedure:
        assert procedure is Procedure.RESOLVE or any(procedure in triple.procedures for triple in found.triples)


def test_every_key_is_explained() -> None:
    keys = [f"certification.{key}" for key in certification.Head.__struct_fields__]
    keys += [f"triple.{key}" for key in certification.Entry.__struct_fields__]
    assert [row[0] for row in rows("To write triples")] == [f"`{key}`" for key in keys]
    assert f"0 to {APPROVALS_MAX}, default 0" in section("To write triples")


def main() -> int:
    """Write the code's tables into the page."""
    text = page()
    for part in PARTS:
        made = part()
        head = made[: made.index("\n", made.index("\n") + 1) + 1]
        before, mark, rest = text.partition(head)
        text = before + made + rest[rest.index("\n\n") + 1 if not rest.startswith("\n") else 0 :]
        if not mark:
            return 1
    PATH.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""docs/daemon.md holds every key of the configuration with its default, and what the control socket takes."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from korora.cli import relay
from korora.daemon import build, config, control
from korora.xl import words

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "daemon.md").read_text(encoding="utf-8")
TABLES = {
    "The top of the file:": config.Config,
    "`[listen]`": config.Listen,
    "`[limits]`": config.Limits,
    "`[pages]`": config.Pages,
    "`[metrics]`": config.Metrics,
    "`[xl]`": config.Xl,
    "`[[peer]]`": config.Peer,
    "`[[ingress]]`": config.Ingress,
    "`[[egress]]`": config.Egress,
}
TABLES_OF_TABLES = frozenset({"listen", "limits", "pages", "metrics", "xl", "peer", "ingress", "egress"})


def rows(heading: str) -> list[list[str]]:
    """The rows of the first table of keys after the line that begins with this."""
    start = PAGE.index("| key | kind | default |", PAGE.index(f"\n{heading}"))
    lines = PAGE[start:].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("heading", TABLES)
def test_every_key_with_its_default(heading: str) -> None:
    fields = {field.encode_name: field for field in msgspec.structs.fields(TABLES[heading])}
    documented = {row[0].strip("`"): row[2] for row in rows(heading)}
    own = TABLES_OF_TABLES if TABLES[heading] is config.Config else frozenset()
    assert list(documented) == [name for name in fields if name not in own]
    for name, shown in documented.items():
        assert shown == _default(fields[name].default), name


def _default(value: Any) -> str:
    if value is msgspec.NODEFAULT:
        return "–"
    if value is None:
        return "none"
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


@pytest.mark.parametrize("heading", TABLES)
def test_every_bound(heading: str) -> None:
    """`1 to 16` in the table is what the type allows."""
    info = msgspec.inspect.type_info(TABLES[heading])
    assert isinstance(info, msgspec.inspect.StructType)
    kinds = {row[0].strip("`"): row[1] for row in rows(heading)}
    for field in info.fields:
        kind = field.type
        if isinstance(kind, msgspec.inspect.IntType):
            assert kinds[field.encode_name].startswith(f"{kind.ge} to {kind.le}"), field.encode_name
        if isinstance(kind, msgspec.inspect.LiteralType):
            assert set(re.findall(r"`(\w+)`", kinds[field.encode_name])) == set(kind.values)


def test_the_limits_in_its_words() -> None:
    assert f"at most {config.CONFIG_BYTES_MAX // 1024} KiB" in PAGE
    assert f"At most {config.INGRESSES_MAX}." in PAGE
    assert f"at most {control.LINE_BYTES_MAX // 1024} KiB" in PAGE


def test_the_memory_that_its_words_count() -> None:
    words = " ".join(PAGE.split())
    made = config.Config()
    gib = (made.sessions_max * made.pages.cache_bytes) >> 30
    assert f"{made.sessions_max} × {made.pages.cache_bytes >> 20} MiB = {gib} GiB" in words


def test_the_first_example_is_a_configuration() -> None:
    block = PAGE.partition("    [[peer]]")[2].partition("\n\n`deploy")[0]
    text = "\n".join(line.removeprefix("    ") for line in ("    [[peer]]" + block).splitlines())
    assert config.parse(text.encode(), "docs/daemon.md").egress[0].name == "vm1"


def test_every_request_of_the_control_socket() -> None:
    documented = set(re.findall(r'^\| `\{"command": "(\w+)"', PAGE, re.MULTILINE))
    assert documented == {kind.__name__.lower() for kind in control.Request.__args__}


def test_every_word_of_the_xl_socket() -> None:
    """With its fields in order; and the limits of packets."""
    documented = re.findall(r"^\| (?:korora xl|`korora xl`|the daemon|) *\| `(\w+)` \| (.+?) \|", PAGE, re.MULTILINE)
    kinds = [*words.Request.__args__, *words.Answer.__args__]
    assert [(kind.__struct_config__.tag, list(kind.__struct_fields__)) for kind in kinds] == [
        (tag, re.findall(r"`(\w+)`", fields)) for tag, fields in documented
    ]
    assert f"`version` {words.VERSION}," in PAGE
    sizes = (
        f"at most {words.REQUEST_BYTES_MAX // 1024} KiB to the daemon and {words.ANSWER_BYTES_MAX // 1024} KiB from it"
    )
    assert sizes in " ".join(PAGE.split())


def test_what_korora_xl_is_told_by_default() -> None:
    assert f"`korora xl` looks for `{relay.XL_SOCKET_DEFAULT}`" in PAGE
    assert f"`{relay.XL_SOCKET_VARIABLE}` names another socket" in PAGE
    assert f"for up to {relay.XL_PATIENCE_SECONDS} s (`--daemon-timeout`)" in " ".join(PAGE.split())
    assert (relay.DEFAULT_PORT, build.PORT_DEFAULT) == (8010, 8010)


def test_the_units_of_a_rate() -> None:
    sentence = PAGE[PAGE.index("A rate is bytes a second") :].partition(";")[0]
    units = re.findall(r"`(\S+/s)`", sentence)
    assert len(units) > 5
    for unit in units:
        assert config.bytes_per_second(f"200000 {unit}")

"""A whole run as JSON and Markdown."""

import json

from bench.machine import Start, describe
from bench.report import SCHEMA, to_json, to_markdown
from tests.bench.canned import canned_run


def test_json_holds_every_section_with_rows_and_samples() -> None:
    document = json.loads(json.dumps(to_json(canned_run())))
    assert set(document) == {"schema", "machine", "settings", "sections"}
    assert document["schema"] == SCHEMA
    assert list(document["sections"]) == ["ladder", "peers", "lanes", "sessions", "qemu", "pages"]
    assert document["machine"]["congestion_control"] == "cubic"
    for section in document["sections"].values():
        assert section["rows"]
        assert section["samples"]
        assert (section["rounds"], section["planned"], section["cut"]) == (2, 2, "")


def test_the_machine_stands_above_the_tables_and_every_table_is_whole() -> None:
    text = to_markdown(canned_run())
    assert text.startswith("A CPU (6/1/1), 2 cores (L1 32K, L2 1024K, L3 8192K), 1024 MiB; virtualisation none")
    headings = [line for line in text.splitlines() if line.startswith("###")]
    assert headings == [
        "### Ladder",
        "### Peers",
        "### By lanes",
        "### By sessions",
        "### QEMU migrations",
        "### Pages",
    ]
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, block


def test_this_machine_says_what_it_is() -> None:
    here = describe(Start.now())
    assert here.cores >= 1
    assert here.memory_mib > 0
    for field in (here.cpu, here.caches, here.virtualisation, here.governor, here.kernel, here.congestion_control):
        assert field
    assert 0 <= here.stolen_percent <= 100
    assert float(here.load_before) >= 0
    assert here.tools["blake3"]

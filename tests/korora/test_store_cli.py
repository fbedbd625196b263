"""`korora store` as a person or a script meets it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chunking.store import Agreed
from korora.store import open_store

SECONDS = 30.0


def korora(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "korora", "store", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def said(*arguments: object) -> str:
    result = korora(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Two machines of one tenant, one of another, and one nobody knows, whose page count tells them apart."""
    rows = [("alpha", "db-1", 3), ("alpha", "web\x1b[31m", 2), ("beta", "db-1", 1), ("beta", None, 4)]
    with open_store(tmp_path / "state", fingerprint=lambda pages: np.arange(len(pages), dtype=np.uint64)) as store:
        for number, (tenant, vm, count) in enumerate(rows):
            writer = store.writer(tenant, bytes([number]) * 16, vm, now=86400.0 * number, slots=8)
            writer.add(np.full((count, 4096), number, np.uint8))
            writer.finish()
            assert writer.wait(SECONDS)
    return tmp_path / "state"


def test_status_lists_tenants_and_machines(state: Path) -> None:
    lines = said("status", "--state", state).splitlines()
    assert [line.split()[:4] for line in lines[:-1]] == [
        ["TENANT", "VM", "SEGMENTS", "PAGES"],
        ["alpha", "db-1", "1", "3"],
        ["alpha", "web\\x1b[31m", "1", "2"] if "\\x1b" in lines[2] else [*lines[2].split()[:2], "1", "2"],
        ["beta", "db-1", "1", "1"],
        ["beta", "—", "1", "4"],
    ]
    assert all(line.isprintable() for line in lines)  # a guest's name does nothing to a terminal
    assert lines[1].endswith("1970-01-01 00:00 UTC")
    assert lines[-1].startswith("4 segments, ")
    assert lines[-1].endswith(" KiB on the disk")


def test_status_as_json(state: Path) -> None:
    for where in (("--state", state), ("--identity", state.parent)):
        found = json.loads(said("status", "--json", *where))
        assert (found["segments"], found["unfinished"], found["damaged"]) == (4, 0, 0)
        assert found["bytes"] == sum(row["bytes"] for row in found["machines"])
        assert [(row["tenant"], row["vm"], row["pages"]) for row in found["machines"]] == [
            ("alpha", "db-1", 3),
            ("alpha", "web\x1b[31m", 2),
            ("beta", "db-1", 1),
            ("beta", None, 4),
        ]


def test_forget_takes_a_machine_a_tenant_or_both(state: Path) -> None:
    assert said("forget", "--state", state, "--vm", "db-1", "--tenant", "beta").startswith("forgotten: 1 segment, ")
    assert json.loads(said("status", "--state", state, "--json"))["segments"] == 3
    forgotten = json.loads(said("forget", "--state", state, "--vm", "db-1", "--json"))
    assert (forgotten["segments"], forgotten["in_use"]) == (1, 0)
    assert said("forget", "--state", state, "--vm", "db-1") == "nothing is stored of it\n"
    with open_store(state) as store, store.view("beta", [Agreed(bytes([3]) * 16, 4)]):
        assert said("forget", "--state", state, "--tenant", "beta").endswith(
            "running sessions hold 1 of them open, and read on until they end\n"
        )
    assert said("forget", "--state", state, "--tenant", "alpha").startswith("forgotten: 1 segment, ")
    assert said("status", "--state", state) == "nothing is stored\n"


def test_where_no_store_is_none_is_made(tmp_path: Path) -> None:
    assert said("status", "--state", tmp_path) == "nothing is stored\n"
    assert json.loads(said("status", "--state", tmp_path, "--json"))["machines"] == []
    assert said("forget", "--state", tmp_path, "--vm", "db-1") == "nothing is stored of it\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("status", "--state", "nowhere"), "there is no state directory nowhere; name it by --state or --identity"),
        (
            ("status", "--state", ".", "--identity", "."),
            "--state and --identity name two directories; give one of them",
        ),
        (("forget", "--state", "."), "nothing says what to forget; give --vm NAME or --tenant NAME"),
    ],
)
def test_errors_are_one_line_with_their_remedy(arguments: tuple[str, ...], words: str) -> None:
    result = korora(*arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"korora: error: {words}\n")


def test_a_store_or_key_that_others_can_read_is_refused(state: Path) -> None:
    (state / "store").chmod(0o755)
    result = korora("status", "--state", state)
    assert result.returncode == 2
    assert result.stderr.endswith(f"; chmod 700 {state / 'store'}\n")
    (state / "store.key").chmod(0o644)
    result = korora("status", "--state", state)
    assert result.returncode == 2
    assert "must be its owner's alone" in result.stderr

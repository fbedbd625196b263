"""docs/operations.md, README.md and deploy/README.md name only what exists: options, codes, keys, events, endpoints."""

import ast
import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import pytest

from crypto.identity import Identity
from korora import report as reports
from proxy.endpoints.spec import FORMS
from proxy.errors import OUTCOMES
from proxy.report import SessionReport
from proxy.streams.formats import StreamFormat

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "deploy" / "README.md"]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def table(*header: str) -> list[list[str]]:
    """The rows of the one table whose header begins with these cells."""
    start = PAGE.index(f"\n| {' | '.join(header)} |") + 1
    rows = []
    for line in PAGE[start:].splitlines():
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[2:]


def test_every_key_of_the_report_in_order() -> None:
    report = SessionReport(role="source", session_id="00", started=datetime.now(UTC))
    reports.conclude(report, 0, None)
    written = reports.as_dict(report)
    assert [row[0].strip("`") for row in table("key", "kind")] == list(written)
    kinds = {str: "string", int: "number", float: "number", dict: "object", list: "list", type(None): "null"}
    for name, kind, _ in table("key", "kind"):
        assert kinds[type(written[name.strip("`")])] in kind, name


def test_the_formats_of_a_stream() -> None:
    (row,) = [row for row in table("key", "kind") if row[0] == "`stream_format`"]
    assert re.findall(r"`([\w-]+)`", row[2]) == [kind.value for kind in StreamFormat]


def test_every_exit_code_and_outcome() -> None:
    documented = {row[0]: row[1].strip("`") for row in table("code", "outcome")}
    assert documented == {str(code): name for code, name in OUTCOMES.items()} | {"130, 143": "interrupted"}


def test_every_endpoint() -> None:
    documented = [row[0].strip("`") for row in table("endpoint", "as `--from`")]
    assert sorted(documented) == sorted([*FORMS.split(", "), "xl:[FLAGS]"])


def test_every_event_that_is_logged() -> None:
    logged = set()
    for package in ("korora", "proxy"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                match node:
                    case ast.Call(
                        func=ast.Attribute(value=logger, attr=level), args=[ast.Constant(value=str(event)), *_]
                    ) if ast.unparse(logger) in {"log", "self.log"} and level in {"debug", "info", "warning", "error"}:
                        logged.add((f"`{event}`", level))
    documented = {(row[0], row[1]) for row in table("event", "level")}
    assert not logged - documented, "rows to put into the table of events"
    assert not documented - logged, "rows to take out of it"


def test_the_messages_at_3_am_are_the_program_s() -> None:
    """Whoever searches the page for what stands on the screen must find it."""
    source = "".join(
        path.read_text(encoding="utf-8")
        for room in ("korora", "proxy", "chunking", "crypto")
        for path in (ROOT / room).rglob("*.py")
    )
    source += "".join(os.strerror(number) for number in errno.errorcode) + "alert"  # the kernel's words, and OpenSSL's
    quoted = [
        part
        for row in table("what is seen", "most likely")
        for span in re.findall(r"`([^`]+)`", row[0])
        for part in re.split(r" ?…[,: ]?| N | 'x'| y$|15 s$|^the qemu ", span)
        if len(part) > 3
    ]
    assert [part for part in quoted if part.strip(" ,:") not in source] == []


@cache
def help_of(*command: str) -> str:
    """What a command's --help prints."""
    done = subprocess.run(
        [sys.executable, "-m", "korora", *command, "--help"], capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout if done.returncode == 0 else ""


def commands(page: Path) -> list[str]:
    """Every command line of ours in the page's code blocks and code spans."""
    text = page.read_text(encoding="utf-8")
    lines = [
        re.sub(r"^ {4,}(?:[\w-]+(?:[$#]| \(qemu\)) )?", "", line) for line in text.splitlines() if line[:4] == "    "
    ]
    spans = re.findall(r"`([^`\n]+)`", text)
    return [line for line in lines + spans if re.match(r"(?:\S*/)?korora (?!v1 |vtpm v1)[a-z-]", line)]


@each_page
def test_every_command_line_names_what_exists(page: Path) -> None:
    for line in commands(page):
        words = [word for word in shlex.split(line.partition("  #")[0]) if word not in {"…", "..."}][1:]
        command = (
            words[:2]
            if words[0] in {"pki", "ctl", "store", "handover", "receipts", "policy", "attest", "vtpm"}
            else words[:1]
        )
        if command[0] == "--version":
            continue
        shown = help_of(*command)
        assert shown.startswith(f"Usage: korora {' '.join(command)}"), line
        for option in (word for word in words if re.match(r"--?[a-z]", word)):
            assert re.search(rf"^ +{re.escape(option)}\b", shown, re.MULTILINE) or option == "--help", (
                f"{option}: {line}"
            )


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_way_to_get_a_pin(identity_beta: Path) -> None:
    (line,) = re.findall(r"^ +(openssl x509 .*sha256sum)$", PAGE, re.MULTILINE)
    done = subprocess.run(
        ["/bin/sh", "-c", line], cwd=identity_beta, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.split()[0] == Identity.load(identity_beta, now=datetime.now(UTC)).spki_sha256.hex()


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        assert aim.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", aim.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target

"""`korora policy` names the rule that decides; `korora approve` shows what is approved of, and believes the kernel."""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from korora.cli.main import main
from korora.policy.board import Board, Facts, Wanted
from korora.policy.desk import Desk
from korora.policy.file import Policy
from korora.policy.rules import Approvals
from proxy.errors import PolicyRefused
from tests.korora.policy.shells import as_user
from tests.korora.policy.support import UUID, rule, told

TEXT = "\n".join(
    [
        "# who may migrate",
        rule("freeze", "deny", hours=["22:00-06:00"], days=["fri"], timezone="Europe/Berlin"),
        rule("web", "allow", peer=["beta"], vm=["web-*"], rate_limit="1 MiB/s", approvals=1, approvers=[1001, 1002]),
        rule("rest", "allow", peer=["be*"], uuid=["4f1b*"]),
    ]
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command, within this process: its exit code, standard output and standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["korora", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int | None)
        return code or 0, told.out, told.err

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(TEXT)
    path.chmod(0o600)
    return path


# ---------------------------------------------------------------- korora policy


def test_a_good_file(run: Run, file: Path) -> None:
    code, out, err = run("policy", "check", file)
    digest = Policy.read(file).digest
    assert (code, out, err) == (0, f"{file}: 3 rules, policy {digest}\n", "")
    code, out, _ = run("policy", "check", file, "--json")
    assert (code, json.loads(out)) == (0, {"ok": True, "policy": digest, "rules": 3, "warnings": []})


def test_a_bad_file_is_told_by_line_and_key(run: Run, file: Path) -> None:
    file.write_text(TEXT + rule("more", "allow", peer=["x"], hours=["all day"]))
    words = f"{file}:23: rule[3].hours: expected \"HH:MM-HH:MM\", got 'all day'"
    code, out, err = run("policy", "check", file)
    assert (code, out, err) == (2, "", f"korora: error: {words}; correct the file\n")
    code, out, _ = run("policy", "check", file, "--json")
    assert (code, json.loads(out)) == (2, {"ok": False, "error": words, "remedy": "correct the file"})
    assert run("policy", "explain", file, "--peer", "x")[0] == 2
    assert run("policy", "check", file.with_name("none"))[0] == 2


def test_a_warning_has_its_line_and_the_file_is_still_good(run: Run, file: Path) -> None:
    file.write_text(TEXT + rule("late", "allow", peer=["beta"], uuid=["4f1b*"], user=[7]))
    code, out, _ = run("policy", "check", file)
    assert code == 0
    assert out.startswith(
        f"{file}:23: warning: rule late: the rule rest before it holds for all of that: it never decides\n"
    )
    (warning,) = json.loads(run("policy", "check", file, "--json")[1])["warnings"]
    assert (warning["number"], warning["line"], warning["rule"]) == (3, 23, "late")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--peer", "beta"], 0, "allowed by web: the rule web may allow it once more is known"),
        (["--peer", "gamma"], 3, "refused by default deny: no rule allows it"),
        (["--peer", "beta", "--vm", "web-1"], 0, "allowed by web: the rule web allows it"),
        (["--peer", "beta", "--vm", "db-1"], 3, "refused by default deny"),
        (["--peer", "beta", "--vm", "db-1", "--uuid", UUID.upper()], 0, "allowed by rest"),
        (
            ["--peer", "beta", "--vm", "web-1", "--at", "2026-11-27T23:30+01:00"],
            3,
            "refused by freeze: the rule freeze",
        ),
        (["--peer", "beta", "--vm", "web-1", "--at", "2026-11-27T21:30"], 3, "refused by freeze"),
        (["--peer", "beta", "--vm", "web-1", "--at", "2026-11-27T20:30"], 0, "allowed by web"),
    ],
)
def test_it_says_who_decides(run: Run, file: Path, options: list[str], code: int, words: str) -> None:
    when = [] if "--at" in options else ["--at", "2026-11-26T12:00"]
    ended, out, err = run("policy", "explain", file, *options, *when)
    assert (ended, err) == (code, "")
    assert words in out
    told = json.loads(run("policy", "explain", file, *options, *when, "--json")[1])
    assert (told["allowed"], told["policy"]) == (code == 0, Policy.read(file).digest)
    assert [each["rule"] for each in told["rules"]] == ["freeze", "web", "rest"]
    assert [each["rule"] for each in told["rules"] if each["decided"]] == [told["rule"]] * (
        told["rule"] != "default deny"
    )


def test_it_says_how_each_rule_stands_and_where_it_is(run: Run, file: Path) -> None:
    _, out, _ = run("policy", "explain", file, "--peer", "beta", "--vm", "web-1", "--at", "2026-11-26T12:00")
    assert out.splitlines() == [
        "machine web-1 (no uuid) to beta, identity on Thu 2026-11-26 12:00:00 UTC:",
        "  allowed by web: the rule web allows it",
        "  at most 1048576 bytes a second",
        "  once 1 of the users 1001, 1002 approve",
        "  LINE  RULE      EFFECT  IT             WHY",
        "  2       freeze  deny    does not hold  hours: Thu 13:00 Europe/Berlin",
        "  9     > web     allow   holds          peer: beta; vm: web-1",
        "  18      rest    allow   does not hold  uuid: not told by its stream",
    ]


@pytest.mark.parametrize(
    "options",
    [
        ["--peer", "b", "--direction", "up"],
        ["--peer", "b", "--at", "noon"],
        ["--peer", "b", "--user", "no such user"],
        [],
    ],
)
def test_wrong_usage(run: Run, file: Path, options: list[str]) -> None:
    code, out, err = run("policy", "explain", file, *options)
    assert (code, out) == (2, "")
    assert err.startswith("korora: error: ")


def test_a_name_on_the_command_line_moves_no_cursor(run: Run, file: Path) -> None:
    _, out, _ = run("policy", "explain", file, "--peer", "be\x1b[2Jta", "--vm", "pr\u043ed\n")
    assert out.isascii()
    assert "\x1b" not in out
    assert r"machine pr\u043ed\n (no uuid) to be\x1b[2Jta" in out


# ---------------------------------------------------------------- korora approve

SESSION = "5e" * 16
BEN, CID = 61_002, 61_003
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may be several users")
processes = pytest.mark.timeout(180)  # one for each word, on a machine that may be busy


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that others may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
async def desk(public: Path, tmp_path: Path) -> AsyncIterator[tuple[Path, Board]]:
    board = Board(tmp_path / "approvals")
    desk = Desk(str(public / "approve.sock"), board)
    await desk.start()
    yield public / "approve.sock", board
    await desk.close()


@pytest.fixture
def wanted(desk: tuple[Path, Board]) -> Iterator[Wanted]:
    facts = Facts.of(told("pr\u043ed-1\x1b[2J"), "two-people", "alpha")
    with desk[1].wanted(SESSION, facts, Approvals(2, (BEN, CID), 60), 61_001) as request:
        yield request


@needs_root
@processes
async def test_two_people_approve_from_two_shells(desk: tuple[Path, Board], wanted: Wanted) -> None:
    socket, _ = desk
    waiting = asyncio.create_task(wanted.enough())
    first = await as_user(BEN, "approve", SESSION[:6], "--socket", socket)
    assert (first.code, first.err) == (0, "")
    assert first.out.splitlines()[:8] == [
        f"session {SESSION}",
        r"  machine   pr\u043ed-1\x1b[2J",
        f"  uuid      {UUID}",
        "  from      alpha",
        "  to        beta, egress default",
        "  tenant    blue",
        "  begun by  61001",
        "  rule      two-people wants 2 to approve; nobody did; "
        + first.out.partition("; nobody did; ")[2].splitlines()[0],
    ]
    assert first.out.endswith("approved: 1 of 2\n")
    assert not waiting.done()
    second = await as_user(CID, "approve", SESSION, "--socket", socket, "--json")
    assert json.loads(second.out)["approvers"] == [BEN, CID]
    assert await asyncio.wait_for(waiting, 10) == (BEN, CID)


@needs_root
@processes
async def test_who_began_it_and_who_is_not_named_are_refused(desk: tuple[Path, Board], wanted: Wanted) -> None:
    socket, _ = desk
    own = await as_user(61_001, "approve", SESSION, "--socket", socket)
    assert own.code == 3
    assert "user 61001 began it, and somebody else has to approve of it" in own.err
    stranger = await as_user(61_004, "approve", SESSION, "--socket", socket)
    assert (stranger.code, stranger.out) == (2, "")
    assert "no session" in stranger.err
    assert wanted.granted() == ()


@needs_root
@processes
async def test_one_may_say_no(desk: tuple[Path, Board], wanted: Wanted) -> None:
    socket, _ = desk
    waiting = asyncio.create_task(wanted.enough())
    said = await as_user(CID, "approve", SESSION, "--deny", "--socket", socket)
    assert (said.code, said.out.splitlines()[-1]) == (0, "denied")
    with pytest.raises(PolicyRefused, match="user 61003 does not approve"):
        await asyncio.wait_for(waiting, 10)


@needs_root
@processes
async def test_a_list(desk: tuple[Path, Board], wanted: Wanted) -> None:
    socket, _ = desk
    shown = await as_user(BEN, "approve", "--list", "--json", "--socket", socket)
    (listed,) = json.loads(shown.out)["waiting"]
    assert (listed["request"]["session"], listed["request"]["count"]) == (SESSION, 2)
    assert wanted.granted() == ()
    wanted.close()
    shown = await as_user(BEN, "approve", "--list", "--socket", socket)
    assert (shown.code, shown.out) == (0, "nothing waits for you\n")


@pytest.mark.parametrize("options", [[], ["--list", SESSION], ["--list", "--deny"], [SESSION], [""]])
def test_wrong_words(run: Run, tmp_path: Path, options: list[str]) -> None:
    code, out, err = run("approve", *options, "--socket", tmp_path / "none.sock")
    assert (code, out) == (2, "")
    assert err.startswith("korora: error: ")
    assert err.count("\n") == 1

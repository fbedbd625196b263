"""Approvals: only of those who are named, of nobody twice, of nobody who began it, and only of what was shown."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from korora.policy.board import Board, Facts, Listed, Wanted
from korora.policy.desk import CONNECTIONS_PER_USER_MAX, LINE_BYTES_MAX, Desk, connected
from korora.policy.rules import Approvals
from proxy.authority import Point
from proxy.errors import ConfigurationError, PolicyRefused
from proxy.session import Role
from tests.korora.policy.support import ASKED, UUID, told

SESSION = "5e" * 16
FACTS = Facts.of(told("web-1"), "two-people", "alpha")
ANN, BEN, CID = 1001, 1002, 1003
TWO = Approvals(2, (ANN, BEN, CID), 30)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may be several users")
processes = pytest.mark.timeout(180)  # one for each word, on a machine that may be busy


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path / "approvals")


@pytest.fixture
def wanted(board: Board) -> Iterator[Wanted]:
    """Ann began it, so Ben and Cid have to approve."""
    with board.wanted(SESSION, FACTS, TWO, ANN) as request:
        yield request


def say(board: Board, uid: int, *, approved: bool = True, digest: str | None = None, side: str = "source") -> Listed:
    (listed,) = board.waiting()
    return board.answer(SESSION, side, digest or listed.digest, uid, approved=approved)


# ---------------------------------------------------------------- the board


def test_two_who_are_named_are_enough(board: Board, wanted: Wanted) -> None:
    assert wanted.granted() == ()
    assert say(board, CID).approvers == (CID,)
    assert wanted.granted() == (CID,)
    assert say(board, BEN).approvers == (CID, BEN)
    assert wanted.granted() == (CID, BEN)


def test_nobody_counts_twice(board: Board, wanted: Wanted) -> None:
    for _ in range(3):
        say(board, BEN)
    assert wanted.granted() == (BEN,)


@pytest.mark.parametrize(
    ("uid", "words"), [(ANN, "user 1001 began it"), (0, "user 0 is not"), (1004, "user 1004 is not")]
)
def test_nobody_else_counts(board: Board, wanted: Wanted, uid: int, words: str) -> None:
    with pytest.raises(PolicyRefused, match=words):
        say(board, uid)
    assert wanted.granted() == ()


@pytest.mark.parametrize("uid", [ANN, 0, 1004])
def test_the_one_who_waits_checks_for_himself(board: Board, wanted: Wanted, uid: int) -> None:
    """Whoever forges the other end, or its file, is not counted either."""
    say(board, BEN)
    forged = (board.folder / f"{SESSION}-source.{BEN}.answer").read_bytes()
    (board.folder / f"{SESSION}-source.{uid}.answer").write_bytes(forged)
    (board.folder / f"{SESSION}-source.{BEN}0.answer").write_bytes(forged)
    assert wanted.granted() == (BEN,)


def test_an_approval_is_of_what_was_shown(board: Board, wanted: Wanted) -> None:
    """Another machine under the same session's id is another matter, for who is about to say yes, and for who did."""
    (shown,) = board.waiting()
    say(board, BEN)
    other = msgspec.structs.replace(FACTS, vm="db-1")
    with board.wanted(SESSION, other, TWO, ANN) as second:
        assert second.granted() == ()
        with pytest.raises(PolicyRefused, match="no longer what was shown"):
            say(board, BEN, digest=shown.digest)
        (board.folder / f"{SESSION}-source.{BEN}.answer").write_bytes(
            msgspec.json.encode({"approved": True, "digest": shown.digest})
        )
        assert second.granted() == ()
    wanted.close()
    assert not list(board.folder.iterdir())


def test_a_request_that_was_replaced_takes_nothing_of_its_successor_down(board: Board, wanted: Wanted) -> None:
    with board.wanted(SESSION, FACTS, TWO, ANN) as second:
        say(board, BEN)
        wanted.close()
        assert second.granted() == (BEN,)
        assert [listed.request for listed in board.waiting()] == [second.request]


async def test_one_no_is_enough(board: Board, wanted: Wanted) -> None:
    say(board, CID)
    say(board, BEN, approved=False)
    with pytest.raises(PolicyRefused, match="user 1002 does not approve of it, as the rule two-people wants"):
        await wanted.enough()


async def test_who_waits_goes_on_when_the_last_has_approved(board: Board, wanted: Wanted) -> None:
    waiting = asyncio.create_task(wanted.enough())
    say(board, BEN)
    await asyncio.sleep(0)
    assert not waiting.done()
    say(board, CID)
    assert await asyncio.wait_for(waiting, 10) == (BEN, CID)


async def test_nobody_waits_for_ever(board: Board) -> None:
    with board.wanted(SESSION, FACTS, Approvals(2, (BEN, CID), 1), ANN) as request:
        say(board, BEN)
        with pytest.raises(PolicyRefused, match="wants 2 to approve, and 1 did within 1 seconds"):
            await request.enough()


def test_what_is_over_cannot_be_approved(board: Board, wanted: Wanted) -> None:
    (shown,) = board.waiting()
    say(board, BEN)
    wanted.close()
    wanted.close()
    assert board.waiting() == []
    with pytest.raises(PolicyRefused, match="nothing waits for approval under 5e5e5e5e"):
        board.answer(SESSION, "source", shown.digest, CID, approved=True)
    assert not list(board.folder.iterdir())


def test_what_a_dead_process_wanted_is_neither_shown_nor_kept(board: Board) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from tests.korora.policy.test_board import *\n"
        "board = Board(Path(sys.argv[1]))\n"
        "wanted = board.wanted(SESSION, FACTS, TWO, ANN); say(board, BEN); print(len(board.waiting())); os._exit(0)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script, str(board.folder)], cwd=root, timeout=50, check=True, stdout=subprocess.PIPE
    )
    assert done.stdout.split()[-1] == b"1"
    assert len(list(board.folder.iterdir())) == 2
    assert board.waiting() == []
    assert not list(board.folder.iterdir())


def test_both_sides_of_a_migration_within_a_host(board: Board, wanted: Wanted) -> None:
    arriving = msgspec.structs.replace(FACTS, side="destination")
    with board.wanted(SESSION, arriving, TWO, None) as other:
        listed = next(each for each in board.waiting() if each.request.facts.side == "destination")
        board.answer(SESSION, "destination", listed.digest, BEN, approved=True)
        assert (wanted.granted(), other.granted()) == ((), (BEN,))


def test_a_folder_of_others_is_no_board(tmp_path: Path) -> None:
    folder = tmp_path / "approvals"
    folder.mkdir()
    (folder / "x").touch()
    folder.chmod(0o770)
    with pytest.raises(ConfigurationError, match="others could put approvals there"):
        Board(folder)
    with pytest.raises(ConfigurationError, match="cannot be made"):
        Board(folder / "x" / "y")


def test_what_people_are_shown() -> None:
    facts = Facts.of(told("pr\u043ed\x1b[2J\n"), "two-people", "alpha")
    assert (facts.vm, facts.uuid) == (r"pr\u043ed\x1b[2J\n", UUID)
    assert (facts.source, facts.destination, facts.side) == ("alpha", "beta", "source")
    arriving = Facts.of(told(role=Role.DESTINATION, point=Point.HANDOVER), "x", "alpha")
    assert (arriving.source, arriving.destination, arriving.side) == ("beta", "alpha", "destination")
    assert Facts.of(ASKED, "x", "alpha").vm == ""


def test_the_longest_name_can_be_put_up(board: Board) -> None:
    facts = Facts.of(told("\U0001f600" * 70_000), "x", "alpha")
    with board.wanted(SESSION, facts, TWO, None):
        (listed,) = board.waiting()
        assert listed.request.facts == facts


def test_what_cannot_be_put_up_refuses(board: Board) -> None:
    with pytest.raises(PolicyRefused, match="approvals cannot be asked for"):
        board.wanted("../../etc/x", FACTS, TWO, None)
    board.folder.rmdir()
    with pytest.raises(PolicyRefused, match=r"approvals cannot be asked for: .*: No such file"):
        board.wanted(SESSION, FACTS, TWO, None)


def test_rubbish_in_the_folder_hurts_nobody(board: Board, wanted: Wanted) -> None:
    (board.folder / f"{SESSION}-source.{BEN}.answer").write_bytes(b"{")
    (board.folder / f"{SESSION}-source.{CID}.answer").mkdir()
    (board.folder / "x.wanted").symlink_to("/etc/passwd")
    assert wanted.granted() == ()
    assert len(board.waiting()) == 1


# ---------------------------------------------------------------- the socket


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that others may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
        assert os.listdir(folder) == []


@pytest.fixture
async def desk(public: Path, board: Board) -> AsyncIterator[Path]:
    path = public / "approve.sock"
    desk = Desk(str(path), board)
    await desk.start()
    yield path
    await desk.close()


CLIENT = """
import os, socket, sys
uid, path = int(sys.argv[1]), sys.argv[2]
os.setgroups([]); os.setgid(uid); os.setuid(uid)
with socket.socket(socket.AF_UNIX) as sock:
    sock.settimeout(20)
    sock.connect(path)
    stream = sock.makefile("rb")
    for line in sys.argv[3:]:
        sock.sendall(line.encode() + b"\\n")
        sys.stdout.write(stream.readline().decode())
"""


async def as_user(uid: int, path: Path, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """What a user of the host is answered, by a process of his own."""
    process = await asyncio.create_subprocess_exec(
        *("/usr/bin/env", "python3", "-I", "-c", CLIENT, str(uid), str(path), *map(json.dumps, requests)),
        stdout=subprocess.PIPE,
        cwd="/",
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 40)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    assert process.returncode == 0
    return [json.loads(line) for line in output.splitlines()]


WAITING = {"command": "waiting"}


def word(listed: dict[str, Any], *, approved: bool = True) -> dict[str, Any]:
    request = listed["request"]
    return {
        "command": "say",
        "session": request["session"],
        "side": request["facts"]["side"],
        "digest": listed["digest"],
        "approved": approved,
    }


@needs_root
@processes
async def test_two_people_approve_from_two_processes(desk: Path, wanted: Wanted) -> None:
    waiting = asyncio.create_task(wanted.enough())
    (shown,) = await as_user(BEN, desk, WAITING)
    (listed,) = shown["waiting"]
    assert listed["request"]["facts"] == msgspec.to_builtins(FACTS)
    (first, again) = await as_user(BEN, desk, word(listed), word(listed))
    assert first["ok"]
    assert again["waiting"][0]["approvers"] == [BEN]
    (own,) = await as_user(ANN, desk, word(listed))
    assert own == {"ok": False, "refused": True, "error": "user 1001 began it, and somebody else has to approve of it"}
    (stranger,) = await as_user(1004, desk, word(listed))
    assert stranger["error"] == "user 1004 is not among its approvers"
    assert not waiting.done()
    (last,) = await as_user(CID, desk, word(listed))
    assert last["waiting"][0]["approvers"] == [BEN, CID]
    assert await asyncio.wait_for(waiting, 10) == (BEN, CID)


@needs_root
@processes
async def test_each_is_shown_what_concerns_him(desk: Path, wanted: Wanted) -> None:
    for uid, shown in ((ANN, 1), (BEN, 1), (1004, 0)):
        (answer,) = await as_user(uid, desk, WAITING)
        assert len(answer["waiting"]) == shown


@needs_root
@processes
async def test_no_uid_in_a_request_is_believed(desk: Path, wanted: Wanted) -> None:
    ((listed,),) = [answer["waiting"] for answer in await as_user(BEN, desk, WAITING)]
    (answer,) = await as_user(1004, desk, word(listed) | {"uid": BEN})
    assert "unknown field `uid`" in answer["error"]
    assert wanted.granted() == ()


async def test_a_client_is_answered(desk: Path, wanted: Wanted) -> None:
    def approve() -> str:
        with connected(desk) as client:
            (listed,) = client.waiting()
            assert listed.request == wanted.request
            with pytest.raises(PolicyRefused, match="is not among its approvers"):
                client.say(listed, approved=True)
        return "told"

    assert await asyncio.wait_for(asyncio.to_thread(approve), 20) == "told"


async def test_one_user_cannot_keep_the_others_out(desk: Path) -> None:
    """He gets a few connections and no more; a slot is free again once he lets go."""
    open_: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    try:
        for _ in range(CONNECTIONS_PER_USER_MAX):
            open_.append(await asyncio.open_unix_connection(str(desk)))
            open_[-1][1].write(json.dumps(WAITING).encode() + b"\n")
            assert json.loads(await asyncio.wait_for(open_[-1][0].readline(), 10))["ok"]
        reader, writer = await asyncio.open_unix_connection(str(desk))
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
    finally:
        for _, writer in open_:
            writer.close()


@pytest.mark.parametrize("line", [b"{}\n", b"x\n", b"[" * 3000 + b"\n", b'{"command":"say"}\n', b"\xff\n"])
async def test_what_is_no_request_is_said(desk: Path, line: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(str(desk))
    writer.write(line)
    assert "no request" in json.loads(await asyncio.wait_for(reader.readline(), 10))["error"]
    writer.write(b"x" * (LINE_BYTES_MAX + 1) + b"\n")
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot reach a relay at"), connected(tmp_path / "none"):
        pytest.fail("there is one")

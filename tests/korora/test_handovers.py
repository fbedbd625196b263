"""What a relay's process does about hand-overs that its sessions have left."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crypto.keys import SessionId
from crypto.tls import PeerRules
from korora import handovers, log
from korora.cli.handover import app
from korora.daemon import build, config
from korora.relay import Common
from proxy.control import PROTOCOL_VERSION, Recover
from proxy.handover.record import Entry, Head, Record
from proxy.handover.table import State
from proxy.hypervisors.base import Vm
from proxy.shell.handovers import Reach
from proxy.shell.journal import Journal, now
from tests.standins.xen_host import UUID, XenHost

SESSION = "5e" * 16
SECONDS_MAX = 30.0


def test_a_process_left_behind_runs_nothing_of_the_folder_it_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """xl is root's, and runs its transport wherever root happens to be: in a user's folder, too."""
    state, folder = tmp_path / "state", tmp_path / "home"
    Journal(state).begin(Head(SESSION, "source", "xl", "there", now()), Entry("open", now())).close()
    (folder / "korora").mkdir(parents=True)
    (folder / "korora" / "__init__.py").touch()
    (folder / "korora" / "__main__.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w')")
    started: list[list[str]] = []
    left = handovers.open_handovers(state)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda command, **how: started.append(command))
        handovers.leave_behind(left, SESSION, identity=tmp_path / "identity", state=state, rules=PeerRules(), seconds=0)
    (command,) = started
    subprocess.run(command, cwd=folder, check=False, capture_output=True, timeout=SECONDS_MAX)
    assert not (tmp_path / "was here").exists()


PIN = "sha256:" + "ab" * 32
CONFIG = f"""
allow_classical = true
[[peer]]
name = "beta"
address = "beta:8010"
pins = ["{PIN}"]
[[ingress]]
name = "out"
from = "tcp:127.0.0.1:4440"
peer = "beta"
"""


def test_who_is_asked_afterwards_is_judged_as_in_the_session(identity_alpha: Path) -> None:
    """The CA alone is not believed where pins are; without them, whoever has its key could say that no copy ran."""
    record = Record(Head(SESSION, "source", "xl", "beta", now(), address="[2001:db8::7]:8010"))
    rules = build.rules_of(config.parse(CONFIG.encode(), "test"))
    contact = handovers.reach(identity_alpha, rules)(record)
    assert contact is not None
    assert contact.where.address == "[2001:db8::7]:8010"
    demanded = contact.tls.rules
    assert demanded.names == {"beta"}
    assert demanded.pins_by_name == {"beta": {bytes.fromhex("ab" * 32)}}
    assert demanded.allow_classical
    pinned = PeerRules(pins=frozenset({bytes(32)}))
    common = Common(identity_alpha, pinned, once=False, report=None, resume_seconds=1)
    contact = common.reach()(record)
    assert contact is not None
    assert contact.tls.rules == PeerRules(frozenset({"beta"}), frozenset({bytes(32)}))


def korora(*arguments: object, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "korora", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS_MAX, env=env)


def test_both_sides_of_a_migration_within_the_host_can_be_told_apart(tmp_path: Path, identity_alpha: Path) -> None:
    """One session's id, two records: more digits of it are no help. And standard output is JSON, whatever is logged."""
    for side in ("source", "destination"):
        Journal(tmp_path).begin(Head(SESSION, side, "xl", "alpha", now()), Entry("open", now())).close()
    common = ("--state", tmp_path, "--identity", identity_alpha)
    told = korora("handover", "show", SESSION[:4], *common)
    assert told.returncode == 2
    assert "--side source or --side destination" in told.stderr
    told = korora("handover", "show", SESSION[:4], "--side", "destination", "--json", *common)
    assert json.loads(told.stdout)["side"] == "destination"
    told = korora("handover", "recover", SESSION, "--json", *common)
    assert told.returncode == 6
    after = {one["side"]: one["settled"] for one in json.loads(told.stdout)["handovers"]}
    assert after == {"source": False, "destination": True}, "there is no address to tell the destination at"


# ------------------------------------------------------------------ an operator decides


def stands(state: Path, side: str, *states: State) -> Record:
    """A hand-over of a copy that is not there (any more), and how far it had come."""
    file = Journal(state).begin(Head(SESSION, side, "xl", "alpha", now()), Entry("open", now()))
    for one in states:
        file.write(one, "", Vm("web-1", UUID, "77@boot"))
    file.close()
    return file.record


@pytest.mark.parametrize(
    ("side", "state", "what", "says"),
    [
        ("destination", State.DOUBT, "--give-up", "the copy of web-1 which was lost here never ran: alpha is told so"),
        ("destination", State.VOTED, "--give-up", "the copy here, which has not run, is destroyed"),
        ("destination", State.VOTED, "--run-here", "at alpha is gone for good, and has not run on"),
        ("source", State.DOUBT, "--give-up", "the copy of web-1 at alpha is whole, and the one to run on"),
        ("source", State.DOUBT, "--run-here", "at alpha is gone for good, and has not run since"),
    ],
)
def test_who_is_not_certain_is_told_what_he_would_say(
    tmp_path: Path, side: str, state: State, what: str, says: str
) -> None:
    stands(tmp_path, side, state)
    told = korora("handover", "resolve", SESSION, what, "--state", tmp_path)
    assert told.returncode == 2
    assert says in told.stderr
    assert "--certain" in told.stderr
    (record,) = Journal(tmp_path).records()
    assert (record.state, len(record.entries)) == (state, 2), "nothing is done"


def test_one_that_is_given_up_in_doubt_is_told_to_its_source_as_one_that_never_ran(tmp_path: Path) -> None:
    """So it has to be said before: its source runs its own copy then."""
    stands(tmp_path / "state", "destination", State.COMMITTED, State.DOUBT)
    xen = XenHost(tmp_path / "xen")
    common = ("--give-up", "--state", tmp_path / "state")
    told = korora("handover", "resolve", SESSION, *common, env=xen.env)
    assert told.returncode == 2
    for words in (
        "never ran",
        "runs its own",
        "older than the disks if the copy here did run",
        "give up at alpha first",
    ):
        assert words in told.stderr
    done = korora("handover", "resolve", SESSION, *common, "--certain", env=xen.env)
    assert done.returncode == 0
    assert "the end of a hand-over is not on record" in done.stderr
    assert "give --identity" in done.stderr
    (record,) = Journal(tmp_path / "state").records()
    assert [entry.state for entry in record.entries][-3:] == ["undoing", "aborted", "aborted"]
    answer = asyncio.run(
        handovers.open_handovers(tmp_path / "state").answer(
            "alpha", SessionId(bytes.fromhex(SESSION)), Recover(PROTOCOL_VERSION, bytes.fromhex(SESSION), "asked")
        )
    )
    assert answer.state == "aborted"


def test_who_is_asked_by_hand_is_judged_as_in_the_session(
    tmp_path: Path, identity_alpha: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its pins, and without ML-KEM where that is allowed: of the daemon's configuration, or as `send` takes them."""
    seen: list[tuple[Path, PeerRules | None]] = []
    state = tmp_path / "state"
    Journal(state).begin(Head(SESSION, "source", "xl", "beta", now()), Entry("open", now())).close()
    file = tmp_path / "korora.toml"
    file.write_text(f'identity = "{identity_alpha}"\nstate = "{state}"\n{CONFIG}')

    def reach(identity: Path, rules: PeerRules | None = None) -> Reach:
        seen.append((identity, rules))
        return lambda record: None

    monkeypatch.setattr(handovers, "reach", reach)
    monkeypatch.setattr(log, "configure", lambda *_: None)  # its standard error is the runner's, and gone afterwards
    common = ["--identity", str(identity_alpha), "--state", str(state)]
    for words in (["recover"], ["show", SESSION]):
        CliRunner().invoke(app, [*words, "--config", str(file)])
        CliRunner().invoke(app, [*words, *common, "--pin", PIN, "--allow-classical"])
        CliRunner().invoke(app, [*words, *common])
    pin = frozenset({bytes.fromhex("ab" * 32)})
    by_config = PeerRules(frozenset({"beta"}), frozenset(), allow_classical=True, pins_by_name={"beta": pin})
    expected = [by_config, PeerRules(pins=pin, allow_classical=True), PeerRules()]
    assert seen == [(identity_alpha, rules) for rules in expected * 2]


def test_what_an_operator_decides_is_on_record(tmp_path: Path, identity_alpha: Path) -> None:
    """Also where no relay runs: who decided, and what came of it."""
    state = tmp_path / "state"
    stands(state, "destination", State.VOTED)
    xen = XenHost(tmp_path / "xen")
    common = ("--state", state, "--identity", identity_alpha)
    done = korora("handover", "resolve", SESSION, "--give-up", "--certain", *common, env=xen.env)
    assert done.returncode == 0, done.stderr
    told = json.loads(korora("receipts", "show", SESSION, "--json", *common).stdout)
    assert korora("receipts", "verify", *common).returncode == 0
    (receipt,) = told["receipts"]
    predicate = receipt["statement"]["predicate"]
    assert (predicate["outcome"], predicate["flags"]) == ("aborted", ["recovered"])
    performed = [(one["subject"], one["procedure"]) for one in predicate["procedures"]]
    assert performed == [("relay", "recover"), ("relay", "record"), (f"uid:{os.getuid()}", "resolve")]


def test_a_process_left_behind_demands_what_the_session_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(tmp_path).begin(Head(SESSION, "source", "xl", "there", now()), Entry("open", now())).close()
    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: started.append(command))
    rules = PeerRules(pins=frozenset({bytes.fromhex("ab" * 32)}), allow_classical=True)
    left = handovers.open_handovers(tmp_path)
    handovers.leave_behind(left, SESSION, identity=tmp_path, state=tmp_path, rules=rules, seconds=0)
    assert started[0][-2:] == [f"--pin={'ab' * 32}", "--allow-classical"]

"""What a relay's process does about hand-overs that its sessions have left."""

import subprocess
from pathlib import Path

import pytest

from crypto.tls import PeerRules
from korora import handovers
from korora.daemon import build, config
from korora.relay import Common
from proxy.handover.record import Entry, Head, Record
from proxy.shell.journal import Journal, now

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
        handovers.leave_behind(left, SESSION, identity=tmp_path / "identity", state=state, seconds=0)
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

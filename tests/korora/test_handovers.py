"""What a relay's process does about hand-overs that its sessions have left."""

import subprocess
from pathlib import Path

import pytest

from korora import handovers
from proxy.handover.record import Entry, Head
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

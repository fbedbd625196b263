"""What a worker keeps of a session, and who has a turn at an egress."""

import json
import os
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from crypto.tls import PeerInfo
from korora.daemon import build, config, kept
from korora.daemon.admission import Admission
from proxy.control import Offer
from proxy.errors import PolicyRefused
from proxy.limits import HANDSHAKE_SECONDS_MAX
from proxy.report import SessionReport

TEXT = """
[[peer]]
name = "alpha"
[[peer]]
name = "gamma"
[[egress]]
name = "file"
to = "file:/nowhere"
[[egress]]
name = "tcp"
to = "tcp:127.0.0.1:1"
peers = ["gamma"]
"""


def report(number: int, role: str = "source") -> SessionReport:
    return SessionReport(role=role, session_id=f"{number:032x}", started=datetime.now(UTC))


def test_reports_are_kept_private_and_never_replaced(tmp_path: Path) -> None:
    for outcome in ("done", "lost", "refused"):
        made = report(1)
        made.outcome = outcome
        kept.keep(tmp_path, made)
    kept.keep(tmp_path, report(1, "destination"))
    name = f"{1:032x}"
    found = {path.name: json.loads(path.read_text())["outcome"] for path in tmp_path.iterdir()}
    assert found == {
        f"{name}-source.json": "done",
        f"{name}-source-2.json": "lost",
        f"{name}-source-3.json": "refused",
        f"{name}-destination.json": "",
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_the_oldest_reports_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "REPORTS_KEPT", 3)
    for number in range(5):
        kept.keep(tmp_path, report(number))
        os.utime(tmp_path / f"{number:032x}-source.json", (number, number))
    assert sorted(path.name[31] for path in tmp_path.iterdir()) == ["2", "3", "4"]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def admission(folder: Path, clock: Clock) -> Admission:
    made = Admission(folder, clock)
    configured = config.parse(TEXT.encode(), "test")
    made.reconfigure(configured, build.egresses(configured))
    return made


def offer(number: int, egress: str = "file") -> Offer:
    session = number.to_bytes(16, "big")
    return Offer(version=1, session=session, suites=(1,), codecs=(0,), egress=egress, lanes=1, resume_seconds=0)


def peer(name: str) -> PeerInfo:
    return PeerInfo(name=name, leaf_sha256=bytes(32), group="", cipher="")


def test_turns_are_taken_by_one_session_of_all_workers(tmp_path: Path) -> None:
    clock = Clock()
    one, other = admission(tmp_path, clock), admission(tmp_path, clock)
    one.admit(peer("alpha"), offer(1))
    assert one.begun(offer(1).session) == "file"
    one.admit(peer("alpha"), offer(1))  # it goes on after a loss
    for worker_, number in ((one, 2), (other, 3)):
        with pytest.raises(PolicyRefused, match="'file' serves one session at a time"):
            worker_.admit(peer("gamma"), offer(number))
    one.ended(offer(1).session)
    other.admit(peer("gamma"), offer(3))
    with pytest.raises(PolicyRefused):
        one.admit(peer("alpha"), offer(4))


def test_a_session_that_never_came_to_be_keeps_nobody_out_for_long(tmp_path: Path) -> None:
    clock = Clock()
    made = admission(tmp_path, clock)
    made.admit(peer("alpha"), offer(1))
    clock.now += HANDSHAKE_SECONDS_MAX - 1
    with pytest.raises(PolicyRefused):
        made.admit(peer("alpha"), offer(2))
    clock.now += 2
    made.admit(peer("alpha"), offer(2))
    made.begun(offer(2).session)
    clock.now += 10 * HANDSHAKE_SECONDS_MAX
    with pytest.raises(PolicyRefused):
        made.admit(peer("alpha"), offer(3))


def test_who_may_use_what(tmp_path: Path) -> None:
    made = admission(tmp_path, Clock())
    made.admit(peer("gamma"), offer(1, "tcp"))
    made.admit(peer("gamma"), offer(2, "tcp"))
    for name, egress in (("alpha", "tcp"), ("omega", "file"), ("alpha", "unknown")):
        with pytest.raises(PolicyRefused, match=f"{name} may not use the egress '{egress}'"):
            made.admit(peer(name), offer(3, egress))


def test_a_lock_that_cannot_be_had_refuses(tmp_path: Path) -> None:
    made = admission(tmp_path / "gone", Clock())
    with pytest.raises(PolicyRefused, match="No such file"):
        made.admit(peer("alpha"), offer(1))

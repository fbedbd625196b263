"""The --report file: whole or not at all, its owner's alone, and with the keys that other tools depend on."""

import errno
import json
import os
import stat
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from korora import __version__, report
from proxy.errors import ConfigurationError
from proxy.report import SessionReport

STARTED = datetime(2031, 5, 17, 12, 0, tzinfo=UTC)

# Stable: other tools read them. Adding one is fine, renaming or removing one is not.
KEYS = {
    "version",
    "role",
    "session_id",
    "started",
    "ended",
    "seconds",
    "handshake_seconds",
    "peer",
    "peer_address",
    "vm",
    "bytes_in",
    "bytes_out",
    "bytes_wire",
    "pages",
    "digest_blake3",
    "stream_format",
    "cipher",
    "group",
    "lanes",
    "channels",
    "resumes",
    "outcome",
    "error",
    "exit_code",
}

needs_ordinary_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")


def made() -> SessionReport:
    return SessionReport(role="source", session_id="00" * 16, started=STARTED)


def read(path: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(path.read_text())
    return content


def test_the_keys_that_tools_depend_on(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.write(path, made())
    content = read(path)
    assert set(content) >= KEYS
    assert content["version"] == __version__
    assert content["started"] == "2031-05-17T12:00:00Z"
    for key in ("bytes_in", "bytes_out", "bytes_wire"):
        assert content[key] == {"forward": 0, "backward": 0}


def test_two_reports_share_no_counts() -> None:
    first, second = made(), made()
    first.bytes_in["forward"] = 1
    first.digest_blake3["0"] = {}
    assert (second.bytes_in["forward"], second.digest_blake3) == (0, {})


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (0, "done"),
        (2, "configuration"),
        (3, "refused"),
        (4, "authentication"),
        (5, "integrity"),
        (6, "lost"),
        (7, "hypervisor"),
        (70, "internal"),
        (130, "interrupted"),
        (143, "interrupted"),
        (99, "internal"),
    ],
)
def test_outcomes(code: int, outcome: str) -> None:
    subject = made()
    report.conclude(subject, code, "words")
    assert (subject.exit_code, subject.outcome) == (code, outcome)
    assert subject.error == (None if code == 0 else "words")


def test_a_report_is_its_owners_alone_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    before = os.umask(0)
    try:
        report.write(path, made())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_an_earlier_report_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("x" * 100_000)
    report.write(path, made())
    assert set(read(path)) >= KEYS


def test_a_disk_that_refuses_leaves_the_earlier_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("earlier")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        report.write(path, made())
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_pipe_is_written_directly(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(path.read_text()))
    reader.start()
    report.write(path, made())
    reader.join(10)
    assert set(json.loads(got[0])) >= KEYS
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_symbolic_link_to_a_device_is_followed(tmp_path: Path) -> None:
    link = tmp_path / "report.json"
    link.symlink_to("/dev/null")
    report.check_writable(link)
    report.write(link, made())
    assert link.is_symlink()


@pytest.mark.parametrize("path", ["absent/report.json", ".", "file/report.json"])
def test_what_cannot_be_written_is_found_out_before_the_migration(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot write the report") as refused:
        report.check_writable(tmp_path / path)
    assert refused.value.remedy


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/report.json"])
def test_a_name_too_long_is_found_out_before_the_migration(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot write the report"):
        report.check_writable(tmp_path / name)


def test_a_directory_that_may_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, **_: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        with pytest.raises(ConfigurationError, match="cannot write the report"):
            report.check_writable(tmp_path / "report.json")


@needs_ordinary_user
def test_a_directory_that_is_not_ours(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigurationError):
        report.check_writable(tmp_path / "report.json")


def test_a_check_leaves_no_trace(tmp_path: Path) -> None:
    report.check_writable(tmp_path / "report.json")
    report.check_writable(None)
    assert list(tmp_path.iterdir()) == []


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report.check_writable(Path("report.json"))
    report.write(Path("report.json"), made())
    assert (tmp_path / "report.json").exists()

"""`korora serve` before it serves: what --check says, and each way in which it does not begin."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.korora.daemon.support import SECONDS_MAX, Host, Site


def serve(config: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "korora", "serve", "--config", str(config), *words],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )


@pytest.fixture
def alpha(site: Site) -> Host:
    """A host that sends to beta and takes from it and from gamma."""
    host = site.host("alpha")
    host.port = 1
    host.peer("beta", "beta:8010")
    host.peer("gamma")
    host.ingress("out", "beta", port=4440, more='priority = "high"\nrate_limit = "5 MiB/s"\n')
    host.egress("in", "unix:/run/vm1/incoming", 'peers = ["gamma"]\n')
    host.egress("any", "exec:cat >/dev/null")
    host.write()
    return host


def test_check_says_what_would_be_served(alpha: Host) -> None:
    done = serve(alpha.config, "--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"this host is alpha, by {alpha.identity}",
        "listens for relays on 127.0.0.1:1",
        "egress in: to unix:/run/vm1/incoming, from gamma",
        "egress any: to exec:cat >/dev/null, from beta, gamma",
        "ingress out: from tcp:127.0.0.1:4440 to beta (beta:8010), egress default, priority high",
    ]
    assert not alpha.state.exists()
    assert not alpha.control.exists()


def test_check_as_json_has_every_key(alpha: Host) -> None:
    done = serve(alpha.config, "--check", "--json")
    said = json.loads(done.stdout)
    assert (said["name"], said["workers"], said["allow_classical"]) == ("alpha", 1, False)
    assert said["limits"] == {
        "rate_limit": None,
        "session_rate_limit": None,
        "resume_timeout": 30,
        "drain_timeout": 900,
    }
    assert said["ingress"] == [
        {
            "name": "out",
            "from": "tcp:127.0.0.1:4440",
            "peer": "beta",
            "egress": "default",
            "lanes": 1,
            "priority": "high",
            "rate_limit": "5 MiB/s",
            "encode": "auto",
            "tenant": "default",
            "xl_flags": None,
            "qmp": None,
            "require_guarded": False,
        }
    ]
    assert [peer["pins"] for peer in said["peer"]] == [[], []]


def _no_identity(host: Host) -> None:
    host.identity = host.folder / "nowhere"
    host.write()


def _open_key(host: Host) -> None:
    (host.identity / "host.key").chmod(0o644)


def _no_crl(host: Host) -> None:
    (host.identity / "crl.pem").unlink()


def _folder_as_target(host: Host) -> None:
    host.egress("file", f"file:{host.folder}")
    host.write()


def _unknown_key(host: Host) -> None:
    host.settings = "threads = 7"
    host.write()


def _no_file(host: Host) -> None:
    host.config.unlink()


@pytest.mark.parametrize("words", [("--check",), ()], ids=["check", "serve"])
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_no_identity, "nowhere"),
        (_open_key, "host.key has mode 0644"),
        (_no_crl, "crl.pem"),
        (_folder_as_target, "file:"),
        (_unknown_key, "alpha.toml: threads: no such key"),
        (_no_file, "alpha.toml: cannot be read"),
    ],
)
def test_what_is_wrong_outside_the_file_too(
    alpha: Host, spoil: Callable[[Host], None], named: str, words: tuple[str, ...]
) -> None:
    spoil(alpha)
    done = serve(alpha.config, *words)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("korora: error: ")]
    assert named in line
    assert "; " in line
    assert "Traceback" not in done.stderr


def _taken_relay_port(host: Host, taken: socket.socket) -> None:
    host.port = taken.getsockname()[1]


def _taken_ingress(host: Host, taken: socket.socket) -> None:
    host.ingress("more", "beta", port=taken.getsockname()[1])


def _state_is_a_file(host: Host, taken: socket.socket) -> None:
    del taken
    host.port = 0
    host.state.write_text("")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_taken_relay_port, "cannot listen on 127.0.0.1:"),
        (_taken_ingress, "cannot listen on tcp:127.0.0.1:"),
        (_state_is_a_file, "the state directory "),
    ],
)
def test_what_cannot_be_opened(alpha: Host, spoil: Callable[[Host, socket.socket], None], named: str) -> None:
    alpha.port = 0
    alpha.tables[2] = alpha.tables[2].replace("4440", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        spoil(alpha, taken)
        alpha.write()
        done = serve(alpha.config)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("korora: error: ")]
    assert line.startswith(f"korora: error: {named}")


def test_a_second_daemon_at_one_control_socket(alpha: Host) -> None:
    alpha.port = 0
    alpha.tables[2] = alpha.tables[2].replace("4440", "0")
    alpha.start()
    done = serve(alpha.config)
    assert done.returncode == 2
    assert f"korora: error: cannot listen on unix:{alpha.control}: another process listens there" in done.stderr
    assert alpha.status()["phase"] == "serving"


def test_a_control_socket_that_nobody_listens_on_is_replaced(alpha: Host) -> None:
    alpha.port = 0
    alpha.tables[2] = alpha.tables[2].replace("4440", "0")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(alpha.control))
    alpha.start()
    assert alpha.status()["ok"]


def test_ready_that_nobody_can_read(alpha: Host) -> None:
    alpha.port = 0
    alpha.tables[2] = alpha.tables[2].replace("4440", "0")
    alpha.write()
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "korora", "serve", "--config", str(alpha.config)],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    os.close(writing)
    assert done.returncode == 2
    assert "korora: error: cannot write to standard output" in done.stderr
    assert not alpha.control.exists()

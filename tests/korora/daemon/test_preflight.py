"""Daemons that look at one another: what is configured counts for the next session, and an operator sees the same."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.korora.daemon.support import SERVE, Host, Machine, Site, exchange, in_thread, until
from tests.korora.daemon.test_sessions import Pair, pair
from tests.proxy.support import run

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        os.uname().machine != "x86_64" or shutil.which("setarch") is None, reason="needs setarch on x86-64"
    ),
]
OFF = 'preflight = "off"\n'


@pytest.fixture
def hosts(site: Site) -> Iterator[Pair]:
    """beta is of another architecture, as far as uname(2) tells."""
    made = pair(site, 1)
    made.beta.start(command=("setarch", "i686", *SERVE))
    made.alpha.start()
    yield made
    made.close()


async def passes(machine: Machine) -> None:
    near, far = await machine.channel()
    await exchange(near, far, b"there" * 1000, b"back" * 1000)


async def refused(machine: Machine) -> None:
    assert await (await machine.connect()).broken()


async def set_to(host: Host, words: str) -> None:
    host.settings = words
    await in_thread(host.write)
    assert (await in_thread(host.ask, "reload"))["ok"]


def by_hand(config: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """`korora preflight`: its exit code, and its sheet."""
    command = [sys.executable, "-m", "korora", "preflight", "--config", str(config), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def failed(sheet: dict[str, Any]) -> list[str]:
    return [finding["check"] for finding in sheet["findings"] if finding["grade"] == "failed"]


def test_a_reload_counts_for_the_next_session(hosts: Pair) -> None:
    (machine,) = hosts.machines

    async def story() -> None:
        await refused(machine)
        await in_thread(until, hosts.alpha.reports)
        (told,) = hosts.alpha.reports()
        assert (told["outcome"], told["bytes_in"]["forward"]) == ("refused", 0)
        assert "preflight: architecture" in told["error"]
        await set_to(hosts.beta, OFF)  # it neither judges nor says anything of itself
        await passes(machine)
        await set_to(hosts.beta, "")
        await refused(machine)
        await set_to(hosts.alpha, OFF)
        await passes(machine)

    run(story(), 120)


def test_by_the_daemon_s_own_file(hosts: Pair) -> None:
    alpha, beta = hosts.alpha, hosts.beta
    for name in ("vm0", beta.name):  # an ingress, whose egress is asked for; and a peer
        egress = () if name == "vm0" else ("--egress", "vm0")
        code, sheet = by_hand(alpha.config, "--to", name, *egress)
        assert (code, sheet["peer"], failed(sheet)) == (3, "beta", ["architecture"])
        assert sheet["peer_host"]["machine"] == "i686"
    code, sheet = by_hand(alpha.config, "--to", beta.name)
    assert (code, failed(sheet), sheet["peer_host"]) == (3, ["egress"], None)
    code, sheet = by_hand(
        beta.config, "--to", alpha.name, "--egress", "vm0"
    )  # alpha has no egress, and does not listen
    assert (code, failed(sheet)) == (6, ["connection"])
    code, sheet = by_hand(alpha.config)
    assert (code, sheet["peer_host"]) == (0, None)
    assert beta.status()["sessions_ended"] == 0
    assert beta.status()["peers_refused"] == 0

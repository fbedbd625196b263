"""Relays as the commands an operator types: looked at before each session, and by `korora preflight`."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from crypto.pki import Authority
from tests.attacks.processes import KORORA, Relay

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
STREAM = os.urandom(300_000)


async def run(*arguments: str | Path, **environment: str) -> tuple[int, str, str]:
    """A command of ours: its exit code, its standard output and standard error."""
    command = [*KORORA, *(str(argument) for argument in arguments)]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, check=False, timeout=60, env=os.environ | environment
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@asynccontextmanager
async def receiver(identity: Path, target: Path, *options: str | Path) -> AsyncIterator[tuple[Relay, int]]:
    async with Relay(
        *("receive", "--listen", "127.0.0.1:0", "--to", f"file:{target}", "--identity", identity, *options)
    ) as relay:
        yield relay, await relay.listening()


def found(sheet: dict[str, Any]) -> dict[str, str]:
    return {finding["check"]: finding["grade"] for finding in sheet["findings"]}


async def test_by_hand(tmp_path: Path, identity_alpha: Path, identity_beta: Path) -> None:
    async with receiver(identity_beta, tmp_path / "out") as (_, port):
        peer = f"127.0.0.1:{port}"
        code, said, _ = await run("preflight", peer, "--identity", identity_alpha, "--json")
        sheet = json.loads(said)
        assert (code, sheet["exit_code"], sheet["peer"]) == (0, 0, "beta"), sheet
        grades = found(sheet)
        assert "failed" not in grades.values()
        assert all(grades[name] == "ok" for name in ("connection", "authentication", "attestation", "egress", "relay"))
        assert sheet["this_host"]["features"] == sheet["peer_host"]["features"]
        code, said, _ = await run("preflight", peer, "--identity", identity_alpha, "--memory", "4000T", "--json")
        assert (code, found(json.loads(said))["memory"]) == (3, "failed")
        code, said, errors = await run("preflight", peer, "--identity", identity_alpha, "--egress", "other")
        assert (code, errors) == (3, "")
        (line,) = (line for line in said.splitlines() if line.startswith("egress"))
        assert line.endswith("failed")
        assert "there is no egress 'other' here" in said
        assert "→" in said
    code, said, _ = await run("preflight", peer, "--identity", identity_alpha, "--json")
    assert (code, found(json.loads(said))["connection"]) == (6, "failed")
    assert not (tmp_path / "out").exists()


async def test_this_host_alone(tmp_path: Path) -> None:
    code, said, errors = await run("preflight", "--identity", tmp_path)
    assert (code, errors) == (0, "")
    assert said.splitlines()[0].split() == ["CHECK", "THIS", "HOST", "GRADE"]
    for words in (["--to", "x"], ["--memory", "much"], ["--memory", "1G", "--vm", "x"]):
        code, _, errors = await run("preflight", *words)
        assert code == 2
        assert errors.startswith("korora: error: ")


async def test_a_stranger(tmp_path: Path, identity_beta: Path) -> None:
    stranger = Authority.create(tmp_path / "ca", now=datetime.now(UTC)).issue("alpha", now=datetime.now(UTC)).directory
    async with receiver(identity_beta, tmp_path / "out") as (_, port):
        code, said, _ = await run("preflight", f"127.0.0.1:{port}", "--identity", stranger, "--json")
        sheet = json.loads(said)
        assert (code, found(sheet)["authentication"], sheet["peer_host"]) == (4, "failed", None)


# Another architecture, as far as uname(2) tells: the kernel of this host runs both.
ODD = ("setarch", "i686", *KORORA)


async def migrate(
    tmp_path: Path, alpha: Path, beta: Path, modes: tuple[str, str] = ("on", "on"), odd: str = ""
) -> tuple[Relay, Relay, list[int]]:
    """A file from one to the other, by relays of these modes; the one called `odd` is of another architecture."""
    await asyncio.to_thread((tmp_path / "in").write_bytes, STREAM)
    options = ("--once", "--resume-timeout", "0", "--report")
    receive = Relay(
        *("receive", "--listen", "127.0.0.1:0", "--to", f"file:{tmp_path / 'out'}", "--identity", beta),
        *(*options, tmp_path / "b.json", "--preflight", modes[1]),
    )
    receive.command = ODD if odd == "beta" else KORORA
    async with receive:
        send = Relay(
            *("send", "--from", f"file:{tmp_path / 'in'}", "--peer", f"127.0.0.1:{await receive.listening()}"),
            *("--identity", alpha, *options, tmp_path / "a.json", "--preflight", modes[0]),
        )
        send.command = ODD if odd == "alpha" else KORORA
        async with send:
            return send, receive, [await send.ended(), await receive.ended()]


def report(tmp_path: Path, name: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
    return told


@pytest.mark.parametrize("modes", [("on", "on"), ("off", "on"), ("on", "off"), ("strict", "strict")])
async def test_two_alike_migrate(
    modes: tuple[str, str], tmp_path: Path, identity_alpha: Path, identity_beta: Path
) -> None:
    _, _, codes = await migrate(tmp_path, identity_alpha, identity_beta, modes)
    assert codes == [0, 0]
    assert (tmp_path / "out").read_bytes() == STREAM
    assert [report(tmp_path, name)["preflight"] for name in ("a", "b")] == [[], []]


@pytest.mark.skipif(os.uname().machine != "x86_64" or shutil.which("setarch") is None, reason="needs setarch on x86-64")
@pytest.mark.parametrize("odd", ["alpha", "beta"])
async def test_two_that_do_not_fit(odd: str, tmp_path: Path, identity_alpha: Path, identity_beta: Path) -> None:
    """No byte arrives, both say 3, and both operators read what is wrong and what to do."""
    send, receive, codes = await migrate(tmp_path, identity_alpha, identity_beta, odd=odd)
    assert codes == [3, 3]
    for relay in (send, receive):
        assert "preflight: architecture: the source is " in relay.complaint
        assert "migrate to a host of the same architecture" in relay.complaint
    assert [name for name in os.listdir(tmp_path) if name.startswith("out")] == []
    assert report(tmp_path, "a")["bytes_in"] == {"forward": 0, "backward": 0}


@pytest.mark.skipif(os.uname().machine != "x86_64" or shutil.which("setarch") is None, reason="needs setarch on x86-64")
async def test_it_can_be_turned_off(tmp_path: Path, identity_alpha: Path, identity_beta: Path) -> None:
    for modes in (("off", "on"), ("on", "off")):
        _, _, codes = await migrate(tmp_path, identity_alpha, identity_beta, modes, odd="alpha")
        assert codes == [0, 0]
        assert (tmp_path / "out").read_bytes() == STREAM
        await asyncio.to_thread((tmp_path / "out").unlink)

"""xl: endpoint: the process that takes an arriving domain is told -p, wound down when cut, and outlives the relay."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from crypto.tls import TlsConfig
from proxy.endpoints import pipes
from proxy.endpoints import scope as systemd
from proxy.endpoints.pipes import ProcessConnection
from proxy.endpoints.scope import scope
from proxy.endpoints.xl import XlEgress
from proxy.errors import EXIT_HYPERVISOR, HypervisorFailed, exit_code_of
from tests.proxy.streams.made import xl_header
from tests.proxy.support import Ended, over_tcp, relays, run, until
from tests.standins.xen_host import XenHost, guest_stream
from tests.standins.xl import BANNER, GO, READY, REPORT

HEADER = xl_header(b"{}")[:48]


@pytest.fixture
def host(tmp_path: Path) -> XenHost:
    return XenHost(tmp_path / "host")


def failed_with_7(ended: tuple[Ended, Ended]) -> None:
    for side in ended:
        assert side.error is not None
        assert exit_code_of(side.error) == EXIT_HYPERVISOR


def unguarded(*args: Any, **keywords: Any) -> XlEgress:
    """The endpoint alone: what the guard adds to it is tested with the guard."""
    egress = XlEgress(*args, **keywords)
    egress.handover = ""
    return egress


def python(code: str) -> str:
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_program_that_cannot_be_started() -> None:
    async def story() -> None:
        with pytest.raises(HypervisorFailed, match="cannot start xl"):
            await XlEgress("", "xl:", program="/nonexistent/xl", environ={}).connect("")

    run(story())


@pytest.mark.parametrize(
    ("own", "asked", "given"), [("", "", "-p"), ("d", "", "-d -p"), ("d", "p", "-d -p"), ("p", "e", "-e -p")]
)
def test_a_whole_migration(
    client_tls: TlsConfig, server_tls: TlsConfig, host: XenHost, *, own: str, asked: str, given: str
) -> None:
    """xl never starts the domain by itself, whatever the operator and the source want of it."""
    guest = guest_stream("g1")

    async def session() -> None:
        hypervisors = over_tcp()
        egress = unguarded(own, "xl:", program=str(host.program))
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, egress, xl_flags=asked) as pair:
                near = await hypervisors.connect()
                assert await near.exactly(54) == BANNER
                await near.send(guest)
                assert await near.exactly(34) == READY
                await near.send(GO)
                assert await near.exactly(40) == REPORT + b"\0"
                near.shut()
                assert await near.to_end() == b""
                source, _ = await pair.ended_well()
                assert source.stream_format == "xl"
                assert source.bytes_in == {"forward": len(guest) + 44, "backward": 54 + 34 + 40}
        finally:
            hypervisors.close()

    run(session())
    assert host.log[0] == f"migrate-receive {given}"
    assert host.states == {"g1": "paused"}
    assert host.stream_of("g1") == guest


def test_a_rename_that_fails(client_tls: TlsConfig, server_tls: TlsConfig, host: XenHost) -> None:
    """A status and the permission go back to the source, which resumes by itself: relays carry them as they are."""
    host.create("g1", uuid="0f9c2f1e-0000-4000-8000-0000000000ff")

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            egress = unguarded("", "xl:", program=str(host.program))
            async with relays(client_tls, server_tls, hypervisors.ingress, egress) as pair:
                near = await hypervisors.connect()
                await near.exactly(54)
                await near.send(guest_stream("g1"))
                await near.exactly(34)
                await near.send(GO)
                near.shut()
                assert await near.to_end() == REPORT + b"\6" + GO
                await pair.ended_well()
        finally:
            hypervisors.close()

    run(session())
    assert host.states == {"g1": "running"}


@pytest.mark.parametrize("moment", ["in the stream", "before GO", "half of GO"])
def test_a_cut_xl_migration_is_wound_down(
    client_tls: TlsConfig, server_tls: TlsConfig, host: XenHost, moment: str
) -> None:
    """Its input is shut, its answer read to the end, and it is not killed: only so does it destroy its copy."""
    guest = guest_stream("g1")

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            egress = unguarded("", "xl:", program=str(host.program))
            async with relays(client_tls, server_tls, hypervisors.ingress, egress) as pair:
                near = await hypervisors.connect()
                await near.exactly(54)
                await near.send(guest[: len(guest) // 2])
                await until(lambda: host.states)
                if moment != "in the stream":
                    await near.send(guest[len(guest) // 2 :])
                    await near.exactly(34)
                if moment == "half of GO":
                    await near.send(GO[:20])
                near.reset()
                failed_with_7(await pair.ended())
                # The session is over for the relay only when xl has ended.
                assert host.states == {}
                connection = next(iter(pair.arriving[0].channels.values())).connection
                assert isinstance(connection, ProcessConnection)
                assert connection._process.returncode == (1 if moment == "in the stream" else 0)
        finally:
            hypervisors.close()

    run(session())


# ------------------------------------------------------------------ under systemd


def systemd_run(folder: Path) -> Path:
    """Something called systemd-run that does what it does for a scope: note its words, and give its place away."""
    program = folder / "systemd-run"
    program.write_text(
        f'#!/bin/sh\necho "$@" > {folder}/words\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n'
    )
    program.chmod(0o755)
    return program


def test_under_systemd_the_receiver_gets_a_scope_of_its_own(
    tmp_path: Path, host: XenHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "_SYSTEMD", tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    systemd_run(tools)
    environ = {"INVOCATION_ID": "0" * 32, "PATH": str(tools)}

    async def story() -> None:
        connection = await XlEgress("e", "xl:", program=str(host.program), environ=environ).connect("")
        try:
            await until(lambda: host.log)
            # The same process: its pipes, its status and its group are the receiver's.
            assert host.processes == {connection._process.pid}
        finally:
            await connection.abort()

    run(story())
    words = (tools / "words").read_text().split()
    assert words[:3] == ["--scope", "--collect", "--quiet"]
    assert re.fullmatch(r"--unit=korora-xl-[0-9a-f]{12}", words[3])
    assert words[4:] == ["--", str(host.program), "migrate-receive", "-e", "-p"]


@pytest.mark.parametrize("lacking", ["INVOCATION_ID", "PATH", "systemd"])
def test_elsewhere_it_is_started_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    systemd_run(tmp_path)
    monkeypatch.setattr(systemd, "_SYSTEMD", tmp_path / ("nothing" if lacking == "systemd" else ""))
    environ = {"INVOCATION_ID": "0" * 32, "PATH": str(tmp_path)}
    if lacking == "PATH":
        environ["PATH"] = "/nonexistent"
    else:
        environ.pop(lacking, None)
    assert scope("korora-xl", environ) == []


def test_no_two_scopes_have_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemd_run(tmp_path)
    monkeypatch.setattr(systemd, "_SYSTEMD", tmp_path)
    environ = {"INVOCATION_ID": "0" * 32, "PATH": str(tmp_path)}
    assert len({tuple(scope("korora-xl", environ)) for _ in range(50)}) == 50


# ------------------------------------------------------------------ a captured migration, byte by byte

CHECKOUT = Path(__file__).parents[3]
CORPUS = Path(os.environ.get("KORORA_SHARED", CHECKOUT.parent / "shared")) / "corpus"
ZSTD = shutil.which("zstd")
REAL = CORPUS / "xen417-live-idle-a.xlmig-up.zst"

REAL_RECEIVER = f"""#!{sys.executable}
import hashlib, sys
out, inp = sys.stdout.buffer, sys.stdin.buffer
said = open(sys.argv[0] + ".down", "rb").read()
length = int(open(sys.argv[0] + ".length").read())
def say(count):
    global said
    out.write(said[:count]); out.flush()
    said = said[count:]
say(54)
digest = hashlib.sha256()
while length > 44:
    piece = inp.read1(min(1 << 20, length - 44))
    if not piece:
        sys.exit(1)
    digest.update(piece)
    length -= len(piece)
say(34)
digest.update(inp.read(44))
say(40)
open(sys.argv[0] + ".sha256", "w").write(digest.hexdigest())
"""


@pytest.mark.skipif(not REAL.exists() or ZSTD is None, reason="no corpus of whole streams (KORORA_SHARED), or no zstd")
def test_a_captured_xl_migration(client_tls: TlsConfig, server_tls: TlsConfig, tmp_path: Path) -> None:
    """Both sides of a real live migration, byte by byte, in the order in which xl says them."""
    assert ZSTD is not None
    up = subprocess.run([ZSTD, "-dcq", "--long=27", str(REAL)], capture_output=True, check=True).stdout
    down = REAL.with_name("xen417-live-idle-a.xlmig-down").read_bytes()
    assert (down[:54], down[54:88], down[88:]) == (BANNER, READY, REPORT + b"\0")
    program = tmp_path / "xl"
    program.write_text(REAL_RECEIVER)
    program.chmod(0o755)
    program.with_name("xl.down").write_bytes(down)
    program.with_name("xl.length").write_text(str(len(up)))

    async def session() -> None:
        hypervisors = over_tcp()
        egress = unguarded("", "xl:", program=str(program), environ={})
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, egress) as pair:
                near = await hypervisors.connect()
                heard = await near.exactly(54)
                await near.send(up[:-44])
                heard += await near.exactly(34)
                await near.send(up[-44:])
                heard += await near.exactly(40)
                near.shut()
                assert await near.to_end() == b""
                assert heard == down
                source, _ = await pair.ended_well()
                assert source.bytes_in == {"forward": len(up), "backward": 128}
        finally:
            hypervisors.close()

    run(session())
    assert program.with_name("xl.sha256").read_text() == hashlib.sha256(up).hexdigest()


# ------------------------------------------------------------------ programs that do not behave


def test_an_xl_that_says_more_than_a_pipe_holds_while_it_is_wound_down(
    client_tls: TlsConfig, server_tls: TlsConfig, tmp_path: Path
) -> None:
    """Its answer is read on, however long: an xl blocked on its output would never destroy its copy."""
    program, done = tmp_path / "xl", tmp_path / "done"
    talk = "import sys; sys.stdin.buffer.read(); sys.stdout.buffer.write(bytes(5_000_000)); sys.stdout.flush()"
    program.write_text(f"#!/bin/sh\n{python(talk)}\ntouch {done}\n")
    program.chmod(0o755)

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            egress = unguarded("", "xl:", program=str(program))
            async with relays(client_tls, server_tls, hypervisors.ingress, egress) as pair:
                near = await hypervisors.connect()
                await near.send(HEADER)
                await until(lambda: pair.arriving and pair.arriving[0].session.receivers)
                near.reset()
                await pair.ended()
        finally:
            hypervisors.close()

    run(session())
    assert done.exists()


def test_an_xl_that_never_ends_is_killed_in_the_end(
    client_tls: TlsConfig, server_tls: TlsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "WIND_DOWN_SECONDS_MAX", 0.2)
    program, pid = tmp_path / "xl", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 600\n")
    program.chmod(0o755)

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            egress = unguarded("", "xl:", program=str(program))
            async with relays(client_tls, server_tls, hypervisors.ingress, egress) as pair:
                near = await hypervisors.connect()
                await near.send(HEADER)
                await until(lambda: pid.exists() and pid.read_text().endswith("\n"))
                near.reset()
                await pair.ended()
        finally:
            hypervisors.close()

    run(session())
    assert not alive(int(pid.read_text()))


def test_winding_down_does_not_spin(client_tls: TlsConfig, server_tls: TlsConfig, tmp_path: Path) -> None:
    """An xl that has closed its output and is still at work is waited for, not asked a million times."""
    program = tmp_path / "xl"
    program.write_text("#!/bin/sh\ncat > /dev/null\nexec >&-\nsleep 0.6\n")
    program.chmod(0o755)

    async def session() -> float:
        hypervisors = over_tcp()
        try:
            egress = unguarded("", "xl:", program=str(program))
            async with relays(client_tls, server_tls, hypervisors.ingress, egress) as pair:
                near = await hypervisors.connect()
                await near.send(HEADER)
                await until(lambda: pair.arriving and pair.arriving[0].session.receivers)
                began = time.process_time()
                near.reset()
                await pair.ended()
                return time.process_time() - began
        finally:
            hypervisors.close()

    assert run(session()) < 0.3

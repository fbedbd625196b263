"""The control socket, and the commands that use it."""

import asyncio
import json
import multiprocessing
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from korora.daemon.control import LINE_BYTES_MAX
from tests.korora.daemon.support import SECONDS_MAX, Host, Site, echo, exchange, in_thread, until
from tests.korora.daemon.test_sessions import Pair, pair
from tests.proxy.support import Wire, run

MIB = 1024 * 1024
NOBODY = 65_534


@pytest.fixture
def hosts(site: Site) -> Pair:
    return pair(site, 2)


def korora(host: Host, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "korora", *words, "--control", str(host.control)],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )


def raw(host: Host, line: bytes) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SECONDS_MAX)
        sock.connect(str(host.control))
        sock.sendall(line)
        with sock.makefile("rb") as stream:
            answer: dict[str, Any] = json.loads(stream.readline())
    return answer


def test_top_shows_what_goes_on(hosts: Pair) -> None:
    hosts.start()

    async def story() -> None:
        channels = [await machine.channel() for machine in hosts.machines]
        for near, far in channels:
            await near.send(bytes(MIB))
            await far.exactly(MIB)
        await in_thread(until, lambda: all(session["bytes_in"] == MIB for session in hosts.alpha.sessions()))
        shown = await in_thread(korora, hosts.alpha, "top", "--once", "--json")
        status = json.loads(shown.stdout)
        assert {session["way"] for session in status["sessions"]} == {"vm0", "vm1"}
        for session in status["sessions"]:
            assert (session["role"], session["peer"], session["priority"]) == ("source", "beta", "normal")
            assert (session["rounds"], session["eta_seconds"]) == (None, None)
        lines = (await in_thread(korora, hosts.beta, "top", "--once")).stdout.splitlines()
        assert lines[0].startswith("beta serving for ")
        assert len(lines) == 3
        for line in lines[1:]:
            assert " peer=←alpha moved=1.0MiB " in line
            assert " rounds=— ETA=— state=open" in line
        for ends in channels:
            await exchange(*ends, b"", b"")
        await in_thread(until, lambda: not hosts.alpha.sessions())
        finished = (await in_thread(hosts.alpha.status))["finished"]
        assert [entry["bytes_in"] for entry in finished] == [MIB, MIB]

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()


@pytest.mark.parametrize("side", ["alpha", "beta"])
def test_a_session_is_cancelled(hosts: Pair, side: str) -> None:
    hosts.start()
    where: Host = getattr(hosts, side)

    async def story() -> None:
        (near, far), others = [await machine.channel() for machine in hosts.machines]
        await echo(near, far)
        await echo(*others)
        (session,) = [entry for entry in await in_thread(where.sessions) if entry["way"] == "vm0"]
        done = await in_thread(korora, where, "ctl", "cancel", session["session_id"][:8])
        assert (done.returncode, done.stdout) == (0, f"session {session['session_id']} is cancelled\n")
        assert await near.broken()
        assert await far.broken()
        await echo(*others)
        for host in (hosts.alpha, hosts.beta):
            (report,) = await in_thread(until, host.reports)
            assert (report["session_id"], report["exit_code"], report["outcome"]) == (
                session["session_id"],
                3,
                "refused",
            )
            assert f"cancelled by an operator of {side}" in report["error"]
        again = await in_thread(korora, where, "ctl", "cancel", session["session_id"])
        assert again.returncode == 2
        assert again.stderr.startswith(f"korora: error: no session '{session['session_id']}' is open")

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()


def test_a_session_is_given_more_lanes_and_fewer(hosts: Pair) -> None:
    hosts.start()
    alpha, beta = hosts.alpha, hosts.beta

    async def story() -> None:
        near, far = await hosts.machines[0].channel()
        await echo(near, far)
        session = (await in_thread(alpha.sessions))[0]["session_id"]
        for count in (4, 1):
            done = await in_thread(korora, alpha, "ctl", "lanes", session[:8], str(count))
            assert (done.returncode, done.stdout) == (0, f"session {session}: {count} lanes\n")
            for host in (alpha, beta):
                await in_thread(until, lambda host=host, count=count: host.sessions()[0]["lanes"] == count)
            await echo(near, far)
        refused = await in_thread(korora, beta, "ctl", "lanes", session, "2")
        assert refused.returncode == 2
        assert "that session arrives here" in refused.stderr
        await exchange(near, far, b"", b"")
        for host in (alpha, beta):
            (report,) = await in_thread(until, host.reports)
            assert (report["lanes"], report["lanes_lost"], report["exit_code"]) == (4, 0, 0)

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()


SETTLE_SECONDS = 2.2  # rates are divided anew once a second, and what was in flight must have arrived
MEASURE_SECONDS = 1.5


class Flow:
    """A session through which as much is sent as gets through; counts what arrives."""

    def __init__(self, near: Wire, far: Wire) -> None:
        self.got = 0
        self._ends = near, far
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._receive())]

    async def _send(self) -> None:
        while True:
            await self._ends[0].send(bytes(64 * 1024))

    async def _receive(self) -> None:
        while data := await self._ends[1].receive():
            self.got += len(data)

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def speeds(*flows: Flow) -> list[float]:
    """MiB a second of each, once they have settled."""
    await asyncio.sleep(SETTLE_SECONDS)
    began, before = time.monotonic(), [flow.got for flow in flows]
    await asyncio.sleep(MEASURE_SECONDS)
    elapsed = time.monotonic() - began
    return [(flow.got - had) / elapsed / MIB for flow, had in zip(flows, before, strict=True)]


def test_limits_and_priorities_hold(site: Site) -> None:
    """Two sessions of different priority share a total; a limit for one leaves the rest to the other."""
    hosts = pair(site, 2, workers=2)  # one session in each: the total is of all workers
    alpha = hosts.alpha
    alpha.tables[1] += 'priority = "high"\n'
    alpha.settings = '[limits]\nrate_limit = "10 MiB/s"\n'
    hosts.start()

    async def story() -> None:
        flows = [Flow(*(await machine.channel())) for machine in hosts.machines]
        high, normal = await speeds(*flows)
        assert 8.5 < high + normal < 11.5
        assert 2.8 < high / normal < 5.5
        sessions = {entry["way"]: entry for entry in await in_thread(alpha.sessions)}
        assert sessions["vm0"]["rate_limit"] == pytest.approx(8 * MIB, rel=0.05)
        first = sessions["vm0"]["session_id"]
        done = await in_thread(korora, alpha, "ctl", "limit", first, "1 MiB/s")
        assert done.stdout == f"{first}: 1,048,576 bytes a second at most\n"
        high, normal = await speeds(*flows)
        assert 0.7 < high < 1.4
        assert 7.5 < normal < 10.5
        for which in ("all", first):
            assert await in_thread(_limit, alpha, which, None) == {"ok": True, "rate": None}
        assert min(await speeds(*flows)) > 15
        for flow in flows:
            await flow.end()

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()


def _limit(host: Host, session: str, rate: Any) -> dict[str, Any]:
    return host.ask("limit", session=session, rate=rate)


def test_an_idle_session_leaves_its_share_to_the_others(site: Site) -> None:
    hosts = pair(site, 2)
    hosts.alpha.tables[1] += 'priority = "high"\n'
    hosts.alpha.settings = '[limits]\nrate_limit = "8 MiB/s"\n'
    hosts.start()

    async def story() -> None:
        idle, busy = [await machine.channel() for machine in hosts.machines]
        await echo(*idle)
        flow = Flow(*busy)
        (speed,) = await speeds(flow)
        assert 6 < speed < 9  # by weight alone it would have 1.6
        await flow.end()

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()


def _ask_as_nobody(path: str, answers: "multiprocessing.Queue[bytes]") -> None:
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SECONDS_MAX)
        sock.connect(path)
        sock.sendall(b'{"command":"drain"}\n')
        answers.put(sock.recv(1000))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_not_heard(site: Site) -> None:
    """Even where the socket's mode would let him: the kernel says who he is."""
    hosts = pair(site, 1)
    hosts.close()
    hosts.alpha.start()
    assert hosts.alpha.control.stat().st_mode & 0o777 == 0o600
    hosts.alpha.control.chmod(0o666)
    # pytest's own folders are for their owner only.
    closed = {path: path.stat().st_mode for path in hosts.alpha.control.parents if not path.stat().st_mode & 0o001}
    for path, mode in closed.items():
        path.chmod(mode | 0o011)
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[bytes] = context.Queue()
    process = context.Process(target=_ask_as_nobody, args=(str(hosts.alpha.control), answers))
    process.start()
    try:
        answer = json.loads(answers.get(timeout=SECONDS_MAX))
    finally:
        process.join(SECONDS_MAX)
        for path, mode in closed.items():
            path.chmod(mode)
    assert answer == {"ok": False, "error": f"user {NOBODY} may not control this daemon"}
    assert hosts.alpha.status()["phase"] == "serving"
    assert [event["uid"] for event in hosts.alpha.events("somebody else was refused at the control socket")] == [NOBODY]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"status\n", "no request: "),
        (b'{"command":"format"}\n', "no request: "),
        (b'{"command":"cancel"}\n', "missing required field `session`"),
        (b'{"command":"cancel","session":"0"}\n', "at least 4 digits"),
        (b'{"command":"cancel","session":"0000"}\n', "no session '0000' is open"),
        (b'{"command":"limit","session":"all","rate":"fast"}\n', "'fast' is no rate"),
        (b'{"command":"limit","session":"all","rate":5}\n', "no request: "),
        (b'{"command":"status","more":1}\n', "unknown field `more`"),
        (b"\xff\xfe\n", "no request: "),
        (b"x" * (LINE_BYTES_MAX * 3) + b"\n", f"at most {LINE_BYTES_MAX} bytes"),
    ],
)
def test_what_is_no_request_gets_an_answer(one: Host, line: bytes, words: str) -> None:
    answer = raw(one, line)
    assert answer["ok"] is False
    assert words in answer["error"]
    assert one.status()["ok"] is True


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A daemon that nothing is sent through."""
    site = Site(tmp_path_factory.mktemp("site"))
    host = site.host("alpha", workers=1)
    host.peer("beta", "127.0.0.1:1")
    host.ingress("vm0", "beta")
    host.start()
    yield host
    site.close()


def test_top_on_a_terminal(one: Host) -> None:
    """Drawn over and over until Ctrl-C, which is no failure."""
    near, far = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "korora", "top", "--control", str(one.control), "--interval", "0.2"],
        stdin=far,
        stdout=far,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "150"},
    ) as process:
        os.close(far)
        drawn = b""
        try:
            while drawn.count(b"alpha serving for") < 3:
                drawn += os.read(near, 4096)
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS_MAX) == 0
            assert process.stderr is not None
            assert process.stderr.read() == b""
        finally:
            process.kill()
            os.close(near)
    assert b"RTT" in drawn


def test_many_requests_on_one_connection(one: Host) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SECONDS_MAX)
        sock.connect(str(one.control))
        sock.sendall(b'{"command":"status"}\n' * 20)
        with sock.makefile("rb") as stream:
            assert all(json.loads(stream.readline())["ok"] for _ in range(20))


def test_commands_without_a_daemon(site: Site) -> None:
    host = site.host("alpha")
    for words in (("top", "--once"), ("ctl", "drain"), ("ctl", "limit", "all", "none")):
        done = korora(host, *words)
        assert done.returncode == 2
        assert done.stderr.startswith(f"korora: error: cannot reach a daemon at {host.control}: ")
        assert done.stderr.count("\n") == 1


def test_a_rate_that_is_none(one: Host) -> None:
    for rate in ("fast", "5", "5 MiB", "1e9"):
        done = korora(one, "ctl", "limit", "all", rate)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("korora: error: RATE: ")


def test_ctl_reload_and_drain(site: Site) -> None:
    host = site.host("alpha", workers=1)
    host.peer("beta", "127.0.0.1:1")
    host.ingress("vm0", "beta")
    host.start()
    assert korora(host, "ctl", "reload").stdout == "reloaded\n"
    host.workers = 2
    host.write()
    assert korora(host, "ctl", "reload").stdout == "reloaded; waits for a restart: workers\n"
    assert korora(host, "ctl", "drain", "--json").stdout == '{"sessions": 0}\n'
    assert host.wait() == 0
    assert not host.control.exists()

"""How the daemon ends, and what it tells the service manager meanwhile."""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.korora.daemon.support import (
    SECONDS_MAX,
    SERVE,
    Machine,
    Site,
    echo,
    exchange,
    in_thread,
    until,
    waiting_hypervisor,
)
from tests.korora.daemon.test_sessions import pair
from tests.proxy.support import Wire, run


async def closed(machine: Machine) -> bool:
    """Whether nobody takes migrations there any more."""
    try:
        wire = await machine.connect()
    except ConnectionRefusedError:
        return True
    return await wire.broken()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("side", ["alpha", "beta"])
def test_a_drain_lets_what_runs_finish_and_takes_nothing_new(site: Site, side: str, number: signal.Signals) -> None:
    hosts = pair(site, 2)
    hosts.start()
    drained = hosts.alpha if side == "alpha" else hosts.beta

    async def story() -> None:
        running, idle = hosts.machines
        ends = await running.channel()
        await echo(*ends)
        drained.signal(number)
        await in_thread(until, lambda: drained.status()["phase"] == "draining")
        # A further connection of the running migration is let in, and a new migration is not.
        await exchange(*await running.channel(), b"a further", b"channel")
        assert await closed(idle)
        if side == "beta":
            (refused,) = await in_thread(until, lambda: hosts.alpha.status()["finished"])
            assert refused["exit_code"] == 3
            assert "no further session is taken now" in refused["error"]
        await exchange(*ends, bytes(3_000_000), b"and whole")
        if side == "alpha":
            assert await in_thread(drained.wait) == 0
            assert await closed(running)
        assert await in_thread(drained.wait) == 0

    try:
        run(story(), SECONDS_MAX)
        assert "done" in [report["outcome"] for report in drained.reports()]
        assert not drained.control.exists()
    finally:
        hosts.close()


def test_ctrl_c_at_a_terminal_is_the_parent_s_to_answer(site: Site) -> None:
    """It goes to the whole group of processes, and the workers carry on."""
    hosts = pair(site, 1)
    hosts.start()
    alpha = hosts.alpha

    async def story() -> None:
        ends = await hosts.machines[0].channel()
        await echo(*ends)
        assert alpha.process is not None
        os.killpg(alpha.process.pid, signal.SIGINT)
        await in_thread(until, lambda: alpha.status()["phase"] == "draining")
        await exchange(*ends, bytes(2_000_000), b"whole")
        assert await in_thread(alpha.wait) == 0

    try:
        run(story(), SECONDS_MAX)
        assert [report["outcome"] for report in alpha.reports()] == ["done"]
    finally:
        hosts.close()


def test_a_drain_without_sessions_ends_at_once(site: Site) -> None:
    hosts = pair(site, 1)
    hosts.start()
    for host in (hosts.alpha, hosts.beta):
        host.signal(signal.SIGTERM)
        assert host.wait() == 0
    hosts.close()


@pytest.mark.parametrize("side", ["alpha", "beta"])
@pytest.mark.parametrize("how", ["second signal", "bound"])
def test_what_is_left_is_ended(site: Site, side: str, how: str) -> None:
    hosts = pair(site, 1)
    ended, other = (hosts.alpha, hosts.beta) if side == "alpha" else (hosts.beta, hosts.alpha)
    if how == "bound":
        ended.settings = "[limits]\ndrain_timeout = 1\n"
    hosts.start()

    async def story() -> None:
        near, far = await hosts.machines[0].channel()
        await echo(near, far)
        ended.signal(signal.SIGTERM)
        if how == "second signal":
            await in_thread(until, lambda: ended.status()["phase"] == "draining")
            await echo(near, far)
            ended.signal(signal.SIGTERM)
        assert await near.broken()
        assert await far.broken()
        assert await in_thread(ended.wait) == 143
        (report,) = ended.reports()
        assert (report["outcome"], report["exit_code"]) == ("interrupted", 143)
        (told,) = await in_thread(until, other.reports)
        assert (told["exit_code"], "stopped by signal 15" in told["error"]) == (6, True)

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()


def test_a_migration_that_is_being_agreed_on_is_ended_by_the_second_signal(site: Site) -> None:
    """Its peer accepts the connection and says nothing: the hypervisor is told at once, not when patience ends."""
    alpha = site.host("alpha")
    silent, endpoint = waiting_hypervisor()
    alpha.peer("beta", endpoint.removeprefix("tcp:"))
    machine_port = alpha.ingress("vm0", "beta")
    alpha.start()

    async def story() -> None:
        machine = Machine(machine_port, silent)
        near, _ = await machine.channel()
        alpha.signal(signal.SIGTERM)
        await in_thread(until, lambda: alpha.status()["phase"] == "draining")
        alpha.signal(signal.SIGTERM)
        assert await near.broken()
        assert await in_thread(alpha.wait) == 143
        machine.close()

    run(story(), 8.0)


# ------------------------------------------------------------------ the service manager


class Manager:
    """systemd's end of sd_notify."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.settimeout(SECONDS_MAX)
        self.heard: list[dict[str, str]] = []

    def until(self, name: str, value: str | None = None) -> dict[str, str]:
        """The next message that has this variable."""
        while True:
            message = dict(line.split("=", 1) for line in self.sock.recv(4096).decode().splitlines())
            self.heard.append(message)
            if name in message and value in {None, message[name]}:
                return message


def test_what_the_service_manager_is_told(site: Site, tmp_path: Path) -> None:
    hosts = pair(site, 1)
    manager = Manager(tmp_path / "notify")
    environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "400000"}
    hosts.beta.start(env=environment)
    hosts.alpha.start()

    async def story() -> None:
        assert (await in_thread(manager.until, "READY"))["STATUS"] == "serving"
        near, far = await hosts.machines[0].channel()
        await echo(near, far)
        await in_thread(manager.until, "STATUS", "serving: 1 sessions")
        for _ in range(3):
            await in_thread(manager.until, "WATCHDOG", "1")
        hosts.beta.signal(signal.SIGHUP)
        assert int((await in_thread(manager.until, "RELOADING", "1"))["MONOTONIC_USEC"]) > 0
        assert (await in_thread(manager.until, "READY"))["STATUS"] == "reloaded"
        hosts.beta.config.write_text("workers = 1000\n")
        hosts.beta.signal(signal.SIGHUP)
        await in_thread(manager.until, "RELOADING", "1")
        refused = (await in_thread(manager.until, "READY"))["STATUS"]
        assert "workers: expected int ≥ 0 and ≤ 64, got 1000" in refused
        hosts.beta.signal(signal.SIGTERM)
        await in_thread(manager.until, "STOPPING", "1")
        await in_thread(manager.until, "STATUS", "draining: 1 sessions")
        await exchange(near, far, b"the", b"end")
        assert await in_thread(hosts.beta.wait) == 0
        # No worker, and so no command of exec:, has the variables.
        assert "NOTIFY_SOCKET" not in environments

    def worker_environments() -> str:
        pids = [worker["pid"] for worker in hosts.beta.status()["workers"]]
        return "".join(Path(f"/proc/{pid}/environ").read_text() for pid in pids)

    environments = worker_environments()
    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()
        manager.sock.close()


# ------------------------------------------------------------------ socket activation

# What systemd does between fork and exec: descriptors from 3 on, and LISTEN_PID, which no parent can know.
ACTIVATE = (
    "import os, sys\n"
    "fds, names = [int(fd) for fd in sys.argv[1].split(',')], sys.argv[2]\n"
    "high = [os.dup2(fd, 100 + number) for number, fd in enumerate(fds)]\n"
    "for number, fd in enumerate(high):\n"
    "    os.dup2(fd, 3 + number)\n"
    "os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': str(len(fds)), 'LISTEN_FDNAMES': names}\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[3:]])\n"
)


def activated(sockets: dict[str, socket.socket]) -> list[str]:
    """The command that hands these sockets over."""
    fds = ",".join(str(sock.fileno()) for sock in sockets.values())
    return [sys.executable, "-c", ACTIVATE, fds, ":".join(sockets), *SERVE[1:]]


def test_sockets_that_the_service_manager_opened(site: Site, tmp_path: Path) -> None:
    hosts = pair(site, 1)
    alpha, beta = hosts.alpha, hosts.beta
    relay = socket.create_server(("127.0.0.1", 0))
    control = socket.socket(socket.AF_UNIX)
    control.bind(str(tmp_path / "beta.sock"))
    control.listen()
    ingress = socket.create_server(("127.0.0.1", 0))
    opened = [relay, control, ingress]
    for sock in opened:
        sock.set_inheritable(True)
    alpha.tables[0] = alpha.tables[0].replace(beta.address, f"127.0.0.1:{relay.getsockname()[1]}")
    hosts.machines[0].port = ingress.getsockname()[1]

    async def story() -> None:
        far = await hosts.machines[0].accept()
        await exchange(Wire(early), far, b"before anybody", b"was there")
        near, far = await hosts.machines[0].channel()
        await exchange(near, far, b"by inherited", b"sockets")
        assert (await in_thread(beta.status))["listen"] == f"127.0.0.1:{relay.getsockname()[1]}"
        # What is served by its own address would have been refused: the configured ports are not open.
        for port in (beta.port, int(alpha.tables[1].partition("127.0.0.1:")[2].partition('"')[0])):
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)

    early = socket.create_connection(ingress.getsockname())
    try:
        alpha.start(command=activated({"ingress-vm0": ingress}), ready=False)  # before its peer, whose port is open
        beta.start(command=activated({"relay": relay, "control": control}))
        run(story(), SECONDS_MAX)
        for host in (alpha, beta):
            host.signal(signal.SIGTERM)
            assert host.wait() == 0
        assert control.getsockname() == str(tmp_path / "beta.sock")
        assert os.path.exists(tmp_path / "beta.sock"), "the service manager's to remove"
    finally:
        hosts.close()
        for sock in (*opened, early):
            sock.close()


@pytest.mark.parametrize(
    ("name", "listening", "words"),
    [
        ("korora.socket", True, "socket 0 of LISTEN_FDS has the name 'korora.socket'"),
        ("ingress-other", True, "nothing here uses the inherited socket ingress-other"),
        ("relay", False, "the inherited socket 'relay' is no listening stream socket"),
    ],
)
def test_sockets_that_do_not_fit(site: Site, name: str, listening: bool, words: str) -> None:
    hosts = pair(site, 1)
    hosts.close()
    with socket.socket() as sock:
        if listening:
            sock.bind(("127.0.0.1", 0))
            sock.listen()
        sock.set_inheritable(True)
        hosts.beta.start(command=activated({name: sock}), ready=False)
        assert hosts.beta.wait() == 2
    assert f"korora: error: {words}" in hosts.beta.log()
    assert hosts.beta.log().count("korora: error: ") == 1


def test_a_worker_that_dies_while_it_drains_is_no_clean_end(site: Site) -> None:
    hosts = pair(site, 1)
    hosts.start()
    alpha = hosts.alpha

    async def story() -> None:
        near, far = await hosts.machines[0].channel()
        await echo(near, far)
        (worker,) = (await in_thread(alpha.status))["workers"]
        alpha.signal(signal.SIGTERM)
        await in_thread(until, lambda: alpha.status()["phase"] == "draining")
        os.kill(worker["pid"], signal.SIGKILL)
        assert await near.broken()
        assert await in_thread(alpha.wait) == 70

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()

"""A reload under load: what is good is taken over whole, what is bad changes nothing, open sessions notice neither."""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from crypto.identity import Identity
from tests.korora.daemon.support import SECONDS_MAX, Host, Machine, Site, echo, exchange, in_thread, until
from tests.korora.daemon.test_sessions import Pair, pair
from tests.proxy.support import Wire, run

CHUNK = bytes(range(256)) * 256


@pytest.fixture
def hosts(site: Site) -> "Pair":
    return pair(site, 3, workers=2)


@asynccontextmanager
async def load(machine: Machine) -> AsyncIterator[Callable[[], int]]:
    """A session that sends all the while, byte-exact; gives how much it has sent. Ends well with the block."""
    near, far = await machine.channel()
    ending = asyncio.Event()
    sent = 0

    async def send() -> None:
        nonlocal sent
        while not ending.is_set():
            await near.send(CHUNK)
            sent += len(CHUNK)
        near.shut()

    async def receive() -> int:
        got = 0
        while data := await far.receive():
            start = got % len(CHUNK)
            assert data == (CHUNK * (2 + len(data) // len(CHUNK)))[start : start + len(data)]
            got += len(data)
        far.shut()
        return got

    sending, receiving = asyncio.create_task(send()), asyncio.create_task(receive())
    try:
        yield lambda: sent
        ending.set()
        await sending
        assert await receiving == sent
        assert await near.receive() == b""
    finally:
        for task in (sending, receiving):
            task.cancel()


async def moves(sent: Callable[[], int]) -> None:
    """The session goes on."""
    before = sent()
    await in_thread(until, lambda: sent() > before + 10 * len(CHUNK))


async def refused(machine: Machine) -> None:
    """A migration that comes to nothing: its hypervisor sees a reset."""
    try:
        wire = await machine.connect()
    except ConnectionResetError:
        return  # before it has looked whether it is connected
    assert await wire.broken()


def renew(site: Site, host: Host) -> None:
    """A new certificate and key in the place of the old."""
    site.authority.issue(host.name, out=host.identity, force=True, now=datetime.now(UTC))


def leaf(host: Host) -> bytes:
    return Identity.load(host.identity, now=datetime.now(UTC)).spki_sha256


def test_a_rotated_certificate(site: Site, hosts: Pair) -> None:
    hosts.start()
    old = leaf(hosts.beta)

    async def story() -> None:
        async with load(hosts.machines[0]) as sent:
            await moves(sent)
            for host in (hosts.alpha, hosts.beta):
                renew(site, host)
                host.signal(signal.SIGHUP)
                await in_thread(until, lambda host=host: host.status()["reloads"] == {"good": 1, "bad": 0})
            await moves(sent)
            # Only the new key is let in from now on: a session that comes about proves that it is in use.
            hosts.alpha.tables[0] += f'pins = ["{leaf(hosts.beta).hex()}"]\n'
            hosts.alpha.write()
            assert (await in_thread(hosts.alpha.ask, "reload"))["ok"]
            await exchange(*await hosts.machines[1].channel(), b"under the new", b"certificates")
            await moves(sent)
            hosts.alpha.tables[0] = hosts.alpha.tables[0].replace(leaf(hosts.beta).hex(), old.hex())
            hosts.alpha.write()
            assert (await in_thread(hosts.alpha.ask, "reload"))["ok"]
            await refused(hosts.machines[2])
            await moves(sent)

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()


def test_a_revoked_peer(site: Site, hosts: Pair) -> None:
    """Its running session goes on until it ends; its next contact is refused."""
    hosts.start()

    async def story() -> None:
        async with load(hosts.machines[0]) as sent:
            site.authority.revoke("alpha", now=datetime.now(UTC))
            shutil.copy(site.folder / "ca" / "crl.pem", hosts.beta.identity / "crl.pem")
            assert (await in_thread(hosts.beta.ask, "reload"))["ok"]
            await refused(hosts.machines[1])
            await moves(sent)
        status = await in_thread(hosts.beta.status)
        assert status["peers_refused"] == 1
        assert "revoked" in status["last_refusals"][0]

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()


def _broken_key(host: Host) -> None:
    host.tables.append('[[ingress]]\nname = "x"\nfrom = "tcp:127.0.0.1:0"\npeer = "beta"\nlanes = 40\n')


def _no_crl(host: Host) -> None:
    (host.identity / "crl.pem").unlink()


def _port_in_use(host: Host) -> None:
    host.ingress("x", "beta")
    taken = host.tables[1].partition('from = "')[2].partition('"')[0]
    host.tables[-1] = f'[[ingress]]\nname = "x"\nfrom = "{taken.replace("127.0.0.1", "localhost")}"\npeer = "beta"\n'


def _no_file(host: Host) -> None:
    host.config.unlink()


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (_broken_key, ["alpha.toml: ingress[3].lanes: expected int ≥ 1 and ≤ 16, got 40"]),
        (_no_crl, ["crl.pem"]),
        (_port_in_use, ["cannot listen on"]),
        (_no_file, ["alpha.toml"]),
    ],
    ids=["key", "CRL", "port", "file"],
)
def test_what_is_bad_changes_nothing(hosts: Pair, spoil: Callable[[Host], None], names: list[str]) -> None:
    hosts.start()
    alpha = hosts.alpha

    async def story() -> None:
        async with load(hosts.machines[0]) as sent:
            await moves(sent)
            alpha.settings = "sessions_max = 7"
            spoil(alpha)
            if spoil is not _no_file:
                alpha.write()
            alpha.signal(signal.SIGHUP)
            await in_thread(until, lambda: alpha.status()["reloads"] == {"good": 0, "bad": 1})
            answer = await in_thread(alpha.ask, "reload")
            assert answer["ok"] is False
            for words in names:
                assert words in answer["error"]
            assert answer["remedy"]
            await moves(sent)
            assert (await in_thread(alpha.status))["sessions_max"] == 64
            await exchange(*await hosts.machines[1].channel(), b"by the old", b"configuration")

    try:
        run(story(), SECONDS_MAX)
        lines = [line for line in alpha.log().splitlines() if line.startswith("korora: error: ")]
        assert len(lines) == 1  # the control socket's answer went where it was asked
        assert names[0] in lines[0]
        assert "Traceback" not in alpha.log()
    finally:
        hosts.close()


def test_ingresses_egresses_and_peers_come_and_go(hosts: Pair) -> None:
    hosts.start()
    alpha, beta = hosts.alpha, hosts.beta

    async def story() -> None:
        kept, leaving, idle = hosts.machines
        async with load(leaving) as sent:
            # vm1 goes while it is busy, vm2 while it is idle, and vm9 comes; beta's egress for it comes, too.
            renamed = alpha.ingress("vm9", "beta", egress="vm9", more="lanes = 2\n")
            del alpha.tables[2:4]
            beta.egress("vm9", beta.tables[3].partition('to = "')[2].partition('"')[0])
            for host in (beta, alpha):
                host.write()
                assert (await in_thread(host.ask, "reload")) == {"ok": True, "restart_needed": []}
            await in_thread(until, lambda: len(alpha.status()["ingresses"]) == 3)
            names = {entry["name"]: entry["leaving"] for entry in (await in_thread(alpha.status))["ingresses"]}
            assert names == {"vm0": False, "vm1": True, "vm9": False}
            with pytest.raises(ConnectionRefusedError):
                await idle.connect()
            await moves(sent)
            kept_port, kept.port = kept.port, renamed
            await _through(kept, idle)
            kept.port = kept_port
            await exchange(*await kept.channel(), b"as", b"before")
        await in_thread(until, lambda: len(alpha.status()["ingresses"]) == 2)
        with pytest.raises(ConnectionRefusedError):
            await leaving.connect()
        # alpha is taken out of beta's table: it is refused by its name.
        beta.tables[0] = beta.tables[0].replace("alpha", "gamma")
        beta.write()
        assert (await in_thread(beta.ask, "reload"))["ok"]
        await refused(kept)
        assert "'alpha'" in (await in_thread(beta.status))["last_refusals"][-1]

    async def _through(departing: Machine, arriving: Machine) -> None:
        near = await departing.connect()
        far: Wire = await arriving.accept()
        await exchange(near, far, b"by the new", b"ingress")

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()


def test_what_waits_for_a_restart_is_said(hosts: Pair, tmp_path: Path) -> None:
    hosts.start()
    alpha = hosts.alpha
    alpha.workers = 1
    text = alpha.text().replace(str(alpha.state), str(tmp_path / "elsewhere"))
    text += '[[egress]]\nname = "first"\nto = "tcp:127.0.0.1:1"\n'  # the relay port is not open
    alpha.config.write_text(text)
    assert alpha.ask("reload") == {"ok": True, "restart_needed": ["workers", "state", "listen.address"]}
    assert len(alpha.status()["workers"]) == 2
    hosts.close()


def test_a_peer_may_use_only_the_egresses_that_name_it(site: Site) -> None:
    hosts = pair(site, 1)
    hosts.beta.peer("gamma")
    hosts.beta.tables[1] += 'peers = ["gamma"]\n'
    hosts.start()

    async def story() -> None:
        await refused(hosts.machines[0])
        (finished,) = (await in_thread(hosts.alpha.status))["finished"]
        assert finished["exit_code"] == 3
        assert "alpha may not use the egress 'vm0'" in finished["error"]
        hosts.beta.tables[1] = hosts.beta.tables[1].replace('["gamma"]', '["gamma", "alpha"]')
        hosts.beta.write()
        assert (await in_thread(hosts.beta.ask, "reload"))["ok"]
        near, far = await hosts.machines[0].channel()
        await echo(near, far)
        await exchange(near, far, b"now", b"it may")

    try:
        run(story(), SECONDS_MAX)
    finally:
        hosts.close()

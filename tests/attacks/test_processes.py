"""What an operator and a hypervisor see: exit codes, reports, files, commands and connections of real processes."""

import asyncio
import os
import shlex
import shutil
import signal
import socket
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from crypto.errors import CryptoError
from crypto.tls import TlsRole
from tests.attacks.mitm import Action, Attack, Cut
from tests.attacks.points import BACKWARD, FORWARD, FlipOnce, Which, end, first_data, middle_ack, tls
from tests.attacks.processes import Hosts, Relay, pair
from tests.attacks.relays import CONVERSATION, Script, StubHypervisor, noise, on_uvloop
from tests.attacks.returning import until
from tests.attacks.rogue import Gone, RogueSource, dial
from tests.attacks.strangers import DAY, House, config
from tests.attacks.wire import ACK, Unit, Way

FORWARD_BYTES = b"".join(say for say, _ in CONVERSATION)
BACKWARD_BYTES = b"".join(answer for _, answer in CONVERSATION)
MIB = 1024 * 1024
ONE_WAY: Script = ((noise(6 * MIB, 50), b""),)


@pytest.fixture(scope="module")
def hosts(identity_alpha: Path, identity_beta: Path) -> Hosts:
    """Two hosts of one CA."""
    return Hosts(identity_alpha, identity_beta)


def late(way: Way, ordinal: int = 3) -> Which:
    """A DATA frame in the middle of a long stream."""
    return lambda unit: unit.is_data and unit.way is way and unit.index >= ordinal


class CutOnce:
    """Reset every connection in place of the first unit that is meant."""

    def __init__(self, way: Way, which: Which) -> None:
        self._way, self._which = way, which

    def __call__(self, unit: Unit) -> Iterable[Action]:
        """See `Attack`."""
        strike = unit.way is self._way and self._which(unit)
        return (Cut(reset=True, everything=True),) if strike else (unit.data,)


@on_uvloop
async def test_without_an_attack(hosts: Hosts, tmp_path: Path) -> None:
    """The yardstick: the same rig, the same commands, both streams exact, both reports in agreement."""
    async with StubHypervisor(CONVERSATION) as there, pair(hosts, tmp_path, f"tcp:127.0.0.1:{there.port}") as made:
        here = await made.talk(CONVERSATION)
        assert await made.codes() == (0, 0), (made.send.lines, made.receive.lines)
        assert (bytes(here.received), here.ended) == (BACKWARD_BYTES, "eof")
        assert [(bytes(side.received), side.ended) for side in there.sides] == [(FORWARD_BYTES, "eof")]
        source, destination = made.reports()
        assert source["digest_blake3"] == destination["digest_blake3"]
        assert (source["outcome"], destination["outcome"]) == ("done", "done")
        assert made.send.output == made.receive.output == b"ready\n"


ATTACKS: dict[str, tuple[Attack, tuple[int, int], str]] = {
    "a bit forward": (FlipOnce(FORWARD, first_data, 0.5), (5, 5), "integrity"),
    "a bit backward": (FlipOnce(BACKWARD, first_data, 0.5), (5, 5), "integrity"),
    "a bit of a header": (FlipOnce(FORWARD, middle_ack, 9), (5, 5), "integrity"),
    "a bit of a tag": (FlipOnce(FORWARD, end, -1), (5, 5), "integrity"),
    "a bit of control": (FlipOnce(BACKWARD, tls(10), 0.5), (5, 5), "integrity"),
    "a bit of the handshake": (FlipOnce(BACKWARD, tls(4), 0.5), (4, 4), "authentication"),
    "a cut": (CutOnce(FORWARD, middle_ack), (6, 6), "lost"),
    "a cut before the end": (CutOnce(FORWARD, end), (6, 6), "lost"),
}


@pytest.mark.parametrize("name", ATTACKS)
@on_uvloop
async def test_both_ends_know_and_both_hypervisors_are_reset(hosts: Hosts, tmp_path: Path, name: str) -> None:
    attack, codes, outcome = ATTACKS[name]
    async with (
        StubHypervisor(CONVERSATION) as there,
        pair(hosts, tmp_path, f"tcp:127.0.0.1:{there.port}", attack) as made,
    ):
        here = await made.talk(CONVERSATION)
        assert await made.codes() == codes, (made.send.lines, made.receive.lines)
        await there.settled()
        for side, stream in ((here, BACKWARD_BYTES), *((side, FORWARD_BYTES) for side in there.sides)):
            assert stream.startswith(side.received)
            assert side.ended == "reset" or side.received == stream
        assert here.ended == "reset" or [side.ended for side in there.sides] == ["reset"]
        assert [report["outcome"] for report in made.reports()] == [outcome, outcome]
        assert [report["exit_code"] for report in made.reports()] == list(codes)
        assert made.send.complaint
        assert made.receive.complaint
        if codes == (4, 4):
            assert there.sides == []


@pytest.mark.parametrize("name", ["flipped", "cut"])
@on_uvloop
async def test_a_file_is_whole_or_not_there(hosts: Hosts, tmp_path: Path, name: str) -> None:
    """What stood at its place before is untouched; nothing partial is left."""
    attack: Attack = FlipOnce(FORWARD, late(FORWARD), 0.5) if name == "flipped" else CutOnce(FORWARD, late(FORWARD))
    target = tmp_path / "out" / "guest"
    target.parent.mkdir()
    target.write_bytes(b"yesterday's")
    async with pair(hosts, tmp_path, f"file:{target}", attack) as made:
        await made.talk(ONE_WAY)
        code = 5 if name == "flipped" else 6
        assert await made.codes() == (code, code), (made.send.lines, made.receive.lines)
        assert [path.name for path in target.parent.iterdir()] == ["guest"]
        assert target.read_bytes() == b"yesterday's"


@on_uvloop
async def test_a_file_is_not_renamed_before_the_source_is_satisfied(hosts: Hosts, tmp_path: Path) -> None:
    """The whole stream has arrived, END and digest too; what is lost is the source's word that all is acknowledged."""
    target = tmp_path / "guest"
    async with pair(hosts, tmp_path, f"file:{target}", CutOnce(FORWARD, tls(7))) as made:
        await made.talk(((noise(5000, 51), b""),))
        assert await made.codes() == (6, 6), (made.send.lines, made.receive.lines)
        assert not target.exists()
        assert not (tmp_path / "guest.partial").exists()


@pytest.mark.parametrize("name", ["flipped", "cut"])
@on_uvloop
async def test_a_command_never_completes(hosts: Hosts, tmp_path: Path, name: str) -> None:
    """`cat > A; mv A B` would take a closed input for the end: it is killed before that, its children with it."""
    attack: Attack = FlipOnce(FORWARD, late(FORWARD), 0.5) if name == "flipped" else CutOnce(FORWARD, late(FORWARD))
    a, b = tmp_path / "A", tmp_path / "B"
    command = f"cat > {shlex.quote(str(a))}; mv {shlex.quote(str(a))} {shlex.quote(str(b))}"
    async with pair(hosts, tmp_path, f"exec:{command}", attack) as made:
        await made.talk(ONE_WAY)
        code = 5 if name == "flipped" else 6
        assert await made.codes() == (code, code), (made.send.lines, made.receive.lines)
        await asyncio.sleep(0.2)
        assert a.exists()
        assert not b.exists()
        assert ONE_WAY[0][0].startswith(a.read_bytes())


@on_uvloop
async def test_a_commands_well_tempered_end(hosts: Hosts, tmp_path: Path) -> None:
    """The same command without an attack completes: what the test above sees is the attack's doing."""
    a, b = tmp_path / "A", tmp_path / "B"
    async with pair(hosts, tmp_path, f"exec:cat > {a}; mv {a} {b}") as made:
        await made.talk(ONE_WAY)
        assert await made.codes() == (0, 0), (made.send.lines, made.receive.lines)
        assert b.read_bytes() == ONE_WAY[0][0]


@on_uvloop
async def test_standard_output_ends_short_and_says_so(hosts: Hosts, tmp_path: Path) -> None:
    async with pair(hosts, tmp_path, "stdio:", FlipOnce(FORWARD, late(FORWARD), 0.5)) as made:
        await made.talk(ONE_WAY)
        assert await made.codes() == (5, 5), (made.send.lines, made.receive.lines)
        output = bytes(made.receive.output)
        assert ONE_WAY[0][0].startswith(output)
        assert len(output) < len(ONE_WAY[0][0])


@pytest.mark.parametrize("who", ["send", "receive"])
@on_uvloop
async def test_a_relay_that_is_killed(hosts: Hosts, tmp_path: Path, who: str) -> None:
    """SIGKILL leaves no time for manners: the kernel resets the hypervisors all the same, the other relay is lost."""
    under_way = asyncio.Event()

    def attack(unit: Unit) -> Iterable[Action]:
        if unit.way is BACKWARD and unit.type == ACK:
            under_way.set()
        return (unit.data,)

    async with (
        StubHypervisor() as there,  # which never answers
        pair(hosts, tmp_path, f"tcp:127.0.0.1:{there.port}", attack) as made,
    ):
        talking = asyncio.create_task(made.talk(CONVERSATION))
        await under_way.wait()
        victim, survivor = (made.send, made.receive) if who == "send" else (made.receive, made.send)
        victim.process.send_signal(signal.SIGKILL)
        assert await survivor.ended() == 6, survivor.lines
        await talking
        await there.settled()
        assert (made.here.ended, there.sides[0].ended) == ("reset", "reset")


# ---- who is let in


@pytest.mark.parametrize("expected", [("gamma", "alpha"), ("beta", "gamma")], ids=["source", "destination"])
@on_uvloop
async def test_another_name_than_expected(hosts: Hosts, tmp_path: Path, expected: tuple[str, str]) -> None:
    async with StubHypervisor(CONVERSATION) as there:
        async with pair(hosts, tmp_path, f"tcp:127.0.0.1:{there.port}", expected=expected) as made:
            here = await made.talk(CONVERSATION)
            assert await made.codes() == (4, 4), (made.send.lines, made.receive.lines)
            assert (here.ended, bytes(here.received)) == ("reset", b"")
            who = made.send if expected[0] == "gamma" else made.receive
            assert "expected gamma" in who.complaint
        assert there.sides == []


@on_uvloop
async def test_a_revoked_host(tmp_path: Path) -> None:
    """Its own CRL is old, so that it starts; the destination's is not."""
    house = House(tmp_path / "ca")
    alpha, beta = (house.issue(name).directory for name in ("alpha", "beta"))
    kept = tmp_path / "kept"
    shutil.copytree(alpha, kept)
    house.revoke("alpha")
    async with StubHypervisor(CONVERSATION) as there:
        async with pair(Hosts(kept, beta), tmp_path, f"tcp:127.0.0.1:{there.port}") as made:
            here = await made.talk(CONVERSATION)
            assert await made.codes() == (4, 4), (made.send.lines, made.receive.lines)
            assert here.ended == "reset"
            assert "revoked" in made.receive.complaint
        assert there.sides == []


@pytest.mark.parametrize("command", ["send", "receive"])
@on_uvloop
async def test_an_expired_crl_at_the_start(tmp_path: Path, command: str) -> None:
    house = House(tmp_path / "ca")
    directory = house.issue("alpha").directory
    house.authority.publish_crl(now=datetime.now(UTC) - 3 * DAY, days=1)
    arguments: tuple[str | Path, ...] = ("--listen", "127.0.0.1:0", "--to", "tcp:127.0.0.1:1")
    if command == "send":
        arguments = ("--from", "tcp:127.0.0.1:0", "--peer", "127.0.0.1:1")
    async with Relay(command, *arguments, "--identity", directory) as relay:
        assert await relay.ended() == 2
        assert "crl.pem expired" in relay.complaint
        assert relay.output == b""


# ---- --once


async def knock(port: int, said: bytes) -> None:
    """Say something to the relay and wait until it closes."""
    loop = asyncio.get_running_loop()
    with await dial(port) as sock, suppress(OSError):
        await loop.sock_sendall(sock, said)
        sock.shutdown(socket.SHUT_WR)
        while await loop.sock_recv(sock, 4096):
            pass


@on_uvloop
async def test_once_ignores_what_is_not_tls_and_bears_a_failure(hosts: Hosts, tmp_path: Path) -> None:
    """Scanners, then a stranger, then the session: exit 0. The stranger's failure would have counted alone."""
    stranger = House(tmp_path / "elsewhere").issue("alpha")
    async with (
        StubHypervisor(CONVERSATION) as there,
        pair(hosts, tmp_path, f"tcp:127.0.0.1:{there.port}", resume_seconds=20) as made,
    ):
        port = made.mitm.target[1]
        for said in (b"GET / HTTP/1.0\r\n\r\n", b"SSH-2.0-scan\r\n", noise(3000, 60), b"KRL1" + bytes(16)):
            await knock(port, said)
        await knock(port, b"\x16\x03\x01" + noise(300, 61))
        with pytest.raises((Gone, CryptoError)):
            async with RogueSource(config(stranger, TlsRole.CLIENT), port) as intruder:
                await intruder.offer()
        await made.talk(CONVERSATION)
        assert await made.codes() == (0, 0), (made.send.lines, made.receive.lines)
        assert [(bytes(side.received), side.ended) for side in there.sides] == [(FORWARD_BYTES, "eof")]


@on_uvloop
async def test_once_ends_with_the_failure_that_nobody_made_good(hosts: Hosts, tmp_path: Path) -> None:
    stranger = House(tmp_path / "elsewhere").issue("alpha")
    async with (
        StubHypervisor() as there,
        Relay(
            *("receive", "--listen", "127.0.0.1:0", "--to", f"tcp:127.0.0.1:{there.port}", "--identity", hosts.beta),
            *("--once", "--resume-timeout", "1", "--report", tmp_path / "report.json"),
        ) as relay,
    ):
        port = await relay.listening()
        await knock(port, b"GET / HTTP/1.0\r\n\r\n")
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises((Gone, CryptoError)):
            async with RogueSource(config(stranger, TlsRole.CLIENT), port) as intruder:
                await intruder.offer()
        assert await relay.ended() == 4
        assert loop.time() - began > 0.9
        assert there.sides == []
        assert (tmp_path / "report.json").exists()


@on_uvloop
async def test_once_takes_one_session_only(hosts: Hosts, tmp_path: Path) -> None:
    """A second source is refused by policy (3) while the first is at work, which goes on and ends well."""
    os.mkfifo(tmp_path / "guest")
    async with (
        StubHypervisor() as there,
        Relay(
            *("receive", "--listen", "127.0.0.1:0", "--to", f"tcp:127.0.0.1:{there.port}", "--identity", hosts.beta),
            "--once",
        ) as relay,
        Relay(
            *("send", "--from", f"file:{tmp_path / 'guest'}", "--peer", f"127.0.0.1:{await relay.listening()}"),
            *("--identity", hosts.alpha, "--once"),
        ) as first,
    ):
        with (tmp_path / "guest").open("wb", buffering=0) as guest:
            guest.write(FORWARD_BYTES)
            await until(lambda: bool(there.sides) and bytes(there.sides[0].received) == FORWARD_BYTES, 20.0)
            async with Relay(
                *("send", "--from", f"file:{hosts.alpha / 'ca.crt'}", "--peer", f"127.0.0.1:{await relay.listening()}"),
                *("--identity", hosts.alpha, "--once"),
            ) as second:
                assert await second.ended() == 3
                assert "refused" in second.complaint
        assert await first.ended() == 0
        assert await relay.ended() == 0
        assert [(bytes(side.received), side.ended) for side in there.sides] == [(FORWARD_BYTES, "eof")]

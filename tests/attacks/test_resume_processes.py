"""What an operator sees of a loss: exit codes, reports and log lines of real commands."""

import asyncio
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.attacks.mitm import Action, Attack, Cut, Stall
from tests.attacks.points import FORWARD
from tests.attacks.processes import Hosts, Pair, Relay, pair
from tests.attacks.relays import Script, StubHypervisor, conversation, on_uvloop
from tests.attacks.wire import Kind, Unit

LOST = 6
SCRIPT: Script = conversation(rounds=6)
FORWARD_BYTES = b"".join(say for say, _ in SCRIPT)
BACKWARD_BYTES = b"".join(answer for _, answer in SCRIPT)


@pytest.fixture(scope="module")
def hosts(identity_alpha: Path, identity_beta: Path) -> Hosts:
    """Two hosts of one CA."""
    return Hosts(identity_alpha, identity_beta)


class Once:
    """Do something at the third frame of the source, once, and tell it."""

    def __init__(self, action: Action) -> None:
        self._action = action
        self.struck = asyncio.Event()
        self._frames = 0

    def __call__(self, unit: Unit) -> Iterable[Action]:
        """See `Attack`."""
        if unit.is_data and unit.way is FORWARD and not self.struck.is_set():
            self._frames += 1
            if self._frames == 3:
                self.struck.set()
                return (self._action,)
        return (unit.data,)


def of(relay: Relay, event: str) -> int:
    """How often it logged that."""
    return sum(logged.get("event") == event for logged in relay.events)


async def killed(relay: Relay) -> None:
    """Kill one of the commands, and reap it."""
    relay.process.kill()
    await relay.ended()


@on_uvloop
async def test_everything_is_cut_once(hosts: Hosts, tmp_path: Path) -> None:
    attack = Once(Cut(reset=True, everything=True))
    async with (
        StubHypervisor(SCRIPT) as there,
        pair(hosts, tmp_path, f"tcp:127.0.0.1:{there.port}", attack, resume_seconds=20) as made,
    ):
        here = await made.talk(SCRIPT)
        assert await made.codes() == (0, 0), (made.send.lines, made.receive.lines)
        assert (bytes(here.received), here.ended) == (BACKWARD_BYTES, "eof")
        assert [(bytes(side.received), side.ended) for side in there.sides] == [(FORWARD_BYTES, "eof")]
        source, destination = made.reports()
        assert source["digest_blake3"] == destination["digest_blake3"]
        assert (source["resumes"], destination["resumes"]) == (1, 1)
        assert (source["exit_code"], destination["exit_code"]) == (0, 0)
        assert source["bytes_wire"]["forward"] > len(FORWARD_BYTES)
        for relay in (made.send, made.receive):
            assert of(relay, "the peer is away") >= 1, relay.events
            assert relay.complaint == ""
        assert of(made.send, "the session goes on") == 1
        assert of(made.receive, "a session goes on") == 1


@on_uvloop
async def test_one_lane_is_cut(hosts: Hosts, tmp_path: Path) -> None:
    attack = Once(Cut(reset=True))
    async with (
        StubHypervisor(SCRIPT) as there,
        pair(hosts, tmp_path, f"tcp:127.0.0.1:{there.port}", attack, resume_seconds=20) as made,
    ):
        await made.talk(SCRIPT)
        assert await made.codes() == (0, 0), (made.send.lines, made.receive.lines)
        assert bytes(there.sides[0].received) == FORWARD_BYTES
        source, destination = made.reports()
        assert (source["resumes"], destination["resumes"]) == (0, 0)
        assert source["lanes_lost"] + destination["lanes_lost"] >= 1
        assert of(made.send, "a lane was lost") + of(made.receive, "a lane was lost") >= 1


class Gone(Once):
    """Cut everything once, and let nothing through from then on."""

    def __call__(self, unit: Unit) -> Iterable[Action]:
        """See `Attack`."""
        return (Stall(),) if self.struck.is_set() else super().__call__(unit)


@on_uvloop
async def test_the_network_stays_away(hosts: Hosts, tmp_path: Path) -> None:
    async with (
        StubHypervisor(SCRIPT) as there,
        pair(
            hosts, tmp_path, f"tcp:127.0.0.1:{there.port}", Gone(Cut(reset=True, everything=True)), resume_seconds=1
        ) as made,
    ):
        here = await made.talk(SCRIPT)
        assert await made.codes() == (LOST, LOST), (made.send.lines, made.receive.lines)
        assert (here.ended, there.sides[0].ended) == ("reset", "reset")
        for relay, report in zip((made.send, made.receive), made.reports(), strict=True):
            assert "was away for over 1 s" in relay.complaint
            assert (report["outcome"], report["resumes"]) == ("lost", 0)


async def _destination_ends(made: Pair, attack: Once) -> None:
    await attack.struck.wait()
    await killed(made.receive)


@on_uvloop
async def test_the_destination_s_relay_is_killed(hosts: Hosts, tmp_path: Path) -> None:
    """Its hypervisor sees a reset at once, the source's when the time is over."""
    attack = Once(Cut())
    async with (
        StubHypervisor(SCRIPT) as there,
        pair(hosts, tmp_path, f"tcp:127.0.0.1:{there.port}", attack, resume_seconds=1) as made,
    ):
        ending = asyncio.create_task(_destination_ends(made, attack))
        here = await made.talk(SCRIPT)
        await ending
        assert await made.send.ended() == LOST
        assert "was away for over 1 s" in made.send.complaint
        await there.settled()
        assert (here.ended, there.sides[0].ended) == ("reset", "reset")


@on_uvloop
async def test_the_destination_s_relay_is_started_again(hosts: Hosts, tmp_path: Path) -> None:
    """The new one does not know the session: the source is told so, and does not wait for its time."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    attack = Once(Cut())

    def receive(to: int) -> Relay:
        return Relay(
            *("receive", "--listen", f"127.0.0.1:{port}", "--to", f"tcp:127.0.0.1:{to}", "--identity", hosts.beta),
            *("--name", "alpha", "--resume-timeout", "20"),
        )

    loop = asyncio.get_running_loop()
    async with (
        StubHypervisor(SCRIPT) as there,
        receive(there.port) as first,
        pair(hosts, tmp_path, f"tcp:127.0.0.1:{there.port}", attack, resume_seconds=20) as made,
    ):
        await first.listening()
        made.mitm.target = ("127.0.0.1", port)
        talking = asyncio.create_task(made.talk(SCRIPT))
        await attack.struck.wait()
        await killed(first)
        async with receive(there.port) as second:
            await second.listening()
            began = loop.time()
            assert await made.send.ended() == LOST
            assert loop.time() - began < 10.0
            assert "there is no such session any more" in made.send.complaint
            assert (await talking).ended == "reset"
            assert of(second, "a peer was not let in") == 1
            assert second.process.returncode is None


def counted(attack: Attack, kinds: list[Kind]) -> Attack:
    """The attack, and which connections there were."""

    def watch(unit: Unit) -> Iterable[Action]:
        with suppress(IndexError):
            if unit.index == 0 and unit.way is FORWARD:
                kinds.append(unit.kind)
        return attack(unit)

    return watch


@on_uvloop
async def test_without_a_time_to_resume_a_loss_is_final(hosts: Hosts, tmp_path: Path) -> None:
    kinds: list[Kind] = []
    attack = counted(Once(Cut(reset=True, everything=True)), kinds)
    async with (
        StubHypervisor(SCRIPT) as there,
        pair(hosts, tmp_path, f"tcp:127.0.0.1:{there.port}", attack, resume_seconds=0) as made,
    ):
        await made.talk(SCRIPT)
        assert await made.codes() == (LOST, LOST)
        assert Kind.RESUME not in kinds
        assert of(made.send, "the peer is away") == 0

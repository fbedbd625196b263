"""Evidence of another connection, between relays that run: recorded earlier, or passed on at this very moment.

Whoever shows it has the keys of both hosts' certificates, so that TLS lets it in at either side, and neither of their
TPMs. What it passes on is whole, fresh, of the right host, session, side and challenge: the connection alone is another
one. In every case the host that is asked refuses with code 4 before anything of a machine is said, its operator reads
why, and the one who is refused does not.
"""

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from crypto.identity import Identity
from crypto.tls import PeerRules, TlsConfig, TlsRole
from tests.attacks.processes import Relay
from tests.attacks.rogue import Control, RogueDestination, dial, message
from tests.e2e.test_attestation import STREAM, Hosts, hosts, platform

__all__ = ["hosts"]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
WHY = "the quote was made for another session, side, challenge or key"
PCRS = [0, 1, 2, 3, 4, 5, 7]
Said = dict[str, Any]


@dataclass
class Thief:
    """Between alpha and beta; to each it is the other one."""

    hosts: Hosts
    as_alpha: TlsConfig
    as_beta: TlsConfig
    door: RogueDestination
    stack: AsyncExitStack
    relays: list[Relay] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """Where what arrives at beta would be."""
        return self.hosts.folder / "out"

    async def alpha(self, *, judges: bool) -> tuple[Relay, Control, Said]:
        """alpha's relay sends to the thief: its connection, and its challenge."""
        (self.hosts.folder / "in").write_bytes(STREAM)
        number = len(self.relays)
        relay = await self._start(
            *("send", "--from", f"file:{self.hosts.folder / 'in'}", "--peer", f"127.0.0.1:{self.door.port}"),
            *("--identity", self.hosts.identities["alpha"], "--state", self.hosts.folder / f"state-{number}"),
            *platform(self.hosts, "alpha", judges=judges),
        )
        control, challenge = await self.door.greet()
        assert challenge["type"] == "challenge"
        return relay, control, challenge

    async def beta(self, challenge: Said) -> tuple[Relay, Control, list[Said]]:
        """beta's relay takes a connection of the thief's: that, and its answer to the challenge."""
        number = len(self.relays)
        relay = await self._start(
            *("receive", "--listen", "127.0.0.1:0", "--to", f"file:{self.out}"),
            *("--identity", self.hosts.identities["beta"], "--state", self.hosts.folder / f"state-{number}"),
            *platform(self.hosts, "beta"),
        )
        sock = await dial(await relay.listening())
        self.stack.callback(sock.close)
        control = Control(sock, self.as_alpha)
        await control.handshake()
        await say(control, challenge)
        return relay, control, await evidence(control)

    async def _start(self, *arguments: str | Path) -> Relay:
        number = len(self.relays)
        relay = Relay(
            *(*arguments, "--once", "--resume-timeout", "1", "--report", self.hosts.folder / f"report-{number}.json")
        )
        self.relays.append(relay)
        return await self.stack.enter_async_context(relay)


async def say(control: Control, *told: Said) -> None:
    """Messages, as they were heard or made."""
    for one in told:
        await control.say(message(one["type"], **{name: value for name, value in one.items() if name != "type"}))


async def evidence(control: Control) -> list[Said]:
    """All that is shown in answer to a challenge."""
    shown = [await control.hear()]
    while shown[-1].get("more"):
        shown.append(await control.hear())
    assert {one["type"] for one in shown} == {"attested"}, shown
    return shown


def challenge(session: bytes, *, wanted: bool) -> Said:
    """One of the thief's own."""
    demanded = {"wanted": {"banks": [{"bank": "sha256", "pcrs": PCRS}]}} if wanted else {}
    return {"type": "challenge", "version": 1, "session": session, "nonce": os.urandom(32), **demanded}


async def refused(judge: Relay, control: Control, thief: Thief) -> None:
    """The judge has said no, told its operator why, and the thief nothing; nothing is at the egress."""
    heard = await control.hear()
    assert heard["type"] in {"refuse", "abort"}, heard
    assert (heard["code"], heard["reason"]) == (4, "attestation failed")
    assert await judge.ended() == 4
    told = "\n".join([*judge.lines, *(str(event) for event in judge.events)])
    assert WHY in told, told
    assert list(thief.hosts.folder.glob("out*")) == []


@pytest.fixture
async def thief(hosts: Hosts) -> AsyncIterator[Thief]:
    now = datetime.now(UTC)
    alpha, beta = (Identity.load(hosts.identities[name], now=now) for name in ("alpha", "beta"))
    async with AsyncExitStack() as stack:
        as_alpha, as_beta = (
            TlsConfig(alpha, TlsRole.CLIENT, PeerRules()),
            TlsConfig(beta, TlsRole.SERVER, PeerRules()),
        )
        door = await stack.enter_async_context(RogueDestination(as_beta))
        yield Thief(hosts, as_alpha, as_beta, door, stack)


async def test_the_destinations_is_passed_on(thief: Thief) -> None:
    """Session, side, challenge and TPM are those that the source means; it was made for the thief's connection."""
    source, upstream, asked = await thief.alpha(judges=True)
    _, _, shown = await thief.beta(asked)
    assert b"".join(one["part"] for one in shown)
    await say(upstream, *shown)
    await refused(source, upstream, thief)


async def test_the_sources_is_passed_on(thief: Thief) -> None:
    """The same the other way: the source demands nothing itself, and shows what the destination asks for."""
    source, upstream, asked = await thief.alpha(judges=False)
    assert asked.get("wanted") is None
    destination, downstream, asks = await thief.beta(asked)
    await say(upstream, *asks)
    await say(downstream, *await evidence(upstream))
    await refused(destination, downstream, thief)
    assert source.process.returncode is None  # it waits for an answer to what it has offered, which nobody has


async def test_the_destinations_is_played_back(thief: Thief) -> None:
    """What beta once showed to whom it took for alpha."""
    _, before, shown = await thief.beta(challenge(os.urandom(16), wanted=True))
    before.sock.close()
    source, upstream, _ = await thief.alpha(judges=True)
    await say(upstream, *shown)
    await refused(source, upstream, thief)


async def test_the_sources_is_played_back(thief: Thief) -> None:
    """What alpha once showed to whom it took for beta, in a session of the same id."""
    _, upstream, asked = await thief.alpha(judges=False)
    wanted = {"banks": [{"bank": "sha256", "pcrs": PCRS}]}
    asks = {"type": "attested", "part": b"", "more": False, "nonce": os.urandom(32), "wanted": wanted}
    await say(upstream, asks)
    shown = await evidence(upstream)
    upstream.sock.close()
    destination, downstream, _ = await thief.beta(challenge(asked["session"], wanted=False))
    await say(downstream, *shown)
    await refused(destination, downstream, thief)

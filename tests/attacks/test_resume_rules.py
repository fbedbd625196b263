"""Rules that changed while a session was away: it is judged by those of now, and both ends and hypervisors are told.

Real relays with the attacker between them, who cuts everything in the middle of a conversation.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from crypto.identity import Identity
from crypto.tls import PeerInfo, PeerRules, TlsConfig, TlsRole
from proxy.control import Offer
from proxy.endpoints.sockets import TcpEgress
from proxy.errors import PolicyRefused
from proxy.shell.destination import Terms
from proxy.shell.source import Peer
from tests.attacks.mitm import Action, Cut, Mitm
from tests.attacks.points import FORWARD
from tests.attacks.relays import BOUND_SECONDS, CONVERSATION, Receiver, Side, StubHypervisor, on_uvloop, send, shorten
from tests.attacks.strangers import House, config
from tests.attacks.wire import Unit

POLICY, AUTHENTICATION, LOST = 3, 4, 6
SECONDS = 1  # that a session may be away


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait 5 s for the leave of what was cut."""
    shorten(monkeypatch, DRAIN_SECONDS_MAX=0.1, ABORT_SECONDS_MAX=0.2)


class Scene:
    """A pair of relays; everything between them is cut when the conversation is under way, and `then` called."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.alpha, self.beta = house.issue("alpha"), house.issue("beta")
        self.receiver: Receiver
        self.egress: TcpEgress
        self.terms = Terms(resume_seconds=SECONDS)
        self.source = config(self.alpha, TlsRole.CLIENT, PeerRules(names=frozenset({"beta"})))
        self.destination = config(self.beta, TlsRole.SERVER, PeerRules(names=frozenset({"alpha"})))
        self.then: Callable[[Scene], None] = lambda _: None
        self._frames = 0

    def attack(self, unit: Unit) -> Iterable[Action]:
        """See `Attack`: cut at the second frame of the conversation, once."""
        if unit.is_data and unit.way is FORWARD:
            self._frames += 1
            if self._frames == 2:
                self.then(self)
                return (Cut(reset=True, everything=True),)
        return (unit.data,)

    def reconfigure(
        self,
        *,
        tls: TlsConfig | None = None,
        egresses: bool = True,
        admit: Callable[[PeerInfo, Offer], None] | None = None,
    ) -> None:
        """The destination has other rules from now on."""
        terms = self.terms if admit is None else replace(self.terms, admit=admit)
        self.receiver.destination.reconfigure(
            tls or self.destination, {"default": self.egress} if egresses else {}, terms
        )


@dataclass(slots=True)
class Ended:
    """How a session ended."""

    codes: tuple[int, int | None]
    error: BaseException | None
    here: Side
    there: Side
    resumes: int

    def told(self) -> None:
        """Both hypervisors know that it failed."""
        assert (self.here.ended, self.there.ended) == ("reset", "reset")


@asynccontextmanager
async def ended(made: Scene) -> AsyncIterator[Ended]:
    """Run it to its end."""
    async with (
        asyncio.timeout(BOUND_SECONDS),
        StubHypervisor(CONVERSATION) as hypervisor,
    ):
        made.egress = TcpEgress("127.0.0.1", hypervisor.port, "tcp:egress")
        async with (
            Receiver(made.destination, made.egress, terms=made.terms) as receiver,
            Mitm(("127.0.0.1", receiver.port), made.attack) as mitm,
        ):
            made.receiver = receiver
            code, error, here = await send(
                made.source, Peer("127.0.0.1", mitm.port, resume_seconds=SECONDS), CONVERSATION
            )
            verdict = await receiver.verdict(5.0)
            await hypervisor.settled()
            (there,) = hypervisor.sides
            yield Ended((code, verdict), error, here, there, receiver.runners[0].report.resumes)


@pytest.fixture
def made(tmp_path: Path) -> Scene:
    """A pair of its own CA."""
    return Scene(House(tmp_path / "ca"))


@on_uvloop
async def test_the_same_rules(made: Scene) -> None:
    """What is refused below is refused for what changed."""
    async with ended(made) as outcome:
        assert outcome.codes == (0, 0), outcome.error
        assert outcome.resumes == 1
        assert outcome.there.received == b"".join(say for say, _ in CONVERSATION)


def loaded_anew(made: Scene, name: str) -> Identity:
    """A host's identity from its folder, with the CRL that lies there now."""
    (folder,) = made.house._directory.glob(f"{name}-*")
    return Identity.load(folder, now=made.house.now)


def source_revoked(made: Scene) -> None:
    made.house.revoke("alpha")
    made.reconfigure(tls=config(loaded_anew(made, "beta"), TlsRole.SERVER, PeerRules(names=frozenset({"alpha"}))))


def source_no_longer_named(made: Scene) -> None:
    made.reconfigure(tls=config(made.beta, TlsRole.SERVER, PeerRules(names=frozenset({"delta"}))))


def source_no_longer_pinned(made: Scene) -> None:
    made.reconfigure(tls=config(made.beta, TlsRole.SERVER, PeerRules(pins=frozenset({bytes(32)}))))


@pytest.mark.parametrize("then", [source_revoked, source_no_longer_named, source_no_longer_pinned])
@on_uvloop
async def test_a_source_that_is_let_in_no_more(made: Scene, then: Callable[[Scene], None]) -> None:
    """It does not get as far as naming its session: the destination waits its time, and the source knows at once."""
    made.then = then
    async with ended(made) as outcome:
        assert outcome.codes == (AUTHENTICATION, LOST), outcome.error
        assert outcome.resumes == 0
        outcome.told()


def egress_gone(made: Scene) -> None:
    made.reconfigure(egresses=False)


def not_admitted(made: Scene) -> None:
    def admit(peer: PeerInfo, offer: Offer) -> None:
        assert (peer.name, offer.egress) == ("alpha", "default")
        raise PolicyRefused("alpha may not migrate here any more")

    made.reconfigure(admit=admit)


@pytest.mark.parametrize(("then", "why"), [(egress_gone, "no egress"), (not_admitted, "alpha may not migrate here")])
@on_uvloop
async def test_a_policy_that_says_no_by_now(made: Scene, then: Callable[[Scene], None], why: str) -> None:
    """It is for the session: that ends at once, and both ends say the same."""
    made.then = then
    async with ended(made) as outcome:
        assert outcome.codes == (POLICY, POLICY), outcome.error
        assert why in str(outcome.error)
        assert outcome.resumes == 0
        outcome.told()


@pytest.mark.parametrize("how", ["revoked", "another name"])
@on_uvloop
async def test_a_destination_that_the_source_trusts_no_more(
    made: Scene, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The source's rules, too, are those of now."""
    from proxy.shell import source as source_module

    sources: list[source_module.Source] = []
    init = source_module.Source.__init__

    def remember(self: source_module.Source, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        sources.append(self)

    monkeypatch.setattr(source_module.Source, "__init__", remember)

    def then(scene: Scene) -> None:
        if how == "revoked":
            scene.house.revoke("beta")
            tls = config(loaded_anew(scene, "alpha"), TlsRole.CLIENT, PeerRules(names=frozenset({"beta"})))
        else:
            tls = config(scene.alpha, TlsRole.CLIENT, PeerRules(names=frozenset({"delta"})))
        (relay,) = sources
        relay.reconfigure(tls, relay._contact.where)

    made.then = then
    async with ended(made) as outcome:
        assert outcome.codes == (AUTHENTICATION, LOST), outcome.error
        outcome.told()


@on_uvloop
async def test_a_destination_that_lets_nobody_new_in_takes_its_sessions_back(made: Scene) -> None:
    """Draining is about new sessions."""

    def then(scene: Scene) -> None:
        scene.receiver.destination.accepting = False

    made.then = then
    async with ended(made) as outcome:
        assert outcome.codes == (0, 0), outcome.error
        assert outcome.resumes == 1

"""Two hosts that do not fit: no byte of a machine goes, and both operators read why. And who asks by hand."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from crypto.attestation.binding import Binding
from crypto.errors import AttestationMissing, PlatformChanged
from crypto.identity import Identity
from crypto.pki import Authority
from crypto.tls import PeerInfo, PeerRules, TlsConfig, TlsRole
from proxy.attestation import Demand, Proved
from proxy.control import PROTOCOL_VERSION, Bank, Finish, Message, Offer, Recover, Refuse, Survey, Surveyed, Wanted
from proxy.errors import (
    EXIT_AUTHENTICATION,
    EXIT_POLICY,
    PeerAborted,
    PeerRefused,
    PolicyRefused,
    PreflightFailed,
    exit_code_of,
)
from proxy.preflight import Finding, HostFacts
from proxy.shell import link, visits
from proxy.shell.contact import Contact, Peer
from proxy.shell.link import ControlLink
from tests.proxy.support import Hypervisors, Pair, over_tcp, relays, run, until
from tests.standins.xen_host import guest_stream

STREAM = guest_stream("vm1")
HERE = HostFacts(relay="1", machine="x86_64", clock_ms=0)
THERE = HostFacts(relay="2", machine="x86_64", clock_ms=0)
WARNING = Finding("cpu", "warning", "it lacks avx512f", "level the CPU model")
FAILED = Finding("hypervisor", "failed", "the source has Xen, the destination KVM", "choose another host")


@dataclass
class Surveyor:
    """Says and finds what a test tells it to, and remembers what it heard."""

    says: HostFacts
    finds: tuple[Finding, ...] = ()
    refuses: bool = False
    heard: list[HostFacts | None] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    thorough: list[bool] = field(default_factory=list)
    now_ms: int = 1000

    def facts(self, *, thorough: bool = False) -> HostFacts:
        self.thorough.append(thorough)
        return self.says

    def stamped(self, facts: HostFacts) -> HostFacts:
        return msgspec.structs.replace(facts, clock_ms=self.now_ms)

    def judge(
        self, own: HostFacts, theirs: HostFacts | None, *, departing: bool, waited_seconds: float = 0.0
    ) -> tuple[Finding, ...]:
        self.heard.append(theirs)
        self.waits.append(waited_seconds)
        if self.refuses:
            first = self.finds[0]
            raise PreflightFailed(f"preflight: {first.check}: {first.says}", first.remedy, self.finds)
        return self.finds

    def survey(
        self, own: HostFacts, theirs: HostFacts | None, *, departing: bool, need_bytes: int, waited_seconds: float = 0.0
    ) -> tuple[Finding, ...]:
        self.heard.append(theirs)
        return (*self.finds, Finding("memory", "ok", f"needs {need_bytes}"))


@dataclass
class Platform:
    """Demands evidence of everybody, shows some, and finds what a test says."""

    error: Exception | None = None

    def demands(self, peer: str) -> Demand | None:
        return Demand(Wanted((Bank("sha256", (7,)),)))

    def attest(self, binding: Binding, wanted: Wanted) -> bytes:
        return b"evidence"

    def appraise(self, peer: str, evidence: bytes, binding: Binding, demand: Demand) -> Proved:
        if self.error is not None:
            raise self.error
        return Proved(f"tpm2 {peer}", b"")


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "DRAIN_SECONDS_MAX", 0.1)


Story = Callable[[Pair, Hypervisors], Any]


def tell(client: TlsConfig, server: TlsConfig, story: Story, **rest: Any) -> None:
    async def told() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client, server, hypervisors.ingress, hypervisors.egress, **rest) as pair:
                await story(pair, hypervisors)
        finally:
            hypervisors.close()

    run(told())


async def refused(pair: Pair, hypervisors: Hypervisors) -> BaseException | None:
    """A migration is tried; nobody connects to the destination's hypervisor, and the source's sees a reset."""
    near = await hypervisors.connect()
    accepting = asyncio.ensure_future(hypervisors.accept())
    ended = await pair.source_ended
    assert await near.broken()
    assert not accepting.done()
    accepting.cancel()
    assert ended.report.bytes_in == {"forward": 0, "backward": 0}
    return ended.error


# ------------------------------------------------------------------ in a session


def test_both_sides_hear_of_the_other_and_a_warning_is_written_down(
    client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    here, there = Surveyor(HERE, (WARNING,)), Surveyor(THERE)

    async def story(pair: Pair, hypervisors: Hypervisors) -> None:
        with capture_logs() as logs:
            near, far = await pair.channel(hypervisors)
            await near.send(STREAM)
            near.shut()
            assert await far.to_end() == STREAM
            far.shut()
            assert await near.to_end() == b""
            source, arrived = await pair.ended_well()
        assert here.heard == [msgspec.structs.replace(THERE, clock_ms=1000)]
        assert there.heard == [msgspec.structs.replace(HERE, clock_ms=1000)]
        assert (here.thorough, there.thorough) == ([False], [False])  # nothing is run for it
        assert here.waits[0] > 0
        assert there.waits == [0.0]
        assert (source.preflight, arrived.preflight) == ([WARNING], [])
        (said,) = (event for event in logs if event["event"] == "preflight")
        assert (said["log_level"], said["check"], said["says"], said["remedy"], said["peer"]) == (
            *("warning", "cpu", WARNING.says, WARNING.remedy),
            "beta",
        )

    tell(client_tls, server_tls, story, surveyors=(here, there))


def test_a_destination_refuses_an_offer(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    there = Surveyor(THERE, (FAILED,), refuses=True)

    async def story(pair: Pair, hypervisors: Hypervisors) -> None:
        error = await refused(pair, hypervisors)
        assert isinstance(error, PolicyRefused)
        assert exit_code_of(error) == EXIT_POLICY
        for word in ("preflight", FAILED.check, FAILED.says, FAILED.remedy):
            assert word in str(error)
        (why,) = pair.refused
        assert isinstance(why, PreflightFailed)
        assert pair.arriving == []

    tell(client_tls, server_tls, story, surveyors=(Surveyor(HERE), there))


def test_a_source_refuses_what_accept_says(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    here = Surveyor(HERE, (FAILED, WARNING), refuses=True)

    async def story(pair: Pair, hypervisors: Hypervisors) -> None:
        error = await refused(pair, hypervisors)
        assert isinstance(error, PreflightFailed)
        assert pair.source_ended.result().report.preflight == [FAILED, WARNING]
        there = await pair.destination_ended
        assert isinstance(there.error, PeerAborted)
        assert exit_code_of(there.error) == EXIT_POLICY
        for word in (FAILED.check, FAILED.says, FAILED.remedy):
            assert word in str(there.error)
        assert there.report.bytes_out == {"forward": 0, "backward": 0}

    tell(client_tls, server_tls, story, surveyors=(here, Surveyor(THERE)))


@pytest.mark.parametrize("silent", [0, 1], ids=["source", "destination"])
def test_a_peer_that_says_nothing_is_judged_as_such(silent: int, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    both = [Surveyor(HERE), Surveyor(THERE)]
    given = [None if number == silent else one for number, one in enumerate(both)]

    async def story(pair: Pair, hypervisors: Hypervisors) -> None:
        near, far = await pair.channel(hypervisors)
        near.shut()
        far.shut()
        await pair.ended_well()
        assert both[silent].heard == []
        assert both[1 - silent].heard == [None]

    tell(client_tls, server_tls, story, surveyors=tuple(given))


def test_a_lying_peer_turns_no_refusal_into_a_session(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    """Perfect words of a host do not open an egress that there is not, nor one that it may not use."""

    async def story(pair: Pair, hypervisors: Hypervisors) -> None:
        def nobody(peer: PeerInfo, offer: Offer) -> None:
            raise PolicyRefused(f"{peer.name} may not use the egress {offer.egress!r}")

        terms = replace(pair.destination._terms, admit=nobody)
        pair.destination.reconfigure(server_tls, {"default": hypervisors.egress}, terms)
        error = await refused(pair, hypervisors)
        assert "may not use" in str(error)

    there = Surveyor(THERE)
    tell(client_tls, server_tls, story, surveyors=(Surveyor(HERE), there))
    assert there.heard == []  # nor is it listened to before it is admitted


@pytest.mark.parametrize("who", [0, 1], ids=["the source's", "the destination's"])
def test_nothing_is_said_of_a_host_to_one_that_has_not_attested(
    who: int, client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    judges = [Platform(), Platform()]
    judges[who].error = PlatformChanged("PCR 7 was 00")
    here, there = Surveyor(HERE), Surveyor(THERE)

    async def story(pair: Pair, hypervisors: Hypervisors) -> None:
        error = await refused(pair, hypervisors)
        assert error is not None
        assert exit_code_of(error) == EXIT_AUTHENTICATION
        assert (here.heard, there.heard) == ([], [])

    tell(client_tls, server_tls, story, surveyors=(here, there), platforms=tuple(judges))


# ------------------------------------------------------------------ by hand


def contact(tls: TlsConfig, pair: Pair, **rest: Any) -> Contact:
    return Contact(tls, Peer("127.0.0.1", pair.port, **rest))


async def survey(tls: TlsConfig, pair: Pair, surveyor: Surveyor, need: int = -1, **rest: Any) -> tuple[Any, list[str]]:
    """What came of it, an error included, and which steps went well."""
    steps: list[str] = []
    try:
        found: Any = await contact(tls, pair, **rest).survey(surveyor, need, lambda name, _: steps.append(name))
    except Exception as error:  # noqa: BLE001 - the test looks at it
        found = error
    return found, steps


def test_a_survey(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    here, there = Surveyor(HERE), Surveyor(THERE, (WARNING,))

    async def story(pair: Pair, _: Hypervisors) -> None:
        (own, answer, waited), steps = await survey(client_tls, pair, here, 7)
        assert steps == ["connection", "authentication", "attestation"]
        assert answer == Surveyed(
            msgspec.structs.replace(THERE, clock_ms=1000),
            (
                Finding("egress", "ok", "alpha may use the egress 'default'"),
                WARNING,
                Finding("memory", "ok", "needs 7"),
            ),
        )
        assert 0 < waited < 10
        assert own.clock_ms == 1000 + round(waited * 500)
        assert there.heard == [msgspec.structs.replace(HERE, clock_ms=1000)]
        assert (here.thorough[-1], there.thorough) == (True, [True])
        assert pair.arriving == []  # nothing is begun
        assert pair.destination.sessions == 0
        assert pair.refused == []  # nor counted as a peer that failed

    tell(client_tls, server_tls, story, surveyors=(None, there))


@pytest.mark.parametrize("egress", ["other", "default"])
def test_who_may_not_send_learns_nothing_of_the_host(egress: str, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    there = Surveyor(THERE)

    async def story(pair: Pair, hypervisors: Hypervisors) -> None:
        def nobody(peer: PeerInfo, name: str) -> None:
            raise PolicyRefused(f"{peer.name} may not use the egress {name!r}")

        terms = replace(pair.destination._terms, allow=nobody)
        pair.destination.reconfigure(server_tls, {"default": hypervisors.egress}, terms)
        (_, answer, _), _ = await survey(client_tls, pair, Surveyor(HERE), egress=egress)
        assert answer.host is None
        ((check, grade),) = ((one.check, one.grade) for one in answer.findings)
        assert (check, grade) == ("egress", "failed")
        assert answer.findings[0].remedy
        assert (there.heard, there.thorough) == ([], [])

    tell(client_tls, server_tls, story, surveyors=(None, there))


def test_a_host_whose_preflight_is_off(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def story(pair: Pair, _: Hypervisors) -> None:
        error, _ = await survey(client_tls, pair, Surveyor(HERE))
        assert isinstance(error, PolicyRefused)
        assert "turned off" in str(error)

    tell(client_tls, server_tls, story)


@pytest.mark.parametrize("judge", [0, 1], ids=["the destination lies", "the source lies"])
def test_a_survey_comes_after_attestation(judge: int, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    judges = [Platform(), Platform()]
    judges[judge].error = PlatformChanged("PCR 7 was 00")
    here, there = Surveyor(HERE), Surveyor(THERE)

    async def story(pair: Pair, _: Hypervisors) -> None:
        error, steps = await survey(client_tls, pair, here, platform=judges[0])
        assert exit_code_of(error) == EXIT_AUTHENTICATION
        assert steps in (["connection", "authentication"], ["connection", "authentication", "attestation"])
        assert (there.heard, there.thorough) == ([], [])

    tell(client_tls, server_tls, story, surveyors=(None, there), platforms=(None, judges[1]))


async def said(tls: TlsConfig, pair: Pair, *messages: Message) -> tuple[ControlLink, Message | Exception]:
    """What a destination answers to these, said at once."""
    met = await contact(tls, pair).meet("beta")
    try:
        for message in messages:
            await met.send(message)
        return met, await met.receive()
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return met, error


def test_a_survey_without_the_attestation_that_is_demanded(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    there = Surveyor(THERE)

    async def story(pair: Pair, _: Hypervisors) -> None:
        met, answer = await said(client_tls, pair, Survey(PROTOCOL_VERSION, "default", HERE))
        assert answer == Refuse(EXIT_AUTHENTICATION, "attestation failed")
        await met.close()
        assert [type(error) for error in pair.refused] == [AttestationMissing]
        assert there.thorough == []

    tell(client_tls, server_tls, story, surveyors=(None, there), platforms=(None, Platform()))


def test_a_survey_of_somebody_else_s_ca(client_tls: TlsConfig, server_tls: TlsConfig, tmp_path: Path) -> None:
    there = Surveyor(THERE)
    stranger = Authority.create(tmp_path / "ca", now=datetime.now(UTC)).issue("alpha", now=datetime.now(UTC)).directory
    identity = Identity.load(stranger, now=datetime.now(UTC))

    async def story(pair: Pair, _: Hypervisors) -> None:
        own = TlsConfig(identity, TlsRole.CLIENT, PeerRules())
        error, _ = await survey(own, pair, Surveyor(HERE))
        assert exit_code_of(error) == EXIT_AUTHENTICATION
        assert there.thorough == []

    tell(client_tls, server_tls, story, surveyors=(None, there))


@pytest.mark.parametrize(
    "first",
    [Finish(), Surveyed(None, ()), Survey(PROTOCOL_VERSION + 1, "default", HERE)],
    ids=["another message", "the answer", "another version"],
)
def test_what_is_no_survey(first: Message, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    there = Surveyor(THERE)

    async def story(pair: Pair, _: Hypervisors) -> None:
        met, answer = await said(client_tls, pair, first)
        assert isinstance(answer, Refuse)
        assert answer.code == EXIT_AUTHENTICATION
        await met.close()
        assert there.thorough == []

    tell(client_tls, server_tls, story, surveyors=(None, there))


def test_a_flood_of_surveys_is_sent_away(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are being answered are counted, with the visits about hand-overs: a peer has so many and no more."""
    monkeypatch.setattr(visits, "VISITS_MAX", 2)
    there = Surveyor(THERE)

    async def story(pair: Pair, _: Hypervisors) -> None:
        gate = asyncio.Event()
        asked = 0

        async def slow(*_: Any) -> Message:
            nonlocal asked
            asked += 1
            await gate.wait()
            return Surveyed(None, ())

        monkeypatch.setattr(visits, "_answer", slow)
        question = Survey(PROTOCOL_VERSION, "default", HERE)
        waiting = [asyncio.create_task(said(client_tls, pair, question)) for _ in range(2)]
        while asked < 2:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)
        met, answer = await said(client_tls, pair, question)
        assert isinstance(answer, Refuse)
        assert answer.code == EXIT_POLICY
        await met.close()
        met, answer = await said(client_tls, pair, Recover(PROTOCOL_VERSION, bytes(16), "voted"))
        assert isinstance(answer, Refuse)
        await met.close()
        assert asked == 2
        gate.set()
        for task in waiting:
            met, answer = await task
            assert answer == Surveyed(None, ())
            await met.close()
        met, answer = await said(client_tls, pair, question)  # and now there is room again
        assert answer == Surveyed(None, ())
        await met.close()

    tell(client_tls, server_tls, story, surveyors=(None, there))


def test_a_survey_that_is_never_answered_ends(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visits, "SURVEY_SECONDS_MAX", 0.1)

    async def hangs(*_: Any) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(visits, "_answer", hangs)

    async def story(pair: Pair, _: Hypervisors) -> None:
        error, _ = await survey(client_tls, pair, Surveyor(HERE))
        assert isinstance(error, PeerRefused)
        await until(lambda: not pair.destination._visits._under_way["alpha"])

    tell(client_tls, server_tls, story, surveyors=(None, Surveyor(THERE)))


def test_a_survey_on_a_connection_that_returns_is_no_resumption(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    there = Surveyor(THERE)

    async def story(pair: Pair, _: Hypervisors) -> None:
        met = await contact(client_tls, pair).meet("beta", bytes(16))
        await met.send(Survey(PROTOCOL_VERSION, "default", HERE))
        answer = await met.receive()
        assert isinstance(answer, Refuse)
        assert answer.code == EXIT_AUTHENTICATION
        await met.close()
        assert there.thorough == []

    tell(client_tls, server_tls, story, surveyors=(None, there))

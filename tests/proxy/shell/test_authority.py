"""Whoever has a say is asked at fixed points, and a no leaves nothing where it should not be."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from crypto.tls import TlsConfig
from proxy.authority import Point, Question, Ruling
from proxy.errors import EXIT_POLICY, PolicyRefused, exit_code_of
from proxy.session import Role
from tests.proxy.support import Pair, Wire, over_tcp, over_unix, relays, run, until
from tests.standins.xen_host import guest_stream

STREAM = guest_stream("vm1")
RULE = "night-only"
POINTS = (Point.OFFER, Point.IDENTITY, Point.HANDOVER)
ROLES = tuple(Role)


@dataclass
class Clerk:
    """Answers as it was told to, and remembers what it was asked."""

    refuses: Point | None = None
    wait: asyncio.Event | None = None
    rate_limit: int | None = None
    asked: list[Question] = field(default_factory=list)
    over: list[str] = field(default_factory=list)

    async def ask(self, question: Question) -> Ruling:
        self.asked.append(question)
        if self.wait is not None and question.point is Point.IDENTITY:
            await self.wait.wait()
        if question.point is self.refuses:
            raise PolicyRefused(f"the rule {RULE} denies it", RULE)
        return Ruling(question.point, "everybody", "ab" * 32, self.rate_limit)

    def ended(self, question: Question) -> None:
        self.over.append(question.session)


async def drained(wire: Wire) -> bytes:
    """What came until the end or the reset."""
    got = b""
    loop = asyncio.get_running_loop()
    try:
        while piece := await loop.sock_recv(wire.sock, 65_536):
            got += piece
    except ConnectionError:
        pass
    return got


async def migrate(pair: Pair, near: Wire, far: Wire) -> bytes:
    """One way, to its end."""
    await near.send(STREAM)
    near.shut()
    got = await far.to_end()
    far.shut()
    assert await near.to_end() == b""
    await pair.ended_well()
    return got


def test_both_sides_are_asked_at_every_point(client_tls: TlsConfig, server_tls: TlsConfig, tmp_path: object) -> None:
    async def story() -> None:
        clerks = Clerk(), Clerk()
        hypervisors = over_unix(tmp_path)  # type: ignore[arg-type]
        try:
            async with relays(
                client_tls, server_tls, hypervisors.ingress, hypervisors.egress, authorities=clerks
            ) as pair:
                near, far = await pair.channel(hypervisors)
                assert await migrate(pair, near, far) == STREAM
                ended = await pair.ended()
        finally:
            hypervisors.close()
        for clerk, role, peer in zip(clerks, ROLES, ("beta", "alpha"), strict=True):
            assert [question.point for question in clerk.asked] == list(POINTS)
            assert {question.role for question in clerk.asked} == {role}
            assert {question.peer for question in clerk.asked} == {peer}
            assert all(len(question.pin) == 64 and question.pin != "0" * 64 for question in clerk.asked)
            assert [question.vm and question.vm.name for question in clerk.asked] == [None, "vm1", "vm1"]
            assert clerk.over == [clerk.asked[0].session]
        assert clerks[0].asked[0].user is not None
        assert clerks[1].asked[0].user is None
        assert clerks[0].asked[0].session == clerks[1].asked[0].session
        for one in ended:
            assert [decision.point for decision in one.report.decisions] == list(POINTS)
            assert all(decision.allowed and decision.rule == "everybody" for decision in one.report.decisions)
            assert one.report.policy == "ab" * 32

    run(story())


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("role", ROLES)
def test_a_no_ends_the_session_at_both_ends_and_says_which_rule(
    client_tls: TlsConfig, server_tls: TlsConfig, role: Role, point: Point
) -> None:
    async def story() -> None:
        clerks = {each: Clerk(point if each is role else None) for each in ROLES}
        hypervisors = over_tcp()
        both = clerks[Role.SOURCE], clerks[Role.DESTINATION]
        try:
            async with relays(
                client_tls, server_tls, hypervisors.ingress, hypervisors.egress, authorities=both
            ) as pair:
                near = await hypervisors.connect()
                accepting = asyncio.ensure_future(hypervisors.accept())
                await near.send(STREAM)
                near.shut()
                got = b""
                if point is not Point.OFFER:
                    far = await accepting
                    got = await drained(far)
                    with suppress(OSError):
                        far.shut()
                source = await pair.source_ended
                assert point is not Point.OFFER or not accepting.done()
                accepting.cancel()
                assert source.error is not None
                assert exit_code_of(source.error) == EXIT_POLICY
                assert RULE in str(source.error)
                refused = [pair.refused[0]] if point is Point.OFFER and role is Role.DESTINATION else []
                if point is not Point.OFFER:
                    refused = [ended.error for ended in await pair.ended() if ended.error]
                    assert len(refused) == 2
                assert all(exit_code_of(error) == EXIT_POLICY and RULE in str(error) for error in refused)
        finally:
            hypervisors.close()
        if point is Point.OFFER:
            assert not got
        elif point is Point.IDENTITY:
            assert b"vm1" not in got, "what tells the machine's name was passed on"
        assert clerks[role].over == [clerks[role].asked[0].session]
        last = source.report.decisions[-1]
        if role is Role.SOURCE:
            assert (last.point, last.allowed, last.rule) == (point, False, RULE)
            assert not any(question.point is point for question in clerks[Role.DESTINATION].asked) or point in (
                Point.IDENTITY,
                Point.HANDOVER,
            )

    run(story())


@pytest.mark.parametrize("role", ROLES)
def test_the_stream_waits_as_long_as_people_think(client_tls: TlsConfig, server_tls: TlsConfig, role: Role) -> None:
    async def story() -> None:
        wait = asyncio.Event()
        clerks = {each: Clerk(wait=wait if each is role else None) for each in ROLES}
        both = clerks[Role.SOURCE], clerks[Role.DESTINATION]
        hypervisors = over_tcp()
        try:
            async with relays(
                client_tls, server_tls, hypervisors.ingress, hypervisors.egress, authorities=both
            ) as pair:
                near, far = await pair.channel(hypervisors)
                going = asyncio.ensure_future(migrate(pair, near, far))
                await until(lambda: any(question.point is Point.IDENTITY for question in clerks[role].asked))
                await asyncio.sleep(0.2)  # long enough for whatever would leak
                assert not going.done()
                wait.set()
                assert await going == STREAM
        finally:
            hypervisors.close()

    run(story())


def test_other_channels_wait_for_the_first_one(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    """Pages may come on any channel; which machine they are of, the first one tells."""

    async def story() -> None:
        wait = asyncio.Event()
        hypervisors = over_tcp()
        try:
            async with relays(
                client_tls, server_tls, hypervisors.ingress, hypervisors.egress, authorities=(None, Clerk(wait=wait))
            ) as pair:
                near, far = await pair.channel(hypervisors)
                other, there = await pair.channel(hypervisors)
                await other.send(b"pages")
                hearing = asyncio.ensure_future(there.exactly(5))
                await asyncio.sleep(0.1)
                assert not hearing.done()
                await near.send(STREAM)
                await asyncio.sleep(0.1)
                assert not hearing.done()
                wait.set()
                assert await hearing == b"pages"
                for wire in (near, other):
                    wire.shut()
                assert await far.to_end() == STREAM
                assert await there.to_end() == b""
                for wire in (far, there):
                    wire.shut()
                await pair.ended_well()
        finally:
            hypervisors.close()

    run(story())


def test_a_rules_rate_holds_whatever_an_operator_sets(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def story() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(
                client_tls,
                server_tls,
                hypervisors.ingress,
                hypervisors.egress,
                authorities=(Clerk(rate_limit=10_000_000), None),
            ) as pair:
                near, far = await pair.channel(hypervisors)
                await near.send(STREAM)
                assert await far.exactly(len(STREAM)) == STREAM
                runner = pair.source.current
                assert runner is not None
                runner.set_rate(None)
                assert runner.bucket.rate == 10_000_000
                runner.set_rate(1_000_000)
                assert runner.bucket.rate == 1_000_000
                runner.set_rate(None)
                near.shut()
                await far.to_end()
                far.shut()
                await pair.ended_well()
        finally:
            hypervisors.close()

    run(story())


def test_a_destinations_rule_holds_whatever_its_source_sends(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    """The source is asked nothing, and would send it in a few milliseconds."""
    size, rate = 800_000, 1_000_000

    async def story(rate_limit: int | None) -> float:
        hypervisors = over_tcp()
        loop = asyncio.get_running_loop()
        try:
            async with relays(
                client_tls,
                server_tls,
                hypervisors.ingress,
                hypervisors.egress,
                authorities=(None, Clerk(rate_limit=rate_limit)),
            ) as pair:
                near, far = await pair.channel(hypervisors)
                began = loop.time()
                await near.send(bytes(range(256)) * (size // 256))
                near.shut()
                assert len(await far.to_end()) == size
                took = loop.time() - began
                far.shut()
                await pair.ended_well()
                return took
        finally:
            hypervisors.close()

    assert run(story(rate)) > 0.8 * (size - 0.05 * rate) / rate
    assert run(story(None)) < 0.8 * (size - 0.05 * rate) / rate

"""Connections between the relays that break at any moment: the streams stay exact, and nothing comes twice.

Each story is drawn from its seed alone; a failure names it, and `story(seed)` tells it again.
"""

import asyncio
import os
import random
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

from crypto.tls import TlsConfig
from proxy.control import Finished, Message
from proxy.errors import EXIT_HYPERVISOR, EXIT_LOST, HypervisorFailed, PeerLost, exit_code_of
from proxy.limits import KIB, MIB
from proxy.report import SessionReport
from proxy.shell.destination import DestinationRunner
from tests.proxy.support import Hypervisors, Middle, Pair, Wire, over_tcp, relays, run, until
from tests.proxy.talk import End

SECONDS_MAX = 60.0
SIZES = [0, 1000, 300 * KIB, 3 * MIB, 24 * MIB]
LARGE = [48 * MIB]  # still under way when the network goes


@dataclass
class Struck:
    """What was cut in one story."""

    lanes: int = 0
    controls: int = 0


async def strike(dice: random.Random, middle: Middle, struck: Struck, *, control: bool, lanes: bool) -> None:
    """Cut something at a random moment, if it is there."""
    await asyncio.sleep(dice.random() * 0.05)
    for _ in range(dice.randrange(50)):
        await asyncio.sleep(0)
    targets = [(True, number) for number in middle.living(lanes=False)] if control else []
    targets += [(False, number) for number in middle.living(lanes=True)] if lanes else []
    if not targets:
        return
    is_control, number = dice.choice(targets)
    if is_control:
        struck.controls += 1
    else:
        struck.lanes += 1
    await middle.cut(number, reset=dice.random() < 0.6)


async def story(
    seed: int, client: TlsConfig, server: TlsConfig, *, cuts: int, control: bool, lanes: bool, refused: float = 0.0
) -> tuple[Struck, SessionReport, SessionReport]:
    dice = random.Random(seed)
    hypervisors: Hypervisors = over_tcp()
    middle = Middle()
    struck = Struck()
    try:
        async with relays(
            client,
            server,
            hypervisors.ingress,
            hypervisors.egress,
            peer_port=middle.port,
            resume_seconds=30,
            lanes=dice.choice([1, 1, 2, 3, 4]),
        ) as pair:
            middle.start(pair.port)
            ends = []
            for _ in range(dice.choice([1, 1, 2, 4])):
                near, far = await pair.channel(hypervisors)
                words = [dice.randbytes(dice.choice(SIZES if not refused else LARGE)) for _ in range(2)]
                ends.append(
                    [End(wire, said, random.Random(seed)) for wire, said in zip((near, far), words, strict=True)]
                )
            talking = asyncio.gather(*(end.talk() for both in ends for end in both))
            for _ in range(cuts):
                await strike(dice, middle, struck, control=control, lanes=lanes)
            if refused:
                middle.refuses = True
                for number in (*middle.living(lanes=False), *middle.living(lanes=True)):
                    await middle.cut(number, reset=True)
                await asyncio.sleep(refused)
                middle.refuses = False
            await talking
            source, destination = await pair.ended_well()
    finally:
        await middle.close()
        hypervisors.close()
    for near, far in ends:
        assert bytes(far.heard) == near.words, f"seed {seed}: forward"
        assert bytes(near.heard) == far.words, f"seed {seed}: backward"
        assert near.clean, seed
        assert far.clean, seed
    assert source.digest_blake3 == destination.digest_blake3, seed
    print(
        seed,
        struck,
        source.lanes,
        source.lanes_lost,
        destination.lanes_lost,
        source.resumes,
        destination.resumes,
        source.seconds,
    )
    return struck, source, destination


# What counts is what was found broken: a lane that is cut when it has carried all that it had to is missed by nobody.
LANES_LOST = 100
RESUMES = 20
STORIES_MAX = 200


def of_both(source: SessionReport, destination: SessionReport) -> tuple[int, int]:
    """Lanes lost and resumes, as the side that noticed more of them counts."""
    return max(source.lanes_lost, destination.lanes_lost), max(source.resumes, destination.resumes)


@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.timeout(240)
def test_lanes_are_lost_at_a_hundred_random_moments(client_tls: TlsConfig, server_tls: TlsConfig, quarter: int) -> None:
    lost = 0
    for seed in range(1000 * quarter, 1000 * quarter + STORIES_MAX):
        struck, source, destination = run(
            story(seed, client_tls, server_tls, cuts=5, control=False, lanes=True), SECONDS_MAX
        )
        assert source.resumes == destination.resumes == 0, seed
        assert max(source.lanes_lost, destination.lanes_lost) <= struck.lanes, seed
        lost += of_both(source, destination)[0]
        if lost >= LANES_LOST / 4:
            return
    raise AssertionError(f"only {lost} lanes were missed in {STORIES_MAX} stories")


@pytest.mark.timeout(240)
def test_control_is_lost_at_twenty_random_moments(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    resumes = 0
    for seed in range(10_000, 10_000 + STORIES_MAX):
        struck, source, destination = run(
            story(seed, client_tls, server_tls, cuts=3, control=True, lanes=False), SECONDS_MAX
        )
        # Either may count one more: an answer to RESUME may be cut too, and a session that is done is only reported.
        assert max(source.resumes, destination.resumes) <= struck.controls, seed
        resumes += min(source.resumes, destination.resumes)
        if resumes >= RESUMES:
            return
    raise AssertionError(f"only {resumes} resumes in {STORIES_MAX} stories")


@pytest.mark.parametrize("seed", range(20_000, 20_012))
def test_anything_is_cut_at_random_moments(client_tls: TlsConfig, server_tls: TlsConfig, seed: int) -> None:
    run(story(seed, client_tls, server_tls, cuts=6, control=True, lanes=True), SECONDS_MAX)


@pytest.mark.parametrize("seed", range(30_000, 30_006))
def test_the_network_is_gone_for_a_while(client_tls: TlsConfig, server_tls: TlsConfig, seed: int) -> None:
    _, source, destination = run(
        story(seed, client_tls, server_tls, cuts=1, control=True, lanes=True, refused=0.7), SECONDS_MAX
    )
    assert source.resumes >= 1
    assert destination.resumes >= 1


# ------------------------------------------------------------------ one thing at a time


Script = Callable[[Pair, Middle, Wire, Wire], Coroutine[Any, Any, None]]


def tell(client: TlsConfig, server: TlsConfig, script: Script, *, resume_seconds: int = 30, lanes: int = 1) -> None:
    """One session with one channel through a network that the script may cut."""

    async def session() -> None:
        hypervisors, middle = over_tcp(), Middle()
        try:
            async with relays(
                client,
                server,
                hypervisors.ingress,
                hypervisors.egress,
                peer_port=middle.port,
                resume_seconds=resume_seconds,
                lanes=lanes,
            ) as pair:
                middle.start(pair.port)
                near, far = await pair.channel(hypervisors)
                await script(pair, middle, near, far)
        finally:
            await middle.close()
            hypervisors.close()

    run(session())


async def everything_cut(middle: Middle) -> None:
    middle.refuses = True
    for number in (*middle.living(lanes=False), *middle.living(lanes=True)):
        await middle.cut(number, reset=True)


async def ping(near: Wire, far: Wire, words: bytes = b"ping") -> None:
    """Something there and something else back."""
    await near.send(words)
    assert await far.exactly(len(words)) == words
    await far.send(words[::-1])
    assert await near.exactly(len(words)) == words[::-1]


async def finish(pair: Pair, near: Wire, far: Wire) -> tuple[SessionReport, SessionReport]:
    near.shut()
    assert await far.to_end() == b""
    far.shut()
    assert await near.to_end() == b""
    return await pair.ended_well()


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_peer_that_stays_away_is_given_up_and_the_hypervisors_are_told(
    client_tls: TlsConfig, server_tls: TlsConfig, lanes: int
) -> None:
    async def script(pair: Pair, middle: Middle, near: Wire, far: Wire) -> None:
        loop = asyncio.get_running_loop()
        await ping(near, far)
        began = loop.time()
        await everything_cut(middle)
        assert await near.broken()
        assert await far.broken()
        assert loop.time() - began > 0.9, "it was given the time it had been promised"
        for ended in await pair.ended():
            assert isinstance(ended.error, PeerLost)
            assert exit_code_of(ended.error) == EXIT_LOST
            assert "away for over 1 s" in str(ended.error)

    tell(client_tls, server_tls, script, resume_seconds=1, lanes=lanes)


def test_a_first_lane_may_take_longer_than_a_loss(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    """A host that is busy opens its lanes late; how long losses are waited out says nothing about that."""

    async def session() -> None:
        hypervisors, middle = over_tcp(), Middle()
        middle.lanes_wait = 2.0
        try:
            async with relays(
                client_tls, server_tls, hypervisors.ingress, hypervisors.egress, peer_port=middle.port, resume_seconds=1
            ) as pair:
                middle.start(pair.port)
                near, far = await pair.channel(hypervisors)
                await ping(near, far)
                await finish(pair, near, far)
        finally:
            await middle.close()
            hypervisors.close()

    run(session())


def test_a_peer_lost_before_its_first_lane_is_given_the_time_of_a_loss(
    client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    async def session() -> None:
        loop = asyncio.get_running_loop()
        hypervisors, middle = over_tcp(), Middle()
        middle.lanes_wait = SECONDS_MAX
        try:
            async with relays(
                client_tls, server_tls, hypervisors.ingress, hypervisors.egress, peer_port=middle.port, resume_seconds=1
            ) as pair:
                middle.start(pair.port)
                wire = await hypervisors.connect()
                await until(lambda: bool(middle.living(lanes=True)))
                began = loop.time()
                await everything_cut(middle)
                assert await wire.broken()
                assert 0.9 < loop.time() - began < 15.0
                wire.close()
        finally:
            await middle.close()
            hypervisors.close()

    run(session())


def test_without_a_time_out_a_loss_is_final(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def script(pair: Pair, middle: Middle, near: Wire, far: Wire) -> None:
        await everything_cut(middle)
        assert await near.broken()
        assert await far.broken()
        assert [exit_code_of(ended.error) for ended in await pair.ended() if ended.error] == [EXIT_LOST, EXIT_LOST]
        assert not middle.living(lanes=False)

    tell(client_tls, server_tls, script, resume_seconds=0)


def test_what_was_said_while_the_peer_was_away_arrives(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def script(pair: Pair, middle: Middle, near: Wire, far: Wire) -> None:
        await ping(near, far)
        await everything_cut(middle)
        await until(lambda: pair.departing.link is None and pair.arriving[0].link is None)
        await near.send(b"meanwhile, there")
        await far.send(b"meanwhile, back")
        assert pair.departing.status().state == "resuming"
        middle.refuses = False
        assert await far.exactly(16) == b"meanwhile, there"
        assert await near.exactly(15) == b"meanwhile, back"
        source, destination = await finish(pair, near, far)
        assert (source.resumes, destination.resumes) == (1, 1)

    tell(client_tls, server_tls, script)


def test_a_channel_that_opens_while_the_peer_is_away(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def session() -> None:
        hypervisors, middle = over_tcp(), Middle()
        try:
            async with relays(
                client_tls,
                server_tls,
                hypervisors.ingress,
                hypervisors.egress,
                peer_port=middle.port,
                resume_seconds=30,
            ) as pair:
                middle.start(pair.port)
                first = await pair.channel(hypervisors)
                await ping(*first)
                await everything_cut(middle)
                await until(lambda: pair.departing.link is None)
                near = await hypervisors.connect()
                await until(lambda: len(pair.departing.session.receivers) == 2)
                middle.refuses = False
                second = near, await pair.unless_ended(hypervisors.accept())
                await ping(*second, words=b"second")
                for here, there in (first, second):
                    here.shut()
                    there.shut()
                source, _ = await pair.ended_well()
                assert source.channels == 2
        finally:
            await middle.close()
            hypervisors.close()

    run(session())


def test_the_verdict_waits_for_a_source_that_was_away_at_the_end(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FINISHED is lost: without the verdict kept, the source would have to say 6 of a migration that is done."""
    real = DestinationRunner.say

    async def cut_first(self: DestinationRunner, message: Message) -> None:
        if isinstance(message, Finished):
            await everything_cut(middles[0])
        await real(self, message)

    middles: list[Middle] = []
    monkeypatch.setattr(DestinationRunner, "say", cut_first)

    async def script(pair: Pair, middle: Middle, near: Wire, far: Wire) -> None:
        middles.append(middle)
        near.shut()
        far.shut()
        ended = await pair.destination_ended
        assert ended.error is None
        await asyncio.sleep(0)
        assert not pair.source_ended.done()
        middle.refuses = False
        source, _ = await pair.ended_well()
        assert source.resumes == 1
        await pair.destination.told()

    tell(client_tls, server_tls, script)


def test_a_failure_that_could_not_be_told_is_told_to_the_source_that_comes_back(
    client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    async def script(pair: Pair, middle: Middle, near: Wire, far: Wire) -> None:
        await everything_cut(middle)
        await until(lambda: pair.arriving[0].link is None)
        far.reset()
        ended = await pair.destination_ended
        assert isinstance(ended.error, HypervisorFailed)
        middle.refuses = False
        assert await near.broken()
        error = (await pair.source_ended).error
        assert error is not None
        assert exit_code_of(error) == EXIT_HYPERVISOR, error

    tell(client_tls, server_tls, script)


# ------------------------------------------------------------------ lanes that join and leave


def test_lanes_join_and_leave_while_the_session_runs(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    async def script(pair: Pair, middle: Middle, near: Wire, far: Wire) -> None:
        words = random.Random(5).randbytes(64 * MIB)
        ends = [End(wire, words, random.Random(6)) for wire in (near, far)]
        talking = asyncio.gather(*(end.talk() for end in ends))
        source, (destination,) = pair.departing, pair.arriving
        for count in (4, 1, 16, 2):
            source.set_lanes(count)
            await until(lambda count=count: len(source.lanes) == len(destination.lanes) == count or talking.done())
        await talking
        here, there = await pair.ended_well()
        assert [bytes(end.heard) == words for end in ends] == [True, True]
        assert (here.lanes_lost, there.lanes_lost, here.resumes) == (0, 0, 0)
        assert here.lanes == there.lanes == 16

    tell(client_tls, server_tls, script)


def test_a_lane_that_opens_as_its_opener_is_called_off_is_dropped(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    class Made:
        dropped = False

        def drop(self) -> None:
            self.dropped = True

    async def script(pair: Pair, middle: Middle, near: Wire, far: Wire) -> None:
        made = Made()

        async def make() -> Any:
            keeping.cancel()
            return made

        keeping = asyncio.ensure_future(pair.departing._while_met(make()))
        with pytest.raises(asyncio.CancelledError):
            await keeping
        await until(lambda: made.dropped)
        await finish(pair, near, far)

    tell(client_tls, server_tls, script)


def test_a_session_of_several_lanes_leaves_no_thread_and_no_descriptor_behind(
    client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    async def script(pair: Pair, middle: Middle, near: Wire, far: Wire) -> None:
        await until(lambda: len(pair.departing.lanes) == 8)
        await everything_cut(middle)
        middle.refuses = False
        await ping(near, far)
        await finish(pair, near, far)

    tell(client_tls, server_tls, script, lanes=8)
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        tell(client_tls, server_tls, script, lanes=8)
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors

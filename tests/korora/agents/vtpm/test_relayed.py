"""A machine and its vTPM change hosts through two relays, whichever of them dies, and whenever the network does.

The hosts' hypervisors are stand-ins, their swtpm real ones. Wherever the machine is in the end, there is its vTPM, with
all that it had; at the other host there is nothing of it; and never did both answer.
"""

from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from crypto.tls import TlsConfig
from korora.agents.vtpm.handover import Holding
from proxy.errors import HypervisorFailed, PolicyRefused, VtpmFailed
from proxy.handover.table import Side, State
from proxy.hypervisors.base import CopyState
from proxy.vtpm import Carriers
from tests.korora.agents.vtpm.emulators import emulators, key, known_by, lived_in
from tests.korora.agents.vtpm.hosts import Host as VtpmHost
from tests.proxy.shell.handing import Hosts, quick, turned_back
from tests.proxy.shell.hosted import Life
from tests.proxy.shell.test_handover import MOMENTS
from tests.proxy.support import run, until

__all__ = ["key", "quick"]
pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # who is killed closes nothing
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
STORY_SECONDS_MAX = 60.0
STEPS = (
    *("exported", "leaving", "rehearsed", "arriving", "kept", "loaded", "part stop"),
    *("release start", "release write", "release forget", "given write", "given erase"),
)


class Both(Hosts):
    """Both hosts, with a swtpm each for the machine; a relay that is killed does nothing to them any more."""

    vtpm: dict[Side, VtpmHost]
    sealed: tuple[bytes, bytes]
    without: frozenset[Side] = frozenset()

    def vtpms(self, life: Life) -> Carriers | None:
        if life.side in self.without:
            return None

        def beat(step: str) -> None:
            life.moment(f"vtpm {step}")
            if life.dead:
                raise VtpmFailed("this relay was killed")

        return Mortal(life, self.vtpm[life.side].agent(beat))

    def look(self, side: Side) -> object:
        """What the machine's guest knows its TPM by."""
        return known_by(self.vtpm[side].emulator, self.sealed)

    @property
    def usable(self) -> set[Side]:
        return {side for side in Side if self.vtpm[side].usable}


class Mortal:
    """Carriers of a relay that may be dead."""

    def __init__(self, life: Life, agent: Any) -> None:
        self._life, self._agent = life, agent

    def recipient(self, session: str, peer: str) -> bytes:
        key: bytes = self._agent.recipient(session, peer)
        return key

    def of(self, session: str, peer: str) -> Any:
        return MortalCarrier(self._life, self._agent.of(session, peer))

    def carries(self, kind: str) -> bool:
        return kind == "xl"

    def verifier(self, session: str, peer: str) -> Any:
        return MortalCarrier(self._life, self._agent.verifier(session, peer))


class MortalCarrier:
    """One of them."""

    def __init__(self, life: Life, carrier: Any) -> None:
        self._life, self._carrier = life, carrier

    def __getattr__(self, name: str) -> Any:
        if self._life.dead:
            raise VtpmFailed("this relay was killed")
        return getattr(self._carrier, name)


Story = Callable[[Both], Coroutine[Any, Any, None]]


@pytest.fixture
def tell(tmp_path: Path, key: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> Iterator[Callable[..., None]]:
    """Runs a story on two hosts."""
    with emulators() as held:
        hosts = {
            Side.SOURCE: VtpmHost.make("alpha", tmp_path / "a", key),
            Side.DESTINATION: VtpmHost.make("beta", tmp_path / "b", key),
        }
        lived_in(hosts[Side.SOURCE].emulator)

        def run_it(story: Story, *, without: frozenset[Side] = frozenset(), **options: Any) -> None:
            async def whole() -> None:
                both = Both(tmp_path, client_tls, server_tls, **options)
                both.vtpm, both.without = hosts, without
                both.sealed = hosts[Side.SOURCE].emulator.sealed
                try:
                    await story(both)
                    assert not both.world.wrong
                finally:
                    await both.close()

            run(whole(), STORY_SECONDS_MAX)

        yield run_it
        held += [host.emulator for host in hosts.values()]


async def end_of(both: Both, before: object) -> None:
    """The vTPM is where the machine is, and nowhere else."""
    await both.settle()
    (at,) = (side for side in Side if both.world.copies[side] is CopyState.RUNNING)
    (other,) = set(Side) - {at}
    assert both.usable == {at}, both.world.story
    assert both.look(at) == before
    assert both.vtpm[other].traces() == []
    assert both.vtpm[at].ledger.holding in (Holding.HERE, Holding.UNKNOWN)
    assert both.vtpm[other].ledger.holding in (Holding.GONE, Holding.WIPED, Holding.UNKNOWN)


def test_it_goes_where_its_machine_goes(tell: Callable[..., None]) -> None:
    async def story(both: Both) -> None:
        before = both.look(Side.SOURCE)
        await both.migrate()
        await until(lambda: len(both.ended) == 2)
        assert [ended.error for ended in both.ended.values()] == [None, None]
        assert both.world.copies[Side.DESTINATION] is CopyState.RUNNING
        told = [what.partition("vtpm ")[2] for what in both.world.story if " vtpm " in what]
        assert sorted(set(told)) == sorted(STEPS)
        story = both.world.story
        # Nothing is promised before it is there, and the source's answers nobody before the destination's may.
        assert story.index("destination vtpm loaded") < story.index("destination write prepared before")
        assert story.index("source vtpm part stop") < story.index("source write committed before")
        assert story.index("destination vtpm release start") < story.index("destination start before")
        await end_of(both, before)
        assert both.vtpm[Side.DESTINATION].ledger.epoch == 1
        digest = both.vtpm[Side.DESTINATION].ledger.entries[-1].digest
        for ended in both.ended.values():
            assert (ended.report.vtpm_epoch, ended.report.vtpm_sha256) == (1, digest)

    tell(story)


@pytest.mark.parametrize("side", Side, ids=lambda side: side.value)
@pytest.mark.parametrize(
    "moment",
    [*(pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS), *(f"vtpm {step}" for step in STEPS)],
)
def test_a_relay_is_killed_and_comes_back(tell: Callable[..., None], side: Side, moment: str) -> None:
    if moment.startswith("vtpm "):
        source = moment.removeprefix("vtpm ") in ("exported", "leaving", "part stop", "given write", "given erase")
        moment = f"{'source' if source else 'destination'} {moment}"

    async def story(both: Both) -> None:
        before = both.look(Side.SOURCE)
        both.world.at[moment] = lambda: both.kill(side)
        await both.migrate()
        await until(lambda: side in both.killed)
        assert len(both.usable) < 2
        await both.until_left()
        assert len(both.usable) < 2
        await end_of(both, before)

    tell(story)


@pytest.mark.parametrize("moment", ["destination vtpm kept", "source vtpm leaving", "source vtpm part stop"])
def test_the_network_is_lost_and_comes_back(tell: Callable[..., None], moment: str) -> None:
    async def story(both: Both) -> None:
        before = both.look(Side.SOURCE)
        both.world.at[moment] = both.lose
        await both.migrate()
        await until(lambda: both.middle.refuses)
        await both.until_left()
        await end_of(both, before)

    tell(story)


@pytest.mark.parametrize(
    "moment", ["destination xl ready", "source vtpm exported", "source vtpm leaving", "destination vtpm loaded"]
)
def test_the_network_is_cut_and_the_session_goes_on(tell: Callable[..., None], moment: str) -> None:
    async def story(both: Both) -> None:
        before = both.look(Side.SOURCE)
        both.world.at[moment] = lambda: both.lose(mend=True)
        await both.migrate()
        await until(lambda: len(both.ended) == 2)
        assert [ended.error for ended in both.ended.values()] == [None, None]
        await end_of(both, before)
        assert both.vtpm[Side.DESTINATION].usable

    tell(story, resume_seconds=30)


def test_a_destination_that_takes_no_vtpm_gets_no_machine_that_has_one(tell: Callable[..., None]) -> None:
    async def story(both: Both) -> None:
        before = both.look(Side.SOURCE)
        await both.migrate()
        await until(lambda: Side.SOURCE in both.ended)
        error = both.ended[Side.SOURCE].error
        assert isinstance(error, PolicyRefused)
        assert "has a vTPM, and the destination's relay does not take any" in str(error)
        await turned_back(both)
        await end_of(both, before)

    tell(story, without=frozenset({Side.DESTINATION}))


def test_a_source_that_moves_none_leaves_the_destinations_alone(tell: Callable[..., None]) -> None:
    async def story(both: Both) -> None:
        await both.migrate()
        await until(lambda: len(both.ended) == 2)
        assert both.states() == {Side.SOURCE: State.DONE, Side.DESTINATION: State.DONE}
        assert both.usable == {Side.SOURCE}

    tell(story, without=frozenset({Side.SOURCE}))


def test_a_destination_whose_emulator_is_somebodys_leaves_it_alone(tell: Callable[..., None]) -> None:
    async def story(both: Both) -> None:
        before = both.look(Side.SOURCE)
        lived_in(both.vtpm[Side.DESTINATION].emulator)
        emulator = both.vtpm[Side.DESTINATION].emulator
        others = known_by(emulator, emulator.sealed)
        await both.migrate()
        await until(lambda: len(both.ended) == 2)
        error = both.ended[Side.DESTINATION].error
        assert isinstance(error, HypervisorFailed)
        assert "is running, so it is somebody's" in str(error)
        await turned_back(both)
        assert both.look(Side.SOURCE) == before
        assert known_by(emulator, emulator.sealed) == others
        assert both.vtpm[Side.DESTINATION].ledger.holding is Holding.UNKNOWN

    tell(story)

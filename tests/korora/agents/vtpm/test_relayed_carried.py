"""A QEMU's machine and the vTPM in its stream change hosts through two relays, which verify it, whichever of them dies.

The QEMUs are stand-ins whose stream has a real vTPM in it; swtpm is a real one. Wherever the machine runs in the end,
there the ledgers have its vTPM; and a machine whose vTPM cannot be verified turns back.
"""

from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crypto.tls import TlsConfig
from korora.agents.vtpm.handover import Holding
from proxy.errors import EXIT_HYPERVISOR, PolicyRefused, RelayError, VtpmFailed, VtpmRefused, exit_code_of
from proxy.handover.table import Side
from proxy.hypervisors.base import CopyState
from proxy.paging import Encode, PagingTerms
from proxy.shell import verification
from proxy.streams.vtpm import CarriedPart, CarriedVtpm
from proxy.vtpm import Carriers
from tests.korora.agents.vtpm.carrying import CarryingHost, stream_of
from tests.korora.agents.vtpm.emulators import Emulator, emulators, key, lived_in
from tests.korora.agents.vtpm.hosts import UUID
from tests.proxy.shell.handing import quick
from tests.proxy.shell.hosted import Life
from tests.proxy.shell.qemu_hosts import QemuHosts
from tests.proxy.shell.test_qemu_guard import MOMENTS, end_of, quick_qemu
from tests.proxy.streams.made import BLOCKS, EOS, Ram, block_list, qemu_header, ram, section
from tests.proxy.streams.test_vtpm import BEFORE, BEHIND, described, vtpm
from tests.proxy.support import run, until

__all__ = ["key", "quick", "quick_qemu"]
pytestmark = [
    pytest.mark.usefixtures("quick", "quick_qemu"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # who is killed closes nothing
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
STORY_SECONDS_MAX = 60.0
STEPS = ("leaving", "rehearsed", "arriving", "release write", "given write")
PAGES = [Ram("page", 4096 * number, b"pc.ram" if number == 0 else None) for number in range(40)]
MEMORY = qemu_header() + section(1, 2, b"ram", block_list(BLOCKS) + EOS) + section(2, 2, None, ram(PAGES))


def devices_of(*devices: Any) -> bytes:
    """What follows the memory: the last of it, these devices, the end and the description."""
    told = described(devices)
    packed = b"".join(device.pack(10 + number) for number, device in enumerate(devices))
    return section(3, 2, None, EOS) + packed + b"\0\x06" + len(told).to_bytes(4, "big") + told


class Mortal:
    """Carriers of a relay that may be dead; what one of them says may be changed on its way."""

    def __init__(self, life: Life, agent: Any, change: Any) -> None:
        self._life, self._agent, self._change = life, agent, change

    def carries(self, kind: str) -> bool:
        return bool(self._agent.carries(kind))

    def recipient(self, session: str, peer: str) -> bytes:
        return bytes(self._agent.recipient(session, peer))

    def of(self, session: str, peer: str) -> Any:
        return self._agent.of(session, peer)

    def verifier(self, session: str, peer: str) -> Any:
        return MortalVerifier(self._life, self._agent.verifier(session, peer), self._change)


class MortalVerifier:
    """One of them."""

    def __init__(self, life: Life, verifier: Any, change: Any) -> None:
        self._life, self._verifier, self._change = life, verifier, change

    def __getattr__(self, name: str) -> Any:
        if self._life.dead:
            raise VtpmFailed("this relay was killed")
        if name == "arrive" and self._change is not None:
            return lambda *told: self._change(self._verifier.arrive(*told))
        return getattr(self._verifier, name)


class Carrying(QemuHosts):
    """Both hosts, whose relays verify."""

    hosts: dict[Side, CarryingHost]
    without: frozenset[Side] = frozenset()
    change: Any = None
    """What a destination does to its proof."""
    paging = PagingTerms()

    def vtpms(self, life: Life) -> Carriers | None:
        if life.side in self.without:
            return None

        def beat(step: str) -> None:
            life.moment(f"vtpm {step}")
            if life.dead:
                raise VtpmFailed("this relay was killed")

        change = self.change if life.side is Side.DESTINATION else None
        return Mortal(life, self.hosts[life.side].acting(beat), change)

    def holdings(self) -> list[Holding]:
        return [self.hosts[side].ledger.holding for side in Side]


Story = Callable[[Carrying], Coroutine[Any, Any, None]]


@pytest.fixture
def source(tmp_path: Path, key: Path) -> Iterator[Emulator]:
    with emulators() as held:
        held.append(Emulator(tmp_path / "e", key))
        lived_in(held[0])
        yield held[0]


@pytest.fixture
def carried(source: Emulator) -> CarriedVtpm:
    return stream_of(source)


@pytest.fixture
def tell(
    tmp_path: Path, key: Path, carried: CarriedVtpm, client_tls: TlsConfig, server_tls: TlsConfig
) -> Callable[..., None]:
    """Runs a story on two hosts."""

    def run_it(
        story: Story,
        *,
        without: frozenset[Side] = frozenset(),
        devices: bytes | None = None,
        change: Any = None,
        paging: PagingTerms | None = None,
        told: Any = "emulator",
        **options: Any,
    ) -> None:
        async def whole() -> None:
            made = Carrying(tmp_path, client_tls, server_tls, **options)
            made.hosts = {
                Side.SOURCE: CarryingHost("alpha", tmp_path / "a", key),
                Side.DESTINATION: CarryingHost("beta", tmp_path / "b", key),
            }
            made.without, made.change = without, change
            made.paging = paging or PagingTerms()
            for qemu in made.qemu.values():
                await qemu.listen()
                qemu.uuid = UUID
                qemu.memory = MEMORY
                qemu.devices = devices_of(BEFORE, vtpm(carried), BEHIND) if devices is None else devices
                qemu.on["query-tpm"] = lambda _: [{"id": "tpm0", "options": {"type": told}}] if told else []
            try:
                await story(made)
                assert not made.world.wrong, made.world.wrong
            finally:
                await made.close()
                for qemu in made.qemu.values():
                    with suppress(OSError):
                        qemu.end()

        run(whole(), STORY_SECONDS_MAX)

    return run_it


async def settled(both: Carrying) -> None:
    """All is settled, one runs, and the ledgers say so."""
    await end_of(both)
    if both.world.copies[Side.DESTINATION] is CopyState.RUNNING:
        assert both.holdings() == [Holding.GONE, Holding.HERE]
    else:
        here, there = both.holdings()
        assert here in (Holding.HERE, Holding.UNKNOWN)
        assert there in (Holding.WIPED, Holding.UNKNOWN)


def errors(both: Carrying) -> list[BaseException | None]:
    return [both.ended[side].error for side in Side]


async def refused(both: Carrying, side: Side, kind: type[RelayError], what: str) -> None:
    """Its migration fails at ``side`` for that reason, and the machine runs on where it was."""
    await both.migrate()
    await until(lambda: side in both.ended)
    error = both.ended[side].error
    assert isinstance(error, kind), both.ended
    assert what in str(error)
    await settled(both)
    assert both.world.copies[Side.SOURCE] is CopyState.RUNNING
    assert both.world.copies[Side.DESTINATION] is CopyState.ABSENT


def test_it_is_verified_before_anybody_votes(tell: Callable[..., None]) -> None:
    async def story(both: Carrying) -> None:
        await both.migrate()
        await until(lambda: len(both.ended) == 2)
        assert errors(both) == [None, None]
        story = both.world.story
        assert [what for what in story if what.partition(" vtpm ")[2] in STEPS] == [
            *("source vtpm leaving", "destination vtpm rehearsed", "destination vtpm arriving"),
            *("destination vtpm release write", "source vtpm given write"),
        ]
        assert story.index("destination qemu completed") < story.index("destination vtpm rehearsed")
        assert story.index("destination vtpm arriving") < story.index("destination write voted before")
        assert story.index("destination vtpm arriving") < story.index("source write voted before")
        await settled(both)
        entry = both.hosts[Side.DESTINATION].ledger.entries[-1]
        assert entry.identity
        assert entry.identity == both.hosts[Side.SOURCE].ledger.identity
        for ended in both.ended.values():
            assert (ended.report.vtpm_epoch, ended.report.vtpm_sha256) == (1, entry.digest)

    tell(story)


@pytest.mark.parametrize("side", Side, ids=lambda side: side.value)
@pytest.mark.parametrize(
    "moment",
    [*(pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS), *(f"vtpm {step}" for step in STEPS)],
)
def test_a_relay_is_killed_and_comes_back(tell: Callable[..., None], side: Side, moment: str) -> None:
    if moment.startswith("vtpm "):
        moment = f"{'source' if moment.endswith(('leaving', 'given write')) else 'destination'} {moment}"

    async def story(both: Carrying) -> None:
        both.world.at[moment] = lambda: both.kill(side)
        await both.migrate()
        await until(lambda: side in both.killed)
        await both.until_left()
        await settled(both)

    tell(story)


@pytest.mark.parametrize("moment", ["source vtpm leaving", "destination vtpm arriving"])
def test_the_network_is_lost_and_comes_back(tell: Callable[..., None], moment: str) -> None:
    async def story(both: Carrying) -> None:
        both.world.at[moment] = both.lose
        await both.migrate()
        await until(lambda: both.middle.refuses)
        await both.until_left()
        await settled(both)

    tell(story)


@pytest.mark.parametrize("moment", ["source vtpm leaving", "destination vtpm rehearsed", "destination vtpm arriving"])
def test_the_network_is_cut_and_the_session_goes_on(tell: Callable[..., None], moment: str) -> None:
    async def story(both: Carrying) -> None:
        both.world.at[moment] = lambda: both.lose(mend=True)
        await both.migrate()
        await until(lambda: len(both.ended) == 2)
        assert errors(both) == [None, None]
        await settled(both)
        assert both.holdings() == [Holding.GONE, Holding.HERE]

    tell(story, resume_seconds=30)


def test_a_machine_without_one_just_moves(tell: Callable[..., None]) -> None:
    async def story(both: Carrying) -> None:
        await both.migrate()
        await until(lambda: len(both.ended) == 2)
        assert errors(both) == [None, None]
        assert both.holdings() == [Holding.UNKNOWN, Holding.UNKNOWN]
        assert not [what for what in both.world.story if " vtpm " in what]

    tell(story, devices=devices_of(BEFORE, BEHIND), told="")


# ---- attacks, and what cannot be told


@pytest.mark.parametrize("without", Side, ids=lambda side: side.value)
def test_a_peer_that_does_not_verify_takes_and_gives_none(tell: Callable[..., None], without: Side) -> None:
    (other,) = set(Side) - {without}

    async def story(both: Carrying) -> None:
        await refused(both, other, PolicyRefused, "has a vTPM, and the peer's relay does not verify it")

    tell(story, without=frozenset({without}))


def test_a_proof_of_another_vtpm_turns_the_machine_back(tell: Callable[..., None]) -> None:
    def other(proof: bytes) -> bytes:
        said = msgspec.msgpack.decode(proof)
        said["pcrs"] = bytes(len(said["pcrs"]))
        return msgspec.msgpack.encode(said)

    async def story(both: Carrying) -> None:
        await refused(both, Side.SOURCE, VtpmRefused, "the vTPM's quote is not good")
        assert both.holdings() == [Holding.HERE, Holding.WIPED]

    tell(story, change=other)


def test_no_proof_turns_the_machine_back(tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A destination that votes, and says nothing of the vTPM."""

    async def nothing(self: verification.Verification) -> None:
        if self._side is Side.SOURCE:
            await verified(self)

    verified = verification.Verification.verified
    monkeypatch.setattr(verification.Verification, "verified", nothing)
    monkeypatch.setattr(verification, "APPROVAL_SECONDS_MAX", 0.3)

    async def story(both: Carrying) -> None:
        await refused(both, Side.SOURCE, VtpmFailed, "the peer's relay says nothing of the vTPM of vm1")
        assert "destination write voted before" in both.world.story

    tell(story)


def test_a_source_that_says_there_is_none_is_not_believed(
    tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def none(self: verification.Verification, vm: Any) -> bool:
        return self._side is Side.DESTINATION

    monkeypatch.setattr(verification.Verification, "_has", none)

    async def story(both: Carrying) -> None:
        await refused(both, Side.DESTINATION, VtpmRefused, "says that vm1 has no vTPM, and one has arrived")

    tell(story)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"paging": PagingTerms(encode=Encode.OPAQUE)}, "the stream is not read where its bytes are sent as they are"),
        ({"devices": devices_of(BEFORE, BEHIND)}, "cannot be verified: the stream has none"),
        ({"devices": devices_of(vtpm(CarriedVtpm(*[CarriedPart(0, b"x" * 40)] * 3)))}, "TPM 1.2"),
    ],
)
def test_what_cannot_be_verified_does_not_move(tell: Callable[..., None], options: Any, what: str) -> None:
    async def story(both: Carrying) -> None:
        await both.migrate()
        await until(lambda: len(both.ended) == 2)
        for ended in both.ended.values():  # whichever finds it first tells the other
            assert ended.error is not None
            assert what in str(ended.error)
            assert exit_code_of(ended.error) == EXIT_HYPERVISOR
        await settled(both)
        assert both.world.copies[Side.SOURCE] is CopyState.RUNNING
        assert both.holdings() == [Holding.UNKNOWN, Holding.UNKNOWN]

    tell(story, **options)


def test_one_that_its_qemu_does_not_tell_of_is_verified_too(tell: Callable[..., None]) -> None:
    async def story(both: Carrying) -> None:
        await both.migrate()
        await until(lambda: len(both.ended) == 2)
        assert errors(both) == [None, None]
        assert both.holdings() == [Holding.GONE, Holding.HERE]

    tell(story, told="")

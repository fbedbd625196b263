"""A source comes about a hand-over: whose it is, how much is listened to; and who says no to it, or nothing at all."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from crypto.identity import Identity
from crypto.pki import Authority
from crypto.tls import PeerRules, TlsConfig, TlsRole
from proxy.control import PROTOCOL_VERSION, Recover, Refuse, Word
from proxy.errors import EXIT_POLICY, PeerLost, PolicyRefused, RelayError, exit_code_of
from proxy.handover.table import Side
from proxy.handover.xl import BANNER
from proxy.hypervisors.base import CopyState, Vm
from proxy.limits import DRAIN_SECONDS_MAX, WORDS_MAX
from proxy.shell.contact import Contact
from tests.proxy.shell.handing import Hosts, both_ended, hosts, lie, quick, tell, turned_back
from tests.proxy.shell.hosted import MortalConnection
from tests.proxy.support import until

__all__ = ["quick", "tell"]
pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # who is killed closes nothing
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


# ------------------------------------------------------------------ visits


@pytest.fixture(scope="session")
def stranger_tls(ca_dir: Path) -> TlsConfig:
    """Another host of the same CA."""
    identity = Authority.open(ca_dir).issue("gamma", now=datetime.now(UTC)).directory
    return TlsConfig(Identity.load(identity, now=datetime.now(UTC)), TlsRole.CLIENT, PeerRules())


async def ask(both: Hosts, tls: TlsConfig, word: str, session: str, version: int = PROTOCOL_VERSION) -> object:
    """What the destination answers to a visit; None if it says nothing."""
    link = await Contact(tls, both.peer).meet("beta")
    try:
        await link.send(Recover(version, bytes.fromhex(session), word))  # type: ignore[arg-type]
        return await link.receive()
    except RelayError:
        return None
    finally:
        await link.close()


@pytest.mark.parametrize("word", ["aborted", "committed", "done", "voted", "asked"])
@pytest.mark.parametrize("session_is", ["under way", "over"])
def test_another_host_asks_about_a_hand_over(
    tell: Callable[..., None],
    client_tls: TlsConfig,
    stranger_tls: TlsConfig,
    word: str,
    session_is: str,
) -> None:
    """Refused, and nothing happens: neither to the session nor to a copy that waits for its source."""

    async def story(both: Hosts) -> None:
        both.world.at["destination write voted after"] = lambda: both.kill(Side.SOURCE)
        await both.migrate()
        await until(lambda: "destination write voted after" in both.world.story)
        await until(lambda: both.arriving[0].guard is not None and both.arriving[0].guard.detached)
        if session_is == "over":
            both.kill(Side.DESTINATION)
            await both.bury(Side.DESTINATION)
            both.begin(Side.DESTINATION)
        await both.bury(Side.SOURCE)
        both.mend()
        session = both.journal(Side.DESTINATION)[0].head.session
        lines = len(both.journal(Side.DESTINATION)[0].entries)
        answer = await ask(both, stranger_tls, word, session)
        assert isinstance(answer, Refuse)
        assert answer.code == EXIT_POLICY
        assert len(both.journal(Side.DESTINATION)[0].entries) == lines
        assert both.world.copies[Side.DESTINATION] is CopyState.PAUSED
        assert await ask(both, stranger_tls, word, "ab" * 16) == Word("unknown")
        answer = await ask(both, client_tls, word, session, version=PROTOCOL_VERSION + 1)
        assert isinstance(answer, Refuse)
        await turned_back(both)

    tell(story)


def test_a_stranger_does_not_stand_for_a_source_that_has_to_hear(
    tell: Callable[..., None], stranger_tls: TlsConfig
) -> None:
    """A destination that ends with its session waits until its own source knows how that ended."""

    async def story(both: Hosts) -> None:
        both.world.at["destination start after"] = lambda: both.kill(Side.SOURCE)
        await both.migrate()
        await until(lambda: Side.DESTINATION in both.ended)
        await both.bury(Side.SOURCE)
        both.mend()
        there = both.handovers[Side.DESTINATION]
        assert there.untold == 1
        session = both.journal(Side.DESTINATION)[0].head.session
        assert isinstance(await ask(both, stranger_tls, "asked", session), Refuse)
        assert there.untold == 1
        await both.settle()
        assert there.untold == 0
        assert both.world.copies == {Side.SOURCE: CopyState.ABSENT, Side.DESTINATION: CopyState.RUNNING}

    tell(story)


def test_a_visit_that_never_ends(
    tell: Callable[..., None],
    client_tls: TlsConfig,
) -> None:
    async def story(both: Hosts) -> None:
        both.begin(Side.DESTINATION)
        link = await Contact(client_tls, both.peer).meet("beta")
        link.mark_open()
        try:
            await link.send(Recover(PROTOCOL_VERSION, bytes(16), "voted"))
            for _ in range(WORDS_MAX):
                assert await link.receive() == Word("unknown")
                await link.send(Word("voted"))
            with pytest.raises(PeerLost):
                await link.receive()
        finally:
            await link.close()

    tell(story)


# ------------------------------------------------------------------ floods, and a no


@pytest.mark.parametrize("side", Side, ids=lambda side: side.value)
def test_a_flood_of_words_is_kept_once(tell: Callable[..., None], side: Side) -> None:
    """While the hearer is at something that takes long, and so cannot listen."""
    victim = Side.SOURCE if side is Side.DESTINATION else Side.DESTINATION
    go_on = asyncio.Event()

    async def slow(_: Side, vm: Vm) -> None:
        await go_on.wait()

    async def story(both: Hosts) -> None:
        moment = "destination xl ready" if victim is Side.DESTINATION else "destination write prepared after"
        both.world.at[moment] = lambda: lie(both, side, "prepared", "voted", times=4000)
        await both.migrate()
        await until(lambda: len(both.xl) == 3 and both.xl[2].done())
        tasks = len(asyncio.all_tasks())
        await asyncio.sleep(0.1)
        assert max(tasks, len(asyncio.all_tasks())) < 80
        go_on.set()
        await both_ended(both)
        assert [ended.error for ended in both.ended.values()] == [None, None]

    tell(story, approvals={victim: [slow]})


@pytest.mark.parametrize("side", Side, ids=lambda side: side.value)
def test_a_no_at_the_hand_over_turns_back(
    tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch, side: Side
) -> None:
    """With the policy's exit code at both ends; and only when nobody is at the hypervisor's connection any more."""
    asked: list[Vm] = []
    attached: list[str] = []
    real = MortalConnection.abort

    async def no(_: Side, vm: Vm) -> None:
        asked.append(vm)
        raise PolicyRefused("not today")

    async def abort(self: MortalConnection) -> None:
        runner = both_now[0].departing.current if self._life.side is Side.SOURCE and both_now[0].departing else None
        runner = runner or (both_now[0].arriving[0] if self._life.side is Side.DESTINATION else None)
        if runner is not None and runner.guard is not None and not runner.guard.detached:
            attached.append(self._life.side.value)
        await real(self)

    both_now: list[Hosts] = []
    monkeypatch.setattr(MortalConnection, "abort", abort)

    async def story(both: Hosts) -> None:
        both_now.append(both)
        await both.migrate()
        await turned_back(both)
        assert [vm.name for vm in asked] == ["guest"]
        assert not attached
        for ended in both.ended.values():
            assert ended.error is not None
            assert exit_code_of(ended.error) == EXIT_POLICY, ended.error
            assert "not today" in str(ended.error)
        assert both.source_xl is not None
        assert bytes(both.source_xl.heard) == BANNER, "every refusal comes before READY"
        assert both.source_xl.end == "resumed"

    tell(story, approvals={side: [no]})


@pytest.mark.parametrize("side", Side, ids=lambda side: side.value)
def test_who_is_asked_while_the_network_goes(tell: Callable[..., None], side: Side) -> None:
    """Nobody waits for an answer that has come to nothing."""

    async def story(both: Hosts) -> None:
        async def never(_: Side, vm: Vm) -> None:
            both.lose()
            await asyncio.Event().wait()

        both.handovers[side].approvals = (never,)
        await until(lambda: both.middle.refuses)
        await both.until_left()
        await turned_back(both)

    async def begin(both: Hosts) -> None:
        await both.migrate()
        await story(both)

    tell(begin)


async def test_nothing_waits_for_the_other_side_of_a_refusal(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    """A source's no comes when its machine stands still, and xl goes on when its transport has ended: at once.

    The destination has promised its copy, and waits to be told that the source has turned back.
    """
    loop = asyncio.get_running_loop()
    refused: list[float] = []

    async def no(_: Side, vm: Vm) -> None:
        refused.append(loop.time())
        raise PolicyRefused("not today")

    async with hosts(tmp_path, client_tls, server_tls, approvals={Side.SOURCE: [no]}) as both:
        await both.migrate()
        await until(lambda: Side.SOURCE in both.ended)
        assert loop.time() - refused[0] < DRAIN_SECONDS_MAX / 2
        assert both.source_xl is not None
        assert both.source_xl.end == "resumed"
        await turned_back(both)

"""A vTPM is wrapped for the key that the destination's TPM has vouched for, and for no other."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from korora.agents.vtpm.carrier import VOUCHED_MAX, VOUCHED_PER_PEER_MAX, Agent
from proxy.control import VtpmGiven
from proxy.errors import VtpmFailed, VtpmRefused
from proxy.handover.table import Side
from proxy.hypervisors.base import CopyState, Vm
from proxy.shell.custody import Custody


def test_the_carrier_has_the_key_that_was_shown(tmp_path: Any) -> None:
    agent = Agent(SimpleNamespace(), tmp_path)  # type: ignore[arg-type]
    shown = agent.recipient("aa", "alpha")
    assert agent.of("aa", "beta").recipient() != shown
    assert agent.of("aa", "alpha").recipient() == shown
    assert agent.of("aa", "alpha").recipient() != shown  # a session begins once


def test_sessions_that_never_come_are_forgotten(tmp_path: Any) -> None:
    agent = Agent(SimpleNamespace(), tmp_path)  # type: ignore[arg-type]
    shown = [agent.recipient("aa", str(number)) for number in range(VOUCHED_MAX + 1)]
    assert agent.of("aa", "0").recipient() != shown[0]
    assert agent.of("aa", "1").recipient() == shown[1]


def test_a_peer_that_floods_challenges_forgets_its_own_alone(tmp_path: Any) -> None:
    agent = Agent(SimpleNamespace(), tmp_path)  # type: ignore[arg-type]
    shown = agent.recipient("aa", "alpha")
    theirs = [agent.recipient(str(number), "mallory") for number in range(2 * VOUCHED_MAX)]
    assert agent.of("aa", "alpha").recipient() == shown
    assert agent.of(str(2 * VOUCHED_MAX - VOUCHED_PER_PEER_MAX - 1), "mallory").recipient() not in theirs
    assert agent.of(str(2 * VOUCHED_MAX - 1), "mallory").recipient() == theirs[-1]


@pytest.mark.parametrize(("vouched", "asks"), [(b"key", b"other"), (b"", b"other")])
async def test_another_key_is_given_nothing(vouched: bytes, asks: bytes) -> None:
    guard: Any = SimpleNamespace(party=SimpleNamespace(handover=SimpleNamespace(side=Side.SOURCE)))
    session: Any = SimpleNamespace(vouched=vouched)
    custody = Custody(session, guard, None, None, agreed=True)  # type: ignore[arg-type]
    with pytest.raises(VtpmRefused, match="not vouched"):
        await custody._give(asks)


VM = Vm("guest", "0f9c2f1e-0000-4000-8000-00000000abcd")


class Source:
    """A source's custody of VM's vTPM, if that has one; what it says to the destination, and whom it has given away."""

    def __init__(self, *has: bool, wrapped: bytes = b"wrapped") -> None:
        self.said: list[Any] = []
        self.known = asyncio.Event()
        """Whether the hypervisor has told which machine it is."""
        self._has, self._wrapped = list(has), wrapped
        party = SimpleNamespace(handover=SimpleNamespace(side=Side.SOURCE), vm=Vm("", ""))
        guard: Any = SimpleNamespace(party=party, leaving=self._leaving)
        session: Any = SimpleNamespace(vouched=None, say=self._say, report=SimpleNamespace())
        carrier: Any = SimpleNamespace(has=self._had, depart=lambda *_: self._wrapped, moving=None)
        hypervisor: Any = SimpleNamespace(departing=self._departing)
        self.custody = Custody(session, guard, hypervisor, carrier, agreed=True)

    async def _leaving(self) -> Vm:
        await self.known.wait()
        return VM

    async def _say(self, message: Any) -> None:
        self.said.append(message)

    async def _departing(self, _: Vm) -> CopyState:
        return CopyState.SUSPENDED

    def _had(self, uuid: str) -> bool:
        return uuid == VM.uuid and (self._has.pop(0) if len(self._has) > 1 else self._has[0])


@pytest.mark.parametrize(
    ("has", "wrapped", "words"),
    [
        pytest.param((True,), b"", "went away", id="went away"),
        pytest.param((False, True), b"wrapped", "was told that guest has no vTPM", id="came"),
    ],
)
async def test_one_that_went_or_came_meanwhile_leaves_nobody_waiting(
    has: tuple[bool, ...], wrapped: bytes, words: str
) -> None:
    """The destination is told that there is none, and the machine does not go without."""
    source = Source(*has, wrapped=wrapped)
    source.known.set()
    await source.custody._give(b"key")
    assert source.said == [VtpmGiven(b"", 0)]
    async with asyncio.timeout(5):
        with pytest.raises(VtpmFailed, match=words):
            await source.custody.approve(Side.SOURCE, VM)


async def test_a_machine_without_one_goes() -> None:
    source = Source(False)
    source.known.set()
    await source.custody._give(b"key")
    async with asyncio.timeout(5):
        await source.custody.approve(Side.SOURCE, VM)


async def test_nobody_is_told_before_it_is_known_which_machine_leaves() -> None:
    """A small machine can have arrived, and the destination have asked, before the hypervisor has told which it is."""
    source = Source(True)
    asyncio.get_running_loop().call_later(0.05, source.known.set)
    async with asyncio.timeout(5):
        await source.custody._give(b"key")
    assert source.said == [VtpmGiven(b"wrapped", 0)]

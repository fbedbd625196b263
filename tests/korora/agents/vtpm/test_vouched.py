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


async def test_one_that_went_away_meanwhile_leaves_nobody_waiting() -> None:
    """It was there when the machine's hand-over began: the destination is told, and the machine does not go without."""
    vm = Vm("guest", "0f9c2f1e-0000-4000-8000-00000000abcd")
    said: list[Any] = []

    async def say(message: Any) -> None:
        said.append(message)

    async def departing(_: Vm) -> CopyState:
        return CopyState.SUSPENDED

    guard: Any = SimpleNamespace(party=SimpleNamespace(handover=SimpleNamespace(side=Side.SOURCE), vm=vm))
    session: Any = SimpleNamespace(vouched=None, say=say, report=SimpleNamespace())
    carrier: Any = SimpleNamespace(has=lambda _: True, depart=lambda *_: b"", moving=None)
    custody = Custody(session, guard, SimpleNamespace(departing=departing), carrier, agreed=True)  # type: ignore[arg-type]
    await custody._give(b"key")
    assert said == [VtpmGiven(b"", 0)]
    async with asyncio.timeout(5):
        with pytest.raises(VtpmFailed, match="went away"):
            await custody.approve(Side.SOURCE, vm)

"""A vTPM is wrapped for the key that the destination's TPM has vouched for, and for no other."""

from types import SimpleNamespace
from typing import Any

import pytest

from korora.agents.vtpm.carrier import VOUCHED_MAX, Agent
from proxy.errors import VtpmRefused
from proxy.handover.table import Side
from proxy.shell.custody import Custody


def test_the_carrier_has_the_key_that_was_shown(tmp_path: Any) -> None:
    agent = Agent(SimpleNamespace(), tmp_path)  # type: ignore[arg-type]
    shown = agent.recipient("aa", "alpha")
    assert agent.of("aa", "beta").recipient() != shown
    assert agent.of("aa", "alpha").recipient() == shown
    assert agent.of("aa", "alpha").recipient() != shown  # a session begins once


def test_sessions_that_never_come_are_forgotten(tmp_path: Any) -> None:
    agent = Agent(SimpleNamespace(), tmp_path)  # type: ignore[arg-type]
    shown = [agent.recipient(str(number), "alpha") for number in range(VOUCHED_MAX + 1)]
    assert agent.of("0", "alpha").recipient() != shown[0]
    assert agent.of("1", "alpha").recipient() == shown[1]


@pytest.mark.parametrize(("vouched", "asks"), [(b"key", b"other"), (b"", b"other")])
async def test_another_key_is_given_nothing(vouched: bytes, asks: bytes) -> None:
    guard: Any = SimpleNamespace(party=SimpleNamespace(handover=SimpleNamespace(side=Side.SOURCE)))
    session: Any = SimpleNamespace(vouched=vouched)
    custody = Custody(session, guard, None, None, agreed=True)  # type: ignore[arg-type]
    with pytest.raises(VtpmRefused, match="not vouched"):
        await custody._give(asks)

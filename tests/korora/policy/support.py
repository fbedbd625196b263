"""Policies and questions in few words."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from korora.policy.decide import Decision, decide
from korora.policy.file import Policy
from korora.policy.ledger import Usage
from proxy.authority import Point, Question
from proxy.hypervisors.base import Vm
from proxy.session import Role

WHERE = "/etc/korora/policy.toml"
NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)  # a Thursday
UUID = "4f1b7a52-90c3-4bd4-8c6e-1f2a3b4c5d6e"
USERS = {"ann": 1001, "ben": 1002, "cid": 1003}
ASKED = Question(
    point=Point.OFFER,
    role=Role.SOURCE,
    session="00" * 16,
    peer="beta",
    pin="ab" * 32,
    egress="default",
    tenant="blue",
    user=1001,
)


def policy(text: str) -> Policy:
    """A policy on a host where ann, ben and cid are users."""
    return Policy.parse(text.encode(), WHERE, USERS.get)


def rule(name: str, effect: str, **keys: Any) -> str:
    """A `[[rule]]` of TOML."""
    lines = [f"{key} = {_toml(value)}" for key, value in keys.items()]
    return "\n".join(["[[rule]]", f'name = "{name}"', f'effect = "{effect}"', *lines, ""])


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, str):
        escaped = "".join(c if c.isprintable() and c not in '\\"' else f"\\U{ord(c):08x}" for c in value)
        return f'"{escaped}"'
    return str(value)


def told(name: str = "web-1", uuid: str = UUID, point: Point = Point.IDENTITY, **changes: Any) -> Question:
    """The same question once the machine is known."""
    return replace(ASKED, point=point, vm=Vm(name, uuid), **changes)


def ask(text: str, question: Question = ASKED, now: datetime = NOW, usage: Usage | None = None) -> Decision:
    """What a policy says."""
    return decide(policy(text), question, now, usage or Usage())

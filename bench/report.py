"""A whole run: its machine, its settings, its sections; as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

from bench.machine import Machine

SCHEMA: Final = "korora-bench-2"


class Result(Protocol):
    """What a section came to."""

    def rows(self) -> Mapping[str, object]:
        """What was measured, by name."""

    def to_json(self) -> dict[str, Any]:
        """`rows` by name, `samples`, and how many rounds there were."""

    def to_markdown(self) -> list[str]:
        """A heading, and tables."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run, ready to be reported: what on, how, and what came of it."""

    machine: Machine
    settings: Mapping[str, Any]
    sections: Mapping[str, Result]


def to_json(run: Run) -> dict[str, Any]:
    """Everything a later reader needs to judge the figures or compute others."""
    return {
        "schema": SCHEMA,
        "machine": asdict(run.machine),
        "settings": dict(run.settings),
        "sections": {name: section.to_json() for name, section in run.sections.items()},
    }


def to_markdown(run: Run) -> str:
    """The tables for people, with the machine above them."""
    machine, settings = run.machine, run.settings
    lines = [
        f"{machine.cpu}, {machine.cores} cores ({machine.caches}), {machine.memory_mib} MiB; "
        f"virtualisation {machine.virtualisation}, governor {machine.governor}; Linux {machine.kernel}, "
        f"Python {machine.python}; {machine.date}, revision {machine.revision}, load {machine.load_before} before and "
        f"{machine.load_after} after, {machine.stolen_percent:.1f} % of CPU time stolen.",
        f"Loopback ({settings['network']} network), TCP congestion control `{machine.congestion_control}`; "
        f"streams of {settings['gib']:g} GiB; {settings['seconds']:.0f} s in all.",
    ]
    for section in run.sections.values():
        lines += ["", *section.to_markdown()]
    lines += ["", f"Tools: {'; '.join(f'{name} {version}' for name, version in machine.tools.items())}."]
    return "\n".join(lines) + "\n"

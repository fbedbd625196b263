"""Two runs side by side: only ever of one machine, in one state. Anything else is refused.

A figure of one machine says nothing about another, nor under another kernel, governor or congestion control: so what
describes the hardware and its set-up has to be equal, field by field, and is named where it is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from bench.processes import BenchError
from bench.report import SCHEMA
from bench.spread import table

# What must be equal. Python, tools and revision may differ: they are what one compares.
MACHINE_FIELDS: Final = (
    "cpu", "cores", "caches", "memory_mib", "virtualisation", "governor", "kernel", "congestion_control",
)  # fmt: skip
SETTING_FIELDS: Final = ("network", "gib", "guest_mib")
RUN_BYTES_MAX: Final = 64 * 1024 * 1024  # a run's JSON is a few hundred KiB


def load_run(path: Path) -> dict[str, Any]:
    """Read a run's JSON.

    Raises:
        BenchError: it cannot be read, or is no run of this bench.
    """
    try:
        if path.stat().st_size > RUN_BYTES_MAX:
            raise BenchError(f"{path}: larger than any run; name another file")
        run = json.loads(path.read_text())
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}; name another file") from error
    except ValueError as error:
        raise BenchError(f"{path}: not JSON; name a file that --json wrote") from error
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        raise BenchError(f"{path}: not a run of this bench ({SCHEMA}); name a file that --json wrote")
    return run


def refuse_if_different(older: Mapping[str, Any], newer: Mapping[str, Any]) -> None:
    """Refuse to compare runs of different machines or set-ups.

    Raises:
        BenchError: they differ, or do not say; the message names each field with both values.
    """
    differences = []
    for part, fields in (("machine", MACHINE_FIELDS), ("settings", SETTING_FIELDS)):
        for field in fields:
            one, other = older.get(part, {}).get(field), newer.get(part, {}).get(field)
            if one is None or one != other:
                differences.append(f"{field} {one!r} and {other!r}")
    if differences:
        raise BenchError(
            f"these runs cannot be compared: {'; '.join(differences)}. Measure both on one machine, in one state"
        )


def _figures(run: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str], dict[str, float]]]:
    """Every figure with a spread: (section, row, figure) and its median, least and greatest."""
    for section, content in run.get("sections", {}).items():
        for row, figures in content.get("rows", {}).items():
            for name, value in figures.items():
                if isinstance(value, dict) and "median" in value:
                    yield (section, row, name), value


def compare(older: Mapping[str, Any], newer: Mapping[str, Any]) -> str:
    """A table of what both runs measured: medians, their ratio, and whether the rounds overlap.

    Raises:
        BenchError: the runs may not be compared.
    """
    refuse_if_different(older, newer)
    before = dict(_figures(older))
    cells = []
    for key, new in _figures(newer):
        old = before.get(key)
        if old is None:
            continue
        ratio = f"{new['median'] / old['median']:.2f}" if old["median"] else "–"
        apart = new["least"] > old["greatest"] or new["greatest"] < old["least"]
        cells.append([*key, f"{old['median']:.3f}", f"{new['median']:.3f}", ratio, "apart" if apart else "overlap"])
    about = [
        f"{name}: {run['machine']['date']}, revision {run['machine']['revision']}, Python {run['machine']['python']}, "
        f"load {run['machine']['load_before']} before and {run['machine']['load_after']} after."
        for name, run in (("Older", older), ("Newer", newer))
    ]
    head = ("section", "row", "figure", "older", "newer", "newer ÷ older", "rounds")
    note = (
        "Where the rounds overlap, the difference may be chance; memcpy and blake3 say how fast the machine itself was."
    )
    return "\n".join([*about, "", *table(head, cells), "", note]) + "\n"

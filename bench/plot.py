"""A picture of one run, from its JSON: ladder, peers, lanes, sessions, QEMU migrations.

    python -m bench.plot RUN.json PICTURE.png

Bars are medians, their whiskers the least and greatest round. Everything in a picture is of one run on one machine.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.compare import load_run
from bench.processes import BenchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTS_PER_INCH: Final = 100
SIZE_INCHES: Final = (15.0, 9.0)
OURS: Final = "#1f6f8b"
OTHERS: Final = "#b8b8b8"
PART: Final = "#d9c9a3"
ACCENT: Final = "#c8553d"

Rows = Mapping[str, Mapping[str, Any]]


def write_plot(run: Mapping[str, Any], path: Path) -> None:
    """Draw the sections that `run` has into a PNG.

    Raises:
        BenchError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (slow, and only for a plot)
        from matplotlib.figure import Figure  # noqa: PLC0415 (as above)
    except ImportError as error:
        raise BenchError("matplotlib is not installed, so there is no plot; `make setup` installs it") from error
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    sections = run["sections"]
    _ladder(axes[0, 0], _rows(sections, "ladder"))
    _speed(axes[0, 1], _rows(sections, "peers"), "Peers: throughput, GiB/s", "gib_per_s", "korora")
    _speed(axes[0, 2], _rows(sections, "peers"), "Peers: CPU-s/GiB", "cpu_s_per_gib", "korora")
    _streams(axes[1, 0], _rows(sections, "lanes"), "lanes", run["machine"]["cores"])
    _streams(axes[1, 1], _rows(sections, "sessions"), "sessions", run["machine"]["cores"])
    _speed(axes[1, 2], _rows(sections, "qemu"), "QEMU migrations: total time, ms", "total_ms", "korora")
    machine = run["machine"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['virtualisation']}, Linux {machine['kernel']}, "
        f"{machine['congestion_control']}, load {machine['load_before']}–{machine['load_after']}; "
        f"{machine['date']}, {machine['revision']}. Not to be compared with other machines.",
        fontsize=9,
    )
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}; name another file") from error


def _rows(sections: Mapping[str, Any], name: str) -> Rows:
    """A section's rows; none where it was not measured."""
    rows: Rows = sections.get(name, {}).get("rows", {})
    return rows


def _medians(rows: Rows, figure: str) -> tuple[list[str], list[float], list[list[float]]]:
    """Names, medians and whiskers (below and above) of the rows that have this figure."""
    spreads = {name: row[figure] for name, row in rows.items() if row.get(figure) is not None}
    medians = [spread["median"] for spread in spreads.values()]
    below = [spread["median"] - spread["least"] for spread in spreads.values()]
    above = [spread["greatest"] - spread["median"] for spread in spreads.values()]
    return list(spreads), medians, [below, above]


def _empty(axes: Axes, title: str) -> None:
    """A panel that says why it is one."""
    axes.set_title(title, fontsize=10)
    axes.text(0.5, 0.5, "not measured in this run", ha="center", va="center", color="grey")
    axes.set_axis_off()


def _label(axes: Axes, at: Sequence[float], names: Sequence[str]) -> None:
    """Names down the side, the first on top."""
    axes.set_yticks(at, names, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _speed(axes: Axes, rows: Rows, title: str, figure: str, ours: str) -> None:
    """Horizontal bars of one figure, ours in colour."""
    names, medians, whiskers = _medians(rows, figure)
    if not names:
        _empty(axes, title)
        return
    at = [float(index) for index in range(len(names))]
    colours = [OURS if name.startswith(ours) else OTHERS for name in names]
    axes.barh(at, medians, xerr=whiskers, color=colours, ecolor="black", capsize=2)
    _label(axes, at, names)
    axes.set_title(title, fontsize=10)


def _ladder(axes: Axes, rows: Rows) -> None:
    """CPU-s/GiB of each rung, with what its parts explain in another colour."""
    title = "Cost ladder: CPU-s/GiB (pale: its parts)"
    names, medians, whiskers = _medians(rows, "cpu_s_per_gib")
    if not names:
        _empty(axes, title)
        return
    at = [float(index) for index in range(len(names))]
    axes.barh(at, medians, xerr=whiskers, color=OURS, ecolor="black", capsize=2)
    axes.barh(at, [rows[name].get("parts_s_per_gib") or 0.0 for name in names], color=PART, height=0.45)
    _label(axes, at, names)
    axes.set_title(title, fontsize=10)


def _streams(axes: Axes, rows: Rows, kind: str, cores: int) -> None:
    """Throughput by lanes or sessions, and how busy the machine was."""
    title = f"Throughput by {kind}, and cores busy of {cores}"
    names, medians, whiskers = _medians(rows, "gib_per_s")
    if not names:
        _empty(axes, title)
        return
    at = [float(index) for index in range(len(names))]
    axes.bar(at, medians, yerr=whiskers, color=OURS, ecolor="black", capsize=3)
    axes.set_xticks(at, names)
    axes.set_xlabel(kind, fontsize=8)
    axes.set_ylabel("GiB/s", fontsize=8)
    axes.set_title(title, fontsize=10)
    busy = axes.twinx()
    _, cores_busy, _ = _medians(rows, "busy_cores")
    busy.plot(at, cores_busy, "o--", color=ACCENT)
    busy.axhline(cores, color=ACCENT, linewidth=0.8)
    busy.set_ylim(0, cores * 1.1)
    busy.set_ylabel("cores busy, whole machine", color=ACCENT, fontsize=8)


def main(argv: Sequence[str]) -> int:
    """Draw a run that was measured before; 2 if it cannot be."""
    if len(argv) != 2:
        sys.stderr.write("usage: python -m bench.plot RUN.json PICTURE.png\n")
        return 2
    try:
        write_plot(load_run(Path(argv[0])), Path(argv[1]))
    except BenchError as error:
        sys.stderr.write(f"bench: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

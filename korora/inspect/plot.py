"""The picture of an inspection: pages by kind along the stream, and where in the guest pages come again."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from chunking.pages import PAGE_BYTES
from korora.inspect.inspection import Inspection, text
from korora.inspect.limits import MIB
from korora.inspect.timeline import KINDS
from proxy.errors import ConfigurationError
from proxy.streams.multifd import BLOCK_SHIFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS: Final = {"zero": "#cfd8dc", "duplicate": "#90caf9", "delta": "#ffb74d", "literal": "#c62828"}
_ROWS_MAX: Final = 16_384  # of the heat map: beyond, holes in memory are left out


def require() -> None:
    """See that a picture can be drawn, before a long stream is read for nothing.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ConfigurationError(
            "--plot needs matplotlib, which is not installed", "pip install 'korora[plot]'"
        ) from error


def draw(found: Inspection, path: Path) -> None:
    """Write the picture to ``path``; its name's ending says which kind of file.

    Raises:
        ConfigurationError: no matplotlib, a kind of file it does not know, or a path that cannot be written.
    """
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    figure.suptitle(text(found.facts.vm_name) or Path(found.source).name)
    _pages(above, found)
    _heat(below, found)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path}: {getattr(error, 'strerror', None) or error}", "name a .png, .svg or .pdf that can be written"
        ) from error


def _edges(found: Inspection) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return np.concatenate([[0], np.cumsum(found.timeline.bytes)]) / MIB


def _pages(axes: "Axes", found: Inspection) -> None:
    edges = _edges(found)
    base = np.zeros(len(edges) - 1)
    for kind, name in enumerate(KINDS):
        top = base + np.array([pages[kind] for pages in found.timeline.pages])
        axes.stairs(top, edges, baseline=base, fill=True, color=_COLOURS[name], label=name)
        base = top
    axes.set_ylabel(f"pages a {found.timeline.pieces_per_bin * 4} MiB")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, ncols=len(KINDS), fontsize="small")
    axes.set_title("Pages by kind", loc="left", fontsize="medium")


def _heat(axes: "Axes", found: Inspection) -> None:
    edges, timeline = _edges(found), found.timeline
    axes.set_title("Pages sent again", loc="left", fontsize="medium")
    axes.set_xlabel("stream, MiB")
    heat, regions = timeline.heat(), np.array(timeline.regions, np.int64)
    if not len(regions):
        axes.set_ylabel("none")
        return
    # A QEMU guest has several blocks, far apart in these numbers: the one that changes most is drawn.
    block_bits = BLOCK_SHIFT - timeline.region_bits
    blocks = regions >> block_bits
    block = max(set(blocks.tolist()), key=lambda number: heat[blocks == number].sum())
    here = blocks == block
    left_out = int(heat[~here].sum())
    if block in found.facts.blocks:
        others = f"; {left_out:,} in other blocks are not drawn" if left_out else ""
        axes.set_title(
            f"Pages of {text(found.facts.blocks[block].name)} sent again{others}", loc="left", fontsize="medium"
        )
    regions = regions[here] - (block << block_bits)
    first, last = int(regions[0]), int(regions[-1])
    region_mib = (1 << timeline.region_bits) * PAGE_BYTES / MIB
    if last - first < _ROWS_MAX:
        rows = np.zeros((last - first + 1, heat.shape[1]))
        rows[regions - first] = heat[here]
        scale = np.arange(first, last + 2.0) * region_mib
        axes.set_ylabel("guest memory, MiB")
    else:
        rows, scale = heat[here], np.arange(len(regions) + 1.0)
        axes.set_ylabel(f"regions of {region_mib:g} MiB that changed")
    mesh = axes.pcolormesh(edges, scale, np.ma.masked_equal(rows, 0), cmap="inferno_r")
    axes.figure.colorbar(mesh, ax=axes, label="pages")

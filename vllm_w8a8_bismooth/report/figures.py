"""Figures of a checkpoint's linears by block. SVG; equal data give equal bytes, whatever matplotlibrc says."""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Literal

from vllm_w8a8_bismooth.errors import BismoothError
from vllm_w8a8_bismooth.measure.weights import VULNERABLE, Analysis, Measure
from vllm_w8a8_bismooth.model.names import block_of, kind_of

# A background of its own and dark ink: legible on light and dark pages alike.
STYLE: dict[str, Any] = {
    "font.size": 11,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "bismooth",
}
BAD, QUIET, GOOD = "#c0392b", "#7f8c8d", "#2471a3"
ERRORS, WEIGHTS = "errors.svg", "weights.svg"

_ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "w1", "up_proj", "w3", "gate_up_proj")

Band = tuple[float, float, float]
"""Smallest, median and largest."""


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def require() -> None:
    """Raises :class:`BismoothError` if there is no matplotlib."""
    if not available():
        raise BismoothError.of("--figures", "needs matplotlib", "pip install vllm-w8a8-bismooth[plot]")


@contextmanager
def drawing(path: Path, width: float, height: float, layout: Literal["constrained"] | None = None) -> Iterator[Any]:
    """An empty matplotlib figure of so many inches, to be drawn on inside; written to ``path`` afterwards, undated."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), layout=layout)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def of_analysis(analysis: Analysis, folder: Path) -> list[Path]:
    """Draw what ``analyze`` measured, by block and kind of linear: the columns' maxima, and the column errors.

    Returns:
        The files, in ``folder``.
    """
    members: dict[tuple[str, int], list[Measure]] = {}
    for name, measure in analysis.linears.items():
        members.setdefault(kind_of(name), []).append(measure)
    panels: dict[str, dict[str, dict[int, Band]]] = {}
    for (kind, block), measures in sorted(members.items(), key=lambda member: (rank(member[0][0]), member[0][1])):
        series = panels.setdefault(kind, {"healthy": {}, "vulnerable": {}})
        label = "vulnerable" if any(measure.vulnerable() for measure in measures) else "healthy"
        extents = [measure.columns for measure in measures]
        series[label][block] = _joined((e.minimum, e.median, e.maximum) for e in extents)
    title = "Largest weight of each input column: smallest, median and largest, by block"
    _bands(folder / WEIGHTS, title, panels, {"healthy": (GOOD, 0.6), "vulnerable": (BAD, 0.6)})
    errors = {name: measure.column_error for name, measure in analysis.linears.items()}
    _heat(folder / ERRORS, "Mean relative error that per-channel INT8 leaves in a column", errors, ())
    return [folder / WEIGHTS, folder / ERRORS]


def of_conversion(
    linears: Mapping[str, Mapping[str, Any]], sites: Mapping[int, Iterable[Mapping[str, Any]]], folder: Path
) -> list[Path]:
    """Draw what a conversion left, by block: the column errors and, if it smoothed, the columns' maxima around it.

    Args:
        linears, sites: of a :class:`outcome.Outcome`.
        folder: to write into.

    Returns:
        The files.
    """
    errors = {name: entry["column_error"] for name, entry in linears.items() if block_of(name)}
    grouped = [name for name, entry in linears.items() if entry["group_size"] is not None]
    _heat(folder / ERRORS, "Mean relative error that INT8 left in a column", errors, grouped)
    members: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for block, entries in sites.items():
        for entry in entries:
            members.setdefault((re.sub(r"\.\d+$", "", entry["site"]), block), []).append(entry)
    if not members:
        return [folder / ERRORS]
    panels: dict[str, dict[str, dict[int, Band]]] = {}
    for (site, block), entries in members.items():
        series = panels.setdefault(site.replace("->", " \u2192 "), {"before": {}, "after": {}})
        for label, prefix in (("before", "weight"), ("after", "smoothed")):
            series[label][block] = _joined(tuple(e[f"{prefix}_{x}"] for x in ("min", "median", "max")) for e in entries)
    title = "Largest weight of each input column before and after smoothing: smallest, median and largest, by block"
    _bands(folder / WEIGHTS, title, panels, {"before": (QUIET, 0.9), "after": (GOOD, 0.5)})
    return [folder / ERRORS, folder / WEIGHTS]


def rank(kind: str) -> tuple:
    """Kinds in the order in which a block uses them, experts last."""
    prefix, _, name = kind.rpartition(".")
    return prefix, _ORDER.index(name) if name in _ORDER else len(_ORDER), name


def _joined(bands: Iterable[Band]) -> Band:
    """One band for several linears, those of experts."""
    low, middle, high = zip(*bands, strict=True)
    return min(low), median(middle), max(high)


_PANEL, _ACROSS = (4.3, 1.5), 2  # inches; panels in a row


def _bands(
    path: Path,
    title: str,
    panels: Mapping[str, Mapping[str, Mapping[int, Band]]],
    styles: Mapping[str, tuple[str, float]],
) -> None:
    """A panel for each kind: over the blocks, a line from smallest to largest with a mark at the median.

    Args:
        path: of the SVG.
        title: of the whole.
        panels: title -> series -> block -> band. Bands without a positive maximum are left out.
        styles: series -> color, and width as a share of what a block has. Later series stand in front of earlier ones.
    """
    across = min(_ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    bands = [(block, band) for panel in panels.values() for series in panel.values() for block, band in series.items()]
    blocks = 1 + max(block for block, _ in bands)
    extremes = [math.log10(value) for _, band in bands for value in band if value > 0] or [0.0]
    limits = 10.0 ** math.floor(min(extremes)), 10.0 ** math.floor(max(extremes) + 1)
    width, height = 0.9 + _PANEL[0] * across, 1.1 + (_PANEL[1] + 0.5) * down
    with drawing(path, width, height) as figure:
        axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(
            left=0.7 / width, right=1 - 0.2 / width, bottom=0.6 / height, top=1 - 0.9 / height, hspace=0.35, wspace=0.12
        )
        for place, (kind, panel) in zip(axes.flat, panels.items(), strict=False):
            place.set_title(kind, fontsize="medium")
            place.set_yscale("log")
            place.minorticks_off()
            place.tick_params(labelbottom=True)
            place.set_ylim(*limits)
            for label, series in panel.items():
                found = {block: band for block, band in series.items() if band[2] > 0}
                low, middle, high = ([band[i] or limits[0] for band in found.values()] for i in range(3))
                color, line = styles[label]
                line *= min(10.0, 0.8 * 72 * _PANEL[0] / blocks)  # points that a block has
                place.vlines(list(found), low, high, color, linewidth=line)
                place.plot(list(found), middle, "_", color="black", markersize=line, markeredgewidth=1)
        for place in axes[-1]:
            place.set_xlim(-0.8, blocks - 0.2)
            place.locator_params("x", integer=True)
        for place in axes.flat[len(panels) :]:
            place.remove()
        figure.suptitle(title, x=0.7 / width, y=1 - 0.15 / height, ha="left", va="top", fontsize="medium")
        figure.supxlabel("block", y=0.1 / height, va="bottom", fontsize="medium")
        handles = [figure.axes[0].plot([], [], color=color, linewidth=8 * line)[0] for color, line in styles.values()]
        corner = (1, 1 - 0.35 / height)
        figure.legend(handles, list(styles), loc="upper right", ncols=2, frameon=False, bbox_to_anchor=corner)


def _heat(path: Path, title: str, errors: Mapping[str, float], grouped: Collection[str]) -> None:
    """Column errors as a heat map, blocks across and kinds down (the worst of several experts), grouped ones dotted."""
    from matplotlib.colors import LogNorm

    cells: dict[tuple[str, int], float] = {}
    for name, error in errors.items():
        cells[kind_of(name)] = max(error, cells.get(kind_of(name), 0.0))
    kinds = sorted({kind for kind, _ in cells}, key=rank)
    blocks = 1 + max(block for _, block in cells)
    lowest = 0.005
    norm = LogNorm(lowest, 1.0)
    table = [[cells.get((kind, block), math.nan) for block in range(blocks)] for kind in kinds]
    table = [[lowest if error < lowest else error for error in row] for row in table]  # 0 has no logarithm
    width, height = 9.0, 1.2 + 0.3 * len(kinds)
    left = 0.3 + 0.085 * max(map(len, kinds))
    with drawing(path, width, height) as figure:
        axes = figure.add_axes((left / width, 0.6 / height, (width - left - 1.5) / width, 1 - 1.1 / height))
        mesh = axes.pcolormesh(table, norm=norm, cmap="YlOrRd", edgecolors="white", linewidth=0.5)
        axes.set_yticks([i + 0.5 for i in range(len(kinds))], kinds)
        axes.invert_yaxis()
        marked = range(0, blocks, max(1, blocks // 16))
        axes.set_xticks([block + 0.5 for block in marked], list(marked))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("block" + (" (dotted: per-group scales)" if grouped else ""), fontsize="medium")
        axes.set_title(title, loc="left", fontsize="medium")
        places = sorted({(block + 0.5, kinds.index(kind) + 0.5) for kind, block in map(kind_of, grouped)})
        axes.plot(*zip(*places, strict=True) if places else ((), ()), ".", color="black", markersize=5)
        legend = figure.add_axes((1 - 1.35 / width, 0.6 / height, 0.15 / width, 1 - 1.1 / height))
        bar = figure.colorbar(mesh, cax=legend)
        bar.set_ticks([0.01, VULNERABLE, 0.2, 1.0], labels=["0.01", f"{VULNERABLE} vulnerable", "0.2", "1 all lost"])
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize="small")

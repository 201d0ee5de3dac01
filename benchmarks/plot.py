"""The figures of README.md and docs/, from the JSON files under benchmarks/results/ and nothing else.

    python -m benchmarks.plot [--results DIR] [--figures DIR]

Figures of what does not depend on the machine go to docs/figures/, those of a machine into a folder of its name there.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.record import RESULTS
from benchmarks.tables import ARMS, Accuracy, Served, files, rows, study_means
from vllm_w8a8_bismooth.report.figures import BAD, GOOD, QUIET, drawing

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
INK, PALE, OCHRE = "#1c2833", "#5499c7", "#b9770e"

# In every figure ours is blue, what it is compared with is grey or ink, and each has a marker of its own.
PER_CHANNEL = {"color": GOOD, "marker": "o"}
PER_GROUP = {"color": PALE, "marker": "s"}
FOUR_BITS = {"color": GOOD, "marker": "D", "ls": "--"}
STOCK = {"color": QUIET, "marker": "^"}
BF16 = {"color": INK, "marker": "D", "mfc": "white"}
OTHER = {"color": OCHRE, "marker": "v"}


class NothingToDraw(Exception):
    """The file lacks what the figure shows; the message says what."""


def machine(path: Path) -> str:
    """Where a file's figures were measured."""
    found = json.loads(path.read_text())["machine"]
    return found["gpu"] or f"{found['cpu']}, {found['cores']} cores"


def title(figure: Any, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize="large")


LEGEND = {"loc": "outside lower left", "frameon": False, "fontsize": 9.5}
"""Where a figure's legend is."""


def round_ticks(axis: Any, most: int, base: int = 10) -> None:
    """Ticks of a logarithmic axis that is complete, written out: as many as there are round numbers up to ``most``."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axis.get_view_interval()
    powers = [base**power for power in range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)]
    for digits in (range(1, 10), (1, 2, 5), (1, 3), (1,)) if base == 10 else ((1,),):
        ticks = [digit * power for power in powers for digit in digits if low <= digit * power <= high]
        if len(ticks) <= most:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


RIGHT, ABOVE, BELOW, LEFT = (14, 0), (0, 15), (0, -15), (-14, 0)
AROUND = (RIGHT, ABOVE, BELOW, LEFT, *((side, 12 * row) for row in (-1, 1, -2, 2, -3, 3) for side in (-14, 14)))


def label(figure: Any, points: Mapping[Any, Sequence[tuple[float, float, str, tuple[int, int]]]]) -> None:
    """Write a text beside each point, where it meets no mark and no text: nowhere if there is no such place.

    Args:
        figure: complete but for these texts.
        points: axes -> x, y, text, and where that is preferred, in points of type from the point. Without a text, the
            point is only kept free. A line leads to a text that is far.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # or nobody knows where a point is
    for axes, named in points.items():
        inside = axes.get_window_extent()
        marks = [axes.transData.transform(point[:2]) for point in named]
        taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in marks]
        taken += [text.get_window_extent() for text in axes.texts]
        for x, y, text, preferred in named:
            for place in (preferred, *AROUND) if text else ():
                note = axes.annotate(text, (x, y), place, textcoords="offset points", fontsize=8.5, color=INK)
                note.set(ha="left" if place[0] > 0 else "right" if place[0] else "center", va="center", in_layout=False)
                box = note.get_window_extent().padded(1)
                free = not any(box.overlaps(other) for other in taken)
                if free and inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1:
                    taken.append(box)
                    if math.hypot(*place) > 16:
                        line = {"arrowstyle": "-", "color": QUIET, "lw": 0.7, "shrinkA": 0, "shrinkB": 4}
                        lead = axes.annotate("", (x, y), place, textcoords="offset points", arrowprops=line)
                        lead.set_in_layout(False)
                    break
                note.remove()


def collapse(path: Path, out: Path) -> None:
    """KL to bf16 of each INT8 arm of the demo."""
    found = {row["arm"]: row for row in rows(path)}
    labels = {
        "healthy RTN": "healthy model, RTN",
        "RTN": "outlier columns, RTN",
        "bi-smooth": "outlier columns, bi-smooth",
        "bi-smooth, data-free": "outlier columns, bi-smooth, data-free",
    }
    colors = {"healthy RTN": QUIET, "RTN": BAD}
    with drawing(out, 8, 2.8, layout="constrained") as figure:
        axes = figure.subplots()
        arms = list(labels)[::-1]
        values = [found[arm]["kl"] for arm in arms]
        bars = axes.barh([labels[a] for a in arms], values, color=[colors.get(a, GOOD) for a in arms])
        axes.bar_label(bars, [f"{value:.1e}" for value in values], padding=4)
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 3, max(values) * 8)
        axes.set_xlabel("KL divergence from bf16, nats per token (log scale)")
        axes.set_title("W8A8 INT8 of SmolLM2-135M in vLLM", loc="left")


def calibration(path: Path, out: Path) -> None:
    """KL by the number of calibration tokens: draws, their mean, and calibration on other texts."""
    found, colors = rows(path), {"alpha-0.5": QUIET, "balanced": GOOD}
    with drawing(out, 9, 3.2, layout="constrained") as figure:
        beds = list(dict.fromkeys(row["bed"] for row in found))
        for bed, axes in zip(beds, figure.subplots(1, len(beds), squeeze=False)[0], strict=True):
            for arm, color in colors.items():
                own = [row for row in found if (row["bed"], row["arm"], row["set"]) == (bed, arm, "own text")]
                sizes = sorted({row["tokens"] for row in own})
                middle = study_means(found, arm)[bed]
                axes.plot(sizes, [middle[size] * 1e6 for size in sizes], color=color, label=arm)
                axes.plot([r["tokens"] for r in own], [r["kl"] * 1e6 for r in own], ".", color=color)
                for marker, texts in zip(
                    "^x", sorted({r["set"] for r in found if r["bed"] == bed} - {"own text"}), strict=True
                ):
                    points = [r for r in found if (r["bed"], r["arm"], r["set"]) == (bed, arm, texts)]
                    axes.plot(
                        [r["tokens"] for r in points],
                        [r["kl"] * 1e6 for r in points],
                        marker,
                        color=color,
                        label=texts if arm == "balanced" else None,
                    )
            axes.set_xscale("log", base=2)
            axes.set_title(bed, loc="left")
            axes.set_xlabel("calibration tokens")
            axes.legend(fontsize=8)
        figure.axes[0].set_ylabel("KL to fp32, millionths")


def accuracy(path: Path, out: Path) -> None:
    """KL of the arms on the healthy beds, relative to RTN."""
    data = Accuracy(path)
    shown = [arm for arm in ARMS if arm != "rtn" and data.has(arm)][::-1]
    with drawing(out, 8, 4.2, layout="constrained") as figure:
        axes = figure.subplots()
        colors = [QUIET if arm.startswith("smoothquant") else GOOD for arm in shown]
        for marker, bed in zip("os^", data.beds, strict=False):
            values = [mean(data.kl(bed, arm)) / mean(data.kl(bed, "rtn")) for arm in shown]
            axes.scatter(values, range(len(shown)), 36, marker=marker, facecolors="none", edgecolors=colors, label=bed)
        axes.axvline(1, color=BAD, label="RTN")
        axes.set_yticks(range(len(shown)), [ARMS[arm] for arm in shown])
        axes.set_xlabel("KL to the source, relative to RTN's (less is better)")
        axes.set_title("INT8 checkpoints of healthy models", loc="left")
        axes.legend(fontsize=9)


KINDS = {"plain or a peer's": STOCK, "bi-smooth, per-channel": PER_CHANNEL, "with per-group scales": PER_GROUP}
SIZES = {
    "rtn": ("RTN", "plain or a peer's", RIGHT),
    "smoothquant-0.5": ("SmoothQuant", "plain or a peer's", ABOVE),
    "alpha-0.5": ("alpha = 0.5", "bi-smooth, per-channel", RIGHT),
    "balanced": ("balanced", "bi-smooth, per-channel", RIGHT),
    "data-free": ("data-free", "bi-smooth, per-channel", BELOW),
    "auto-g32": ("auto", "with per-group scales", RIGHT),
    "group-everywhere": ("groups everywhere", "with per-group scales", RIGHT),
}


def size(path: Path, out: Path) -> None:
    """KL on the healthy beds against the bits that a weight of the blocks' linears takes, scales included."""
    data = Accuracy(path)
    healthy = [row for row in data.rows if row["plant"] == "healthy"]
    if not all("bits" in row for row in healthy):
        raise NothingToDraw("its rows have no bits per weight, measure them again with benchmarks.accuracy")
    engine = {"vllm": "vLLM", "emulation": "fp32 emulation"}[json.loads(path.read_text())["through"]]
    with drawing(out, 9, 4, layout="constrained") as figure:
        panels = figure.subplots(1, len(data.beds), squeeze=False, sharex=True)[0]
        points, kinds = {axes: [] for axes in panels}, {}
        for bed, axes in zip(data.beds, panels, strict=True):
            for arm, (name, kind, place) in SIZES.items():
                mine = [row for row in healthy if (row["bed"], row["arm"]) == (bed, arm)]
                if mine:
                    x, y = mean(row["bits"] for row in mine), mean(row["kl"] for row in mine) * 1e6
                    (kinds[kind],) = axes.plot(x, y, ls="none", ms=10 if KINDS[kind] is STOCK else 6.5, **KINDS[kind])
                    points[axes].append((x, y, name, place))
            axes.set_title(bed, loc="left", fontsize="medium")
            axes.set_yscale("log")
            axes.margins(x=0.5, y=0.25)
            round_ticks(axes.yaxis, 8)
            axes.text(0.98, 0.98, "\u2199 better", transform=axes.transAxes, ha="right", va="top", color=INK)
            axes.set_xlabel("bits per weight, with scales")
        panels[0].set_ylabel("KL to bf16, millionths (log scale)")
        figure.legend(kinds.values(), kinds, ncols=len(kinds), **LEGEND)
        title(figure, f"INT8 checkpoints of healthy models in {engine}: error against size (bf16: 16 bits)")
        label(figure, points)


LINES = {
    "rows of four and eight bits, by one budget": (
        ("4-bit", "budget, 4.5", "budget, 5", "budget, 6", "int8"),
        PER_CHANNEL,
    ),
    "the same share in each linear": (("even, 4.5",), STOCK),
    "rows of four bits, groups of 64": (("4-bit, groups of 64",), PER_GROUP),
    "rows of four bits, to the nearest": (("4-bit, nearest",), OTHER),
}
"""What is drawn of ``bits.json``: name -> arms, which a line joins, and how."""


def bits(path: Path, out: Path) -> None:
    """KL on the healthy beds against the bits of a weight."""
    healthy = [row for row in rows(path) if row["plant"] == "healthy"]
    beds = list(dict.fromkeys(row["bed"] for row in healthy))
    with drawing(out, 9, 4, layout="constrained") as figure:
        panels = figure.subplots(1, len(beds), squeeze=False, sharex=True)[0]
        for bed, axes in zip(beds, panels, strict=True):
            for name, (arms, style) in LINES.items():
                mine = [[row for row in healthy if (row["bed"], row["arm"]) == (bed, arm)] for arm in arms]
                points = [(mean(row["bits"] for row in some), mean(row["kl"] for row in some) * 1e6) for some in mine]
                axes.plot(*zip(*points, strict=True), label=name, ms=6.5, **style)
            axes.set_title(bed, loc="left", fontsize="medium")
            axes.set_yscale("log")
            round_ticks(axes.yaxis, 8)
            axes.text(0.98, 0.98, "\u2199 better", transform=axes.transAxes, ha="right", va="top", color=INK)
            axes.set_xlabel("bits per weight, with scales")
        panels[0].set_ylabel("KL to the source, millionths (log scale)")
        figure.legend(*panels[0].get_legend_handles_labels(), ncols=2, **LEGEND)
        title(figure, "Healthy models with INT8 activations in fp32 emulation: error against size")


IMPLEMENTATIONS = {
    "ours-channel": ("ours, per-channel", PER_CHANNEL),
    "ours-rows": ("ours, 4.5 bits", FOUR_BITS),
    "ours-group128": ("ours, per-group (128)", PER_GROUP),
    "vllm": ("vLLM's INT8", STOCK),
    "cutlass": ("CUTLASS's INT8", OTHER),
    "torch-bf16": ("torch's bf16", BF16),
}
PREFERRED = "LLaMA3-70B tp1"


def moved(m: float, n: int, k: int, width: int) -> float:
    """Bytes of a product of weights and activations of ``width`` bytes, as ``benchmarks.gemm`` counts them."""
    return n * k * width + m * k * width + 2 * m * n + 4 * (m + n)


def roofline(m: float, n: int, k: int, width: int, peak: float, rate: float) -> float:
    """TOPS that ``peak`` TOPS and a memory of ``rate`` GB/s allow for ``m`` tokens."""
    return min(peak, 2 * m * n * k * rate / moved(m, n, k, width) / 1e3)


def ridge(n: int, k: int, width: int, peak: float, rate: float) -> float:
    """How many tokens it takes until ``peak`` bounds, and no longer memory; may be infinite."""
    gained = 2 * n * k * rate / 1e3 - peak * (moved(1, n, k, width) - moved(0, n, k, width))
    return peak * moved(0, n, k, width) / gained if gained > 0 else math.inf


def kernels(path: Path, out: Path) -> None:
    """TOPS of a model's linears by number of tokens, under their rooflines.

    The rate of memory is what reading the same weights reached in the same turns (rows ``read-weights``): the line is
    the median over a panel, the shade goes from least to most, for on shared machines it drifts by half. Without such
    rows, on GPUs, it is that of the copy that was measured once, before everything else; whatever is above the line
    then had a faster memory, or a cache. Where no peak of INT8 was measured, it is taken for twice that of bf16.
    """
    record, layers = json.loads(path.read_text()), {}
    for row in record["rows"]:
        model, _, name = row["layer"].rpartition(" ")
        layers.setdefault(model, {}).setdefault(name, []).append(row)
    if not layers:
        raise NothingToDraw("it has nothing yet")
    model = PREFERRED if PREFERRED in layers else next(iter(layers))
    ceilings = record["ceilings"]
    bf16, int8 = ceilings["bf16 TFLOP/s"], ceilings["int8 TOPS"]
    roofs = ((1, int8 or 2 * bf16, "-"), (2, bf16, "--"))
    down = math.ceil(min(4, len(layers[model])) / 2)
    with drawing(out, 9, 1.6 + 2.6 * down, layout="constrained") as figure:
        panels = figure.subplots(down, 2, sharex=True, sharey=True).flat
        lines, limits, reads = {}, {}, []
        for axes, (name, found) in zip(panels, layers[model].items(), strict=False):
            n, k = found[0]["N"], found[0]["K"]
            tokens = sorted({row["M"] for row in found})
            rates = [n * k / row["us"] / 1e3 for row in found if row["impl"] == "read-weights"] or [ceilings["GB/s"]]
            reads += rates
            grid = [tokens[0] * (tokens[-1] / tokens[0]) ** (i / 200) for i in range(201)]
            for width, peak, style in roofs:
                low, middle, high = (
                    [roofline(m, n, k, width, peak, rate) for m in grid]
                    for rate in (min(rates), median(rates), max(rates))
                )
                axes.fill_between(grid, low, high, color=QUIET, alpha=0.2, lw=0)
                (limits[width],) = axes.plot(grid, middle, style, color=INK, lw=1)
            for impl, (text, look) in IMPLEMENTATIONS.items():
                mine = [row for row in found if row["impl"] == impl]
                if mine:
                    xs, ys = [row["M"] for row in mine], [row["TOPS"] for row in mine]
                    (lines[text],) = axes.plot(xs, ys, lw=1.3, ms=5.5, label=text, **look)
            edge = ridge(n, k, 1, roofs[0][1], median(rates))
            if edge < tokens[-1]:
                axes.axvline(edge, color=QUIET, lw=0.8, ls=":")
                for side, text in (("right", "memory-bound "), ("left", " compute-bound")):
                    axes.text(edge, 0.03, text, transform=axes.get_xaxis_transform(), ha=side, color=INK, fontsize=9)
            axes.set_title(f"{name} (N = {n}, K = {k})", loc="left", fontsize="medium")
        for axes in figure.axes[len(layers[model]) :]:
            axes.remove()
        first = figure.axes[0]
        first.set(xscale="log", yscale="log")
        first.set_ylim(bottom=first.get_ylim()[0] / 1.4)  # room for the words
        round_ticks(first.xaxis, 8, base=4)
        round_ticks(first.yaxis, 8)
        for axes in figure.axes:
            axes.set(xlabel="tokens" if axes.get_subplotspec().is_last_row() else None)
            axes.set(ylabel="TOPS" if axes.get_subplotspec().is_first_col() else None)
        shade = first.fill_between([], [], [], color=QUIET, alpha=0.2, lw=0)
        rates = " to ".join(f"{rate:.0f}" for rate in sorted({min(reads), max(reads)}))
        shade.set_label(f"rooflines' memory: {rates} GB/s")
        limits[1].set_label(f"INT8 roofline, {roofs[0][1]:.4g} TOPS" + ("" if int8 else " (twice bf16's)"))
        limits[2].set_label(f"bf16 roofline, {bf16:.4g} TOPS")
        figure.legend(handles=[*lines.values(), shade, *limits.values()], ncols=3, **LEGEND)
        measured = "product alone" if record["measured"] == "product" else record["measured"]
        title(figure, f"Speed of {model}'s linears on {machine(path)} ({measured})")


ARMS_SERVED = {
    "bf16": BF16,
    "stock INT8": STOCK,
    "ours, per-channel": PER_CHANNEL,
    "ours, 4.5 bits": FOUR_BITS,
    "ours, mixed": PER_GROUP,
    "FP8": OTHER,
}
TIMES = {"tpot_ms": "time per output token, ms (median)", "ttft_ms": "time to first token, ms (median)"}


def serve(path: Path, out: Path) -> None:
    """Output tokens a second against latency, by arm and request rate; bars from least to most over turns."""
    record, data = json.loads(path.read_text()), Served(path)
    arms = {arm: found for arm in data.arms if (found := data.of(arm, "serve"))}
    if not arms:
        raise NothingToDraw("it has no rows of a server under load")
    rate = "output_tokens_per_second"
    with drawing(out, 9, 4.6, layout="constrained") as figure:
        panels = dict(zip(TIMES, figure.subplots(1, 2, sharey=True), strict=True))
        for time, axes in panels.items():
            for arm, found in arms.items():
                look = ARMS_SERVED.get(arm, OTHER)
                xs, ys = [row[time] for row in found], [row[rate] for row in found]
                axes.plot(xs, ys, lw=1.3, ms=6, label=arm, **look)
                across, up = ([row.get(f"{name}_range", 2 * [row[name]]) for row in found] for name in (time, rate))
                axes.hlines(ys, *zip(*across, strict=True), look["color"], lw=0.8, zorder=1)
                axes.vlines(xs, *zip(*up, strict=True), look["color"], lw=0.8, zorder=1)
            axes.set_xscale("log")
            axes.margins(x=0.12)
            round_ticks(axes.xaxis, 6)
            axes.set_xlabel(TIMES[time])
            axes.text(0.02, 0.99, "\u2196 better", transform=axes.transAxes, va="top", color=INK)
        first = figure.axes[0]
        first.set_ylim(0, 1.15 * first.get_ylim()[1])
        first.set_ylabel("output tokens/s")
        figure.legend(*first.get_legend_handles_labels(), ncols=len(arms), **LEGEND)
        turns = max(row["turns"] for found in arms.values() for row in found)
        model = record["settings"]["model"]
        title(figure, f"Serving {model} on {machine(path)} by requests/s asked ({_turns(turns)})")
        points = {
            axes: [(row[time], row[rate], *_asked(row)) for found in arms.values() for row in found]
            for time, axes in panels.items()
        }
        label(figure, points)


LABELLED = {"ours, per-channel": (-7, 8), "bf16": (7, -8)}
"""Which arms have their rates written, and where: those at the edges, for the others' are the same."""


def _asked(row: dict) -> tuple[str, tuple[int, int]]:
    """What to write at a point, and where."""
    rate = "no limit" if row["rate"] is None else f"{row['rate']:.2g}/s"
    return (rate, LABELLED[row["arm"]]) if row["arm"] in LABELLED else ("", RIGHT)


def _turns(count: int) -> str:
    return "one turn" if count == 1 else f"{count} turns"


WORK = (
    ("RTN", "data-free", "llm-compressor RTN", "llm-compressor RTN, model-free"),
    ("calibrated", "llm-compressor SmoothQuant"),
)
"""Conversions that do the same work."""


def conversions(path: Path, out: Path) -> None:
    """Seconds and peak memory of conversions, medians of whole processes; thin lines from least to most over turns."""
    found = {(row["blocks"], row["arm"]): row for row in rows(path)}
    least = min(blocks for blocks, _ in found)
    groups = [
        [found[b, arm] for arm in group if (b, arm) in found] for b in sorted({b for b, _ in found}) for group in WORK
    ]
    places, place = {}, 0.0
    for group in filter(None, groups):
        for row in group:
            places[place] = row
            place += 1
        place += 0.6
    names = [
        ("" if row["arm"].startswith("llm-") else "bismooth ")
        + row["arm"]
        + f", {row['blocks']} blocks" * (row["blocks"] > least)
        for row in places.values()
    ]
    shown = {"seconds": ("seconds", 1, "{:.0f} s"), "peak_rss_bytes": ("peak memory, GB", 1e9, "{:.1f} GB")}
    imports = None
    with drawing(out, 9, 1.5 + 0.33 * place, layout="constrained") as figure:
        for axes, (key, (text, unit, form)) in zip(figure.subplots(1, 2, sharey=True), shown.items(), strict=True):
            for y, row in places.items():
                values = [value / unit for value in row[key]]
                color = QUIET if row["arm"].startswith("llm-") else GOOD
                axes.barh(y, median(values), color=color)
                if key == "seconds" and "inside_seconds" in row:
                    start = row["median"]["inside_seconds"]
                    imports = axes.barh(
                        y, median(values) - start, left=start, color="white", ec=color, hatch="////", lw=0
                    )
                axes.hlines(y, min(values), max(values), INK, lw=1)
                note = axes.annotate(form.format(median(values)), (max(values), y), (4, 0), textcoords="offset points")
                note.set(va="center", fontsize=9.5)
            axes.set_xlabel(text)
            axes.margins(y=0.02)
            axes.set_xlim(0, 1.25 * max(max(row[key]) / unit for row in places.values()))
        if imports:
            figure.axes[0].legend([imports], ["importing libraries"], frameon=False, fontsize=9.5)
        figure.axes[0].set_yticks(list(places), names)
        figure.axes[0].invert_yaxis()
        figure.axes[0].tick_params(axis="y", length=0)
        turns = max(len(row["seconds"]) for row in places.values())
        hidden = json.loads(path.read_text())["settings"]["hidden_size"]
        what = f"Converting {least} decoder blocks (hidden size {hidden}) to INT8"
        title(figure, f"{what} on {machine(path)} ({_turns(turns)})")


SHARED = (
    ("demo.json", "collapse", collapse),
    ("calibration.json", "calibration", calibration),
    ("accuracy.json", "accuracy", accuracy),
    ("accuracy-vllm.json", "size", size),
    ("bits.json", "bits", bits),
)
OF_MACHINES = (
    ("gemm.json", "kernels", kernels),
    ("serve-*.json", None, serve),
    ("convert.json", "convert", conversions),
)


def draw(results: Path = RESULTS, figures: Path = FIGURES) -> Iterator[str]:
    """Draw every figure that there is a file for, into the same folders under ``figures``.

    Yields:
        A line for each: that it was drawn, or why not.
    """
    for path, name, figure in files(results, SHARED, OF_MACHINES):
        out = figures / path.relative_to(results).with_name(f"{name or path.stem}.svg")
        try:
            if not path.exists():
                raise NothingToDraw("there is no such file")
            figure(path, out)
        except NothingToDraw as reason:
            yield f"no {out}: {path}: {reason}"
        else:
            yield f"{out}, from {path}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    asked = parser.parse_args()
    for line in draw(asked.results, asked.figures):
        print(line)


if __name__ == "__main__":
    main()

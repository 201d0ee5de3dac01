"""Figures and tables for the README, from the JSON files under benchmarks/results/ and nothing else.

python -m benchmarks.plot     # writes docs/figures/, prints the tables that the README must hold
"""

import json
from pathlib import Path
from statistics import geometric_mean, mean, median, stdev

from benchmarks.record import RESULTS
from vllm_w8a8_bismooth.figures import BAD, GOOD, QUIET, drawing

FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def load(name: str) -> list[dict]:
    return json.loads((RESULTS / name).read_text())["rows"]


def demo_table() -> str:
    """The demo's result as a Markdown table."""
    lines = ["| checkpoint | perplexity | KL to bf16, nats per token | same first token |", "|---|--:|--:|--:|"]
    for row in load("demo.json"):
        model = "" if row["arm"].startswith("healthy") else "planted, "
        kl, top1 = f"{row['kl']:.2e} ± {row['kl_error']:.0e}", f"{row['top1']:.1%}"
        cells = ("", "") if row["arm"].endswith("bf16") else (kl, top1)
        lines.append(f"| {model}{row['arm']} | {row['ppl']:.3f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


ARMS = {
    "rtn": "RTN",
    "smoothquant-0.5": "SmoothQuant 0.5 (llm-compressor)",
    "smoothquant-0.8": "SmoothQuant 0.8 (llm-compressor)",
    "alpha-0.5": "bi-smooth, alpha = 0.5",
    "best alpha": "bi-smooth, the model's best alpha",
    "balanced": "bi-smooth, balanced (default)",
    "data-free": "bi-smooth, data-free",
    "auto-g32": "auto, g = 32",
    "auto-bf16": "the linears that auto chose in bf16 instead",
    "split-32": "balanced, 32 columns split in two",
    "group-everywhere": "RTN with groups everywhere",
}


class Accuracy:
    """The rows of one accuracy file."""

    def __init__(self, name: str):
        self.rows = load(name)
        self.beds = list(dict.fromkeys(row["bed"] for row in self.rows))

    def kl(self, bed: str, arm: str, kind: str = "healthy", k: float | None = None) -> list[float]:
        """One value a seed. ``best alpha`` is the single alpha that is best on average on this bed."""
        if arm == "best alpha":
            alphas = {row["arm"] for row in self.rows if row["arm"].startswith("alpha")}
            return min((self.kl(bed, alpha, kind, k) for alpha in alphas), key=mean)
        where = (bed, arm, kind, k)
        return [row["kl"] for row in self.rows if (row["bed"], row["arm"], row["plant"], row["k"]) == where]

    def has(self, arm: str) -> bool:
        return arm == "best alpha" or any(row["arm"] == arm for row in self.rows)

    def ratios(self, arm: str, to: str) -> list[float]:
        """A value a bed: mean over seeds, healthy."""
        return [mean(self.kl(bed, arm)) / mean(self.kl(bed, to)) for bed in self.beds]

    def planted(self, arm: str, to: str, kinds: tuple[str, ...] = ("norm", "residual")) -> list[float]:
        """KL of an arm on each bed's plants, mean over seeds, to that of an arm on the healthy bed."""
        return [
            mean(self.kl(bed, arm, kind, k)) / mean(self.kl(bed, to))
            for bed in self.beds
            for kind in kinds
            for k in (100.0, 1000.0)
        ]


def _spread(values: list[float]) -> str:
    """In millionths, with the standard deviation over seeds where there are several."""
    deviation = f" ± {stdev(values) * 1e6:.0f}" if len(values) > 1 else ""
    return f"{mean(values) * 1e6:.0f}{deviation}"


def accuracy_table() -> str:
    """Healthy beds: KL of every arm, and relative to RTN."""
    data = Accuracy("accuracy.json")
    lines = [f"| arm | {' | '.join(data.beds)} | x RTN |", "|---|" + "--:|" * (len(data.beds) + 1)]
    for arm, label in ARMS.items():
        if data.has(arm):
            cells = [_spread(data.kl(bed, arm)) for bed in data.beds]
            lines.append(f"| {label} | {' | '.join(cells)} | {geometric_mean(data.ratios(arm, 'rtn')):.2f} |")
    return "\n".join(lines)


def plants_table() -> str:
    """Planted beds: KL relative to RTN on the healthy bed, by kind of plant: mean over beds and seeds, and range."""
    data = Accuracy("accuracy.json")
    arms = ("rtn", "mixed-g32", "balanced", "data-free", "auto-g32")
    names = {**ARMS, "mixed-g32": "mixed, g = 32"}
    lines = [f"| plant | {' | '.join(names[arm] for arm in arms)} |", "|---|" + "--:|" * len(arms)]
    for kind in ("norm", "residual"):
        for k in (100.0, 1000.0):
            cells = []
            for arm in arms:
                ratios = [kl / mean(data.kl(bed, "rtn")) for bed in data.beds for kl in data.kl(bed, arm, kind, k)]
                cells.append(f"{geometric_mean(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})")
            lines.append(f"| {kind}, k = {k:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def served_table() -> str:
    """The same through real vLLM in bf16, one draw."""
    data = Accuracy("accuracy-vllm.json")
    lines = [f"| arm | {' | '.join(data.beds)} | x RTN |", "|---|" + "--:|" * (len(data.beds) + 1)]
    for arm, label in ARMS.items():
        if arm != "best alpha" and data.has(arm):
            cells = [_spread(data.kl(bed, arm)) for bed in data.beds]
            lines.append(f"| {label} | {' | '.join(cells)} | {geometric_mean(data.ratios(arm, 'rtn')):.2f} |")
    return "\n".join(lines)


def accuracy_targets_table() -> str:
    """What was promised of accuracy, and what was measured."""
    data = Accuracy("accuracy.json")
    smoothquant = [
        mean(data.kl(bed, "balanced")) / min(mean(data.kl(bed, f"smoothquant-{a}")) for a in (0.5, 0.8))
        for bed in data.beds
    ]
    change = [abs(ratio - 1) for ratio in data.planted("balanced", "balanced")]
    targets = (
        ("balanced / RTN, healthy, geometric mean", 0.80, geometric_mean(data.ratios("balanced", "rtn"))),
        ("balanced / best single alpha, geometric mean", 0.92, geometric_mean(data.ratios("balanced", "best alpha"))),
        ("balanced / alpha = 0.5, worst model", 1.0, max(data.ratios("balanced", "alpha-0.5"))),
        ("balanced: change by a plant, worst", 0.05, max(change)),
        ("balanced / better SmoothQuant of llm-compressor, worst model", 1.0, max(smoothquant)),
        ("data-free on norm plants / RTN healthy, worst", 1.0, max(data.planted("data-free", "rtn", ("norm",)))),
        (
            "data-free on residual plants / RTN healthy, worst",
            3.0,
            max(data.planted("data-free", "rtn", ("residual",))),
        ),
        *(
            (f"auto / groups everywhere, {bed}", 1.0, ratio)
            for bed, ratio in zip(data.beds, data.ratios("auto-g32", "group-everywhere"), strict=True)
        ),
        ("balanced: spread over 4k tokens and more of own text, worst model", 0.05, max(study_spread().values())),
    )
    lines = ["| target | at most | measured |", "|---|--:|--:|"]
    lines += [f"| {name} | {most:g} | {found:.3f} |" for name, most, found in targets]
    return "\n".join(lines)


def study_means(arm: str = "balanced", texts: str = "own text") -> dict[str, dict[int, float]]:
    """Bed -> tokens -> mean KL over draws."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in load("calibration.json"):
        if row["arm"] == arm and row["set"] == texts:
            found.setdefault(row["bed"], {}).setdefault(row["tokens"], []).append(row["kl"])
    return {bed: {size: mean(values) for size, values in sizes.items()} for bed, sizes in found.items()}


def study_spread() -> dict[str, float]:
    """Bed -> (largest - smallest) / middle of the mean KL from 4096 tokens of its own text on."""
    spread = {}
    for bed, sizes in study_means().items():
        values = [value for size, value in sizes.items() if size >= 4096]
        spread[bed] = (max(values) - min(values)) / median(values)
    return spread


def gemm_table() -> str:
    """Speed relative to vLLM's INT8 kernel by number of tokens: geometric mean over the linears, with the range."""
    rows = load("amd-epyc-2-cores/gemm.json")
    names = {"ours-channel": "per-channel", "ours-group128": "per-group, g = 128", "torch-bf16": "torch bf16"}
    lines = ["| tokens | " + " | ".join(names.values()) + " | per-channel, TOPS | GB/s |"]
    lines.append("|--:|" + "--:|" * (len(names) + 2))
    for m in dict.fromkeys(row["M"] for row in rows):
        cells = []
        for name in names:
            ratios = [row["x stock"] for row in rows if row["M"] == m and row["impl"] == name]
            cells.append(f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        best = max((row for row in rows if row["M"] == m and row["impl"] == "ours-channel"), key=lambda r: r["TOPS"])
        lines.append(f"| {m} | {' | '.join(cells)} | {best['TOPS']:.2f} | {best['GB/s']:.0f} |")
    return "\n".join(lines)


def throughput_table() -> str:
    """Whole engines: total tokens per second and seconds per request."""
    rows = load("amd-epyc-2-cores/throughput.json")
    lines = ["| model | arm | tokens/s | x bf16 | latency, s | x bf16 |", "|---|---|--:|--:|--:|--:|"]
    for row in rows:
        bf16 = next(r for r in rows if r["model"] == row["model"] and r["arm"] == "bf16")
        rate, latency = row["tokens_per_second"], row["latency_seconds"]
        faster = rate / bf16["tokens_per_second"], bf16["latency_seconds"] / latency
        cells = (row["model"], row["arm"], f"{rate:.0f}", f"{faster[0]:.2f}", f"{latency:.3f}", f"{faster[1]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def conversions_table() -> str:
    """Conversions beside llm-compressor's: seconds, CPU seconds, peak memory; medians of the turns."""
    lines = [
        "| conversion | blocks | seconds | less the peer's imports | CPU seconds | peak GB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in load("amd-epyc-2-cores/convert.json"):
        median = row["median"]
        inside = f"{median['inside_seconds']:.0f}" if "inside_seconds" in median else ""
        cells = (
            f"{median['seconds']:.0f}",
            inside,
            f"{median['cpu_seconds']:.0f}",
            f"{median['peak_rss_bytes'] / 1e9:.2f}",
        )
        lines.append(f"| {row['arm']} | {row['blocks']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def conversion_targets_table() -> str:
    """What was promised of conversions, and what was measured."""
    lines = ["| target | at most | measured |", "|---|--:|--:|"]
    for target in json.loads((RESULTS / "amd-epyc-2-cores/convert.json").read_text())["targets"]:
        lines.append(f"| {target['name']} | {target['target']:g} | {target['measured']:.3g} |")
    return "\n".join(lines)


def collapse() -> None:
    """KL to bf16 of each INT8 arm of the demo."""
    rows = {row["arm"]: row for row in load("demo.json")}
    labels = {
        "healthy RTN": "healthy model, RTN",
        "RTN": "outlier columns, RTN",
        "mixed, g = 32": "outlier columns, mixed (g = 32)",
        "bi-smooth": "outlier columns, bi-smooth",
        "bi-smooth, data-free": "outlier columns, bi-smooth, data-free",
    }
    colors = {"healthy RTN": QUIET, "RTN": BAD}
    with drawing(FIGURES / "collapse.svg", 8, 2.8, layout="constrained") as figure:
        axes = figure.subplots()
        arms = list(labels)[::-1]
        values = [rows[arm]["kl"] for arm in arms]
        bars = axes.barh([labels[a] for a in arms], values, color=[colors.get(a, GOOD) for a in arms])
        axes.bar_label(bars, [f"{value:.1e}" for value in values], padding=4)
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 3, max(values) * 8)
        axes.set_xlabel("KL divergence from bf16, nats per token (log scale)")
        axes.set_title("W8A8 INT8 in vLLM on the planted test bed", loc="left")


def calibration() -> None:
    """KL by the number of calibration tokens, relative to the largest calibration of each bed."""
    rows, colors = load("calibration.json"), {"alpha-0.5": QUIET, "balanced": GOOD}
    with drawing(FIGURES / "calibration.svg", 9, 3.2, layout="constrained") as figure:
        beds = list(dict.fromkeys(row["bed"] for row in rows))
        for bed, axes in zip(beds, figure.subplots(1, len(beds), squeeze=False)[0], strict=True):
            for arm, color in colors.items():
                own = [row for row in rows if (row["bed"], row["arm"], row["set"]) == (bed, arm, "own text")]
                sizes = sorted({row["tokens"] for row in own})
                middle = study_means(arm)[bed]
                axes.plot(sizes, [middle[size] * 1e6 for size in sizes], color=color, label=arm)
                axes.plot([r["tokens"] for r in own], [r["kl"] * 1e6 for r in own], ".", color=color)
                for marker, texts in zip(
                    "^x", sorted({r["set"] for r in rows if r["bed"] == bed} - {"own text"}), strict=True
                ):
                    points = [r for r in rows if (r["bed"], r["arm"], r["set"]) == (bed, arm, texts)]
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


def arms() -> None:
    """KL of the arms on the healthy beds, relative to RTN."""
    data = Accuracy("accuracy.json")
    shown = [arm for arm in ARMS if arm != "rtn" and data.has(arm)][::-1]
    with drawing(FIGURES / "accuracy.svg", 8, 4.2, layout="constrained") as figure:
        axes = figure.subplots()
        for marker, bed in zip("os^", data.beds, strict=False):
            values = [mean(data.kl(bed, arm)) / mean(data.kl(bed, "rtn")) for arm in shown]
            axes.plot(values, range(len(shown)), marker, color=GOOD, mfc="none", label=bed)
        axes.axvline(1, color=BAD)
        axes.set_yticks(range(len(shown)), [ARMS[arm] for arm in shown])
        axes.set_xlabel("KL relative to RTN, healthy models")
        axes.legend(fontsize=9)


if __name__ == "__main__":
    collapse()
    calibration()
    arms()
    tables = (
        demo_table,
        accuracy_table,
        plants_table,
        served_table,
        accuracy_targets_table,
        gemm_table,
        throughput_table,
        conversions_table,
        conversion_targets_table,
    )
    print(*(table() for table in tables), sep="\n\n")

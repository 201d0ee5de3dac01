"""Figures and tables for the README, from the JSON files under benchmarks/results/ and nothing else.

python -m benchmarks.plot     # writes docs/figures/, prints the tables that the README must hold
"""

import json
from pathlib import Path
from statistics import geometric_mean

from vllm_w8a8_bismooth.figures import BAD, GOOD, QUIET, drawing

RESULTS = Path(__file__).parent / "results"
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


def accuracy_table() -> str:
    """KL to bf16 of every arm on every plant as a Markdown table."""
    arms = {"rtn": "RTN", "mixed-g32": "mixed, g = 32", "bismooth": "bi-smooth", "bismooth-data-free": "data-free"}
    lines = [f"| plant | {' | '.join(arms.values())} |", "|---|" + "--:|" * len(arms)]
    plants: dict[str, dict[str, float]] = {}
    for row in load("accuracy-vllm.json"):
        where = f"{row['plant']}" if row["k"] is None else f"{row['plant']}, k = {row['k']:.0f}"
        where += f", blocks {', '.join(map(str, row['blocks']))}" if row["blocks"] else ""
        where += f", seed {row['seed']}" if row["seed"] is not None else ""
        plants.setdefault(where, {})[row["arm"]] = row["kl"]
    lines += [f"| {where} | {' | '.join(f'{kl[arm]:.2e}' for arm in arms)} |" for where, kl in plants.items()]
    return "\n".join(lines)


def gemm_table() -> str:
    """Speed relative to vLLM's INT8 kernel by number of tokens: geometric mean over the linears, with the range."""
    rows = load("gemm-cpu.json")
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
    rows = load("throughput-cpu.json")
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
    for row in load("convert.json"):
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
    for target in json.loads((RESULTS / "convert.json").read_text())["targets"]:
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


if __name__ == "__main__":
    collapse()
    tables = (demo_table, accuracy_table, gemm_table, throughput_table, conversions_table, conversion_targets_table)
    print(*(table() for table in tables), sep="\n\n")

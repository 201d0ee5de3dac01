"""Figures for the README, from the JSON files under benchmarks/results/ and nothing else.

python -m benchmarks.plot
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"

# A background of its own and dark ink: legible on light and dark pages alike.
STYLE = {
    "font.size": 11,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "bismooth",
}
COLLAPSED, HEALTHY, REPAIRED = "#c0392b", "#7f8c8d", "#2471a3"


def collapse() -> None:
    """KL to bf16 of each INT8 arm of the demo."""
    from matplotlib import pyplot

    data = json.loads((RESULTS / "demo.json").read_text())
    rows = {row["arm"]: row for row in data["rows"] if not row["arm"].endswith("bf16")}
    labels = {
        "healthy RTN": "healthy model, RTN",
        "RTN": "outlier columns, RTN",
        "mixed, g = 32": "outlier columns, mixed (g = 32)",
        "bi-smooth": "outlier columns, bi-smooth",
        "bi-smooth, data-free": "outlier columns, bi-smooth, data-free",
    }
    colors = {"healthy RTN": HEALTHY, "RTN": COLLAPSED}
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(8, 2.8), layout="constrained")
        arms = list(labels)[::-1]
        values = [rows[arm]["kl"] for arm in arms]
        bars = axes.barh([labels[a] for a in arms], values, color=[colors.get(a, REPAIRED) for a in arms])
        axes.bar_label(bars, [f"{value:.1e}" for value in values], padding=4)
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 3, max(values) * 8)
        axes.set_xlabel("KL divergence from bf16, nats per token (log scale)")
        axes.set_title("W8A8 INT8 in vLLM on the planted test bed", loc="left")
        FIGURES.mkdir(parents=True, exist_ok=True)
        figure.savefig(FIGURES / "collapse.svg", metadata={"Date": None})
        figure.savefig(FIGURES / "collapse.png", dpi=150, metadata={"Software": None})
        pyplot.close(figure)


if __name__ == "__main__":
    collapse()

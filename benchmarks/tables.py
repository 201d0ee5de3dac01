"""The tables of README.md and docs, from the JSON files under benchmarks/results/, and of platforms from the rules.

    python -m benchmarks.tables [FILE ...]

prints them all, or puts them where Markdown files want them: behind the comments that it prints before each.
"""

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean, mean, median, stdev

from benchmarks import platforms
from benchmarks.record import RESULTS
from vllm_w8a8_bismooth.serving import servers


def rows(path: Path) -> list[dict]:
    """The rows of a file that :func:`benchmarks.record.write` wrote."""
    return json.loads(path.read_text())["rows"]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table whose first ``words`` columns are words, and the others numbers."""
    rule = "---|" * words + "--:|" * (len(header) - words)
    return "\n".join([f"| {' | '.join(header)} |", f"|{rule}", *(f"| {' | '.join(line)} |" for line in lines)])


def demo(path: Path) -> str:
    """The demo's checkpoints."""
    lines = []
    for row in rows(path):
        model = "" if row["arm"].startswith("healthy") else "planted, "
        low, high = row["kl_interval"]
        cells = (f"{row['kl']:.4f} ({low:.4f} to {high:.4f})", f"{row['kl_worst']:.2g}", f"{row['top1']:.1%}")
        cells = ("", "", "") if row["source"] else cells
        lines.append((f"{model}{row['arm']}", f"{row['perplexity']:.2f}", *cells))
    return markdown(("checkpoint", "perplexity", "KL to bf16 (95 %)", "worst token", "same best token"), lines)


def answers(path: Path) -> str:
    """What the demo's checkpoints answer to its first prompt."""
    lines = []
    for row in rows(path):
        model = "" if row["arm"].startswith("healthy") else "planted, "
        said = " ".join(row["answers"][0].split())
        lines.append((f"{model}{row['arm']}", "".join(c if c.isascii() and c not in "|<>`*_" else "?" for c in said)))
    return markdown(("checkpoint", "answer"), lines, words=2)


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

    def __init__(self, path: Path):
        self.rows = rows(path)
        self.beds = list(dict.fromkeys(row["bed"] for row in self.rows))
        self.alphas = {row["arm"] for row in self.rows if row["arm"].startswith("alpha")}

    def kl(self, bed: str, arm: str, kind: str = "healthy", k: float | None = None) -> list[float]:
        """One value for each seed. ``best alpha`` is the single alpha that is best on average on this bed."""
        if arm == "best alpha":
            return min((self.kl(bed, alpha, kind, k) for alpha in self.alphas), key=mean)
        where = (bed, arm, kind, k)
        return [row["kl"] for row in self.rows if (row["bed"], row["arm"], row["plant"], row["k"]) == where]

    def has(self, arm: str) -> bool:
        return len(self.alphas) > 1 if arm == "best alpha" else any(row["arm"] == arm for row in self.rows)

    def ratios(self, arm: str, to: str) -> list[float]:
        """One value for each bed: the mean over seeds, on the healthy model."""
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


def accuracy(path: Path) -> str:
    """Healthy beds: KL of every arm, and relative to RTN."""
    data = Accuracy(path)
    lines = [
        (label, *(_spread(data.kl(bed, arm)) for bed in data.beds), f"{geometric_mean(data.ratios(arm, 'rtn')):.2f}")
        for arm, label in ARMS.items()
        if data.has(arm)
    ]
    return markdown(("arm", *data.beds, "x RTN"), lines)


def real(path: Path) -> str:
    """A real model's arms: KL to the source in thousandths of a nat a token."""
    lines = []
    for row in rows(path):
        d = row["divergence"]
        low, high = d["kl_interval"]
        kl = f"{d['kl'] * 1e3:.2f} ({low * 1e3:.2f} to {high * 1e3:.2f})"
        rest = (f"{d[name] * 1e3:.{places}f}" for name, places in (("kl_median", 2), ("kl_p999", 0), ("kl_worst", 0)))
        planted = f"planted, k = {row['k']:.0f}: " if row["k"] else ""
        chosen = ""
        if row.get("estimated") is not None:
            chosen = (
                f" ({row['grouped']:.0%} of linears, {row['work']:.0%} of work; estimated {row['estimated'] * 1e3:.1f})"
            )
        lines.append((planted + row["arm"] + chosen, kl, *rest, f"{d['top1']:.1%}"))
    return markdown(("arm", "mean KL (95 %)", "median", "99.9th percentile", "worst token", "same best token"), lines)


def drafters(path: Path) -> str:
    """What a model keeps of what is drafted for it."""
    lines = []
    for row in rows(path):
        low, high = row["interval"]
        places = ", ".join(f"{share:.1%}" for share in row["positions"])
        length = f"{row['length']:.2f} ({low:.2f} to {high:.2f})"
        planted = f"planted, k = {row['k']:.0f}: " if row["k"] else ""
        lines.append((planted + row["target"], row["draft"], f"{row['rate']:.1%}", places, length))
    header = ("what answers", "what drafts", "tokens kept", "by place in the draft", "tokens a step (95 %)")
    return markdown(header, lines, words=2)


def humaneval(path: Path) -> str:
    """Functions that pass their tests, by arm, and how many more or fewer than of full precision, in points."""
    lines = []
    for row in rows(path):
        if row["task"] == "humaneval":
            change, low, high = (100 * share for share in (row["difference"], *row["difference_interval"]))
            counts = (str(row["gained"]), str(row["lost"]), str(row["cut"]))
            points = "" if row["arm"] == "bf16" else f"{change:+.1f} ({low:+.1f} to {high:+.1f})"
            lines.append((row["arm"], f"{row['pass1']:.1%}", points, f"{row['recovery']:.1%}", *counts))
    header = ("arm", "pass@1", "points to bf16 (95 %)", "recovery", "gained", "lost", "answers cut off")
    return markdown(header, lines)


def agreement(path: Path) -> str:
    """Tokens that greedy answers have in common with full precision's before the first that differs."""
    lines = []
    for row in rows(path):
        if row["task"] == "agreement" and row["arm"] != "bf16":
            low, high = row["mean_interval"]
            mean = f"{row['mean']:.0f} ({low:.0f} to {high:.0f})"
            lines.append((row["arm"], mean, f"{row['median']:.0f}", f"{row['whole']:.1%}", f"{row['tokens']:.0f}"))
    return markdown(("arm", "mean (95 %)", "median", "same to the end", "tokens of an answer"), lines)


def families(path: Path) -> str:
    """Families of models: what was found out, how well the function is kept, and what vLLM makes of the result."""
    lines = []
    for row in rows(path):
        reasons: dict[str, list[str]] = {}
        for module, why in row["floats"].items():
            reasons.setdefault(why, []).append(f"`{module}`")
        floats = "; ".join(f"{', '.join(modules)}: {why}" for why, modules in reasons.items())
        cost, error = row["served"]["cost"], row["served"]["error"]
        served = f"{cost:.1e} ({cost / row['served']['yardstick']:.2%})" if error is None else f"no: {error}"
        stream = "" if row["stream"] is None else f"{row['stream']:.0e}"
        sites = ", ".join(f"`{site}`" for site in row["sites"])
        measured = (str(row["linears"]), f"{row['discovery']:.1f}", f"{row['function']:.0e}", stream)
        lines.append((f"`{row['family']}`", sites, floats, served, *measured))
    header = ("family", "sites", "in float, and why", "KL in vLLM")
    return markdown((*header, "INT8 linears", "discovery, s", "folds", "calibration"), lines, words=len(header))


def saturation(path: Path) -> str:
    """Errors of oneDNN's INT8 products and of ours by level of instructions, and the ratio of their times."""
    found, lines = rows(path), []
    crests = list(dict.fromkeys(row["crest"] for row in found))
    for limit, level in dict.fromkeys((row["limit"], row["level"]) for row in found):
        own = [row for row in found if row["limit"] == limit]
        errors = [max(row["stock error"] for row in own if row["crest"] == crest) for crest in crests]
        cells = [f"{error:.1%}" if error else "0" for error in errors]
        cells.append("0" if not any(row["ours wrong"] for row in own) else "not 0")
        for tokens in dict.fromkeys(row["m"] for row in own):
            cells.append(f"{median(row['x stock'] for row in own if row['m'] == tokens):.2f}")
        lines.append((limit, level, *cells))
    errors = [f"error at crest {crest}" for crest in crests]
    tokens = [f"x at M = {m}" for m in dict.fromkeys(row["m"] for row in found)]
    return markdown(("oneDNN may use", "ours uses", *errors, "error of ours", *tokens), lines, words=2)


def engines_without_vnni(path: Path) -> str:
    """KL of one bed's checkpoints in vLLM by either product, with VNNI and without."""
    found = {(row["limit"], row["arm"], row["kernel"]): row for row in rows(path)}
    lines = []
    for limit, arm in dict.fromkeys((limit, arm) for limit, arm, _ in found):
        cells = (found[limit, arm, kernel] for kernel in ("vLLM's", "ours"))
        lines.append((limit, arm, *(f"{row['kl']:.2e} ± {row['kl_error']:.0e}" for row in cells)))
    return markdown(("oneDNN may use", "checkpoint", "KL by vLLM's own product", "KL by ours"), lines, words=2)


def compute_dtypes(path: Path) -> str:
    """Healthy beds: KL by the dtype in which calibration computed, and what the choice changes for the same draw."""
    lines = []
    for row in rows(path):
        wide, narrow = row["kl"]["float32"], row["kl"]["bfloat16"]
        changes = (f"{row[key] * 1e6:+.0f}" for key in ("difference", "largest_difference"))
        lines.append((row["bed"], _spread(wide), _spread(narrow), *changes))
    return markdown(("bed", "float32", "bfloat16", "mean change", "largest"), lines)


def shares(path: Path) -> str:
    """Seconds of each load, and the share that each part of the engine has in them."""
    found = rows(path)
    parts = list(dict.fromkeys(part for row in found for part in row["parts"]))
    parts.sort(key=lambda part: -sum(row["parts"].get(part, 0) / row["profiled"] for row in found))
    lines = []
    for row in found:
        cells = (f"{row['parts'].get(part, 0) / row['profiled']:.1%}" for part in parts)
        lines.append((row["model"], row["level"], row["arm"], row["load"], f"{row['seconds']:.2f}", *cells))
    return markdown(("model", "level", "arm", "load", "seconds", *parts), lines, words=4)


def bits(path: Path) -> str:
    """Healthy beds: bits a weight and KL of each arm, and how the KL compares with four bits in every row."""
    found = [row for row in rows(path) if row["plant"] == "healthy"]
    beds = list(dict.fromkeys(row["bed"] for row in found))
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in found):
        cells, ratios = [], []
        for bed in beds:
            kls, fours, sizes = (
                [row[key] for row in found if (row["bed"], row["arm"]) == (bed, which)]
                for which, key in ((arm, "kl"), ("4-bit", "kl"), (arm, "bits"))
            )
            cells.append(f"{mean(sizes):.2f}: {_spread(kls)}")
            ratios.append(mean(kls) / mean(fours))
        lines.append((arm, *cells, f"{geometric_mean(ratios):.2f}"))
    return markdown(("arm", *(f"{bed}, bits: KL x 1e-6" for bed in beds), "x 4-bit"), lines)


def bits_planted(path: Path) -> str:
    """Planted beds: KL relative to the same arm on the healthy bed, of the same draw."""
    found = rows(path)
    known = {(row["bed"], row["plant"], row["arm"]): row["kl"] for row in found if row["seed"] == 0}
    planted = [key for key in known if key[1] != "healthy"]
    arms = list(dict.fromkeys(arm for *_, arm in planted))
    lines = [
        (bed, kind, *(f"{known[bed, kind, arm] / known[bed, 'healthy', arm]:.3f}" for arm in arms))
        for bed, kind in dict.fromkeys((bed, kind) for bed, kind, _ in planted)
    ]
    return markdown(("bed", "plant, k = 1000", *arms), lines, words=2)


def plants(path: Path) -> str:
    """Planted beds: KL relative to RTN on the healthy bed, by kind of plant: mean over beds and seeds, and range."""
    data = Accuracy(path)
    arms = ("rtn", "mixed-g32", "balanced", "data-free", "auto-g32")
    names = {**ARMS, "mixed-g32": "mixed, g = 32"}
    lines = []
    for kind in ("norm", "residual"):
        for k in (100.0, 1000.0):
            cells = []
            for arm in arms:
                ratios = [kl / mean(data.kl(bed, "rtn")) for bed in data.beds for kl in data.kl(bed, arm, kind, k)]
                cells.append(f"{geometric_mean(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})")
            lines.append((f"{kind}, k = {k:.0f}", *cells))
    return markdown(("plant", *(names[arm] for arm in arms)), lines)


def accuracy_targets(path: Path) -> str:
    """What was promised of accuracy, and what was measured; of calibration's size, in ``calibration.json`` beside."""
    data = Accuracy(path)
    smoothquant = [
        mean(data.kl(bed, "balanced")) / min(mean(data.kl(bed, f"smoothquant-{a}")) for a in (0.5, 0.8))
        for bed in data.beds
    ]
    change = [abs(ratio - 1) for ratio in data.planted("balanced", "balanced")]
    spread = study_spread(rows(path.with_name("calibration.json")))
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
        ("balanced: spread over 4k tokens and more of own text, worst model", 0.05, max(spread.values())),
    )
    return _targets((name, most, f"{found:.3f}") for name, most, found in targets)


def _targets(lines: Iterable[tuple[str, float, str]]) -> str:
    return markdown(("target", "at most", "measured"), [(name, f"{most:g}", found) for name, most, found in lines])


def study_means(rows: list[dict], arm: str = "balanced", texts: str = "own text") -> dict[str, dict[int, float]]:
    """Bed -> calibration tokens -> mean KL over draws."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["arm"] == arm and row["set"] == texts:
            found.setdefault(row["bed"], {}).setdefault(row["tokens"], []).append(row["kl"])
    return {bed: {size: mean(values) for size, values in sizes.items()} for bed, sizes in found.items()}


def study_spread(rows: list[dict]) -> dict[str, float]:
    """Bed -> (largest - smallest) / middle of the mean KL from 4096 tokens of its own text on."""
    spread = {}
    for bed, sizes in study_means(rows).items():
        values = [value for size, value in sizes.items() if size >= 4096]
        spread[bed] = (max(values) - min(values)) / median(values)
    return spread


KERNELS = {
    "ours-channel": "per-channel",
    "ours-rows": "4.5 bits",
    "ours-group128": "per-group, g = 128",
    "cutlass": "CUTLASS",
    "torch-bf16": "torch bf16",
}


def _mean_and_range(ratios: list[float]) -> str:
    if not ratios:
        return ""
    extent = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{geometric_mean(ratios):.2f}{extent}"


def kernels(path: Path) -> str:
    """Speed relative to vLLM's INT8 kernel by number of tokens: geometric mean over the linears, with the range."""
    found: dict[int, dict[str, list[dict]]] = {}
    for row in rows(path):
        found.setdefault(row["M"], {}).setdefault(row["impl"], []).append(row)
    shown = [name for name in KERNELS if any("x stock" in r for by in found.values() for r in by.get(name, ()))]
    lines = []
    for m, by in found.items():
        cells = []
        for name in shown:
            cells.append(_mean_and_range([row["x stock"] for row in by.get(name, ()) if "x stock" in row]))
        best = max(by["ours-channel"], key=lambda row: row["TOPS"])
        lines.append((str(m), *cells, f"{best['TOPS']:.2f}", f"{best['GB/s']:.0f}"))
    header = ("tokens", *(KERNELS[name] for name in shown), "per-channel, TOPS", "GB/s")
    return markdown(header, lines, words=0)


def levels(path: Path) -> str:
    """Speed by level of instructions relative to torch's fp32 and to vLLM's INT8: geometric means over the linears."""
    shown = list(itertools.product(("ours-channel", "ours-group128"), ("x fp32", "x stock")))
    found: dict[tuple[str, int], dict[str, list[dict]]] = {}
    for row in rows(path):
        found.setdefault((row["level"], row["M"]), {}).setdefault(row["impl"], []).append(row)
    lines = []
    for (level, m), by in found.items():
        cells = []
        for name, column in shown:
            ratios = [row[column] for row in by[name] if column in row]
            among = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
            cells.append(f"{geometric_mean(ratios):.2f}{among}" if ratios else "")
        best = max(by["ours-channel"], key=lambda row: row["TOPS"])
        lines.append((level, str(m), *cells, f"{best['TOPS']:.2f}", f"{best['GB/s']:.0f}"))
    columns = [
        f"{KERNELS[name]}: {column}" for name in ("ours-channel", "ours-group128") for column in ("x fp32", "x stock")
    ]
    return markdown(("level", "tokens", *columns, "per-channel, TOPS", "GB/s"), lines)


def conversions(path: Path) -> str:
    """Conversions beside llm-compressor's: seconds, CPU seconds, peak memory; medians of the turns."""
    lines = []
    for row in rows(path):
        median = row["median"]
        cells = (
            f"{median['seconds']:.0f}",
            f"{median['inside_seconds']:.0f}" if "inside_seconds" in median else "",
            f"{median['cpu_seconds']:.0f}",
            f"{median['peak_rss_bytes'] / 1e9:.2f}",
        )
        lines.append((row["arm"], str(row["blocks"]), *cells))
    header = ("conversion", "blocks", "seconds", "less the peer's imports", "CPU seconds", "peak GB")
    return markdown(header, lines)


def conversion_targets(path: Path) -> str:
    """What was promised of conversions, and what was measured."""
    targets = json.loads(path.read_text())["targets"]
    return _targets(
        (t["name"], t["target"], "missing" if t["measured"] is None else f"{t['measured']:.3g}") for t in targets
    )


class Served:
    """The rows of one file of whole engines."""

    def __init__(self, path: Path):
        self.rows = rows(path)
        self.arms = list(dict.fromkeys(row["arm"] for row in self.rows))

    def of(self, arm: str, bench: str) -> list[dict]:
        """An arm's rows; those of ``serve`` by rate, the one without a limit last."""
        found = [row for row in self.rows if (row["arm"], row["bench"]) == (arm, bench)]
        return sorted(found, key=lambda row: (row.get("rate") is None, row.get("rate")))

    def one(self, arm: str, bench: str) -> dict:
        """An arm's only row; empty if it was not measured."""
        return next(iter(self.of(arm, bench)), {})


def engines(path: Path) -> str:
    """Whole engines: an arm's throughput, latency of a request alone, size and accuracy."""
    data = Served(path)

    def against(arm: str, bench: str, figure: str, digits: int, faster: Callable[[float, float], float]) -> tuple:
        """The figure with its range over turns, and how much faster than bf16 that is."""
        row, bf16 = data.one(arm, bench), data.one("bf16", bench)
        if not row:
            return "", ""
        cell = f"{row[figure]:.{digits}f}"
        if row["turns"] > 1:
            cell += " ({:.{n}f} to {:.{n}f})".format(*row[f"{figure}_range"], n=digits)
        return cell, f"{faster(row[figure], bf16[figure]):.2f}" if bf16 else ""

    lines = []
    for arm in data.arms:
        row = data.one(arm, "accuracy")
        lines.append(
            (
                arm,
                *against(arm, "throughput", "tokens_per_second", 0, lambda mine, bf16: mine / bf16),
                *against(arm, "latency", "seconds", 3, lambda mine, bf16: bf16 / mine),
                f"{row['bytes'] / 1e9:.2f}" if row else "",
                f"{row['kl']:.1e} ± {row['kl_error']:.0e}" if row and arm != "bf16" else "",
                f"{row['top1']:.1%}" if row and arm != "bf16" else "",
            )
        )
    header = ("arm", "tokens/s", "x bf16", "latency, s", "x bf16", "GB on disk", "KL to bf16", "same first token")
    return markdown(header, lines)


def rates(path: Path) -> str:
    """A server under load: by arm and request rate, what it keeps up with and how long requests wait."""
    data, lines = Served(path), []
    for arm in data.arms:
        for row in data.of(arm, "serve"):
            lines.append(
                (
                    arm,
                    "no limit" if row["rate"] is None else f"{row['rate']:.2f}",
                    f"{row['requests_per_second']:.2f}",
                    f"{row['output_tokens_per_second']:.0f}",
                    *(f"{row[f'{time}_ms']:.0f} ({row[f'p99_{time}_ms']:.0f})" for time in ("ttft", "tpot")),
                )
            )
    asked = ("arm", "requests/s asked", "served", "output tokens/s")
    return markdown((*asked, "time to first token, ms: median (p99)", "per output token, ms: median (p99)"), lines)


def heads(path: Path) -> str:
    """What a head in INT8 saves of the time of one request."""
    lines = []
    for row in rows(path):
        low, high = row["quartiles"]
        ratio = f"{row['x INT8']:.2f} ({low:.2f} to {high:.2f})"
        lines.append((row["model"], row["arm"], f"{row['bytes'] / 1e6:.0f}", f"{row['seconds']:.2f}", ratio))
    return markdown(("model", "arm", "MB", "seconds", "x INT8 (quartiles)"), lines, words=2)


SHARED = (
    ("demo.json", demo),
    ("demo.json", answers),
    ("accuracy.json", accuracy),
    ("accuracy.json", plants),
    ("accuracy-vllm.json", accuracy),
    ("compute-dtype.json", compute_dtypes),
    ("accuracy.json", accuracy_targets),
    ("bits.json", bits),
    ("bits.json", bits_planted),
    ("real-*.json", real),
    ("drafters-*.json", drafters),
    ("tasks-*.json", humaneval),
    ("agreement-*.json", agreement),
    ("families.json", families),
)
OF_MACHINES = (
    ("gemm.json", kernels),
    ("gemm-levels.json", levels),
    ("convert.json", conversions),
    ("convert.json", conversion_targets),
    ("serve-*.json", engines),
    ("serve-*.json", rates),
    ("heads.json", heads),
    ("shares.json", shares),
    ("saturation.json", saturation),
    ("saturation-engines.json", engines_without_vnni),
)


def files(results: Path, shared: Sequence[tuple], of_machines: Sequence[tuple]) -> Iterator[tuple]:
    """What is to be made of which file.

    Args:
        results: a folder as ``benchmarks/results``, with one folder in it for each machine.
        shared, of_machines: tuples that begin with a pattern of names, in ``results`` and in the folders of machines.

    Yields:
        The path of a file, and the rest of the tuple whose pattern it fits; if none does, the path that the pattern is.
    """
    machines = [(folder, of_machines) for folder in sorted(results.iterdir()) if folder.is_dir()]
    for folder, wanted in [(results, shared), *machines]:
        for pattern, *what in wanted:
            for path in sorted(folder.glob(pattern)) or [folder / pattern]:
                yield path, *what


def minutes(results: Path) -> str:
    """What each file's run took, where the file says it."""
    lines = []
    for path in sorted(results.rglob("*.json")):
        found = json.loads(path.read_text())
        if "seconds" in found:
            command = re.sub(r"^python -m benchmarks\.| --json \S+", "", found["command"])
            lines.append((f"`{command}`", f"`{path.relative_to(results)}`", f"{found['seconds'] / 60:.1f}"))
    return markdown(("benchmark", "file", "minutes"), lines, words=2)


def every(results: Path = RESULTS) -> dict[str, str]:
    """All tables that there are files for, by what they are."""
    wanted = files(results, SHARED, OF_MACHINES)
    found = {f"{table.__name__} of {path.relative_to(results)}": table(path) for path, table in wanted if path.exists()}
    kinds = tuple(servers.KINDS)
    return found | {
        "minutes of all files": minutes(results),
        "layers of all platforms": markdown(("platform", *kinds), list(platforms.layers()), words=1 + len(kinds)),
        "proofs of all kernels": markdown(("who serves", "proven how"), list(platforms.proofs()), words=2),
    }


def put(text: str, found: dict[str, str]) -> str:
    """Replace each table that follows a comment with its name.

    Raises:
        KeyError: there are no such results.
    """
    return re.sub(r"(<!-- (.+ of .+) -->\n)\n*(?:\|.*\n)*\n*", lambda m: f"{m[1]}\n{found[m[2]]}\n\n", text)


if __name__ == "__main__":
    tables = every()
    for file in map(Path, sys.argv[1:]):
        file.write_text(put(file.read_text(), tables))
    if not sys.argv[1:]:
        for name, table in tables.items():
            print(f"<!-- {name} -->\n\n{table}\n")

"""Figures and tables of made-up results; the committed figures are those of the committed results."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks import accuracy, bits, gemm, plot, tables
from benchmarks.record import RESULTS
from benchmarks.testbed import PYTHON
from tests.support.conversion import convert
from vllm_w8a8_bismooth.recipe import Recipe

CPU = {"cpu": "AMD EPYC", "cores": 2, "gpu": None}
GPU = {"cpu": "Xeon", "cores": 16, "gpu": "NVIDIA H200"}
H200 = {"GB/s": 4000.0, "bf16 TFLOP/s": 700.0, "int8 TOPS": None}
BEDS = ("python", "headers", "docstrings")
DISTANCE = {"kl_error": 1e-5, "kl_worst": 0.1, "top1": 0.98, "ppl": 15.0}
SVG = "{http://www.w3.org/2000/svg}"


def write(path: Path, rows: list[dict], **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": CPU, **more, "rows": rows}))
    return path


def demo(path: Path) -> Path:
    arms = ("healthy bf16", "healthy RTN", "bf16", "RTN", "bi-smooth", "bi-smooth, data-free")
    rows = []
    for i, arm in enumerate(arms):
        kl, said = 1e-3 * 3**i, {"source": arm.endswith("bf16"), "answers": ["Paris |\n<b>", "so"]}
        found = {"kl": kl, "kl_interval": [kl / 2, 2 * kl], "kl_worst": 50 * kl, "top1": 0.9, "perplexity": 9.0}
        rows.append({"arm": arm, **found, **said})
    return write(path, rows)


def of_accuracy(path: Path, bits: bool = True) -> Path:
    """KL that differs by arm and hardly by bed, sizes as of the test beds."""
    rows = []
    for place, bed in enumerate(BEDS):
        arms = {arm: 8.08 for arm in accuracy.ARMS} | {"source": 16.0, "auto-g32": 8.11, "group-everywhere": 8.25}
        for i, (arm, wide) in enumerate(arms.items()):
            sizes = {"bytes": 7_549_864, "bits": wide} if bits else {}
            where = {"bed": bed, "plant": "healthy", "k": None, "seed": 0, "arm": arm}
            rows.append({**where, "kl": 1e-4 * (9 - 0.4 * i - place), **DISTANCE, **sizes})
        for plant in ("norm", "residual"):
            for k in (100.0, 1000.0):
                rows += [{"bed": bed, "plant": plant, "k": k, "arm": arm, "kl": 5e-4} for arm in accuracy.PLANTED]
    return write(path, rows, through="vllm")


def of_bits(path: Path) -> Path:
    rows = []
    for bed, size in (("python", 1e-3), ("headers", 3e-4)):
        for number, (arm, (asked, *_)) in enumerate(bits.ARMS.items()):
            for seed in range(2):
                here = {"bed": bed, "plant": "healthy", "k": None, "seed": seed, "arm": arm}
                rows.append({**here, "bits": asked or 4.2 + number / 10, "kl": size * (1 + number + seed / 9)})
        for arm in bits.PLANTED:
            rows.append({**rows[-1], "plant": "norm", "k": 1000.0, "seed": 0, "arm": arm})
    return write(path, rows)


def of_calibration(path: Path) -> Path:
    rows = [
        {"bed": bed, "arm": arm, "set": texts, "tokens": tokens, "seed": seed, "kl": 1e-3 / math.log(tokens + seed)}
        for bed in BEDS
        for arm in ("alpha-0.5", "balanced")
        for texts in ("own text", "random tokens", f"text of {bed}'s neighbour")
        for tokens in (1024, 4096, 16384)
        for seed in range(3)
    ]
    return write(path, rows)


def of_gemm(path: Path, models: tuple[str, ...] = ("LLaMA3-8B tp1",), machine: dict = CPU, **ceilings) -> Path:
    """Kernels at four fifths of what a machine can do."""
    ceilings = {"GB/s": 40.0, "bf16 TFLOP/s": 1.0, "int8 TOPS": 2.0} | ceilings
    names = ["ours-channel", "ours-group128", "vllm", "torch-bf16"] + ["read-weights" if machine is CPU else "cutlass"]
    rows = []
    for model in models:
        for name, n, k in (("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336)):
            for m in (1, 4, 16, 64, 256, 1024):
                for place, impl in enumerate(names):
                    width = 2 if "bf16" in impl else 1
                    peak = (ceilings["bf16 TFLOP/s"], ceilings["int8 TOPS"] or 1.5 * ceilings["bf16 TFLOP/s"])[
                        2 - width
                    ]
                    tops = (0.8 - 0.02 * place) * plot.roofline(m, n, k, width, peak, ceilings["GB/s"])
                    us = 2 * m * n * k / tops / 1e6 if impl != "read-weights" else n * k / 1e3 / (30 if m == 64 else 40)
                    row = {"impl": impl, "layer": f"{model} {name}", "M": m, "N": n, "K": k, "us": us, "TOPS": tops}
                    rows.append(row | {"GB/s": plot.moved(m, n, k, width) / us / 1e3, "x stock": 1.0})
    return write(path, rows, machine=machine, measured="product", ceilings=ceilings)


def of_convert(path: Path, turns: int = 1, peer: bool = True) -> Path:
    def row(arm: str, blocks: int, seconds: float, peak: float) -> dict:
        lists = {
            "seconds": [seconds * (1 + 0.1 * turn) for turn in range(turns)],
            "peak_rss_bytes": [peak * 1e9] * turns,
        }
        lists |= {"cpu_seconds": lists["seconds"]}
        if arm.startswith("llm-compressor"):
            lists["inside_seconds"] = [each - 8 for each in lists["seconds"]]
        return {"arm": arm, "blocks": blocks, **lists, "median": {key: each[turns // 2] for key, each in lists.items()}}

    rows = [row("RTN", 4, 18, 2.1), row("data-free", 4, 20, 2.2), row("calibrated", 4, 70, 2.7)]
    if peer:
        rows += [row("llm-compressor RTN", 4, 43, 12), row("llm-compressor RTN, model-free", 4, 51, 9.3)]
        rows += [row("llm-compressor SmoothQuant", 4, 149, 12)]
    rows += [row("calibrated", 8, 135, 2.8)]
    targets = [{"name": "seconds of --help", "target": 0.5, "measured": 0.15}]
    targets += [{"name": "seconds of inspect", "target": 2.0, "measured": None}]
    return write(path, rows, targets=targets, settings={"hidden_size": 8192})


SPEEDS = {
    "bf16": 1.0,
    "stock INT8": 1.45,
    "ours, per-channel": 1.8,
    "ours, 4.5 bits": 2.3,
    "ours, mixed": 1.7,
    "FP8": 1.5,
}


def of_serve(path: Path, turns: int = 3, arms: tuple[str, ...] = tuple(SPEEDS), machine: dict = CPU) -> Path:
    """Queues: latency grows as an arm nears what it can do, which is its speed times that of bf16."""
    rows = []

    def measured(**figures: float) -> dict:
        spread = 0.06 if turns > 1 else 0
        ranges = {f"{name}_range": [value * (1 - spread), value * (1 + spread)] for name, value in figures.items()}
        ranges = ranges if turns > 1 else {}
        return {"turns": turns, **figures, **ranges}

    for arm in arms:
        speed = SPEEDS[arm]
        rows.append({"arm": arm, "bench": "accuracy", "bytes": 2.2e9 / speed, "kl": 1e-3, **DISTANCE})
        rows.append({"arm": arm, "bench": "throughput", **measured(tokens_per_second=300 * speed)})
        rows.append({"arm": arm, "bench": "latency", **measured(seconds=1.4 / speed)})
        for load in (None, 0.25, 0.5, 0.75, 1.0, 1.5):
            used = min(load or 9, 0.97 * speed) / speed
            wait = 1 / (1.03 - used)
            figures = {"requests_per_second": used * speed * 0.8, "output_tokens_per_second": used * speed * 102}
            figures |= {"ttft_ms": 350 / speed * wait**1.3, "tpot_ms": 60 / speed * wait**0.5, "e2e_ms": 5000.0}
            figures |= {"p99_ttft_ms": 900 / speed * wait**1.3, "p99_tpot_ms": 90 / speed * wait**0.5}
            rate = load and 0.8 * load
            rows.append({"arm": arm, "bench": "serve", "load": load, "rate": rate, **measured(**figures)})
    return write(path, rows, machine=machine, settings={"model": "random:1b", "turns": turns})


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Results of a CPU with all files and of a GPU with a server under load and more linears than are shown."""
    folder = tmp_path_factory.mktemp("results")
    demo(folder / "demo.json")
    of_accuracy(folder / "accuracy.json")
    of_accuracy(folder / "accuracy-vllm.json")
    of_calibration(folder / "calibration.json")
    of_bits(folder / "bits.json")
    of_gemm(folder / "cpu/gemm.json")
    of_convert(folder / "cpu/convert.json")
    of_serve(folder / "cpu/serve-testbed.json", turns=1, arms=("bf16", "stock INT8", "ours, per-channel"))
    of_serve(folder / "cpu/serve-1b.json")
    of_gemm(folder / "gpu/gemm.json", ("LLaMA3-8B tp1", "LLaMA3-70B tp1", "LLaMA3-70B tp4"), GPU, **H200)
    of_serve(folder / "gpu/serve-1b.json", machine=GPU)
    return folder


DRAWN = {
    *("collapse", "calibration", "accuracy", "size", "bits"),
    *("cpu/kernels", "cpu/convert", "cpu/serve-testbed", "cpu/serve-1b", "gpu/kernels", "gpu/serve-1b"),
}


@contextmanager
def keeping() -> Iterator[dict[Path, Figure]]:
    """Fills with figures as they are drawn, by their paths."""
    found, drawing = {}, plot.drawing

    @contextmanager
    def kept(path: Path, *size, **more):
        with drawing(path, *size, **more) as figure:
            yield figure
        found[path] = figure

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plot, "drawing", kept)
        yield found


@pytest.fixture(scope="module")
def drawn(results, tmp_path_factory) -> tuple[Path, dict[str, Figure], list[str]]:
    """Folder, figures by their names in it, and what ``draw`` said."""
    folder = tmp_path_factory.mktemp("figures")
    with keeping() as found:
        lines = list(plot.draw(results, folder))
    return folder, {path.relative_to(folder).with_suffix("").as_posix(): each for path, each in found.items()}, lines


def texts(figure) -> list[Text]:
    """Those that are seen: of ticks, only of those within an axis."""
    ticks = [
        (axis, tick) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()
    ]
    hidden = {text for axis, tick in ticks for text in (tick.label1, tick.label2) if not within(axis, tick.get_loc())}
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]


def within(axis, place: float) -> bool:
    low, high = sorted(axis.get_view_interval())
    return low * (1 - 1e-9) <= place <= high * (1 + 1e-9)


def contrast_to_white(color) -> float:
    """As in WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def test_every_figure_is_drawn_and_legible(results, drawn):
    """On a page of any color: ink on an opaque ground of its own; and no text on or beyond another thing's place."""
    folder, figures, lines = drawn
    assert figures.keys() == DRAWN
    assert [line for line in lines if line.startswith("no ")] == [
        f"no {folder / 'gpu/convert.svg'}: {results / 'gpu/convert.json'}: there is no such file"
    ]
    assert len(lines) == len(DRAWN) + 1
    for name in DRAWN:
        root = ElementTree.parse(folder / f"{name}.svg").getroot()
        ground = next(root.iter(f"{SVG}path"))  # of what is drawn, the first
        assert ground.get("style") == "fill: #ffffff"
        corners = [float(number) for number in re.findall(r"[\d.]+", ground.get("d"))]
        assert [max(corners[::2]), max(corners[1::2])] == [float(size) for size in root.get("viewBox").split()[2:]]
    for name, figure in figures.items():
        figure.draw_without_rendering()
        seen = {text: Text.get_window_extent(text).padded(-0.5) for text in texts(figure)}
        for text, box in seen.items():
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, (name, text)
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, (name, text)
            assert contrast_to_white(text.get_color()) > 4.5, (name, text)
        for (one, box), (two, other) in combinations(seen.items(), 2):
            assert not box.overlaps(other), (name, one, two)
        for line in (line for axes in figure.axes for line in axes.get_lines()):
            assert contrast_to_white(line.get_color()) > 3, (name, line)


@pytest.mark.slow
def test_equal_results_give_equal_bytes(results, drawn, tmp_path):
    with matplotlib.rc_context({"font.size": 30, "savefig.transparent": True}):
        list(plot.draw(results, tmp_path))
    for name in DRAWN:
        assert (drawn[0] / f"{name}.svg").read_bytes() == (tmp_path / f"{name}.svg").read_bytes(), name


def test_without_results_there_are_no_figures(tmp_path):
    (tmp_path / "results/machine").mkdir(parents=True)
    of_accuracy(tmp_path / "results/accuracy-vllm.json", bits=False)
    write(tmp_path / "results/machine/gemm.json", [])
    write(tmp_path / "results/machine/serve-cut-short.json", [{"arm": "bf16", "bench": "accuracy"}])
    lines = list(plot.draw(tmp_path / "results", tmp_path / "figures"))
    assert all(line.startswith(f"no {tmp_path / 'figures'}") for line in lines) and len(lines) == 8
    for reason in ("no bits per weight, measure them again", "it has nothing yet", "no rows of a server under load"):
        assert sum(reason in line for line in lines) == 1
    assert not (tmp_path / "figures").exists()
    assert tables.every(tmp_path / "results" / "machine").keys() == {
        "minutes of all files",
        "layers of all platforms",
        "proofs of all kernels",
    }


# N, K, bytes of a number, TOPS at most, GB/s. 1000 x 1000 of a byte: 1e6 + 4000 bytes, and 1000 + 2000 + 4 a token.
SQUARE = (1000, 1000, 1, 2.0, 50.0)


def test_roofline():
    assert plot.moved(1, *SQUARE[:3]) == 1e6 + 4000 + 3004
    assert plot.moved(3, 1000, 1000, 2) == 2e6 + 4000 + 3 * (2000 + 2000 + 4)
    # One token: 2e6 operations while 1007004 bytes take 20.14 us.
    assert plot.roofline(1, *SQUARE) == pytest.approx(2e6 / 20.14008e-6 / 1e12)
    assert plot.roofline(1000, *SQUARE) == 2.0
    # m tokens: 2e6 m operations at 2e12 a second take as long as (1004000 + 3004 m) bytes at 50e9.
    edge = plot.ridge(*SQUARE)
    assert edge == pytest.approx(1004000 / 50e9 / (2e6 / 2e12 - 3004 / 50e9))
    assert plot.roofline(0.99 * edge, *SQUARE) < 2.0 == plot.roofline(1.01 * edge, *SQUARE)
    assert plot.ridge(1000, 1000, 1, 2.0, 3.0) == math.inf


def test_roofline_counts_bytes_as_the_benchmark_does():
    for path in RESULTS.glob("*/gemm.json"):
        for row in tables.rows(path):
            weight, activation = gemm.BYTES.get(row["impl"], (1, 1))
            counted = plot.moved(row["M"], row["N"], row["K"], activation) + row["N"] * row["K"] * (weight - activation)
            assert abs(counted / row["us"] / 1e3 - row["GB/s"]) < 0.06 + 1e-4 * row["GB/s"]


def lines_of(axes, *names: str) -> list[list[float]]:
    found = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    return [found[name] for name in names]


def test_kernels_show_a_model_under_what_was_measured_with_it(results, drawn):
    gpu, cpu = drawn[1]["gpu/kernels"], drawn[1]["cpu/kernels"]
    assert [axes.get_title("left")[:3] for axes in gpu.axes] == ["qkv", "o (", "gat", "dow"]
    assert "LLaMA3-70B tp1" in gpu.get_suptitle() and "H200" in gpu.get_suptitle()
    legend = [text.get_text() for text in gpu.legends[0].get_texts()]
    assert {"INT8 roofline, 1400 TOPS (twice bf16's)", "CUTLASS's INT8", "rooflines' memory: 4000 GB/s"} <= {*legend}
    axes = cpu.axes[0]
    legend = [text.get_text() for text in cpu.legends[0].get_texts()]
    assert {"INT8 roofline, 2 TOPS", "bf16 roofline, 1 TOPS", "rooflines' memory: 30 to 40 GB/s"} <= {*legend}
    rows = [row for row in tables.rows(results / "cpu/gemm.json") if row["layer"].endswith("qkv")]
    (ours,) = lines_of(axes, "ours, per-channel")
    assert ours == [row["TOPS"] for row in rows if row["impl"] == "ours-channel"]
    # Reading took turns at 30 and 40 GB/s: at one token the roofline is at the median, and its shade between the two.
    assert axes.get_lines()[0].get_ydata()[0] == pytest.approx(plot.roofline(1, 6144, 4096, 1, 2.0, 40.0))
    shade = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert shade.min() == pytest.approx(plot.roofline(1, 6144, 4096, 1, 2.0, 30.0))


def test_kernels_of_a_run_that_was_cut_short(tmp_path):
    rows = tables.rows(of_gemm(tmp_path / "gemm.json"))
    ceilings = {"GB/s": 40.0, "bf16 TFLOP/s": 1.0, "int8 TOPS": 2.0}
    for count, panels in ((1, 1), (30, 1), (60, 2)):
        write(tmp_path / "gemm.json", rows[:count], measured="product", ceilings=ceilings)
        with keeping() as found:
            plot.kernels(tmp_path / "gemm.json", tmp_path / "out.svg")
        (figure,) = found.values()
        assert len(figure.axes) == panels
        assert all("1" in [text.get_text() for text in axes.get_xticklabels()] for axes in figure.axes)


def test_serve_draws_rates_in_order_and_ranges(results, drawn):
    figure = drawn[1]["cpu/serve-1b"]
    rows = tables.Served(results / "cpu/serve-1b.json").of("ours, mixed", "serve")
    assert [row["rate"] for row in rows] == [0.2, 0.4, pytest.approx(0.6), 0.8, pytest.approx(1.2), None]
    for axes, time in zip(figure.axes, ("tpot_ms", "ttft_ms"), strict=True):
        (line,) = (line for line in axes.get_lines() if line.get_label() == "ours, mixed")
        assert list(line.get_xdata()) == [row[time] for row in rows]
        assert list(line.get_ydata()) == [row["output_tokens_per_second"] for row in rows]
        ends = [segment[:, 0].tolist() for bars in axes.collections for segment in bars.get_segments()]
        assert all(row[f"{time}_range"] in ends for row in rows)
        assert {"0.2/s", "1.2/s", "no limit"} <= {text.get_text() for text in axes.texts}
    assert "random:1b" in figure.get_suptitle() and "3 turns" in figure.get_suptitle()
    assert "one turn" in drawn[1]["cpu/serve-testbed"].get_suptitle()


@pytest.mark.parametrize(("turns", "peer"), [(3, True), (1, False)])
def test_conversions_show_turns_and_the_peer(tmp_path, turns, peer):
    with keeping() as found:
        plot.conversions(of_convert(tmp_path / "convert.json", turns, peer), tmp_path / "convert.svg")
    seconds = found[tmp_path / "convert.svg"].axes[0]
    names = [text.get_text() for text in seconds.get_yticklabels()]
    assert names == [
        *("bismooth RTN", "bismooth data-free"),
        *(("llm-compressor RTN", "llm-compressor RTN, model-free") if peer else ()),
        "bismooth calibrated",
        *(("llm-compressor SmoothQuant",) if peer else ()),
        "bismooth calibrated, 8 blocks",
    ]
    ends = [bar.get_segments()[0][:, 0].tolist() for bar in seconds.collections]
    assert ends[0] == pytest.approx([18, 18 * (1 + 0.1 * (turns - 1))])
    assert (seconds.get_legend() is not None) == peer


def test_tables_of_engines(tmp_path):
    path = of_serve(tmp_path / "serve-1b.json", arms=("bf16", "ours, per-channel"))
    lines = tables.engines(path).splitlines()
    assert lines[2] == "| bf16 | 300 (282 to 318) | 1.00 | 1.400 (1.316 to 1.484) | 1.00 | 2.20 |  |  |"
    cells = "540 (508 to 572) | 1.80 | 0.778 (0.731 to 0.824) | 1.80 | 1.22 | 1.0e-03 ± 1e-05 | 98.0%"
    assert lines[3:] == [f"| ours, per-channel | {cells} |"]
    lines = tables.rates(path).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["0.20", "0.40", "0.60", "0.80", "1.20", "no limit"] * 2
    row = tables.Served(path).of("bf16", "serve")[0]
    times = f"{row['ttft_ms']:.0f} ({row['p99_ttft_ms']:.0f}) | {row['tpot_ms']:.0f} ({row['p99_tpot_ms']:.0f})"
    assert lines[2] == f"| bf16 | 0.20 | 0.20 | 26 | {times} |"
    # Turns need not be several, nor must every arm have been measured in every way.
    path = of_serve(path, turns=1, arms=("stock INT8",))
    assert tables.engines(path).splitlines()[2] == "| stock INT8 | 435 |  | 0.966 |  | 1.52 | 1.0e-03 ± 1e-05 | 98.0% |"
    write(path, [row for row in tables.rows(path) if row["bench"] == "serve"])
    assert tables.engines(path).splitlines()[2] == "| stock INT8 |  |  |  |  |  |  |  |"


def test_tables_are_of_every_machine_and_model(results):
    found = tables.every(results)
    assert {"kernels of cpu/gemm.json", "kernels of gpu/gemm.json", "rates of cpu/serve-testbed.json"} <= found.keys()
    assert len(found) == 21
    for table in found.values():
        assert len({line.count(" | ") for line in table.splitlines() if "|--" not in line}) == 1
    assert "CUTLASS" in found["kernels of gpu/gemm.json"] and "CUTLASS" not in found["kernels of cpu/gemm.json"]
    assert "| seconds of inspect | 2 | missing |" in found["conversion_targets of cpu/convert.json"]


def test_minutes_of_what_says_them(tmp_path):
    (tmp_path / "cpu").mkdir()
    command = "python -m benchmarks.convert --repeats 1 --json benchmarks/results/cpu/convert.json"
    write(tmp_path / "cpu/convert.json", [], command=command, seconds=321)
    write(tmp_path / "demo.json", [])
    lines = tables.minutes(tmp_path).splitlines()
    assert lines[2:] == ["| `convert --repeats 1` | `cpu/convert.json` | 5.3 |"]


def test_table_of_kernels_without_vllm(tmp_path):
    rows = [row for row in tables.rows(of_gemm(tmp_path / "gemm.json")) if row["impl"] != "vllm"]
    for row in rows:
        row.pop("x stock")
    table = tables.kernels(write(tmp_path / "gemm.json", rows))
    assert table.splitlines()[0] == "| tokens | per-channel, TOPS | GB/s |"


def test_sizes_of_checkpoints(tmp_path):
    """16 bits in the source; a byte and a share of a scale after conversion, in groups of 32 another bit."""
    source = accuracy.size(PYTHON.model, PYTHON.model)
    assert source == {"bytes": (PYTHON.model / "model.safetensors").stat().st_size, "bits": 16.0}
    weights = [header.shape for header in accuracy.linears(PYTHON.model).values()]
    assert sum(n * k for n, k in weights) == 5_898_240 and len(weights) == 6 * 7
    found = {}
    for name, options in {
        "rtn": {"method": "rtn"},
        "groups": {"method": "mixed", "group_size": 32, "group_layers": "."},
    }.items():
        convert(PYTHON.model, tmp_path / name, Recipe.of(**options), None)
        found[name] = accuracy.size(tmp_path / name, PYTHON.model)
    assert found["rtn"]["bits"] == 8 + 32 * sum(n for n, _ in weights) / 5_898_240
    assert found["groups"]["bits"] == 9.0
    assert found["rtn"]["bytes"] < found["groups"]["bytes"] < source["bytes"]


NAMES = re.compile(r'(?:id|clip-path|xlink:href)="[^"]*"')
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def test_committed_figures_are_of_the_committed_results(tmp_path):
    """Run ``python -m benchmarks.plot`` if this fails. To a hundredth of a point: not all machines round alike."""
    list(plot.draw(figures=tmp_path))
    committed = {path.relative_to(plot.FIGURES): path.read_text() for path in plot.FIGURES.rglob("*.svg")}
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*.svg")} == committed.keys()
    version = f"Matplotlib v{matplotlib.__version__},"
    if not all(version in text for text in committed.values()):
        pytest.skip(f"another matplotlib drew them, and {matplotlib.__version__} may set type differently")
    for path, text in committed.items():
        text, again = (NAMES.sub("", each) for each in (text, (tmp_path / path).read_text()))
        assert NUMBER.sub("0", text) == NUMBER.sub("0", again), path
        pairs = zip(NUMBER.findall(text), NUMBER.findall(again), strict=True)
        assert all(abs(float(one) - float(other)) < 0.01 for one, other in pairs), path

"""Accuracy of every arm on the test beds, healthy and planted; and how much calibration matters.

    python -m benchmarks.accuracy [--quick] [--through emulation|vllm|transformers] [--peer PYTHON] [--json FILE]
    python -m benchmarks.accuracy --calibration-study [--quick] [--json FILE]

An arm is one way to convert: a checkpoint on disk, made from a checkpoint on disk and scored on held-out tokens that
neither training nor calibration saw, each window led by BOS in all arms. A planted model has outlier columns put in,
which leave what it computes as it was (:mod:`benchmarks.testbed.plant`). KL is to the same source in the same engine
(bf16 in vLLM, fp32 elsewhere). ``bytes`` are those of the folder's safetensors, ``bits`` those that a weight of the
blocks' linears takes, scales included (16 in the source). Healthy models are calibrated on five draws of the
calibration text, planted ones planted with five seeds. Through transformers, which takes longer, there are fewer plants
and one draw; through vLLM one draw of the healthy ones (benchmarks.demo has planted ones there). ``--quick`` takes the
first draw and the first plant of one bed. ``--peer`` is the Python of an environment with llm-compressor.
"""

import argparse
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import decompressed, emulate, peer, record, score
from benchmarks.compare import distance
from benchmarks.testbed import BEDS, Bed
from benchmarks.testbed.plant import plant
from benchmarks.testbed.split import split
from benchmarks.testbed.train import VOCAB
from vllm_w8a8_bismooth.checkpoint.files import Folder
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.checkpoint.reader import Header, Headers
from vllm_w8a8_bismooth.conversion.pipeline import convert, prepare
from vllm_w8a8_bismooth.measure.text import CalibrationText, read_text, tokenize
from vllm_w8a8_bismooth.recipe import Recipe

WORK = Path("build/accuracy")
WINDOWS = 32
SEEDS = 5
CEILING = {"python": 128, "headers": 128, "docstrings": 64}
"""Group size of the arm that has groups everywhere: 128 where it divides every K, else the largest that does."""


@dataclass(frozen=True)
class Setting:
    """One source and one draw of calibration text.

    Attributes:
        bed: key of :data:`BEDS`.
        kind, k: of the plant; ``healthy`` and ``None`` without one.
        seed: of the plant; on a healthy model, of the draw.
    """

    bed: str
    kind: str = "healthy"
    k: float | None = None
    seed: int = 0

    @property
    def draw(self) -> int:
        """The seed of the draw of calibration text."""
        return self.seed if self.kind == "healthy" else 0


class Case:
    """A setting on disk: the source, its calibration text, and folders for arms."""

    def __init__(self, setting: Setting, work: Path, peer_python: str | None):
        self.setting, self.work, self.peer_python = setting, work, peer_python
        self.bed: Bed = BEDS[setting.bed]
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        self.source = self.bed.model
        if setting.kind != "healthy":
            self.source = work / "source"
            plant(self.bed.model, self.source, kind=setting.kind, k=setting.k, seed=setting.seed)
        self.text = drawn(self.bed.calibration.read_text(), setting.draw)

    @cached_property
    def tokens(self) -> torch.Tensor:
        """What our converter calibrates on, for those who take tokens: int64 ``[windows, length]``."""
        return tokenize(self.text, Source(self.source).checkpoint, 16384)

    def convert(self, name: str, recipe: Recipe, calibrated: bool, source: Path | None = None) -> tuple[Path, Any]:
        """The folder of an arm, and the converter's report."""
        text = self.text if calibrated else None
        return self.work / name, convert(prepare(source or self.source, self.work / name, recipe, text))


def drawn(whole: str, seed: int) -> CalibrationText:
    """A draw of calibration windows from a text: for each seed it begins elsewhere, and goes round."""
    start = seed * len(whole) // SEEDS + 1000 * seed
    return read_text([whole[start:] + whole[:start]])


Make = Callable[[Case], Path]


def ours(method: str, calibrated: bool = False, **options) -> Make:
    recipe = Recipe.of(method, **options)
    name = "-".join([method, *map(str, options.values()), *["calibrated"] * calibrated])
    return lambda case: case.convert(name, recipe, calibrated)[0]


def smoothquant(strength: float, case: Case) -> Path:
    """llm-compressor's SmoothQuant at its norm sites, on the same tokens."""
    folder = case.work / f"smoothquant-{strength}"
    peer.convert(case.peer_python, case.source, folder, case.tokens.numpy(), strength)
    return folder


def everywhere(case: Case) -> Path:
    """Per-group scales in all linears: the ceiling of the per-group route."""
    recipe = Recipe.of("mixed", group_size=CEILING[case.setting.bed], group_layers=".")
    return case.convert("group-everywhere", recipe, False)[0]


def left_in_bf16(case: Case) -> Path:
    """What ``auto`` would give per-group scales, left in bf16 instead: needs no kernel."""
    _, report = case.convert("auto-to-ask", Recipe.of("auto", group_size=32), True)
    chosen = [name for entry in report.granularity if entry.chosen for name in entry.linears]
    ignore = "|".join(f"^{re.escape(name)}$" for name in chosen) or None
    return case.convert("left-in-bf16", Recipe.of("bismooth", ignore=ignore), True)[0]


def split_columns(case: Case) -> Path:
    """The 32 largest inputs of every down_proj split into two copies (QLLM), then smoothed: needs no kernel."""
    split(case.source, case.work / "split-source", case.tokens)
    return case.convert("split", Recipe.of("bismooth"), True, case.work / "split-source")[0]


ARMS: dict[str, Make] = {
    "rtn": ours("rtn"),
    "smoothquant-0.5": partial(smoothquant, 0.5),
    "smoothquant-0.8": partial(smoothquant, 0.8),
    "mixed-g32": ours("mixed", group_size=32),
    **{f"alpha-{a}": ours("bismooth", True, smoothing="alpha", alpha=a) for a in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)},
    "balanced": ours("bismooth", True),
    "data-free": ours("bismooth"),
    "auto-g32": ours("auto", True, group_size=32),
    "auto-bf16": left_in_bf16,
    "split-32": split_columns,
    "group-everywhere": everywhere,
}
DRAWN = ("alpha-0.5", "alpha-0.6", "alpha-0.7", "balanced", "auto-g32")
PLANTED = ("rtn", "mixed-g32", "balanced", "data-free", "auto-g32")
SERVED = ("rtn", "smoothquant-0.5", "alpha-0.5", "balanced", "data-free", "auto-g32", "group-everywhere")
DECOMPRESSED = ("rtn", "smoothquant-0.5", "alpha-0.5", "balanced", "data-free")


def emulation(model: Path, windows: np.ndarray, log: Path) -> np.ndarray:
    """Stands in for :func:`score.log_probabilities`."""
    return emulate.log_probabilities(emulate.load(model), windows)


ENGINES: dict[str, Callable[[Path, np.ndarray, Path], np.ndarray]] = {
    "vllm": score.log_probabilities,
    "emulation": emulation,
    "transformers": decompressed.log_probabilities,
}


def size(folder: Path, source: Path) -> dict[str, float]:
    """Bytes of a checkpoint's safetensors, and bits for each weight that the linears of the source's blocks have."""
    weights = sum(prod(header.shape) for name, header in linears(source).items() if name.endswith(".weight"))
    return {
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "bits": 8 * sum(header.nbytes for header in linears(folder).values()) / weights,
    }


def linears(folder: Path) -> dict[str, Header]:
    """Weights and scales of the linears inside the blocks."""
    return {
        name: header
        for name, header in Headers(Folder(folder)).headers.items()
        if name.startswith("model.layers.") and name.endswith((".weight", ".weight_scale")) and len(header.shape) == 2
    }


def plan(through: str, quick: bool) -> Iterator[tuple[Setting, tuple[str, ...]]]:
    """What is measured: settings and their arms."""
    beds = list(BEDS)[: 1 if quick else None]
    kinds = [(kind, k) for kind in ("norm", "residual") for k in (100.0, 1000.0)]
    if quick:
        yield Setting(beds[0]), PLANTED
        yield Setting(beds[0], "norm", 1000.0), PLANTED
    elif through == "emulation":
        for bed in beds:
            yield Setting(bed), tuple(ARMS)
            yield from ((Setting(bed, seed=seed), DRAWN) for seed in range(1, SEEDS))
            yield from ((Setting(bed, *kind, seed), PLANTED) for kind in kinds for seed in range(SEEDS))
    elif through == "vllm":
        yield from ((Setting(bed), SERVED) for bed in beds)
    else:
        yield from ((Setting(bed), DECOMPRESSED) for bed in beds)
        planted = [arm for arm in PLANTED if arm in DECOMPRESSED]
        yield from ((Setting("python", kind, 1000.0), tuple(planted)) for kind in ("norm", "residual"))


def measure(
    setting: Setting, arms: tuple[str, ...], through: str, work: Path, windows: int, peer_python: str | None = None
) -> list[dict]:
    """One row an arm, the source itself first.

    Args:
        setting: what is measured.
        arms: keys of :data:`ARMS`; llm-compressor's are left out without ``peer_python``.
        through: a key of :data:`ENGINES`.
        work: scratch folder, emptied first and removed afterwards.
        windows: how many held-out windows of 256 tokens.
        peer_python: interpreter of an environment with llm-compressor.
    """
    case, run, rows = Case(setting, work, peer_python), ENGINES[through], []
    heldout = case.bed.heldout_windows(windows)
    reference = run(case.source, heldout, work / "source.log")
    where = {"bed": setting.bed, "plant": setting.kind, "k": setting.k, "seed": setting.seed}

    def add(arm: str, folder: Path, scores: np.ndarray) -> None:
        found = distance(reference, scores, heldout).as_dict()
        rows.append({**where, "arm": arm, **found, **size(folder, case.source)})

    add("source", case.source, reference)
    for arm in arms:
        if peer_python or not arm.startswith("smoothquant"):
            folder = ARMS[arm](case)
            add(arm, folder, run(folder, heldout, work / f"{arm}.log"))
    shutil.rmtree(work)
    return rows


SIZES = tuple(2**n for n in range(10, 19))
DRAWS = 3


def texts(bed: str) -> dict[str, str]:
    """Calibration sets of a bed: its own text, another bed's, and random tokens."""
    from transformers import AutoTokenizer

    other = {"python": "docstrings", "headers": "python", "docstrings": "headers"}[bed]
    tokenizer = AutoTokenizer.from_pretrained(BEDS[bed].model)
    # Of the model's own vocabulary: transformers may add special tokens to a tokenizer.
    random = np.random.default_rng(0).integers(2, VOCAB, size=2**17)
    return {
        "own text": BEDS[bed].calibration.read_text(),
        f"text of {other}": BEDS[other].calibration.read_text(),
        "random tokens": tokenizer.decode(random),
    }


def study(bed: str, arm: str, name: str, size: int, work: Path, windows: int) -> list[dict]:
    """KL of one arm by what and how much it is calibrated on: :data:`DRAWS` rows; none where the text is too short."""
    text = texts(bed)[name]
    model, heldout = BEDS[bed].model, BEDS[bed].heldout_windows(windows)
    if tokenize(read_text([text]), Source(model).checkpoint, size).numel() < 0.97 * size:
        return []
    options = {"smoothing": "alpha", "alpha": 0.5} if arm == "alpha-0.5" else {}
    recipe = Recipe.of("bismooth", calibration_tokens=size, **options)
    reference, rows = emulate.log_probabilities(emulate.load(model), heldout), []
    for draw in range(DRAWS):
        shutil.rmtree(work, ignore_errors=True)
        convert(prepare(model, work, recipe, drawn(text, draw)))
        found = distance(reference, emulate.log_probabilities(emulate.load(work), heldout), heldout)
        rows.append({"bed": bed, "arm": arm, "set": name, "tokens": size, "seed": draw, **found.as_dict()})
    shutil.rmtree(work)
    return rows


def _single_threaded() -> None:
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--calibration-study", action="store_true")
    parser.add_argument("--through", choices=list(ENGINES), default="emulation")
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter with llm-compressor")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    os.environ.setdefault("VLLM_CACHE_ROOT", str((WORK / "vllm-cache").resolve()))
    work = (WORK / str(number) for number in range(10**6))
    if arguments.calibration_study:
        beds = ["headers"] if arguments.quick else list(BEDS)
        sizes = SIZES[:3] if arguments.quick else SIZES
        tasks = [
            partial(study, bed, arm, name, size, next(work), WINDOWS)
            for bed in beds
            for arm in ("alpha-0.5", "balanced")
            for name in texts(bed)
            for size in (sizes if name == "own text" else (sizes[0], sizes[-1] if arguments.quick else 16384))
        ]
    else:
        tasks = [
            partial(measure, setting, arms, arguments.through, next(work), WINDOWS, arguments.peer)
            for setting, arms in plan(arguments.through, arguments.quick)
        ]
    # An engine takes all cores; everything else is many small steps, which gain more from running side by side.
    jobs = 1 if arguments.through == "vllm" else torch.get_num_threads()
    rows = []
    with ProcessPoolExecutor(jobs, get_context("spawn"), _single_threaded) as pool:
        submitted = [pool.submit(task) for task in tasks]
        for done in submitted:
            if error := done.exception():
                pool.shutdown(wait=False, cancel_futures=True)
                raise error
            for row in done.result():
                rows.append(row)
                where = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in list(row.values())[:5])
                console.print(
                    f"{where:<48} KL {row['kl']:.3e} ± {row['kl_error']:.0e}  worst {row['kl_worst']:.1e}  "
                    f"top-1 {row['top1']:.3f}  ppl {row['ppl']:.3f}"
                )
    if arguments.json:
        record.write(arguments.json, rows, through=arguments.through, tokens=WINDOWS * 255)


if __name__ == "__main__":
    main()

"""What INT8 costs real models: KL to the source on tokens that no calibration saw, arm by arm.

    python -m benchmarks.real.accuracy MODEL [--arms ARM,...] [--plants] [--windows N] [--json FILE]

Every arm is converted by the package and computed with its own ops in fp32, exactly as the kernels do in INT8; KL is to
the source in fp32, whose weights were rounded to about 4 bits once (:mod:`benchmarks.real`). With ``--plants`` outlier
columns are planted first (k = 100 and 1000, :mod:`benchmarks.testbed.plant`). Arms are calibrated on text of the kind
that the model is judged on, or, where that is said, on the bundled text. In arms with *head* that of the language model
is INT8, too.
"""

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import vllm_w8a8_bismooth as package
from benchmarks import emulate, record
from benchmarks.real import MODELS, texts
from benchmarks.real.weights import folder_of
from benchmarks.testbed.plant import plant
from vllm_w8a8_bismooth.scoring.divergence import Divergence, Window, compare, summarize

WORK = Path("build/real/accuracy")
OWN = {"calibration": texts.own()}
ARMS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "RTN": {"method": "rtn"},
    "data-free": {"calibration": "none"},
    "alpha 0.5, nearest": {**OWN, "smoothing": "alpha", "rounding": "nearest"},
    "alpha 0.5": {**OWN, "smoothing": "alpha"},
    "balanced, nearest": {**OWN, "rounding": "nearest"},
    "balanced": {**OWN},
    "balanced, bundled": {},
    "RTN, head": {"method": "rtn", "head": "int8"},
    "balanced, bundled, head": {"head": "int8"},
    "auto, nearest": {**OWN, "method": "auto", "rounding": "nearest"},
    "auto": {**OWN, "method": "auto"},
    "auto, budget 15 %": {**OWN, "method": "auto", "group_budget": 0.15},
    "auto, target 0.003": {**OWN, "method": "auto", "target_kl": 0.003},
    "auto, target 0.0025": {**OWN, "method": "auto", "target_kl": 0.0025},
    "auto, bundled": {"method": "auto"},
}
"""Name -> options of :func:`vllm_w8a8_bismooth.convert`; ``None`` is the source computed in bf16."""


@dataclass(frozen=True)
class Measured:
    """How an arm did.

    Attributes:
        divergence: from the source.
        grouped: share of its linears that have groups.
        work: their share of the multiplications, and
        estimated: KL that the conversion expected, where it chose them by that.
        seconds: that the conversion took.
    """

    divergence: Divergence
    grouped: float = 0.0
    work: float | None = None
    estimated: float | None = None
    seconds: float = 0.0


class Source:
    """A model on disk, and what it predicts."""

    def __init__(self, folder: Path, windows: int):
        from transformers import AutoTokenizer

        self.folder = folder
        self.windows = texts.heldout_windows(AutoTokenizer.from_pretrained(folder), windows)
        self.work = WORK / "scores"
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        with torch.no_grad():
            self._kept = [self._keep(i, scores) for i, scores in enumerate(self._predict(emulate.load(folder)))]

    def _keep(self, number: int, scores: np.ndarray) -> Path:
        path = self.work / f"{number}.npy"
        np.save(path, scores)
        return path

    def _predict(self, model: torch.nn.Module) -> Iterator[np.ndarray]:
        for row in torch.from_numpy(self.windows):
            yield model(input_ids=row[None, :-1]).logits[0].float().numpy()

    def measure(self, name: str) -> Measured:
        """Convert by the arm's options, and compare."""
        options, converted, about = ARMS[name], self.work / "converted", {}
        if options is None:
            served = emulate.load(self.folder).to(torch.bfloat16)
        else:
            shutil.rmtree(converted, ignore_errors=True)
            started = time.monotonic()
            outcome = package.convert(self.folder, converted, **options)
            grouped = sum(e["group_size"] is not None for e in outcome.linears.values()) / len(outcome.linears)
            about = {"grouped": grouped, "seconds": time.monotonic() - started}
            if outcome.estimated_kl is not None:
                work = sum(entry.work for entry in outcome.granularity if entry.chosen)
                about |= {"work": work, "estimated": outcome.estimated_kl}
            served = emulate.load(converted)
        with torch.no_grad():
            pairs = zip(self._kept, self._predict(served), self.windows, strict=True)
            found: list[Window] = [compare(np.load(kept, mmap_mode="r"), scores, row) for kept, scores, row in pairs]
        return Measured(summarize(found), **about)


def sources(model: str, planted: bool, windows: int) -> Iterator[tuple[float | None, Source]]:
    """k of the plant, ``None`` without one, and the source."""
    healthy = folder_of(MODELS[model])
    yield None, Source(healthy, windows)
    for k in (100.0, 1000.0) if planted else ():
        folder = WORK / f"{model}-planted-{k:.0f}"
        shutil.rmtree(folder, ignore_errors=True)
        plant(healthy, folder, k=k)
        yield k, Source(folder, windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--arms", default=",".join(name.replace(", ", "/") for name in ARMS))
    parser.add_argument("--plants", action="store_true")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    arms = [name.replace("/", ", ") for name in asked.arms.split(",")]
    if unknown := [name for name in arms if name not in ARMS]:
        parser.error(f"{unknown[0]} is none of {'; '.join(ARMS)}; write / for a comma and its space")
    console, rows = Console(), []
    for k, source in sources(asked.model, asked.plants, asked.windows):
        for name in arms:
            measured = source.measure(name)
            d = measured.divergence
            rows.append({"model": asked.model, "k": k, "arm": name, **asdict(measured)})
            console.print(
                f"k {k or 0:<5.0f} {name:<20} KL {d.kl:.5f} median {d.kl_median:.5f} 99.9 % {d.kl_p999:.3f} "
                f"worst {d.kl_worst:.3f} top-1 {d.top1:.2%} grouped {measured.grouped:.1%}, "
                f"{measured.work or 0:.1%} of the work, estimated {measured.estimated or 0:.5f}, "
                f"{measured.seconds:.0f} s",
                highlight=False,
                soft_wrap=True,
            )
    if asked.json:
        weights = MODELS[asked.model].weights
        record.write(asked.json, rows, tokens=asked.windows * 255, weights=f"were {weights} once", computed="fp32")


if __name__ == "__main__":
    main()

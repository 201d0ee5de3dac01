"""Accuracy of the arms on the healthy test bed and on a range of plants.

    python -m benchmarks.accuracy [--quick] [--through vllm|emulation|transformers] [--json FILE]

Every arm is converted from a checkpoint on disk and scored on held-out tokens that calibration never saw; KL is to the
same source in the same engine (bf16 in vLLM, fp32 elsewhere). ``--quick`` takes the first plant only.
"""

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks import decompressed, emulate, record, score
from benchmarks.compare import distance
from benchmarks.testbed import PYTHON
from benchmarks.testbed.plant import plant
from vllm_w8a8_bismooth.calibrate import read_text
from vllm_w8a8_bismooth.convert import convert
from vllm_w8a8_bismooth.recipe import Recipe

WORK = Path("build/accuracy")
WINDOWS = 24

# Arm -> recipe, and whether it is calibrated.
ARMS = {
    "rtn": (Recipe.of("rtn"), False),
    "mixed-g32": (Recipe.of("mixed", group_size=32), False),
    "bismooth": (Recipe.of("bismooth"), True),
    "bismooth-data-free": (Recipe.of("bismooth"), False),
}
PLANTS = (
    {"kind": "norm", "k": 1000.0, "blocks": (0, 1, 3), "seed": 0},
    {"kind": "norm", "k": 1000.0, "blocks": (0, 1, 3), "seed": 1},
    {"kind": "norm", "k": 1000.0, "blocks": (2, 4, 5), "seed": 2},
    {"kind": "norm", "k": 100.0, "blocks": (0, 1, 3), "seed": 3},
    {"kind": "norm", "k": 2000.0, "blocks": (1, 2, 5), "seed": 4},
    {"kind": "residual", "k": 100.0, "seed": 0},
    {"kind": "residual", "k": 1000.0, "seed": 1},
)
HEALTHY = {"kind": "healthy"}


def emulation(model: Path, windows: np.ndarray, log: Path) -> np.ndarray:
    """Stands in for :func:`score.log_probabilities`."""
    return emulate.log_probabilities(emulate.load(model), windows)


ENGINES: dict[str, Callable[[Path, np.ndarray, Path], np.ndarray]] = {
    "vllm": score.log_probabilities,
    "emulation": emulation,
    "transformers": decompressed.log_probabilities,
}


def measure(planted: dict, through: str, work: Path, windows: np.ndarray, report: Callable[[dict], None]) -> list[dict]:
    """One row an arm for one plant (or the healthy model), the source itself first.

    Args:
        planted: arguments of :func:`plant`, or :data:`HEALTHY`.
        through: a key of :data:`ENGINES`.
        work: scratch folder, emptied first.
        windows: ``[n, length]`` held-out tokens.
        report: called with each row as it comes.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    source = PYTHON.model
    if planted != HEALTHY:
        source = work / "source"
        plant(PYTHON.model, source, **planted)
    run, rows = ENGINES[through], []
    reference = run(source, windows, work / "source.log")
    where = {
        "plant": planted["kind"],
        "k": planted.get("k"),
        "blocks": planted.get("blocks"),
        "seed": planted.get("seed"),
    }

    def add(arm: str, scores: np.ndarray) -> None:
        rows.append({"arm": arm, **where, **distance(reference, scores, windows).as_dict()})
        report(rows[-1])

    add("source", reference)
    for arm, (recipe, calibrated) in ARMS.items():
        convert(source, work / arm, recipe, read_text(PYTHON.calibration) if calibrated else None)
        add(arm, run(work / arm, windows, work / f"{arm}.log"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--through", choices=list(ENGINES), default="vllm")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    os.environ.setdefault("VLLM_CACHE_ROOT", str((WORK / "vllm-cache").resolve()))

    def show(row: dict) -> None:
        where = " ".join(f"{key}={row[key]}" for key in ("plant", "k", "blocks", "seed") if row[key] is not None)
        console.print(
            f"{where:<48} {row['arm']:<20} KL {row['kl']:.3e} ± {row['kl_error']:.0e}  top-1 {row['top1']:.3f}  "
            f"ppl {row['ppl']:.3f}",
            highlight=False,
            soft_wrap=True,
        )

    rows = []
    for number, planted in enumerate((HEALTHY, *PLANTS[: 1 if arguments.quick else None])):
        rows += measure(planted, arguments.through, WORK / str(number), PYTHON.heldout_windows(WINDOWS), show)
    if arguments.json:
        record.write(arguments.json, rows, through=arguments.through, tokens=WINDOWS * 255)


if __name__ == "__main__":
    main()

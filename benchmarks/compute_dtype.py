"""Does it matter in which dtype calibration computes? KL divergence of both, over draws of calibration text.

    python -m benchmarks.compute_dtype [--draws N] [--tokens N] [--windows N] [--json FILE]

Each draw of each test bed's text makes a checkpoint in float32 and one in bfloat16. What the choice of the dtype does
is the mean over draws of the difference between the two, beside the spread that the draws alone cause: the standard
deviation over draws in float32. Predictions are those of :mod:`emulate`, of held-out text, against the source's.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import emulate, record
from benchmarks.accuracy import SEEDS, Case, Setting
from benchmarks.compare import distance
from benchmarks.testbed import BEDS
from vllm_w8a8_bismooth.recipe import BF16, FP32, Recipe

console = Console()


def measure(bed: str, draws: int, tokens: int, windows: int, work: Path) -> dict:
    """KL in nats a token of each dtype and draw, and what they say."""
    text = BEDS[bed].heldout_windows(windows)
    reference = emulate.log_probabilities(emulate.load(BEDS[bed].model), text)
    found: dict[str, list[float]] = {FP32: [], BF16: []}
    for draw in range(draws):
        case = Case(Setting(bed, seed=draw), work / f"{bed}-{draw}", None)
        for dtype, values in found.items():
            recipe = Recipe.of("bismooth", calibration_tokens=tokens, compute_dtype=dtype)
            folder, _ = case.convert(dtype, recipe, calibrated=True)
            other = emulate.log_probabilities(emulate.load(folder), text)
            values.append(distance(reference, other, text).kl)
            console.print(f"{bed}, draw {draw}, {dtype}: {values[-1]:.6f}", highlight=False)
    differences = [narrow - wide for wide, narrow in zip(found[FP32], found[BF16], strict=True)]
    return {
        "bed": bed,
        "kl": found,
        "difference": statistics.mean(differences),
        "largest_difference": max(differences, key=abs),
        "spread": statistics.stdev(found[FP32]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--draws", type=int, default=SEEDS, choices=range(2, SEEDS + 1))
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration text (4096)")
    parser.add_argument("--windows", type=int, default=16, help="of held-out text, of 256 tokens (16)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = [measure(bed, arguments.draws, arguments.tokens, arguments.windows, Path(work)) for bed in BEDS]
    table = Table("bed", "KL, float32", "KL, bfloat16", "difference", "largest", "spread over draws")
    for row in rows:
        means = [f"{statistics.mean(row['kl'][dtype]):.6f}" for dtype in (FP32, BF16)]
        table.add_row(
            row["bed"], *means, *(f"{row[key]:.2e}" for key in ("difference", "largest_difference", "spread"))
        )
    console.print(table)
    if arguments.json:
        settings = {key: getattr(arguments, key) for key in ("draws", "tokens", "windows")}
        record.write(arguments.json, rows, settings=settings)


if __name__ == "__main__":
    main()

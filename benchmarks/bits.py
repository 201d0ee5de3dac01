"""Accuracy against bits a weight, on the test beds: rows of four bits, of eight, and what chooses among them.

    python -m benchmarks.bits [--quick] [--seeds N] [--json FILE]

Every arm is a conversion, scored on held-out tokens in fp32 with exact INT8 products (benchmarks.emulate); KL is to the
source. ``int8`` is the default conversion. ``4-bit`` arms have no row of eight bits: ``nearest`` rounds each weight for
itself, ``a16`` are the same codes with activations in full precision. ``budget`` arms spend bits on rows by what four
cost the predictions, one budget over the model, ``even`` ones give each linear the same share of its rows. Healthy
models are calibrated on some draws of the calibration text; planted ones have outlier columns 1000 times as large put
in, which leave what they compute as it was. Groups have 128 columns, or what their names say, where that divides K.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console

from benchmarks import emulate, record
from benchmarks.accuracy import WINDOWS, Case, Setting
from benchmarks.compare import distance
from benchmarks.testbed import BEDS
from vllm_w8a8_bismooth import grouping
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.measure import narrowing
from vllm_w8a8_bismooth.recipe import Recipe

WORK = Path("build/bits")
SEEDS = 3
INT8, NEAREST, FOUR, FLOAT, EVEN = "int8", "4-bit, nearest", "4-bit", "4-bit, a16", "even"
ARMS: dict[str, tuple[float | None, int | None, str]] = {
    "int8": (None, None, INT8),
    "4-bit, nearest": (0, 128, NEAREST),
    "4-bit": (0, 128, FOUR),
    "4-bit, a16": (0, 128, FLOAT),
    "4-bit, groups of 64": (0, 64, FOUR),
    "4-bit, groups of 64, a16": (0, 64, FLOAT),
    "budget, 4.5": (4.5, 128, FOUR),
    "even, 4.5": (4.5, 128, EVEN),
    "budget, 5": (5.0, 128, FOUR),
    "budget, 6": (6.0, 128, FOUR),
}
"""Name -> bits a weight (0: no more than four in each row), largest group, and what is special about it."""
PLANTED = ("int8", "budget, 4.5")


def least(source: Source, group_size: int) -> float:
    """Bits a weight where every row has four."""
    shapes = [shape for layer in source.layers for shape in layer.linears.values()]
    return sum(n * grouping.row_bits(k, group_size)[0] for n, k in shapes) / sum(n * k for n, k in shapes)


def evenly(
    costs: Sequence[Mapping[str, torch.Tensor]], columns: Sequence[Mapping[str, int]], bits: float, group_size: int
) -> list[dict[str, torch.Tensor]]:
    """:func:`narrowing.allot` in each linear by itself, with the share of its rows that all together can have."""
    sizes = [(len(rows), columns[i][name]) for i, block in enumerate(costs) for name, rows in block.items()]
    four, eight = (sum(n * grouping.row_bits(k, group_size)[which] for n, k in sizes) for which in (0, 1))
    share = (bits * sum(n * k for n, k in sizes) - four) / (eight - four)
    return [
        {name: rows.topk(int(share * len(rows))).indices.sort().values.int() for name, rows in block.items()}
        for block in costs
    ]


def fitting(source: Source, group_size: int) -> int:
    """The largest size of groups, up to this one, that divides every K."""
    columns = {k for layer in source.layers for _, k in layer.linears.values()}
    return next(s for s in (128, 64, 32) if s <= group_size and all(grouping.fits(k, s) for k in columns))


def measure(setting: Setting, arms: Sequence[str], work: Path) -> list[dict]:
    """One row an arm, and what its linears take, in bits a weight."""
    case, rows = Case(setting, work, None), []
    heldout, source = case.bed.heldout_windows(WINDOWS), Source(case.source)
    reference = emulate.log_probabilities(emulate.load(case.source), heldout)
    for arm in arms:
        bits, largest, kind = ARMS[arm]
        options = {}
        if largest is not None:
            size = fitting(source, largest)
            options = {"group_size": size, "bits": bits or least(source, size)}
        recipe = Recipe.of("bismooth", rounding="nearest" if kind == NEAREST else None, **options)
        allot = evenly if kind == EVEN else narrowing.allot
        with mock.patch.object(narrowing, "allot", allot):
            folder, report = case.convert(arm.replace(" ", "-"), recipe, True)
        model = emulate.load(folder)
        if kind == FLOAT:
            for module in model.modules():
                if isinstance(module, emulate.W8A8Linear):
                    module.forward = partial(in_float, module)  # type: ignore[method-assign]
        found = distance(reference, emulate.log_probabilities(model, heldout), heldout).as_dict()
        shapes = {n: h.shape for n, h in source.checkpoint.headers.items()}
        of_linears = {n: shapes[f"{n}.weight"] for n in report.linears}
        weights = sum(n * k for n, k in of_linears.values())
        taken = sum(report.linears[name].get("bits", 8 + 32 / k) * n * k for name, (n, k) in of_linears.items())
        place = {"bed": setting.bed, "plant": setting.kind, "k": setting.k, "seed": setting.seed}
        rows.append({**place, "arm": arm, "bits": taken / weights, **found})
        shutil.rmtree(folder)
    shutil.rmtree(work)
    return rows


def in_float(module: emulate.W8A8Linear, x: torch.Tensor) -> torch.Tensor:
    """A linear whose activations are not quantized."""
    return torch.nn.functional.linear(x, module.weight.float() * module.weight_scale, module.bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="draws of calibration text of healthy models")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    tasks = [(Setting(bed, seed=seed), tuple(ARMS)) for seed in range(arguments.seeds) for bed in BEDS]
    tasks += [(Setting(bed, kind, 1000.0), PLANTED) for bed in BEDS for kind in ("norm", "residual")]
    rows = []
    with ProcessPoolExecutor(torch.get_num_threads(), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        submitted = [
            pool.submit(measure, setting, arms, WORK / str(number))
            for number, (setting, arms) in enumerate(tasks[: 1 if arguments.quick else None])
        ]
        for done in submitted:
            for row in done.result():
                rows.append(row)
                where = f"{row['bed']:<10} {row['plant']:<8} {row['seed']}  {row['arm']:<26}"
                console.print(f"{where} {row['bits']:.3f} bits  KL {row['kl']:.3e} ± {row['kl_error']:.0e}")
    if arguments.json:
        record.write(arguments.json, rows, tokens=WINDOWS * 255)


if __name__ == "__main__":
    main()

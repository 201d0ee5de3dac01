"""What it costs to round the numbers of an FP8 source to BF16 before they become INT8, on real weights.

    python -m benchmarks.real.fp8 [--json FILE]

The linears of each model's blocks are put into DeepSeek's FP8 (a scale in fp32 for each 128 x 128), and then into INT8
by plain rounding: once from the fp32 products of codes and scales, and once from these rounded to BF16.
"""

import argparse
import math
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.real import MODELS
from benchmarks.real.weights import folder_of
from vllm_w8a8_bismooth.checkpoint.layout import Source
from vllm_w8a8_bismooth.method.quantize import dequantize_weight, quantize_weight

BLOCK, LARGEST = 128, 448.0


def in_fp8(weight: torch.Tensor) -> torch.Tensor:
    """The fp32 numbers that FP8 makes of a ``[N, K]``."""
    found = torch.empty_like(weight)
    for row in range(0, weight.shape[0], BLOCK):
        for column in range(0, weight.shape[1], BLOCK):
            place = slice(row, row + BLOCK), slice(column, column + BLOCK)
            scale = weight[place].abs().max().clamp(min=1e-30) / LARGEST
            found[place] = (weight[place] / scale).to(torch.float8_e4m3fn).float() * scale
    return found


def decibels(expected: torch.Tensor, found: torch.Tensor) -> float:
    return 10 * math.log10(float(expected.double().square().sum() / (expected.double() - found).square().sum()))


def measure(weight: torch.Tensor) -> dict[str, float]:
    """SQNR in dB of one weight: of FP8, and of INT8 on top, against the original and against what FP8 stands for."""
    exact = in_fp8(weight)
    rounded = exact.bfloat16().float()
    of_exact, of_rounded = (dequantize_weight(*quantize_weight(each)) for each in (exact, rounded))
    return {
        "fp8": decibels(weight, exact),
        "bf16_to_fp8": decibels(exact, rounded),
        "int8_of_exact_to_fp8": decibels(exact, of_exact),
        "int8_of_bf16_to_fp8": decibels(exact, of_rounded),
        "int8_of_exact": decibels(weight, of_exact),
        "int8_of_bf16": decibels(weight, of_rounded),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rows = []
    for name, model in MODELS.items():
        checkpoint = Source(folder_of(model)).checkpoint
        linears = [tensor for tensor in checkpoint.headers if tensor.endswith("_proj.weight")]
        found = [measure(checkpoint.read(tensor).float()) for tensor in linears]
        rows.append(
            {"model": name, "linears": len(linears)} | {k: statistics.mean(f[k] for f in found) for k in found[0]}
        )
    table = Table(*rows[0], title="SQNR in dB, mean over linears")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if arguments.json:
        record.write(arguments.json, rows)


if __name__ == "__main__":
    main()

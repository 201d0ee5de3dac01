"""Quantization of activations: our fused ops against vLLM's kernels for the same, one or two of them, and plain torch.

    python -m benchmarks.quant --device cpu|cuda [--dry] [--json FILE]

LLaMA3-70B's widths at TP 1. GB/s counts what a fused kernel has to read and write. ``--dry`` goes through the same
motions with few tokens; its figures mean nothing.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

from benchmarks import ceilings, record
from benchmarks.gemm import load_vllm
from vllm_w8a8_bismooth import ops
from vllm_w8a8_bismooth.ops import reference, timing

HIDDEN, MIDDLE = 8192, 28672
TOKENS = {"cpu": [1, 16, 64, 256, 1024], "cuda": [1, 16, 64, 256, 1024, 4096, 8192]}
SECONDS = {"cpu": 0.5, "cuda": 0.05}
EPSILON = 1e-5

Measured = tuple[int, int, dict[str, timing.Call]]
"""Bytes that a fused kernel moves, copies of the inputs, and calls with the index of a copy."""


def inputs(m: int, width: int, device: str) -> list[torch.Tensor]:
    """Enough inputs to keep L2 from holding them at large m. At small m they come from the kernel before."""
    copies = min(4, timing.copies_against_caches(device, 2 * m * width))
    return [torch.randn(m, width, device=device, dtype=torch.bfloat16) for _ in range(copies)]


def plain(m: int, device: str) -> Measured:
    x = inputs(m, HIDDEN, device)
    codes, scale = torch.empty(m, HIDDEN, dtype=torch.int8, device=device), torch.empty(m, 1, device=device)
    return (
        3 * m * HIDDEN,
        len(x),
        {
            "ours-token": lambda i: ops.quantize_activations(x[i], None),
            "ours-group128": lambda i: ops.quantize_activations(x[i], 128),
            "vllm": lambda i: torch.ops._C.dynamic_scaled_int8_quant(codes, x[i], scale, None),
            "torch": lambda i: reference.quantize_activations(x[i], None),
        },
    )


def add_norm(m: int, device: str) -> Measured:
    x, residual = inputs(m, HIDDEN, device), inputs(m, HIDDEN, device)
    gain = torch.ones(HIDDEN, device=device, dtype=torch.bfloat16)
    codes, scale = torch.empty(m, HIDDEN, dtype=torch.int8, device=device), torch.empty(m, 1, device=device)

    def vllm_two(i: int) -> None:
        torch.ops._C.fused_add_rms_norm(x[i], residual[i], gain, EPSILON)
        torch.ops._C.dynamic_scaled_int8_quant(codes, x[i], scale, None)

    def vllm_fused(i: int) -> None:
        torch.ops._C.rms_norm_dynamic_per_token_quant(codes, x[i], gain, scale, EPSILON, None, residual[i])

    return (
        7 * m * HIDDEN,
        len(x),
        {
            "ours-token": lambda i: ops.rms_norm_quantize(x[i], residual[i], gain, EPSILON, None),
            "ours-group128": lambda i: ops.rms_norm_quantize(x[i], residual[i], gain, EPSILON, 128),
            "vllm": vllm_two,
            "vllm-fused": vllm_fused,
            "torch": lambda i: reference.rms_norm_quantize(x[i], residual[i], gain, EPSILON, None),
        },
    )


def silu_mul(m: int, device: str) -> Measured:
    x = inputs(m, 2 * MIDDLE, device)
    between = torch.empty(m, MIDDLE, dtype=torch.bfloat16, device=device)
    codes, scale = torch.empty(m, MIDDLE, dtype=torch.int8, device=device), torch.empty(m, 1, device=device)

    def vllm_two(i: int) -> None:
        torch.ops._C.silu_and_mul(between, x[i])
        torch.ops._C.dynamic_scaled_int8_quant(codes, between, scale, None)

    return (
        5 * m * MIDDLE,
        len(x),
        {
            "ours-token": lambda i: ops.silu_mul_quantize(x[i], None),
            "ours-group128": lambda i: ops.silu_mul_quantize(x[i], 128),
            "vllm": vllm_two,
            "torch": lambda i: reference.silu_mul_quantize(x[i], None),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=TOKENS, required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    device = asked.device
    tokens, seconds = ([1, 5], 0.0) if asked.dry else (TOKENS[device], SECONDS[device])
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: there is no CUDA device")
    missing, rows = {}, []
    try:
        load_vllm(device)
    except (ImportError, RuntimeError, OSError) as error:
        missing["vllm"] = missing["vllm-fused"] = str(error)
        print(f"! vllm left out: {error}", file=sys.stderr)
    rates = {"GB/s": round(ceilings.bandwidth(device, seconds and 0.5), 1)}
    print(f"ceiling measured: {rates['GB/s']} GB/s")
    for what in (plain, add_norm, silu_mul):
        for m in tokens:
            size, copies, calls = what(m, device)
            runs = {}
            for name in [name for name in calls if name not in missing]:
                try:
                    runs[name] = timing.prepare(calls[name], copies, device)
                except (RuntimeError, AttributeError, TypeError) as error:
                    missing[name] = str(error).splitlines()[0]
                    print(f"! {name} left out: {missing[name]}", file=sys.stderr)
            line = f"{what.__name__:10}{m:6}"
            for name, times in timing.times(runs, seconds).items():
                us = statistics.median(times)
                row = {"op": what.__name__, "impl": name, "M": m, "us": round(us, 2), "GB/s": round(size / us / 1e3)}
                rows.append(row)
                line += f"   {name} {us:8.2f} us {row['GB/s']:6} GB/s"
            print(line, flush=True)
        if asked.json:  # after every op: a run that is cut short leaves what it has
            record.write(asked.json, rows, dry=asked.dry, ceilings=rates, left_out=missing)


if __name__ == "__main__":
    main()

"""Quantization of activations on a GPU: our fused ops against vLLM's kernels for the same, one or two of them.

    python -m benchmarks.quant [--json FILE]

LLaMA3-70B's widths at TP 1. GB/s counts what a fused kernel has to read and write.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

from benchmarks import record, timing
from benchmarks.gemm import load_vllm_cuda
from vllm_w8a8_bismooth import ops

HIDDEN, MIDDLE = 8192, 28672
TOKENS = [1, 16, 64, 256, 1024, 4096, 8192]
EPSILON = 1e-5


def inputs(m: int, width: int) -> list[torch.Tensor]:
    """As many as keep L2 from holding them at large m; at small m they come from the kernel before, and it does."""
    copies = min(4, timing.copies_against_caches("cuda", 2 * m * width))
    return [torch.randn(m, width, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]


def plain(m: int) -> tuple[int, int, dict[str, timing.Call]]:
    x = inputs(m, HIDDEN)
    codes, scale = torch.empty(m, HIDDEN, dtype=torch.int8, device="cuda"), torch.empty(m, 1, device="cuda")
    return (
        3 * m * HIDDEN,
        len(x),
        {
            "ours-token": lambda i: ops.quantize_activations(x[i], HIDDEN),
            "ours-group128": lambda i: ops.quantize_activations(x[i], 128),
            "vllm": lambda i: torch.ops._C.dynamic_scaled_int8_quant(codes, x[i], scale, None),
        },
    )


def add_norm(m: int) -> tuple[int, int, dict[str, timing.Call]]:
    x, residual = inputs(m, HIDDEN), inputs(m, HIDDEN)
    gain = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
    codes, scale = torch.empty(m, HIDDEN, dtype=torch.int8, device="cuda"), torch.empty(m, 1, device="cuda")

    def vllm_two(i: int) -> None:
        torch.ops._C.fused_add_rms_norm(x[i], residual[i], gain, EPSILON)
        torch.ops._C.dynamic_scaled_int8_quant(codes, x[i], scale, None)

    def vllm_fused(i: int) -> None:
        torch.ops._C.rms_norm_dynamic_per_token_quant(codes, x[i], gain, scale, EPSILON, None, residual[i])

    return (
        7 * m * HIDDEN,
        len(x),
        {
            "ours-token": lambda i: ops.rms_norm_quantize(x[i], residual[i], gain, EPSILON, HIDDEN),
            "ours-group128": lambda i: ops.rms_norm_quantize(x[i], residual[i], gain, EPSILON, 128),
            "vllm": vllm_two,
            "vllm-fused": vllm_fused,
        },
    )


def silu_mul(m: int) -> tuple[int, int, dict[str, timing.Call]]:
    x = inputs(m, 2 * MIDDLE)
    between = torch.empty(m, MIDDLE, dtype=torch.bfloat16, device="cuda")
    codes, scale = torch.empty(m, MIDDLE, dtype=torch.int8, device="cuda"), torch.empty(m, 1, device="cuda")

    def vllm_two(i: int) -> None:
        torch.ops._C.silu_and_mul(between, x[i])
        torch.ops._C.dynamic_scaled_int8_quant(codes, between, scale, None)

    return (
        5 * m * MIDDLE,
        len(x),
        {
            "ours-token": lambda i: ops.silu_mul_quantize(x[i], MIDDLE),
            "ours-group128": lambda i: ops.silu_mul_quantize(x[i], 128),
            "vllm": vllm_two,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device")
    missing, rows = {}, []
    try:
        load_vllm_cuda()
    except (RuntimeError, OSError) as error:
        missing["vllm"] = str(error)
        print(f"! vllm left out: {error}", file=sys.stderr)
    ceilings = {"GB/s": round(timing.bandwidth("cuda"), 1)}
    print(f"copy {ceilings['GB/s']} GB/s")
    for what in (plain, add_norm, silu_mul):
        for m in TOKENS:
            size, copies, calls = what(m)
            runs = {}
            for name, call in calls.items():
                if "vllm" in missing and name.startswith("vllm"):
                    continue
                try:
                    runs[name] = timing.prepare(call, copies, "cuda")
                except (RuntimeError, AttributeError, TypeError) as error:
                    missing[name] = str(error).splitlines()[0]
            line = f"{what.__name__:10}{m:6}"
            for name, times in timing.times(runs, 0.05).items():
                us = statistics.median(times)
                rows.append(
                    {"op": what.__name__, "impl": name, "M": m, "us": round(us, 2), "GB/s": round(size / us / 1e3)}
                )
                line += f"   {name} {us:8.2f} us {size / us / 1e3:6.0f} GB/s"
            print(line, flush=True)
    if asked.json:
        record.write(asked.json, rows, ceilings=ceilings, left_out=missing)


if __name__ == "__main__":
    main()

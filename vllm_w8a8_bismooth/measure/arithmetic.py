"""In which dtype calibration computes: one that holds the model's activations, and that the machine multiplies fast."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

from vllm_w8a8_bismooth.recipe import BF16, FP32

_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
"""As /proc/cpuinfo calls the instructions that multiply bf16, on x86 and on Arm."""
_SIZES, _TURNS = (256, 512, 512), 5  # of the product that is timed: a millisecond, out of a core's cache


def bf16_pays() -> bool:
    """Whether torch multiplies bf16 at least as fast as fp32 on this CPU, measured once in a process."""
    return faster() >= 1


def has_instructions() -> bool:
    """Whether the CPU has instructions for bf16, where :func:`bf16_pays` will most likely be true; without torch."""
    return bool(_INSTRUCTIONS & cpu_flags())


def arithmetic(stored: str, device: str = "cpu", fast: Callable[[], bool] = bf16_pays) -> str:
    """:data:`FP32` or :data:`BF16`, never fp16: activations of some models pass 65504.

    Weights in fp32 are multiplied in fp32. Others are in bf16, where the device is faster at that: without instructions
    for it torch's products of bf16 are several times slower than those of fp32. CPUs have no fast products of fp16, so
    that there fp16 becomes fp32, which holds all of its digits.

    Args:
        stored: safetensors' name of the dtype that the embedding is stored in.
        device: ``cpu`` or ``cuda``.
        fast: whether a CPU is as fast in bf16 as in fp32, :func:`bf16_pays` or :func:`has_instructions`.
    """
    if stored == "F32":
        return FP32
    if device == "cuda":
        return BF16 if _cuda_multiplies_bf16() else FP32
    return BF16 if stored == "BF16" and fast() else FP32


@functools.cache
def faster() -> float:
    """How many times the speed of fp32 torch's products of bf16 have on one core of this CPU.

    Both take turns, and the least time of each counts: others may use the machine meanwhile. It is 2 and more with
    instructions for bf16 and 0.5 and less without, so that noise decides nothing.
    """
    import torch

    rows, columns, width = _SIZES
    pairs = [[torch.ones(n, width, dtype=dtype) for n in (rows, columns)] for dtype in (torch.float32, torch.bfloat16)]
    least, threads = [float("inf")] * len(pairs), torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for the slowest of them
    try:
        for turn in range(1 + _TURNS):
            for number, pair in enumerate(pairs):
                started = time.perf_counter()
                torch.nn.functional.linear(*pair)
                if turn:  # the first one makes the code
                    least[number] = min(least[number], time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return least[0] / least[1]


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the first CPU can do, as Linux calls it; empty where that is not known."""
    try:
        lines = path.read_text(errors="replace").splitlines()  # names of processors may hold anything
    except OSError:
        return set()
    flags = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return set(next(flags, []))


def _cuda_multiplies_bf16() -> bool:
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)

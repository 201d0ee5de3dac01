"""In which dtype calibration computes: one that holds the model's activations, and that the machine multiplies fast."""

from pathlib import Path

FP32, BF16 = "float32", "bfloat16"
"""torch's names."""

_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
"""As /proc/cpuinfo calls the instructions that multiply bf16, on x86 and on Arm."""


def arithmetic(stored: str, device: str = "cpu") -> str:
    """:data:`FP32` or :data:`BF16`, never fp16: activations of some models pass 65504.

    Weights in fp32 are multiplied in fp32. Others are in bf16, where the device has instructions for that; without them
    torch's products of bf16 are several times slower than those of fp32. CPUs have no fast products of fp16, so that
    there fp16 becomes fp32, which holds all of its digits.

    Args:
        stored: safetensors' name of the dtype that the embedding is stored in.
        device: ``cpu`` or ``cuda``.
    """
    if stored == "F32":
        return FP32
    if device == "cuda":
        return BF16 if _cuda_multiplies_bf16() else FP32
    return BF16 if stored == "BF16" and _INSTRUCTIONS & cpu_flags() else FP32


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

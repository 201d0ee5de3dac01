"""What a machine is, and what it can do at best: the ceilings that the other benchmarks are held against.

    python -m benchmarks.ceilings --device cpu|cuda [--dry] [--json FILE]

``--dry`` measures for a moment only; its figures mean nothing.
"""

import argparse
import ctypes
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import record
from vllm_w8a8_bismooth.ops import timing

GPU = [
    "name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "power.draw", "temperature.gpu",
]  # fmt: skip
COMMANDS = {
    "CUDA compiler": ["nvcc", "--version"],
    "C++ compiler": ["g++", "--version"],
    "CPU": ["lscpu"],
    "memory": ["free", "-g"],
    "GPU": ["nvidia-smi"],
}
TOOLS = ("compute-sanitizer", "ncu", "cuobjdump")


def measure(device: str, seconds: float = 0.5) -> dict[str, float | None]:
    """Rates by unit, each the best of about ``seconds``.

    Returns:
        ``GB/s`` read by a sum on a CPU, read plus written by a copy on a GPU; ``bf16 TFLOP/s`` of torch's product of
        random square matrices; ``int8 TOPS`` of the byte dot products from registers on a CPU (see :func:`dot_rate`),
        of torch's product (cuBLASLt) of random square matrices on a GPU.
    """
    return {
        "GB/s": round(bandwidth(device, seconds), 1),
        "bf16 TFLOP/s": round(bf16_rate(device, seconds), 2),
        "int8 TOPS": dot_rate() if device == "cpu" else round(int8_rate(seconds), 2),
    }


def bandwidth(device: str, seconds: float) -> float:
    if device == "cuda":
        source = torch.empty(1 << 31, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        return 2 * source.numel() / timing.median(lambda i: target.copy_(source), device, seconds) / 1e3
    buffer = torch.ones(1 << 26, dtype=torch.int64)
    us = min(timing.median(read, device, seconds) for read in (lambda i: buffer.amax(), lambda i: buffer.sum()))
    return 8 * buffer.numel() / us / 1e3


def bf16_rate(device: str, seconds: float) -> float:
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    return 2 * size**3 / timing.median(lambda i: a @ b, device, seconds) / 1e6


def int8_rate(seconds: float, device: str = "cuda", size: int = 8192) -> float:
    a, b = torch.randint(-127, 128, (2, size, size), dtype=torch.int8, device=device)
    return 2 * size**3 / timing.median(lambda i: torch._int_mm(a, b.t()), device, seconds) / 1e6


def dot_rate() -> float | None:
    """TOPS of the CPU's byte dot products from registers, on torch's number of threads; none without AVX-512 VNNI."""
    library = Path("build/peak.so")
    library.parent.mkdir(exist_ok=True)
    command = ["g++", "-O2", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("peak.cpp"), "-lpthread"]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    peak = ctypes.CDLL(str(library.resolve())).int8_tops
    peak.restype = ctypes.c_double
    return round(max(peak(torch.get_num_threads()) for _ in range(5)), 2) or None


def answer(command: list[str]) -> list[str]:
    """Lines that a command prints; one that says so where there is no such command."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"no answer: {error}"]
    return done.stdout.splitlines()


def gpu() -> dict[str, str]:
    """Clocks, power and temperature at this moment; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    lines = answer(["nvidia-smi", f"--query-gpu={','.join(GPU)}", "--format=csv,noheader"])
    return dict(zip(GPU, lines[0].split(", "), strict=False))


def environment() -> dict:
    facts = {name: answer(command) for name, command in COMMANDS.items()}
    facts |= {"system": platform.platform(), "torch": torch.__version__, "CUDA of torch": torch.version.cuda}
    facts |= {tool: shutil.which(tool) is not None for tool in TOOLS}
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: there is no CUDA device")
    facts = environment()
    for name, value in facts.items():
        print(f"{name}:", *(value if isinstance(value, list) else [value]), sep="\n  ")
    idle = gpu()
    rates = measure(asked.device, 0.0 if asked.dry else 0.5)
    loaded = gpu()  # at once: clocks sink again when the work is done
    print(*(f"{rate} {unit}" for unit, rate in rates.items()), sep="\n")
    print("GPU before:", idle, "\nGPU after: ", loaded)
    if asked.json:
        rows = [{"rate": rate, "unit": unit} for unit, rate in rates.items()]
        record.write(asked.json, rows, dry=asked.dry, environment=facts, gpu={"before": idle, "after": loaded})


if __name__ == "__main__":
    main()

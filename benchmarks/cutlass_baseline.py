"""The CUTLASS baseline of benchmarks/gemm.py: builds cutlass_baseline.cu once for each tile, picks the fastest.

A build takes nvcc, the headers of the wheel `nvidia-cutlass` (or the folder CUTLASS_INCLUDE), 4 GB and half a minute a
tile; its result stays in build/cutlass, from where it is used again, also on another machine.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "benchmarks/cutlass_baseline.cu"
BUILT = ROOT / "build/cutlass"

# tokens x channels x K of a tile, cluster, schedules of main loop and epilogue
TILES = {
    "128x256": (128, 256, 128, 2, 1, "KernelTmaWarpSpecializedCooperative", "TmaWarpSpecializedCooperative"),
    "128x128": (128, 128, 128, 2, 1, "KernelTmaWarpSpecializedPingpong", "TmaWarpSpecialized"),
    "64x128": (64, 128, 256, 1, 1, "KernelTmaWarpSpecializedPingpong", "TmaWarpSpecialized"),
}
MACROS = ("TILE_M", "TILE_N", "TILE_K", "CLUSTER_M", "CLUSTER_N", "MAINLOOP_SCHEDULE", "EPILOGUE_SCHEDULE")


def headers() -> list[Path]:
    """Include folders of CUTLASS.

    Raises:
        RuntimeError: there are none.
    """
    if folder := os.environ.get("CUTLASS_INCLUDE"):
        return [Path(folder), Path(folder).parent / "tools/util/include"]
    try:
        files = importlib.metadata.distribution("nvidia-cutlass").files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.as_posix().endswith("source/include/cute/tensor.hpp"):
            include = Path(file.locate()).parents[1]
            return [include, include.parent / "tools/util/include"]
    raise RuntimeError("no headers of CUTLASS: pip install nvidia-cutlass, or set CUTLASS_INCLUDE")


def build(tiles=tuple(TILES)) -> None:
    """Compile what is not there yet, all at once where the machine has the cores.

    Raises:
        RuntimeError: no nvcc or headers, or it does not compile.
    """
    todo = [tile for tile in tiles if not library(tile).exists()]
    if not todo:
        return
    if not shutil.which("nvcc"):
        raise RuntimeError("no nvcc to build the CUTLASS baseline")
    BUILT.mkdir(parents=True, exist_ok=True)
    # Without NDEBUG, asserts make ptxas serialize wgmma.
    base = ["nvcc", "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-shared", "-Xcompiler=-fPIC"]
    base += ["-gencode=arch=compute_90a,code=sm_90a", "-w", *[f"-I{folder}" for folder in headers()], str(SOURCE)]
    at_once = max(1, (os.cpu_count() or 1) // 4)
    while todo:
        running = {}
        for tile in todo[:at_once]:
            defines = [f"-D{macro}={value}" for macro, value in zip(MACROS, TILES[tile], strict=True)]
            command = [*base, *defines, "-o", str(library(tile))]
            running[tile] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for tile, process in running.items():
            _, error = process.communicate()
            if process.returncode:
                raise RuntimeError(f"CUTLASS baseline {tile} does not compile: {error[-2000:]}")
        todo = todo[at_once:]


def library(tile: str) -> Path:
    """Named after what it is made of, so that one from another machine is known to fit, whatever its date."""
    digest = hashlib.sha256(SOURCE.read_bytes() + repr(TILES[tile]).encode()).hexdigest()[:12]
    return BUILT / f"{tile}-{digest}.so"


@functools.cache
def load() -> dict[str, ctypes.CDLL]:
    """The built tiles. Raises RuntimeError as :func:`build` does, or if the GPU is not of compute capability 9.0."""
    if torch.cuda.get_device_capability() != (9, 0):
        raise RuntimeError("the CUTLASS baseline is for compute capability 9.0")
    build()
    return {tile: ctypes.CDLL(str(library(tile))) for tile in TILES}


def prepare(a: torch.Tensor, b: list[torch.Tensor], a_scale: torch.Tensor, b_scale: torch.Tensor):
    """A call with the index of a weight, by the tile that is fastest here.

    Args:
        a: int8 ``[M, K]``.
        b: int8 ``[N, K]`` each.
        a_scale, b_scale: fp32, contiguous.

    Returns:
        a function from an index into ``b`` to bf16 ``[M, N]``.
    """
    (m, k), n = a.shape, b[0].shape[0]
    out = torch.empty(m, n, dtype=torch.bfloat16, device=a.device)
    sms = torch.cuda.get_device_properties().multi_processor_count

    def run(tile: str, i: int) -> torch.Tensor:
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b[i], a_scale, b_scale, out)]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = load()[tile].int8_gemm(*pointers, m, n, k, sms, stream)
        if status:
            raise RuntimeError(f"CUTLASS tile {tile}: status {status} at M={m} N={n} K={k}")
        return out

    def took(tile: str) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run(tile, 0)
        start.record()
        for i in range(5):
            run(tile, i % len(b))
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    best = min(load(), key=took)
    return lambda i: run(best, i)


if __name__ == "__main__":
    build()

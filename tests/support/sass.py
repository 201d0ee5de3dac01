"""Machine code of the compiled library; whoever imports this is skipped where there is none to read."""

import importlib.util
import pathlib
import shutil
import subprocess

import pytest

LIBRARY = pathlib.Path(__file__).parents[2] / "vllm_w8a8_bismooth/_C.so"


def _cuobjdump() -> str | None:
    """The toolkit's, or the one that triton carries."""
    triton = importlib.util.find_spec("triton")
    carried = pathlib.Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return str(carried) if carried and carried.exists() else shutil.which("cuobjdump")


CUOBJDUMP = _cuobjdump()
if not CUOBJDUMP:
    pytest.skip("no cuobjdump, neither triton's nor a toolkit's", allow_module_level=True)
if not LIBRARY.exists() or b"gemm_mma" not in LIBRARY.read_bytes():
    pytest.skip(
        "the package was built without CUDA kernels (nvcc or nvidia-cutlass is missing)", allow_module_level=True
    )


def dump(*arguments: str) -> str:
    return subprocess.run([CUOBJDUMP, *arguments, LIBRARY], capture_output=True, text=True, check=True).stdout

"""Who does each operation on each kind of device: compiled kernels, else Triton's, else the reference.

The compiled kernels of ``csrc/``, where they were built, register themselves for their own device (``CPU``, ``CUDA``).
Where torch is a build for a GPU, Triton's are registered for what is then missing there. torch's dispatcher prefers
either to the reference, and nothing above this module changes.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from vllm_w8a8_bismooth.ops import schema

COMPILED, TRITON, REFERENCE = "compiled", "triton", "reference"
_BUILDS: Mapping[str, str | None] = {"cuda": torch.version.cuda or torch.version.hip, "xpu": torch.version.xpu}
"""Type of a device that Triton compiles for -> the version of its platform, if torch is a build for it."""
_logger = logging.getLogger("vllm.w8a8_bismooth")


def _load_library() -> None:
    path = Path(__file__).parents[1] / "_C.so"
    if not path.exists():
        return
    try:
        torch.ops.load_library(path)
    except OSError as error:
        _logger.warning("the compiled kernels do not load, so they are not used: %s", error)


def _registered(device: str, operation: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"w8a8_bismooth::{operation}", device.upper())


def _register_triton(device: str, operations: list[str]) -> bool:
    """Have Triton's kernels do these operations on a kind of device; whether they can."""
    try:
        from vllm_w8a8_bismooth.ops import triton
    except Exception as error:  # triton is absent, or broken, in which case it can raise anything
        _logger.warning(
            "triton cannot be imported (%s), so %s on %s run on the torch reference, which is slow: install the triton "
            "that this torch requires, or this package with its compiled kernels",
            error,
            ", ".join(operations),
            device,
        )
        return False
    for operation in operations:
        schema.LIBRARY.impl(operation, triton.OPERATIONS[operation], device.upper())
    return True


def _servers() -> dict[tuple[str, str], str]:
    """Register all that there is: (type of a device, operation) -> who does it; the reference does the others."""
    _load_library()
    found = {
        (device, operation): COMPILED
        for device in ("cpu", *_BUILDS)
        for operation in schema.OPERATIONS
        if _registered(device, operation)
    }
    for device, version in _BUILDS.items():
        missing = [operation for operation in schema.OPERATIONS if (device, operation) not in found]
        if version and missing and _register_triton(device, missing):
            found |= dict.fromkeys(((device, operation) for operation in missing), TRITON)
    return found


_SERVERS = _servers()


def server(device_type: str, operation: str = "scaled_mm") -> str:
    """Who does an operation on this kind of device (``cpu``, ``cuda``, ``xpu``).

    Returns:
        :data:`COMPILED`, :data:`TRITON` or :data:`REFERENCE`. ROCm's devices are of torch's type ``cuda``.
    """
    return _SERVERS.get((device_type, operation), REFERENCE)

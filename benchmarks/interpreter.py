"""Our Triton kernels on a CPU, by Triton's interpreter: a rehearsal of what a GPU does, thousands of times slower."""

import os
from collections.abc import Callable, Mapping
from types import SimpleNamespace


def operations(device: str) -> Mapping[str, Callable]:
    """Our Triton kernels by the names of the operations, for tensors on a ``cuda`` device, or in a rehearsal on a CPU.

    Raises:
        ImportError, RuntimeError: they cannot run here.
    """
    if device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":  # which Triton reads when it is imported
            raise RuntimeError("Triton needs a GPU, or TRITON_INTERPRET=1 to rehearse")
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        driver.set_active(
            SimpleNamespace(
                get_current_target=lambda: GPUTarget("cuda", 90, 32),
                get_current_device=lambda: 0,
                utils=SimpleNamespace(get_device_properties=lambda index: {"multiprocessor_count": 4}),
            )
        )
    from vllm_w8a8_bismooth.ops import triton

    return triton.OPERATIONS

"""The INT8 operations in Triton, for devices that have no compiled kernels: the same numbers from portable sources.

Only a device's own build of torch imports this, see :mod:`ops.kernels`; a CPU never does.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vllm_w8a8_bismooth.ops.triton import experts, product, quantization


def _where_it_is(operation: Callable) -> Callable:
    """Makes the device of the first argument the current one meanwhile, because Triton launches there."""

    @functools.wraps(operation)
    def call(first: torch.Tensor, *rest: Any, **more: Any) -> Any:
        with torch.accelerator.device_index(first.device.index):
            return operation(first, *rest, **more)

    return call


OPERATIONS: Mapping[str, Callable] = {
    operation.__name__: _where_it_is(operation)
    for operation in (
        quantization.quantize_activations,
        quantization.rms_norm_quantize,
        quantization.silu_mul_quantize,
        product.scaled_mm,
        experts.experts,
    )
}
"""Name of an operation in :mod:`ops.schema` -> what does it."""

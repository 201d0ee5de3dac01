"""The INT8 operations: ``from vllm_w8a8_bismooth import ops; ops.linear(...)``."""

from vllm_w8a8_bismooth.ops.api import (
    cpu_level,
    experts,
    has_kernel,
    linear,
    linear_rows,
    quantize_activations,
    rms_norm_quantize,
    scaled_mm,
    scaled_mm_rows,
    silu_mul_quantize,
    static_linear,
    unsupported,
)
from vllm_w8a8_bismooth.ops.kernels import COMPILED, REFERENCE, TRITON, server
from vllm_w8a8_bismooth.ops.mixture import ACTIVATIONS
from vllm_w8a8_bismooth.ops.packing import PackedRows, pack_rows, pack_weight, unpack_rows, unpack_weight

__all__ = [
    "ACTIVATIONS",
    "COMPILED",
    "REFERENCE",
    "TRITON",
    "PackedRows",
    "cpu_level",
    "experts",
    "has_kernel",
    "linear",
    "linear_rows",
    "pack_rows",
    "pack_weight",
    "quantize_activations",
    "rms_norm_quantize",
    "scaled_mm",
    "scaled_mm_rows",
    "server",
    "silu_mul_quantize",
    "static_linear",
    "unpack_rows",
    "unpack_weight",
    "unsupported",
]

"""The ops of the namespace ``w8a8_bismooth``: schemas, fakes, references.

The schemas, the fakes (shapes for torch.compile) and a reference implementation for every device are registered here
at import; :mod:`kernels` adds what is faster.
"""

from collections.abc import Callable, Mapping

import torch

from vllm_w8a8_bismooth.grouping import groups
from vllm_w8a8_bismooth.ops import mixture, reference, whole

LIBRARY = torch.library.Library("w8a8_bismooth", "FRAGMENT")  # kept alive: the ops go when it goes
LIBRARY.define("quantize_activations(Tensor x, int? group_size) -> (Tensor, Tensor)")
LIBRARY.define(
    "rms_norm_quantize(Tensor x, Tensor(a!)? residual, Tensor weight, float epsilon, int? group_size) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define("silu_mul_quantize(Tensor x, int? group_size) -> (Tensor, Tensor)")
LIBRARY.define(
    "scaled_mm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, ScalarType out_dtype, Tensor? bias=None, "
    "bool constant_b=False) -> Tensor"
)
LIBRARY.define(
    "experts(Tensor x, Tensor shares, Tensor chosen, Tensor w13, Tensor w13_scale, Tensor w2, Tensor w2_scale, "
    "str activation, int? group_size=None) -> Tensor"
)
LIBRARY.define(
    "linear(Tensor x, Tensor b, Tensor b_scale, int? group_size, Tensor? bias=None, bool silu_mul=False) -> Tensor"
)
LIBRARY.define(
    "scaled_mm_rows(Tensor a, Tensor a_scale, Tensor eight, Tensor four, Tensor steps, Tensor b_scale, Tensor order, "
    "ScalarType out_dtype, Tensor? bias=None) -> Tensor"
)
LIBRARY.define(
    "linear_rows(Tensor x, Tensor eight, Tensor four, Tensor steps, Tensor b_scale, Tensor order, Tensor? bias=None, "
    "bool silu_mul=False) -> Tensor"
)
OPERATIONS: Mapping[str, Callable] = {
    "quantize_activations": reference.quantize_activations,
    "rms_norm_quantize": reference.rms_norm_quantize,
    "silu_mul_quantize": reference.silu_mul_quantize,
    "scaled_mm": reference.scaled_mm,
    "experts": mixture.experts,
}
"""Name of an operation -> its reference."""
COMPOSED: Mapping[str, Callable] = {
    "linear": whole.linear,
    "scaled_mm_rows": whole.scaled_mm_rows,
    "linear_rows": whole.linear_rows,
}
"""Name of an operation that compiled kernels may do in one -> how others do it, one after the other."""
for _name, _reference in {**OPERATIONS, **COMPOSED}.items():
    LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")


def _fake_quantized(x: torch.Tensor, channels: int, group_size: int | None) -> reference.Quantized:
    codes = x.new_empty((x.shape[0], channels), dtype=torch.int8)
    return codes, x.new_empty((x.shape[0], groups(channels, group_size)), dtype=torch.float32)


@torch.library.register_fake("w8a8_bismooth::quantize_activations", lib=LIBRARY)
def _(x: torch.Tensor, group_size: int | None) -> reference.Quantized:
    return _fake_quantized(x, x.shape[1], group_size)


@torch.library.register_fake("w8a8_bismooth::rms_norm_quantize", lib=LIBRARY)
def _(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float, group_size: int | None
) -> reference.Quantized:
    return _fake_quantized(x, x.shape[1], group_size)


@torch.library.register_fake("w8a8_bismooth::silu_mul_quantize", lib=LIBRARY)
def _(x: torch.Tensor, group_size: int | None) -> reference.Quantized:
    return _fake_quantized(x, x.shape[1] // 2, group_size)


@torch.library.register_fake("w8a8_bismooth::scaled_mm", lib=LIBRARY)
def _(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    constant_b: bool = False,
) -> torch.Tensor:
    return a.new_empty((a.shape[0], b_scale.shape[0]), dtype=out_dtype)


@torch.library.register_fake("w8a8_bismooth::linear", lib=LIBRARY)
def _(x: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, *rest: object) -> torch.Tensor:
    return x.new_empty((x.shape[0], b_scale.shape[0]))


@torch.library.register_fake("w8a8_bismooth::scaled_mm_rows", lib=LIBRARY)
def _(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    eight: torch.Tensor,
    four: torch.Tensor,
    steps: torch.Tensor,
    b_scale: torch.Tensor,
    order: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return a.new_empty((a.shape[0], order.shape[0]), dtype=out_dtype)


@torch.library.register_fake("w8a8_bismooth::linear_rows", lib=LIBRARY)
def _(
    x: torch.Tensor,
    eight: torch.Tensor,
    four: torch.Tensor,
    steps: torch.Tensor,
    b_scale: torch.Tensor,
    order: torch.Tensor,
    *rest: object,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], order.shape[0]))


@torch.library.register_fake("w8a8_bismooth::experts", lib=LIBRARY)
def _(x: torch.Tensor, *rest: object) -> torch.Tensor:
    return x.new_empty(x.shape)

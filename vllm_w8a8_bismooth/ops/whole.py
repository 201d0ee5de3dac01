"""A whole linear, and products of rows of four bits, composed of the other operations; kernels may do each in one."""

import torch

from vllm_w8a8_bismooth.ops.packing import PackedRows, unpack_rows


def linear(
    x: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    group_size: int | None,
    bias: torch.Tensor | None = None,
    silu_mul: bool = False,
) -> torch.Tensor:
    """``scaled_mm`` of what ``quantize_activations`` or, with ``silu_mul``, ``silu_mul_quantize`` makes of x.

    Bit for bit. With few tokens much of a call's time goes before the kernel, and codes and scales need no tensors.

    Args:
        x: ``[M, K]`` in fp32, bf16 or fp16; with ``silu_mul`` ``[M, 2 K]``, gate then up.
        b: int8 ``[N, K]``, or packed as in ``scaled_mm``.
        b_scale: fp32 ``[N, 1]`` or ``[N, G]``.
        group_size: channels that share an activation scale; ``None`` is per token.
        bias: ``[N]`` in any float dtype.
        silu_mul: see x.

    Returns:
        ``[M, N]`` in x's dtype.
    """
    quantize = torch.ops.w8a8_bismooth.silu_mul_quantize if silu_mul else torch.ops.w8a8_bismooth.quantize_activations
    codes, scale = quantize(x, group_size)
    return torch.ops.w8a8_bismooth.scaled_mm(codes, b, scale, b_scale, x.dtype, bias, True)


def linear_rows(
    x: torch.Tensor,
    eight: torch.Tensor,
    four: torch.Tensor,
    steps: torch.Tensor,
    b_scale: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None = None,
    silu_mul: bool = False,
) -> torch.Tensor:
    """:func:`linear`, one scale a token, of a weight with rows of four bits.

    Args:
        x, silu_mul: see :func:`linear`.
        eight, four, steps, order: see :class:`packing.PackedRows`.
        b_scale: fp32 ``[N, 1]`` in stored order.
        bias: ``[N]`` in any float dtype, in the weight's order.

    Returns:
        ``[M, N]`` in x's dtype, in the weight's order.
    """
    b, scale = unpack_rows(PackedRows(eight, four, steps, order)), _in_place(b_scale, order)
    return torch.ops.w8a8_bismooth.linear(x, b, scale, None, bias, silu_mul)


def scaled_mm_rows(
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
    """``scaled_mm`` of int8 a ``[M, K]``, one scale a token, and a weight with rows of four bits.

    Args:
        a, a_scale, out_dtype: see ``scaled_mm``.
        eight, four, steps, b_scale, order, bias: see :func:`linear_rows`.

    Returns:
        ``[M, N]`` in ``out_dtype``, in the weight's order.
    """
    b, scale = unpack_rows(PackedRows(eight, four, steps, order)), _in_place(b_scale, order)
    return torch.ops.w8a8_bismooth.scaled_mm(a, b, a_scale, scale, out_dtype, bias)


def _in_place(b_scale: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Scales in stored order, in the weight's."""
    return torch.empty_like(b_scale).index_copy_(0, order.long(), b_scale)

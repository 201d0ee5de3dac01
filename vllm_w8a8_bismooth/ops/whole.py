"""A whole linear, composed of the other operations; kernels may do it in one."""

import torch


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

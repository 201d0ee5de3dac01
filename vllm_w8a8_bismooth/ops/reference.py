"""The INT8 operations in plain torch: the definition of the numerics, the oracle of every kernel, the last fallback."""

import torch


def quantize_activations(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic symmetric INT8 quantization, per token or per token and group.

    Args:
        x: ``[M, K]`` in fp32, bf16 or fp16.
        group_size: channels that share a scale; K means per token.

    Returns:
        int8 ``[M, K]`` with ``q = round_half_even(x * (127 / amax))``, and fp32 ``[M, K / group_size]`` with
        ``scale = amax / 127``, all of it computed in fp32. A group that is all zero, or so small that ``127 / amax``
        overflows (amax < 3.74e-37), gives q 0. A group with a NaN or an infinity has a NaN or infinite scale, so that
        the product is NaN there; its codes are unspecified.
    """
    tokens, channels = x.shape
    groups = x.float().reshape(tokens, channels // group_size, group_size)
    amax = groups.abs().amax(dim=-1)
    # A tensor 127, because torch turns scalar / tensor, and on CUDA tensor / scalar, into products with reciprocals.
    top = amax.new_tensor(127)
    inverse = top / amax
    inverse = torch.where(inverse.isfinite(), inverse, 0)
    codes = (groups * inverse.unsqueeze(-1)).round_().nan_to_num_(0)
    return codes.to(torch.int8).reshape(tokens, channels), amax / top


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``cast(sum_g(a_scale_g * b_scale_g * float((A B^T)_g)) + bias)``: int32 inside a group, fp32 across, g ascending.

    Args:
        a: int8 ``[M, K]``.
        b: int8 ``[N, K]``.
        a_scale: fp32 ``[M, 1]`` or ``[M, G]``.
        b_scale: fp32 ``[N, 1]`` (per-channel) or ``[N, G]``; G divides K. ``a_scale`` has G columns only if ``b_scale``
            has.
        out_dtype: of the result.
        bias: ``[N]`` in any float dtype.

    Returns:
        ``[M, N]`` in ``out_dtype``.
    """
    groups = b_scale.shape[1]
    width = a.shape[1] // groups
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for g in range(groups):
        columns = slice(g * width, (g + 1) * width)
        product = _int_matmul(a[:, columns], b[:, columns]).float()
        out += product * a_scale[:, min(g, a_scale.shape[1] - 1), None] * b_scale[:, g]
    if bias is not None:
        out += bias.float()
    return out.to(out_dtype)


def _int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int32 ``[M, N]`` = ``a b^T``, exact, for int8 ``a [M, K]`` and ``b [N, K]``."""
    if a.device.type == "cpu" and a.shape[1] > 1:  # at K = 1 torch 2.13's _int_mm misreads a transposed operand
        return torch._int_mm(a.contiguous(), b.t())
    # Elsewhere _int_mm restricts shapes. float64 is exact: |sum| <= K * 127^2 < 2^53.
    return (a.double() @ b.double().t()).to(torch.int32)

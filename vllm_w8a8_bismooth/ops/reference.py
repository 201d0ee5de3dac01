"""The INT8 operations in plain torch: the definition of the numerics, the oracle of every kernel, the last fallback."""

import torch

from vllm_w8a8_bismooth import grouping

Quantized = tuple[torch.Tensor, torch.Tensor]
"""int8 codes ``[M, K]`` and their fp32 scales ``[M, G]``."""


def quantize_activations(x: torch.Tensor, group_size: int | None) -> Quantized:
    """Dynamic symmetric INT8 quantization, per token or per token and group.

    Args:
        x: ``[M, K]`` in fp32, bf16 or fp16.
        group_size: channels that share a scale; ``None`` is per token.

    Returns:
        int8 ``[M, K]`` with ``q = round_half_even(x * (127 / amax))``, and fp32 ``[M, K / group_size]`` (``[M, 1]`` per
        token) with ``scale = amax / 127``, all of it computed in fp32. A group that is all zero, or so small that
        ``127 / amax`` overflows (amax < 3.74e-37), gives q 0. A group with a NaN or an infinity has a NaN or infinite
        scale, so that the product is NaN there; its codes are unspecified.
    """
    tokens, channels = x.shape
    count = grouping.groups(channels, group_size)
    groups = x.float().reshape(tokens, count, channels // count)
    amax = groups.abs().amax(dim=-1)
    # A tensor 127, because torch turns scalar / tensor, and on CUDA tensor / scalar, into products with reciprocals.
    top = amax.new_tensor(127)
    inverse = top / amax
    inverse = torch.where(inverse.isfinite(), inverse, 0)
    codes = (groups * inverse.unsqueeze(-1)).round_().nan_to_num_(0)
    return codes.to(torch.int8).reshape(tokens, channels), amax / top


def rms_norm_quantize(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float, group_size: int | None
) -> Quantized:
    """RMSNorm of ``x`` or of ``x + residual``, then :func:`quantize_activations`.

    The roundings are those of vLLM's CUDA ``fused_add_rms_norm``: the sum is rounded to x's dtype before it is squared,
    ``z * (1 / rms) * weight`` once at its end. The squares are summed in fp32 over one fixed tree, which
    makes the result independent of threads, vector width and batch.

    Args:
        x: ``[M, K]`` in fp32, bf16 or fp16.
        residual: ``[M, K]`` in x's dtype; becomes ``x + residual``, in place.
        weight: ``[K]`` in x's dtype.
        epsilon: added to the mean square, in fp32.
        group_size: as in :func:`quantize_activations`.

    Returns:
        Codes and scales of :func:`quantize_activations`.
    """
    if residual is not None:
        x = residual.add_(x)
    wide = x.float()
    mean = _tree_sum(wide * wide) / wide.new_tensor(x.shape[1])
    rms = (mean + wide.new_tensor(epsilon)).double().sqrt().float()  # torch's vectorized fp32 root is not IEEE's
    one = wide.new_tensor(1)  # see quantize_activations
    normed = wide * (one / rms).unsqueeze(1) * weight.float()
    return quantize_activations(normed.to(x.dtype), group_size)


def silu_mul_quantize(x: torch.Tensor, group_size: int | None) -> Quantized:
    """``silu(gate) * up``, then :func:`quantize_activations`.

    The roundings are those of vLLM's CUDA ``silu_and_mul``: silu is rounded to x's dtype, and so is the product.

    Args:
        x: ``[M, 2 K]``, gate then up, in fp32, bf16 or fp16.
        group_size: as in :func:`quantize_activations`.

    Returns:
        Codes and scales of :func:`quantize_activations`, for K channels.
    """
    gate, up = x.chunk(2, dim=1)
    return quantize_activations(silu(gate.float()).to(x.dtype) * up, group_size)


def silu(x: torch.Tensor) -> torch.Tensor:
    """``x / (1 + exp(-x))`` of fp32 x, with an exponential that every device can repeat bit for bit.

    Library exponentials differ in their last bits from device to device. This one is ``2^n p(r)`` with
    ``-x = n ln 2 + r`` and a polynomial p, in IEEE operations alone. Below -87, where ``exp(-x)`` nears the end of
    fp32, it counts as infinite, so that silu is -0.
    """
    low = x.clamp(max=87)  # from there on 1 + exp(-x) is 1
    shifted = _fma(low, -LOG2E, ROUNDER)
    n = shifted - ROUNDER
    r = _fma(n, -LN2_LOW, _fma(n, -LN2_HIGH, -low))
    power = torch.full_like(x, EXP[0])
    for coefficient in EXP[1:]:
        power = _fma(power, r, coefficient)
    exponential = (power.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)
    one = x.new_tensor(1)  # see quantize_activations
    return x * torch.where(x < -87, 0, one / (one + exponential))


ROUNDER = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, which the low bits of the sum then hold
LOG2E = 1.44269502162933349609375  # fp32 constants, here in full
LN2_HIGH = 0.693147182464599609375
LN2_LOW = -1.9046542121259336e-09
EXP = (
    0.0013814539415761828,
    0.00836874544620514,
    0.04166838899254799,
    0.1666652113199234,
    0.4999999403953552,
    1.0,
    1.0,
)


def _fma(a: torch.Tensor, b: torch.Tensor | float, c: torch.Tensor | float) -> torch.Tensor:
    """fp32 ``a * b + c``, rounded once, which torch has no operation for."""
    product = a.double() * b  # exact
    total = product + c
    # total is rounded, and would be so again: its error, by Knuth's two-sum, shows which way to make its last bit odd,
    # after which rounding to fp32 is right.
    partner = total - product
    error = (product - (total - partner)) + (c - partner)
    even = (total.view(torch.int64) & 1) == 0
    step = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where((error != 0) & even, (total.view(torch.int64) + step).view(torch.float64), total).float()


def _tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, padded with zeros to a power of two: neighbours are added until one is left."""
    x = torch.nn.functional.pad(x, (0, (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]))
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x.squeeze(-1)


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    constant_b: bool = False,
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
        constant_b: accepted and ignored: a promise about when b is written, which only kernels use.

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

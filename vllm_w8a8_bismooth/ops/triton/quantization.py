"""The quantizations in Triton: of activations as they are, of ``silu(gate) * up``, and after RMSNorm.

A *unit* is what shares a scale, a token or a group of it. A program takes some narrow ones, or one wide one in pieces.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_w8a8_bismooth.ops import reference
from vllm_w8a8_bismooth.ops.reference import Quantized

PIECE = 4096
"""The most channels that a program holds."""
HELD = 2048
"""Channels that a program of narrow units holds."""

EXP: tl.constexpr = tl.constexpr(reference.EXP)
TERMS: tl.constexpr = tl.constexpr(len(reference.EXP))
ROUNDER: tl.constexpr = tl.constexpr(reference.ROUNDER)
LOG2E: tl.constexpr = tl.constexpr(reference.LOG2E)
LN2_HIGH: tl.constexpr = tl.constexpr(reference.LN2_HIGH)
LN2_LOW: tl.constexpr = tl.constexpr(reference.LN2_LOW)
PLAIN: tl.constexpr = tl.constexpr(0)
SILU_MUL: tl.constexpr = tl.constexpr(1)
RMS_NORM: tl.constexpr = tl.constexpr(2)


@triton.jit
def _silu(x):
    """See :func:`reference.silu`."""
    low = tl.minimum(x, 87.0)
    shifted = tl.fma(low, -LOG2E, ROUNDER)
    n = shifted - ROUNDER
    r = tl.fma(n, -LN2_LOW, tl.fma(n, -LN2_HIGH, -low))
    power = tl.full(x.shape, EXP[0], tl.float32)
    for i in tl.static_range(1, TERMS):
        power = tl.fma(power, r, EXP[i])
    bits = power.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    exponential = bits.to(tl.float32, bitcast=True)
    return x * tl.where(x < -87.0, 0.0, tl.div_rn(1.0, 1.0 + exponential))


@triton.jit
def _values(
    x, x_row, x_column, gain, inverse_rms, rows, columns, mask, channels,
    SOURCE: tl.constexpr,
):  # fmt: skip
    """fp32, shaped as ``columns``: what is quantized there, rounded to x's dtype."""
    at = x + rows[:, None] * x_row + columns * x_column
    value = tl.load(at, mask=mask, other=0).to(tl.float32)
    if SOURCE == SILU_MUL:
        up = tl.load(at + channels * x_column, mask=mask, other=0).to(tl.float32)
        value = _silu(value).to(x.dtype.element_ty).to(tl.float32) * up
    elif SOURCE == RMS_NORM:
        value = (
            value * tl.load(inverse_rms + rows)[:, None] * tl.load(gain + columns, mask=mask, other=0).to(tl.float32)
        )
    return value.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _quantize(
    x, x_row, x_column, gain, inverse_rms, codes, scales, units, groups, channels,
    SOURCE: tl.constexpr, WIDTH: tl.constexpr, UNITS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    there = unit < units
    rows, first = (tl.minimum(unit, units - 1) // groups).to(tl.int64), unit % groups * WIDTH
    # Magnitudes as bits, which are ordered like the numbers, with NaN above infinity.
    largest = tl.zeros((UNITS,), tl.int32)
    for start in range(0, WIDTH, PIECE):
        inside = start + tl.arange(0, PIECE)[None, :]
        mask = there[:, None] & (inside < WIDTH)
        columns = first[:, None] + inside
        value = _values(x, x_row, x_column, gain, inverse_rms, rows, columns, mask, channels, SOURCE)
        largest = tl.maximum(largest, tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1))
    amax = largest.to(tl.float32, bitcast=True)
    inverse = tl.div_rn(127.0, amax)
    inverse = tl.where(inverse < float("inf"), inverse, 0.0)
    for start in range(0, WIDTH, PIECE):
        inside = start + tl.arange(0, PIECE)[None, :]
        mask = there[:, None] & (inside < WIDTH)
        columns = first[:, None] + inside
        value = _values(x, x_row, x_column, gain, inverse_rms, rows, columns, mask, channels, SOURCE)
        rounded = value * inverse[:, None] + ROUNDER  # half to even; the code is its low byte
        tl.store(codes + rows[:, None] * channels + columns, rounded.to(tl.int32, bitcast=True).to(tl.int8), mask=mask)
    tl.store(scales + unit, tl.div_rn(amax, 127.0), mask=there)


@triton.jit
def _tree_sum(x, LEVELS: tl.constexpr):
    """fp32 ``[1]``, the sum of ``2^LEVELS`` numbers as in the reference: neighbours are added until one is left."""
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (1 << (LEVELS - 1 - level), 2)), axis=1)
    return x


@triton.jit
def _inverse_rms(
    x, x_row, x_column, residual, residual_row, residual_column, out, channels, epsilon,
    PIECE_LEVELS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """``1 / rms`` of rows of ``x``, or of ``x + residual``, which becomes that sum: ``2^LEVELS`` pieces of the tree."""
    row, pieces = tl.program_id(0).to(tl.int64), tl.arange(0, 1 << LEVELS)
    sums = tl.zeros((1 << LEVELS,), tl.float32)
    for piece in range(1 << LEVELS):
        column = (piece << PIECE_LEVELS) + tl.arange(0, 1 << PIECE_LEVELS)
        z = tl.load(x + row * x_row + column * x_column, mask=column < channels, other=0)
        if residual is not None:
            at = residual + row * residual_row + column * residual_column
            added = tl.load(at, mask=column < channels, other=0)
            z = (added.to(tl.float32) + z.to(tl.float32)).to(z.dtype)
            tl.store(at, z, mask=column < channels)
        wide = z.to(tl.float32)
        sums = tl.where(pieces == piece, _tree_sum(wide * wide, PIECE_LEVELS), sums)
    mean = tl.div_rn(_tree_sum(sums, LEVELS), channels.to(tl.float32))
    tl.store(out + row + tl.arange(0, 1), tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon)))


def quantize_activations(x: torch.Tensor, group_size: int | None) -> Quantized:
    """See :func:`reference.quantize_activations`."""
    return _launch(PLAIN.value, x, x.shape[1], group_size)


def silu_mul_quantize(x: torch.Tensor, group_size: int | None) -> Quantized:
    """See :func:`reference.silu_mul_quantize`."""
    return _launch(SILU_MUL.value, x, x.shape[1] // 2, group_size)


def rms_norm_quantize(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float, group_size: int | None
) -> Quantized:
    """See :func:`reference.rms_norm_quantize`."""
    tokens, channels = x.shape
    inverse = x.new_empty(tokens, dtype=torch.float32)
    if tokens:
        levels = (channels - 1).bit_length()
        of_piece = min(levels, PIECE.bit_length() - 1)
        strides = (0, 0) if residual is None else residual.stride()
        _inverse_rms[(tokens,)](
            x,
            *x.stride(),
            residual,
            *strides,
            inverse,
            channels,
            epsilon,
            of_piece,
            levels - of_piece,
            **_options(1 << of_piece),
        )
    summed = x if residual is None else residual
    return _launch(RMS_NORM.value, summed, channels, group_size, weight.contiguous(), inverse)


def _launch(
    source: int,
    x: torch.Tensor,
    channels: int,
    group_size: int | None,
    gain: torch.Tensor | None = None,
    inverse_rms: torch.Tensor | None = None,
) -> Quantized:
    """Codes ``[M, channels]`` and scales ``[M, channels / group_size]`` of what ``source`` makes of x."""
    tokens, width = x.shape[0], group_size or channels
    groups = channels // width
    codes = x.new_empty((tokens, channels), dtype=torch.int8)
    scales = x.new_empty((tokens, groups), dtype=torch.float32)
    units = tokens * groups
    if units:
        piece = min(triton.next_power_of_2(width), PIECE)
        together = max(1, HELD // piece) if groups > 1 else 1
        _quantize[(triton.cdiv(units, together),)](
            x, *x.stride(), x if gain is None else gain, x if inverse_rms is None else inverse_rms,
            codes, scales, units, groups, channels, source, width, together, piece, **_options(together * piece),
        )  # fmt: skip
    return codes, scales


def _options(held: int) -> dict[str, Any]:
    """Keyword arguments of a launch whose programs hold as many channels."""
    return {"num_warps": min(max(held // 512, 1), 16), "enable_fp_fusion": False}

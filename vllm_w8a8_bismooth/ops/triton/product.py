"""``scaled_mm`` in Triton: one kernel for every granularity, and the tile that experts use too.

The weights are the rows of the matrix instruction, and the tokens its columns, as in ``csrc/cuda``: Hopper's and
Blackwell's take 64 rows at least, and a step of decoding has few tokens.
"""

import torch
import triton
import triton.language as tl

from vllm_w8a8_bismooth.ops.triton import tiles


@triton.jit
def _sums(
    a_at, a_step, b_at, b_step, width,
    TILE_T: tl.constexpr, TILE_W: tl.constexpr, TILE_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """int32 ``[TILE_W, TILE_T]``, the products of weights and tokens over ``width`` columns from ``b_at``, ``a_at``."""
    columns = tl.arange(0, TILE_K)
    sums = tl.zeros((TILE_W, TILE_T), tl.int32)
    for first in range(0, width, TILE_K):
        if WHOLE:
            a, b = tl.load(a_at), tl.load(b_at)
        else:
            inside = columns < width - first
            a = tl.load(a_at, mask=inside[:, None], other=0)
            b = tl.load(b_at, mask=inside[None, :], other=0)
        sums = tl.dot(b, a, sums, out_dtype=tl.int32)
        a_at += TILE_K * a_step
        b_at += TILE_K * b_step
    return sums


@triton.jit
def tile(
    a, a_row, a_column, a_scale, a_scale_row, a_scale_group, tokens,
    b, b_row, b_column, b_scale, b_scale_row, b_scale_group, weights,
    k, WIDTH: tl.constexpr, A_GROUPED: tl.constexpr,
    TILE_T: tl.constexpr, TILE_W: tl.constexpr, TILE_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """fp32 ``[TILE_W, TILE_T]``: ``sum_g(a_scale_g * b_scale_g * float(sums_g))`` for some weight rows and tokens.

    No product is contracted with a sum, and groups are added in ascending order, so that this is the reference's result
    bit for bit, whatever the tile.

    Args:
        a, a_row, a_column: int8 ``[M, K]`` and its strides, as for the other three.
        tokens, weights: int64, the numbers of rows that exist.
        k, WIDTH: columns, and those of a group; ``None`` is per-channel.
        A_GROUPED: activations have scales per group, too.
        TILE_T, TILE_W, TILE_K: tokens and weight rows of the tile, and columns of a step.
        WHOLE: no step goes beyond the columns that share a scale.
    """
    columns = tl.arange(0, TILE_K)
    a_at = a + tokens[None, :] * a_row + columns[:, None] * a_column
    b_at = b + weights[:, None] * b_row + columns[None, :] * b_column
    a_scale_at = a_scale + tokens * a_scale_row
    b_scale_at = b_scale + weights * b_scale_row
    out = tl.zeros((TILE_W, TILE_T), tl.float32)
    if WIDTH is None:
        sums = _sums(a_at, a_column, b_at, b_column, k, TILE_T, TILE_W, TILE_K, WHOLE).to(tl.float32)
        out = sums * tl.load(a_scale_at)[None, :] * tl.load(b_scale_at)[:, None]
    else:
        for g in range(k // WIDTH):
            sums = _sums(a_at, a_column, b_at, b_column, WIDTH, TILE_T, TILE_W, TILE_K, WHOLE).to(tl.float32)
            a_scales = tl.load(a_scale_at + g * a_scale_group if A_GROUPED else a_scale_at)
            b_scales = tl.load(b_scale_at + g * b_scale_group)
            out += sums * a_scales[None, :] * b_scales[:, None]
            a_at += WIDTH * a_column
            b_at += WIDTH * b_column
    return out


@triton.jit
def _product(
    a, a_row, a_column, a_scale, a_scale_row, a_scale_group,
    b, b_row, b_column, b_scale, b_scale_row, b_scale_group,
    bias, out, m, n, k, WIDTH: tl.constexpr, A_GROUPED: tl.constexpr,
    TILE_T: tl.constexpr, TILE_W: tl.constexpr, TILE_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    # Bands of 8 token tiles, through which all weight tiles pass: programs that run together share operands in L2.
    token_tiles, weight_tiles = tl.cdiv(m, TILE_T), tl.cdiv(n, TILE_W)
    program = tl.program_id(0)
    band = program // (8 * weight_tiles) * 8
    height = min(token_tiles - band, 8)
    within = program % (8 * weight_tiles)
    token = (band + within % height).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    weight = (within // height).to(tl.int64) * TILE_W + tl.arange(0, TILE_W)
    # Rows past the end are the last one once more, and are not written.
    sums = tile(
        a, a_row, a_column, a_scale, a_scale_row, a_scale_group, tl.minimum(token, m - 1),
        b, b_row, b_column, b_scale, b_scale_row, b_scale_group, tl.minimum(weight, n - 1),
        k, WIDTH, A_GROUPED, TILE_T, TILE_W, TILE_K, WHOLE,
    )  # fmt: skip
    if bias is not None:
        sums += tl.load(bias + weight, mask=weight < n, other=0).to(tl.float32)[:, None]
    at = out + token[None, :] * n + weight[:, None]
    tl.store(at, sums.to(out.dtype.element_ty), mask=(token < m)[None, :] & (weight < n)[:, None])


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    constant_b: bool = False,
) -> torch.Tensor:
    """See :func:`reference.scaled_mm`, bit for bit.

    Raises:
        ValueError: K is so large that int32 sums may overflow, or Triton has no INT8 product for the device.
    """
    (m, k), (n, groups) = a.shape, b_scale.shape
    if reason := tiles.unsupported(k):
        raise ValueError(reason)
    out = a.new_empty((m, n), dtype=out_dtype)
    if not out.numel():
        return out
    chosen = tiles.choose(m, n, groups)
    grid = (triton.cdiv(m, chosen.tokens) * triton.cdiv(n, chosen.weights),)
    _product[grid](
        a, *a.stride(), a_scale, *a_scale.stride(), b, *b.stride(), b_scale, *b_scale.stride(),
        None if bias is None else bias.contiguous(), out, m, n, k,
        **chosen.launch(k, groups, a_scale.shape[1]),
    )  # fmt: skip
    return out

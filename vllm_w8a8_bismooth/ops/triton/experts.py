"""The routed experts in Triton: two products over tokens sorted by expert, without asking the host how many each has.

So a CUDA graph holds all of it. The sorted list of (token, expert) pairs is cut into tiles of one expert each; how many
tiles there are depends on the data, so as many programs start as there could be, and those past the last tile end.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_w8a8_bismooth.ops.mixture import ACTIVATIONS
from vllm_w8a8_bismooth.ops.triton import tiles
from vllm_w8a8_bismooth.ops.triton.product import tile as product_tile

PIECE = 1024
"""Channels of a token that one program adds up."""


@triton.jit
def _products(
    a, a_row, a_column, a_scale, a_scale_row, a_scale_group, readers,
    b, b_expert, b_row, b_column, b_scale, b_scale_expert, b_scale_row, b_scale_group,
    out, owners, before, starts, experts, n, k, WIDTH: tl.constexpr, A_GROUPED: tl.constexpr,
    TILE_T: tl.constexpr, TILE_W: tl.constexpr, TILE_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``out[place] = scaled_mm(a[readers[place]], b[its expert])`` for the places of a tile, see :class:`Sorted`."""
    number, weight_tile = tl.program_id(0) // tl.cdiv(n, TILE_W), tl.program_id(0) % tl.cdiv(n, TILE_W)
    expert = tl.load(owners + number)
    if expert >= experts:
        return
    first = tl.load(starts + expert) + (number - tl.load(before + expert)) * TILE_T
    end = tl.load(starts + expert + 1)
    place = first + tl.arange(0, TILE_T)
    weight = weight_tile.to(tl.int64) * TILE_W + tl.arange(0, TILE_W)
    sums = product_tile(
        a, a_row, a_column, a_scale, a_scale_row, a_scale_group, tl.load(readers + tl.minimum(place, end - 1)),
        b + expert * b_expert, b_row, b_column, b_scale + expert * b_scale_expert, b_scale_row, b_scale_group,
        tl.minimum(weight, n - 1), k, WIDTH, A_GROUPED, TILE_T, TILE_W, TILE_K, WHOLE,
    )  # fmt: skip
    at = out + place[None, :] * n + weight[:, None]
    tl.store(at, sums.to(out.dtype.element_ty), mask=(place < end)[None, :] & (weight < n)[:, None])


@triton.jit
def _add_up(products, places, shares, starts, out, count, channels, PIECE: tl.constexpr):
    """``out[t] = sum_j(shares[t, j] * products[places[t, j]])`` in ascending j, without places of experts elsewhere."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    first = tl.load(starts)
    total = tl.zeros((PIECE,), tl.float32)
    for j in range(count):
        place = tl.load(places + token * count + j)
        if place >= first:
            product = tl.load(products + place * channels + channel, mask=channel < channels, other=0)
            total += product * tl.load(shares + token * count + j)
    tl.store(out + token * channels + channel, total.to(out.dtype.element_ty), mask=channel < channels)


@dataclass(frozen=True)
class Sorted:
    """Every pair of a token and one of its experts has a *place*; those of an expert are neighbours.

    Attributes:
        readers: int64 ``[P]``, the token of each place; P is T * k.
        places: int64 ``[P]``, token by token, each token's in the order of its experts' numbers.
        starts: int64 ``[E + 1]``, the first place of each expert; pairs whose expert lives elsewhere are before them.
        owners: int64 ``[tiles]``, the expert of each tile, or E for those that are not needed.
        before: int64 ``[E]``, the number of each expert's first tile.
    """

    readers: torch.Tensor
    places: torch.Tensor
    starts: torch.Tensor
    owners: torch.Tensor
    before: torch.Tensor

    @classmethod
    def of(cls, chosen: torch.Tensor, experts: int, tokens: int) -> "Sorted":
        """Sort ``chosen [T, k]``, ascending in each row, for tiles of as many ``tokens``."""
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        numbers = torch.arange(len(flat), device=flat.device)
        starts = torch.searchsorted(flat[order], torch.arange(experts + 1, device=flat.device, dtype=flat.dtype))
        needed = (starts.diff() + tokens - 1) // tokens
        ends = needed.cumsum(0)
        most = len(flat) // tokens + min(experts, len(flat))
        return cls(
            readers=order // chosen.shape[1],
            places=torch.empty_like(order).scatter_(0, order, numbers),
            starts=starts,
            owners=torch.searchsorted(ends, torch.arange(most, device=flat.device), right=True),
            before=ends - needed,
        )


def experts(
    x: torch.Tensor,
    shares: torch.Tensor,
    chosen: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    activation: str,
    group_size: int | None = None,
) -> torch.Tensor:
    """See :func:`mixture.experts`, bit for bit.

    Raises:
        ValueError: as :func:`product.scaled_mm`.
    """
    count = len(w13_scale)
    chosen, slots = chosen.sort(dim=1, stable=True)
    shares = shares.float().gather(1, slots)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not out.numel() or not chosen.numel():
        return out.zero_()
    per_expert = -(-chosen.numel() // count)
    pairs = Sorted.of(chosen, count, tiles.choose(per_expert, *w13_scale.shape[1:]).tokens)
    codes, scale = torch.ops.w8a8_bismooth.quantize_activations(x, group_size)
    inner = _multiply(codes, scale, pairs.readers, w13, w13_scale, pairs, per_expert, x.dtype)
    codes, scale = ACTIVATIONS[activation](inner, group_size)
    every = torch.arange(len(codes), device=x.device)
    products = _multiply(codes, scale, every, w2, w2_scale, pairs, per_expert, torch.float32)
    grid = (len(x), triton.cdiv(x.shape[1], PIECE))
    _add_up[grid](
        products, pairs.places, shares, pairs.starts, out, chosen.shape[1], x.shape[1], PIECE, enable_fp_fusion=False
    )
    return out


def _multiply(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    readers: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    pairs: Sorted,
    per_expert: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``[P, N]``: what each place's expert makes of its row of a; places of experts elsewhere hold anything.

    Args:
        a, a_scale: int8 ``[*, K]`` and fp32 ``[*, 1 or G]``.
        readers: int64 ``[P]``, the row of each place.
        b, b_scale: int8 ``[E, N, K]`` and fp32 ``[E, N, G]``.
        pairs: the places.
        per_expert: how many an expert has on average, rounded up.
        out_dtype: of the result.
    """
    (count, n, groups), k = b_scale.shape, a.shape[1]
    if reason := tiles.unsupported(k):
        raise ValueError(reason)
    chosen = tiles.choose(per_expert, n, groups)
    out = a.new_empty((len(readers), n), dtype=out_dtype)
    _products[(len(pairs.owners) * triton.cdiv(n, chosen.weights),)](
        a, *a.stride(), a_scale, *a_scale.stride(), readers,
        b, *b.stride(), b_scale, *b_scale.stride(),
        out, pairs.owners, pairs.before, pairs.starts, count, n, k,
        **chosen.launch(k, groups, a_scale.shape[1]),
    )  # fmt: skip
    return out

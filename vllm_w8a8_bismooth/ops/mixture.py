"""The routed experts of a mixture, composed of the other operations."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.nn.functional import gelu

from vllm_w8a8_bismooth.ops.reference import Quantized


def _silu(inner: torch.Tensor, group_size: int | None) -> Quantized:
    return torch.ops.w8a8_bismooth.silu_mul_quantize(inner, group_size)


def _gelu(inner: torch.Tensor, group_size: int | None, approximate: str) -> Quantized:
    gate, up = inner.chunk(2, dim=1)
    return torch.ops.w8a8_bismooth.quantize_activations(gelu(gate, approximate=approximate) * up, group_size)


ACTIVATIONS: Mapping[str, Callable[[torch.Tensor, int | None], Quantized]] = {
    "silu": _silu,
    "gelu": partial(_gelu, approximate="none"),
    "gelu_tanh": partial(_gelu, approximate="tanh"),
}
"""vLLM's names of the functions that the gate goes through -> ``[M, 2 I]``, gate then up, to codes and scales.

The second argument is the number of channels that share a scale, ``None`` per token.
"""


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
    """The sum over a token's experts of ``share * down(activation(gate(x)) * up(x))``.

    Every expert is two W8A8 linears, per-channel or per group. Roundings are those of a dense MLP, see
    ``silu_mul_quantize``: gate and up, the activation, and its product with up are rounded to x's dtype. What down
    makes stays fp32, also in the sum, whose terms are added in the order of the experts' numbers; the sum is rounded to
    x's dtype. Each token is quantized once, whoever reads it.

    So a token's result depends neither on the other tokens nor on the order in which it names its experts. (That of
    torch's GELU may differ in the last bit with a value's place in the batch.)

    Args:
        x: ``[T, H]`` float.
        shares: ``[T, k]`` float, what the router gives each of a token's experts.
        chosen: integer ``[T, k]``, their numbers, or -1 for one that lives on another rank and adds nothing here.
        w13: int8 ``[E, 2 I, H]``, gate then up, or packed ones as in ``scaled_mm``, stacked.
        w13_scale: fp32 ``[E, 2 I, 1]`` or ``[E, 2 I, G]``.
        w2: int8 ``[E, H, I]``, or packed and stacked.
        w2_scale: fp32 ``[E, H, 1]`` or ``[E, H, G]``.
        activation: a key of :data:`ACTIVATIONS`.
        group_size: channels that share an activation scale in both linears; ``None`` is per token.

    Returns:
        ``[T, H]`` in x's dtype.
    """
    multiply = torch.ops.w8a8_bismooth.scaled_mm
    codes, scale = torch.ops.w8a8_bismooth.quantize_activations(x, group_size)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    tokens, shares = order // chosen.shape[1], shares.float().flatten()[order, None]
    elsewhere, *loads = torch.bincount(flat + 1, minlength=len(w13_scale) + 1).tolist()
    out, done = x.new_zeros(x.shape, dtype=torch.float32), elsewhere
    for expert, load in enumerate(loads):
        if not load:
            continue
        mine = slice(done, done + load)
        rows = tokens[mine]
        inner = multiply(codes[rows], w13[expert], scale[rows], w13_scale[expert], x.dtype, None, True)
        inner_codes, inner_scale = ACTIVATIONS[activation](inner, group_size)
        product = multiply(inner_codes, w2[expert], inner_scale, w2_scale[expert], torch.float32, None, True)
        out.index_add_(0, rows, product.mul_(shares[mine]))
        done += load
    return out.to(x.dtype)

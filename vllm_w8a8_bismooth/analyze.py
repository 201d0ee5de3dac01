"""What per-channel INT8 does to each linear, from the weights alone."""

import re
from collections.abc import Iterable, Mapping

import torch

from vllm_w8a8_bismooth.architectures import Architecture
from vllm_w8a8_bismooth.quantize import dequantize_weight

VULNERABLE = 0.05
"""Column error above which a linear counts as vulnerable. Gaussian weights measure about 0.01; one column 100 times as
large brings them to about 0.2, three of 1000 times to nearly 1, because the row's step then swallows the rest."""


def column_error(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> float:
    """Mean over input columns of the relative error that INT8 leaves in them.

    The usual norm-wise error is blind to the LLaMA3-70B pathology: the huge columns dominate the norm and are exactly
    those that survive. Per column, a weight that is rounded to zero counts as lost, whatever its size.

    Args:
        weight: fp32 ``[N, K]``.
        codes, scale: what :func:`quantize_weight` made of it.

    Returns:
        0 (exact) to 1 (every column lost): mean of ``min(1, |W_j - Q(W)_j| / |W_j|)`` over the nonzero columns.
    """
    error = (dequantize_weight(codes, scale) - weight).norm(dim=0)
    size = weight.norm(dim=0)
    used = size > 0
    return float((error[used] / size[used]).clamp(max=1).mean()) if used.any() else 0.0


def close_under_fusion(names: Iterable[str], architecture: Architecture) -> set[str]:
    """Names inside a block, plus the siblings that vLLM fuses them with: one fused linear has one granularity."""
    chosen = set(names)
    for parts in architecture.fused.values():
        if chosen & set(parts):
            chosen |= set(parts)
    return chosen


def vulnerable(errors: Mapping[str, float], architecture: Architecture) -> set[str]:
    """The linears of one block (by name inside it) that need finer scales: above :data:`VULNERABLE`, with siblings."""
    return close_under_fusion((name for name, error in errors.items() if error > VULNERABLE), architecture)


def named(pattern: re.Pattern, block: str, architecture: Architecture) -> set[str]:
    """The linears of the block ``model.layers.i.`` whose full name ``pattern`` finds, with siblings."""
    return close_under_fusion((n for n in architecture.linears if pattern.search(block + n)), architecture)

"""Bi-smoothing: per-channel factors that balance weights against activations, and their exact folds.

A *site* is a place where ``X W^T`` can be rewritten as ``(X / s) (W diag(s))^T``: the division goes into whatever
produces X (a norm's gain, or the rows of ``v_proj`` or ``up_proj``), the product into the columns of its consumers.
With ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (SmoothQuant, arXiv 2211.10438, eq. 4) magnitude may move either
way: channels with huge weights get ``s_j < 1``, the direction that repairs LLaMA3-70B (arXiv 2408.15301).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_w8a8_bismooth.architectures import Site

Block = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Factors:
    """What was folded at one site: extremes of the activation range, the weight range and the factor."""

    site: str
    activation_min: float
    activation_max: float
    weight_min: float
    weight_max: float
    factor_min: float
    factor_max: float


def balance(activation: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """The factors of one site.

    Args:
        activation: fp32 ``[K]``, largest magnitude of each input channel.
        weight: fp32 ``[K]``, largest magnitude of each weight column over all consumers.
        alpha: share of the activations' range that is moved into the weights, 0 to 1.

    Returns:
        fp32 ``[K]``, positive and finite, with geometric mean 1: a common factor cancels between the two sides, and
        this choice keeps the folded norm in the range of its dtype. A channel whose range is 0 on one side is given
        the median range there: what calibration has not seen is treated as typical.
    """
    logs = []
    for extent in (activation, weight):
        seen = extent > 0
        typical = extent[seen].median() if seen.any() else extent.new_ones(())
        logs.append(torch.where(seen, extent, typical).double().log())
    log_s = alpha * logs[0] - (1 - alpha) * logs[1]
    return (log_s - log_s.mean()).exp().float()


def fold_vector(vector: torch.Tensor, s: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide a stored vector (a norm's gain, a bias) by ``s`` and make the rounding to ``dtype`` part of the factor.

    Args:
        vector: fp32 ``[K]``.
        s: fp32 ``[K]``, positive.
        dtype: how the vector is stored in the checkpoint.

    Returns:
        The vector in ``dtype``, and the *effective* factor fp32 ``[K]``: ``vector / folded``, so that
        ``folded * effective`` is the old vector and folding costs nothing. Where the vector is 0 the factor is ``s``.
    """
    folded = (vector / s).to(dtype)
    usable = (folded != 0) & folded.isfinite()
    # A quotient outside the dtype's range would lose the channel: such a channel keeps its value and factor 1.
    folded = torch.where(usable, folded, vector.to(dtype))
    effective = torch.where(vector == 0, s, vector / folded.float())
    return folded, effective


def spread(s: torch.Tensor, heads_per_group: int, head_dim: int) -> torch.Tensor:
    """Repeat factors of ``[kv_heads * head_dim]`` value channels for the ``[heads * head_dim]`` columns of o_proj.

    In grouped-query attention ``heads_per_group`` query heads read one value head, so their columns share its factor.
    """
    return s.view(-1, 1, head_dim).expand(-1, heads_per_group, -1).reshape(-1)


def gather(extent: torch.Tensor, heads_per_group: int, head_dim: int) -> torch.Tensor:
    """The inverse tie of :func:`spread`: largest of the ``heads_per_group`` columns that share a value channel."""
    return extent.view(-1, heads_per_group, head_dim).amax(dim=1).reshape(-1)


def column_extent(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp32 ``[K]``: largest magnitude of each column over several ``[N_i, K]`` weights."""
    return torch.stack([w.abs().amax(dim=0) for w in weights]).amax(dim=0)


def smooth_block(
    block: Block,
    activations: Mapping[str, torch.Tensor],
    sites: Sequence[Site],
    alpha: float,
    head_dim: int,
    dtypes: Mapping[str, torch.dtype],
) -> tuple[Block, list[Factors]]:
    """Smooth one decoder block; its function does not change.

    Args:
        block: fp32 tensors by name inside the block (``self_attn.q_proj.weight``). Not modified.
        activations: site name -> fp32 ``[K]`` largest magnitude of each input channel. Sites without an entry stay.
        sites: the architecture's couplings, producers that are linears first (see :class:`Site`).
        alpha: see :func:`balance`.
        head_dim: channels of one attention head, for the tie of ``v_proj`` to ``o_proj``.
        dtypes: storage dtype of each tensor, by the same names; norms and biases are rounded to it, weights are not.

    Returns:
        The smoothed block (fp32, norms and biases already rounded to what will be stored) and one record per site.
    """
    block, records = dict(block), []
    for site in sites:
        if site.name not in activations:
            continue
        activation = activations[site.name]
        weight = column_extent([block[f"{c}.weight"] for c in site.consumers])
        width = block[f"{site.producer}.weight"].shape[0]
        heads_per_group = len(weight) // width
        if heads_per_group > 1:
            activation, weight = (gather(e, heads_per_group, head_dim) for e in (activation, weight))
        s = balance(activation, weight, alpha)

        producer, bias = f"{site.producer}.weight", f"{site.producer}.bias"
        for name in (producer, bias):
            if name in block and block[name].dim() == 1:
                folded, s = fold_vector(block[name], s, dtypes[name])
                block[name] = folded.float()
        if block[producer].dim() == 2:
            block[producer] = block[producer] / s.unsqueeze(1)
        columns = spread(s, heads_per_group, head_dim) if heads_per_group > 1 else s
        for consumer in site.consumers:
            block[f"{consumer}.weight"] = block[f"{consumer}.weight"] * columns
        extremes = (float(e) for extent in (activation, weight, s) for e in extent.aminmax())
        records.append(Factors(site.name, *extremes))
    return block, records

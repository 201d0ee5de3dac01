"""Bi-smoothing: per-channel factors that balance weights against activations, folded exactly.

A *site* is a place where ``X W^T`` can be rewritten as ``(X / s) (W diag(s))^T``: the division goes into whatever
produces X (a norm's gain, or the rows of ``v_proj`` or ``up_proj``), the product into the columns of its consumers.
Magnitude may move either way: channels with huge weights get ``s_j < 1``, the direction that repairs LLaMA3-70B
(arXiv 2408.15301). How ``s`` is chosen is in balance.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vllm_w8a8_bismooth.checkpoint.architectures import Layer, Site
from vllm_w8a8_bismooth.method.balance import Rule
from vllm_w8a8_bismooth.method.moments import Moments
from vllm_w8a8_bismooth.method.rows import ALONE, Fold, Threads


@dataclass(frozen=True)
class Factors:
    """What was folded at one site: extremes of the activation range, the weight range and the factor.

    The weight range has a value for each input channel: the largest magnitude in this column of all consumers, before
    (``weight``) and after the fold (``smoothed``).
    """

    site: str
    activation_min: float
    activation_max: float
    weight_min: float
    weight_max: float
    factor_min: float
    factor_max: float
    smoothed_min: float
    smoothed_max: float
    weight_median: float
    smoothed_median: float


@dataclass
class Smoothing:
    """What smoothing does to one decoder block.

    Attributes:
        folds: linear or router -> what happens to its weight. Those without an entry are left as they are.
        vectors: tensor name (a norm's gain, a bias) -> the vector to store instead, in its storage dtype.
        sites: one record per site.
    """

    folds: dict[str, Fold] = field(default_factory=dict)
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    sites: list[Factors] = field(default_factory=list)

    def fold(self, linear: str) -> Fold:
        return self.folds.get(linear, Fold())


def fold_vector(
    vector: torch.Tensor, s: torch.Tensor, dtype: torch.dtype, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide a vector (a norm's gain, a bias) by ``s`` and make the rounding to ``dtype`` part of the factor.

    Args:
        vector: fp32 ``[K]``, as stored.
        s: fp32 ``[K]``, positive.
        dtype: how the vector is stored in the checkpoint.
        offset: what the model adds to the stored vector; Gemma's norms multiply by ``1 + stored``.

    Returns:
        The vector to store in ``dtype``, and the *effective* factor fp32 ``[K]``: old over new gain, so that
        ``new * effective`` is the old gain and folding costs nothing. Where the gain is 0 the factor is ``s``.
    """
    gain = vector + offset
    folded = (gain / s - offset).to(dtype)
    new = folded.float() + offset
    usable = (new != 0) & new.isfinite()
    # A quotient outside the dtype's range would lose the channel: such a channel keeps its value and factor 1.
    folded = torch.where(usable, folded, vector.to(dtype))
    effective = torch.where(gain == 0, s, gain / (folded.float() + offset))
    return folded, effective


def spread(s: torch.Tensor, heads_per_group: int, head_dim: int) -> torch.Tensor:
    """Repeat factors of ``[kv_heads * head_dim]`` value channels for the ``[heads * head_dim]`` columns of o_proj.

    In grouped-query attention ``heads_per_group`` query heads read one value head, so their columns share its factor.
    """
    return s.view(-1, 1, head_dim).expand(-1, heads_per_group, -1).reshape(-1)


def gather(extent: torch.Tensor, heads_per_group: int, head_dim: int) -> torch.Tensor:
    """The inverse tie of :func:`spread`: largest of the ``heads_per_group`` columns that share a value channel."""
    return extent.view(-1, heads_per_group, head_dim).amax(dim=1).reshape(-1)


def smooth_block(
    block: Mapping[str, torch.Tensor],
    activations: Mapping[str, Moments],
    layer: Layer,
    sizes: Mapping[str, int],
    rule: Rule,
    offset: float = 0.0,
    threads: Threads = ALONE,
) -> Smoothing:
    """The smoothing of one decoder block; applied, it does not change the block's function.

    Args:
        block: stored tensors by name inside the block (``self_attn.q_proj.weight``). Not modified.
        activations: site name -> moments of its K input channels over tokens. Sites without an entry are left alone.
        layer: the block's couplings, producers that are linears first (see :class:`Layer`).
        sizes: the architecture's, by name.
        rule: one of balance.py: moments of what feeds a site and of its weight columns -> factors fp32 ``[K]``.
        offset: what the architecture's norms add to their stored gains, see :func:`fold_vector`.
        threads: share the weights' rows.
    """
    smoothing = Smoothing()
    for site in layer.sites:
        if site.name not in activations:
            continue
        activation = activations[site.name]
        # An output channel's size is that of what its weights make of these activations.
        basis = activation.rms()
        weight = Moments.none(len(basis), basis.device)
        for consumer in site.consumers:
            if consumer in layer.linears:
                weight.merge(smoothing.fold(consumer).moments(block[f"{consumer}.weight"], basis, threads))
        start, width = rows_of(site, layer, sizes)
        heads_per_group = len(basis) // width
        if heads_per_group > 1:
            activation, weight = (m.tied(heads_per_group, sizes["head"]) for m in (activation, weight))
        s = rule(activation, weight)
        if layer.routers.keys() & set(site.consumers):
            s = s.log2().round().exp2()  # exact in any dtype, so that tokens go to the experts that they went to

        producer, bias = f"{site.producer}.weight", f"{site.producer}.bias"
        for name in (producer, bias):
            if name in block and block[name].dim() == 1:
                stored = block[name]
                part = stored[start : start + width].float()
                folded, s = fold_vector(part, s, stored.dtype, offset if name == producer else 0.0)
                smoothing.vectors[name] = torch.cat([stored[:start], folded, stored[start + width :]])
        if site.producer in layer.linears:
            rows = torch.ones(len(block[producer]), device=s.device)
            rows[start : start + width] = s
            smoothing.folds[site.producer] = Fold(rows, smoothing.fold(site.producer).columns)
        columns = spread(s, heads_per_group, sizes["head"]) if heads_per_group > 1 else s
        for consumer in site.consumers:
            smoothing.folds[consumer] = Fold(smoothing.fold(consumer).rows, columns)
        smoothed = weight.largest * s
        shown = (activation.largest, weight.largest, s, smoothed)
        extremes = (float(e) for extent in shown for e in extent.aminmax())
        medians = (float(extent.median()) for extent in (weight.largest, smoothed))
        smoothing.sites.append(Factors(site.name, *extremes, *medians))
    return smoothing


def rows_of(site: Site, layer: Layer, sizes: Mapping[str, int]) -> tuple[int, int]:
    """First row and number of rows of the producer that feed the consumers."""
    if site.producer in layer.vectors:
        return 0, sizes[layer.vectors[site.producer]]
    parts = [sizes[part] for part in layer.linears[site.producer][0]]
    return sum(parts[: site.part]), parts[site.part]

"""Bi-smoothing: per-channel factors that balance weights against activations, folded exactly.

A *site* is a place where ``X W^T`` can be rewritten as ``(X / s) (W diag(s))^T``: the division goes into whatever
produces X (a norm's gain, or the rows of ``v_proj`` or ``up_proj``), the product into the columns of its consumers.
Magnitude may move either way: channels with huge weights get ``s_j < 1``, the direction that repairs LLaMA3-70B
(arXiv 2408.15301). How ``s`` is chosen is in balance.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from vllm_w8a8_bismooth.method.balance import Rule
from vllm_w8a8_bismooth.method.columns import Columns, indices
from vllm_w8a8_bismooth.method.moments import Moments
from vllm_w8a8_bismooth.method.rows import ALONE, Fold, Threads
from vllm_w8a8_bismooth.model.layers import Layer, Site


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

    def add(self, linear: str, fold: Fold) -> None:
        """One more fold of a weight, beside those of other sites."""
        self.folds[linear] = self.fold(linear) * fold


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


def smooth_block(
    block: Mapping[str, torch.Tensor],
    activations: Mapping[str, Moments],
    layer: Layer,
    rule: Rule,
    threads: Threads = ALONE,
) -> Smoothing:
    """The smoothing of one decoder block; applied, it does not change the block's function.

    Args:
        block: stored tensors by name inside the block (``self_attn.q_proj.weight``). Not modified.
        activations: site name -> moments of its K input channels over tokens. Sites without an entry are left alone.
        layer: the block's couplings, producers that are linears first (see :class:`Layer`).
        rule: one of balance.py: moments of what feeds a site and of its weight columns -> factors fp32 ``[K]``.
        threads: share the weights' rows.
    """
    smoothing = Smoothing()
    for site in layer.sites:
        if site.name not in activations:
            continue
        activation = activations[site.name]
        weight = _weight_moments(block, site, layer, smoothing, activation.rms(), threads)
        columns = Columns.of(site)
        activation, weight = activation.tied(columns), weight.tied(columns)
        s = threads.alone(partial(rule, activation, weight))
        if layer.routers.keys() & set(site.consumers):
            s = s.log2().round().exp2()  # exact in any dtype, so that tokens go to the experts that they went to
        s = _fold_producer(block, site, layer, smoothing, s)
        for consumer in site.consumers:
            smoothing.add(consumer, Fold(columns=columns.spread(s)))
        smoothing.sites.append(_factors_of(site.name, activation.largest, weight.largest, s))
    return smoothing


def _weight_moments(
    block: Mapping[str, torch.Tensor],
    site: Site,
    layer: Layer,
    smoothing: Smoothing,
    basis: torch.Tensor,
    threads: Threads,
) -> Moments:
    """Moments of a site's K weight columns over all its consumers, as they are after the sites before it.

    An output channel's size is that of what its weights make of these activations: ``basis``, fp32 ``[K]``.
    """
    total = Moments.none(len(basis), basis.device)
    for consumer in site.consumers:
        if consumer in layer.linears:
            total.merge(smoothing.fold(consumer).moments(block[f"{consumer}.weight"], basis, threads))
    return total


def _fold_producer(
    block: Mapping[str, torch.Tensor],
    site: Site,
    layer: Layer,
    smoothing: Smoothing,
    s: torch.Tensor,
) -> torch.Tensor:
    """Divide what feeds a site by ``s`` ``[n]``, to the power that it sees; returns the factors that rounding left."""
    producer, bias = f"{site.producer}.weight", f"{site.producer}.bias"
    fed = indices(site.rows).to(s.device)
    s = s ** (1 / site.power)
    is_linear = site.producer in layer.linears
    if not is_linear:
        gain = block[producer]
        folded, s = fold_vector(gain[fed].float(), s, gain.dtype, site.offset)
        smoothing.vectors[producer] = gain.index_copy(0, fed, folded)
    if bias in block:
        stored = block[bias]
        # What rounding leaves of a bias is part of the factor, unless the gain has settled that.
        folded, settled = fold_vector(stored[fed].float(), s, stored.dtype)
        smoothing.vectors[bias] = stored.index_copy(0, fed, folded)
        s = settled if is_linear else s
    if is_linear:
        smoothing.add(site.producer, Fold(rows=torch.ones(len(block[producer]), device=s.device).index_copy(0, fed, s)))
    return s**site.power


def _factors_of(site: str, activation: torch.Tensor, weight: torch.Tensor, s: torch.Tensor) -> Factors:
    """The record of one site, from its channels' largest activations and weights, and its factors, fp32 ``[K]``."""
    smoothed = weight * s
    extremes = (float(e) for extent in (activation, weight, s, smoothed) for e in extent.aminmax())
    medians = (float(extent.median()) for extent in (weight, smoothed))
    return Factors(site, *extremes, *medians)

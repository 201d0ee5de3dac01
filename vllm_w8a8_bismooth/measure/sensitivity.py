"""What the quantization of each linear costs the model's predictions, in nats.

A linear that is quantized changes what its block leaves by some ``d``. With ``g``, the gradient there of the
log-probability of a token that the model itself would say, ``(g . d)^2 / 2`` is on average over such tokens the KL
divergence of the changed predictions from the true ones (see :meth:`logits.Logits.gradients`). Gradients are carried
from the predictions to the first block, one block in memory at a time; each token counts for itself, and the costs of
linears add up, because rounding errors of different tokens and linears have nothing in common.
"""

from collections.abc import Mapping

import torch

from vllm_w8a8_bismooth import grouping
from vllm_w8a8_bismooth.measure.passing import Passing
from vllm_w8a8_bismooth.measure.perturbation import Variant, quantized, units
from vllm_w8a8_bismooth.method.rows import Fold
from vllm_w8a8_bismooth.model.layers import Layer

DRAWS = 2
"""Tokens that are drawn at each place: with 1024 places, units are told apart where their costs differ by a tenth."""
EXPERTS = "experts"
"""All experts of a block, which are measured and chosen together: vLLM serves them alike."""
CHANNEL, GROUP = "per_channel", "per_group"
COMPENSATED = 0.6
"""Of the cost of nearest codes, what error-compensating rounding leaves (on SmolLM2-135M, docs/experiments.md)."""


def measured_units(layer: Layer) -> dict[str, tuple[str, ...]]:
    """:func:`perturbation.units`, and the experts as one."""
    return {**units(layer), **({EXPERTS: tuple(sorted(layer.experts))} if layer.experts else {})}


def variants(group_size: int | None) -> dict[str, dict[str, Variant]]:
    """Per-channel and per-group: weights and activations, each alone. What both cost together is the sum."""
    sizes = {CHANNEL: None, GROUP: group_size}
    return {
        name: {
            "weights": Variant(activations=False, group_size=size),
            "activations": Variant(weights=False, group_size=size),
        }
        for name, size in sizes.items()
    }


def measure(passing: Passing, group_size: int) -> tuple[dict[str, dict[str, dict[str, float]]], torch.Tensor]:
    """Quantize each unit of a block in each way, and carry the gradients through the block.

    Args:
        passing: through the block.
        group_size: of the per-group variants.

    Returns:
        Unit -> ``per_channel`` and ``per_group`` -> ``weights`` and ``activations`` -> nats a token, and the gradients
        of what the block reads. Where groups do not divide K there is no ``per_group``, and there are no experts that
        run as transformers has them, stacked.
    """
    layer, gradients = passing.layer, passing.gradients
    found: dict[str, dict[str, dict[str, float]]] = {}
    with passing.running() as running:
        true, before = torch.empty_like(running.hidden), torch.empty_like(gradients)
        for i, leaf, out in running.windows():
            true[i] = out.detach()[0]
            for draw, gradient in enumerate(gradients[:, i]):
                kept = draw < len(gradients) - 1
                (carried,) = torch.autograd.grad(out, leaf, gradient[None], retain_graph=kept)
                before[draw, i] = carried[0]
        modules = {name for name, _ in running.block.named_modules()}
        with torch.no_grad():
            for unit, parts in measured_units(layer).items():
                folds: dict[str, Fold] = {running.built(part): passing.smoothing.fold(part) for part in parts}
                if not folds.keys() <= modules:
                    continue
                columns = {layer.linears[part][1] for part in parts}
                found[unit] = {}
                for name, ways in variants(group_size).items():
                    if name == GROUP and not all(grouping.fits(k, group_size) for k in columns):
                        continue
                    found[unit][name] = {}
                    for what, variant in ways.items():
                        with quantized(running.block, folds, variant):
                            moved = (gradients * (running.run(running.hidden, running.numbers) - true)).sum(dim=-1)
                        found[unit][name][what] = float(moved.square().mean()) / 2
    return found, before


def cost(found: Mapping[str, float], compensated: bool) -> float:
    """Nats a token that weights and activations cost together.

    Args:
        found: of one unit in one granularity, by :func:`measure`, which rounds weights to nearest.
        compensated: whether they will be rounded with :mod:`method.compensate`.
    """
    return found["weights"] * (COMPENSATED if compensated else 1.0) + found["activations"]

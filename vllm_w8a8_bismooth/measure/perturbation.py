"""How far the output of a decoder block moves when linears of it are quantized (after arXiv 2403.06408).

Each fused linear is quantized alone, weights and activations together or one of the two, and the block runs on a sample
of the calibration's hidden states. What counts is the change of the residual stream relative to its size, which is what
later blocks get to see: an error of a linear that hardly adds to the stream does no harm, however large it is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from vllm_w8a8_bismooth import grouping
from vllm_w8a8_bismooth.checkpoint.blocks import Run, Stage
from vllm_w8a8_bismooth.measure.activations import Activations
from vllm_w8a8_bismooth.measure.calibration import Calibration
from vllm_w8a8_bismooth.method.balance import Rule
from vllm_w8a8_bismooth.method.quantize import dequantize_weight, quantize_weight
from vllm_w8a8_bismooth.method.rows import Fold, Threads
from vllm_w8a8_bismooth.method.smooth import Smoothing, smooth_block
from vllm_w8a8_bismooth.model.layers import Layer

SAMPLE = 1024  # tokens of the calibration


@dataclass(frozen=True)
class Variant:
    """What of a linear is quantized, and whether it was smoothed before. ``group_size`` ``None`` is per-channel."""

    weights: bool = True
    activations: bool = True
    smoothed: bool = True
    group_size: int | None = None


def units(layer: Layer) -> dict[str, tuple[str, ...]]:
    """What vLLM serves as one linear -> its parts: fused linears, and those that stand alone. Experts are left out."""
    fused = {part for parts in layer.fused.values() for part in parts}
    alone = {linear: (linear,) for linear in layer.linears if linear not in fused | layer.experts}
    return {**layer.fused, **alone}


def sample(calibration: Calibration) -> torch.Tensor:
    """``[windows, length, hidden]``: a copy of some of what the next block will read, about :data:`SAMPLE` tokens.

    Windows are taken from all over the text, whose kinds stand one after the other.
    """
    windows, length = calibration.hidden.shape[:2]
    return calibration.hidden[sampled(windows, length)]


def sampled(windows: int, length: int) -> list[int]:
    """The numbers of those windows."""
    count = min(windows, max(1, SAMPLE // length))
    return [(2 * i + 1) * windows // (2 * count) for i in range(count)]


@torch.no_grad()
def measure(
    calibration: Calibration,
    index: int,
    tensors: Mapping[str, torch.Tensor],
    smoothing: Smoothing,
    hidden: torch.Tensor,
    variants: Mapping[str, Variant],
) -> dict[str, dict[str, float]]:
    """Quantize each unit of a block in each way.

    Args:
        calibration: whose model the block is part of.
        index: of the block.
        tensors: what is stored of it, by name inside it.
        smoothing: of the block, which only variants that are smoothed get.
        hidden: ``[windows, length, hidden]``, what the block reads, by :func:`sample`.
        variants: by name.

    Returns:
        Unit -> variant -> mean over tokens of ``|change of the block's output|^2 / |output|^2``. Variants whose groups
        do not divide K are left out.
    """
    layer = calibration.source.layers[index]
    found: dict[str, dict[str, float]] = {}
    built = partial(calibration.source.construction.built, index)
    with calibration.lend(index, tensors, torch.float32) as (block, run):
        hidden, windows = hidden.float(), sampled(*calibration.hidden.shape[:2])
        true = run(hidden, windows)
        size = true.square().sum(dim=-1).clamp_(min=torch.finfo(torch.float32).tiny)
        for unit, parts in units(layer).items():
            found[unit] = {}
            for name, variant in variants.items():
                columns = layer.linears[parts[0]][1]
                if not grouping.fits(columns, variant.group_size):
                    continue
                folds = {built(p): smoothing.fold(p) if variant.smoothed else Fold() for p in parts}
                with quantized(block, folds, variant):
                    change = (run(hidden, windows) - true).square().sum(dim=-1)
                found[unit][name] = float((change / size).mean())
    return found


@contextmanager
def quantized(block: torch.nn.Module, folds: Mapping[str, Fold], variant: Variant) -> Iterator[None]:
    """Linears of a block as they are after quantization, in the basis of the source: the block's function stays.

    Only a fold's columns matter: dividing a whole row changes its scale, and none of its codes.
    """
    kept, hooks = {}, []
    for name, fold in folds.items():
        linear = block.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear)
        s = fold.columns if fold.columns is not None else linear.weight.new_ones(linear.weight.shape[1])

        def rounded(rows: torch.Tensor) -> torch.Tensor:
            return dequantize_weight(*quantize_weight(rows, variant.group_size))

        def before(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], s: torch.Tensor = s) -> torch.Tensor:
            rows = inputs[0].flatten(0, -2)
            return (rounded(rows / s) * s).view_as(inputs[0])

        if variant.weights:
            kept[name] = linear.weight.data
            linear.weight.data = rounded(linear.weight.data * s) / s
        if variant.activations:
            hooks.append(linear.register_forward_pre_hook(before))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, weight in kept.items():
            block.get_submodule(name).weight.data = weight


PERTURB = Stage("perturb")

VIEW = {
    f"{when}_{what}": Variant(weights=what != "activations", activations=what != "weights", smoothed=when == "after")
    for when in ("before", "after")
    for what in ("weights", "activations", "both")
}
"""What ``analyze`` shows: which side an error comes from, before and after smoothing."""


def view(run: Run, tokens: torch.Tensor, rule: Rule) -> dict[str, dict[str, float]]:
    """:func:`measure` every unit of a checkpoint in the ways of :data:`VIEW`.

    Args:
        run: over the checkpoint; its progress shows the stage ``perturb``.
        tokens: int64 ``[windows, length]``.
        rule: for the smoothing.

    Returns:
        Full name of the unit -> variant -> error.
    """
    source, activations = run.source, Activations(run, tokens)
    found: dict[str, dict[str, float]] = {}
    with Threads() as threads:
        for index, block in run.walk(PERTURB):
            calibration = activations.calibration(index)
            hidden = sample(calibration)
            moments = activations.read_by(block, threads)
            smoothing = smooth_block(block, moments, source.layers[index], rule, threads)
            errors = measure(calibration, index, block, smoothing, hidden, VIEW)
            found |= {block.prefix + unit: by_variant for unit, by_variant in errors.items()}
    return found

"""What per-channel INT8 does to each linear, from the weights alone."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from vllm_w8a8_bismooth.architectures import BLOCK, Layer
from vllm_w8a8_bismooth.checkpoint import AHEAD, ReadAhead
from vllm_w8a8_bismooth.quantize import Fold, Loss, quantize_folded
from vllm_w8a8_bismooth.source import Source

VULNERABLE = 0.05
"""Column error above which a linear counts as vulnerable. Gaussian weights measure about 0.01; one column 100 times as
large brings them to about 0.2, three of 1000 times to nearly 1, because the row's step then swallows the rest."""


@dataclass(frozen=True)
class Measure:
    """What one linear's weights look like, and what per-channel INT8 does to them.

    Attributes:
        column_error, sqnr: see :class:`quantize.Loss`.
        maximum: largest magnitude of the weight.
        column_outlier, row_outlier: largest over median of the columns' and of the rows' largest magnitudes.
    """

    column_error: float
    sqnr: float | None
    maximum: float
    column_outlier: float
    row_outlier: float


def measure(weight: torch.Tensor) -> tuple[Measure, torch.Tensor]:
    """Measure a stored ``[N, K]`` weight; also fp32 ``[K]``, the largest magnitude of each column."""
    loss = Loss(weight.shape[1], weight.device)
    rows = torch.cat([scale for _, _, scale in quantize_folded(weight, Fold(), None, loss)]).view(-1)
    columns = Fold().column_extent(weight)
    measured = Measure(
        column_error=loss.column_error(),
        sqnr=loss.sqnr(),
        maximum=float(columns.max()),
        column_outlier=_outlier(columns),
        row_outlier=_outlier(rows),
    )
    return measured, columns


def _outlier(extent: torch.Tensor) -> float:
    median = float(extent.median())
    return float(extent.max()) / median if median > 0 else math.inf


def blocks(source: Source, device: torch.device) -> Iterator[tuple[int, dict[str, tuple[Measure, torch.Tensor]]]]:
    """Measure block after block: index, and linear (by name inside the block) -> :func:`measure` of its weight."""
    linears = [
        [name for name in names if layer.linear_of(name)]
        for names, layer in zip(source.blocks, source.layers, strict=True)
    ]
    order = [BLOCK.format(i) + name for i, names in enumerate(linears) for name in names]
    with ReadAhead(source.checkpoint, order, AHEAD) as reader:
        for index, names in enumerate(linears):
            measured = {}
            for name in names:
                full = BLOCK.format(index) + name
                measured[name.removesuffix(".weight")] = measure(reader.take(full).to(device))
                reader.release(full)
            yield index, measured


def close_under_fusion(names: Iterable[str], layer: Layer) -> set[str]:
    """Names inside a block, plus the siblings that vLLM fuses them with: one fused linear has one granularity."""
    chosen = set(names)
    for parts in layer.fused.values():
        if chosen & set(parts):
            chosen |= set(parts)
    return chosen


def vulnerable(errors: Mapping[str, float], layer: Layer) -> set[str]:
    """The linears of one block (by name inside it) that need finer scales: above :data:`VULNERABLE`, with siblings.

    Experts are left out, because vLLM serves them per-channel only.
    """
    return close_under_fusion((name for name, error in errors.items() if error > VULNERABLE), layer) - layer.experts


def named(pattern: re.Pattern, block: str, layer: Layer) -> set[str]:
    """The linears of the block ``model.layers.i.`` whose full name ``pattern`` finds, with siblings."""
    return close_under_fusion((n for n in layer.linears if pattern.search(block + n)), layer)

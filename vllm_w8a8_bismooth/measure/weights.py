"""What INT8 does to each linear, from the weights alone: how much is lost, why, and what would repair it."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from vllm_w8a8_bismooth import grouping
from vllm_w8a8_bismooth.checkpoint.blocks import Block, Run, Stage
from vllm_w8a8_bismooth.method.quantize import quantize_folded
from vllm_w8a8_bismooth.method.rows import ALONE, Fold, Threads
from vllm_w8a8_bismooth.model.layers import Layer

VULNERABLE = 0.05
"""Column error above which a linear counts as vulnerable. Gaussian weights measure about 0.01; one column 100 times as
large brings them to about 0.2, three of 1000 times to nearly 1, because the row's step then swallows the rest."""

OUTLIER = 20.0
"""Times the median from which a column or row is counted: about where one such column makes a linear vulnerable."""

ANALYZE = Stage("analyze", whole=False)

GROUP_SIZES = tuple(size for size in reversed(grouping.SIZES) if size <= 256)
"""What is tried on a vulnerable linear, in this order, until one repairs it."""


@dataclass(frozen=True)
class Extent:
    """How the largest magnitudes of a weight's columns, or of its rows, spread. All-zero ones do not count.

    Attributes:
        minimum, median, maximum: in the weight's own unit; 0 if the weight is all zero.
        ratio: maximum over median.
        outliers: how many are at least :data:`OUTLIER` times the median.
    """

    minimum: float
    median: float
    maximum: float
    ratio: float
    outliers: int

    @classmethod
    def of(cls, magnitudes: torch.Tensor) -> "Extent":
        """From fp32 ``[K]`` or ``[N]``, the magnitudes."""
        used = magnitudes[magnitudes > 0]
        if not len(used):
            return cls(0.0, 0.0, 0.0, 1.0, 0)
        minimum, median, maximum = (float(x) for x in (used.min(), used.median(), used.max()))
        return cls(minimum, median, maximum, maximum / median, int((used >= OUTLIER * median).sum()))


@dataclass(frozen=True)
class Measure:
    """What one linear's weights look like, and what INT8 does to them.

    Attributes:
        shape: N, K.
        column_error, sqnr: see :class:`quantize.Loss`; per-channel scales.
        columns, rows: how their largest magnitudes spread.
        groups: group size -> the column error that per-group scales would leave. Only sizes that divide K, and that of
            all linears that would get the same.
    """

    shape: tuple[int, int]
    column_error: float
    sqnr: float | None
    columns: Extent
    rows: Extent
    groups: Mapping[int, float] = field(default_factory=dict)

    def vulnerable(self) -> bool:
        return self.column_error > VULNERABLE

    def reason(self) -> str:
        """Why it is vulnerable, or why what stands out in it does no harm; empty where nothing stands out."""
        columns, rows = self.columns, self.rows
        if self.vulnerable() and columns.outliers:
            return (
                f"{columns.outliers} of {self.shape[1]} input columns up to {columns.ratio:.0f}x the median: "
                "the row's step rounds the rest to zero"
            )
        if self.vulnerable():
            return (
                f"input columns {columns.minimum / columns.median:.2g}x to {columns.ratio:.2g}x the median: "
                "the row's step, which the larger ones set, is too coarse for the smaller"
            )
        if columns.outliers:
            return f"columns up to {columns.ratio:.0f}x the median, in so few rows that little is lost"
        if rows.outliers:
            return f"rows up to {rows.ratio:.0f}x the median row: harmless, each has its own scale"
        return ""


def measure(
    weight: torch.Tensor,
    group_size: int | None = None,
    search: bool = False,
    threads: Threads = ALONE,
    beside: Collection[int] = (),
) -> Measure:
    """Measure a stored ``[N, K]`` weight.

    Args:
        weight: in its storage dtype, finite.
        group_size: measure this one too, if it divides K.
        search: without a ``group_size``, try :data:`GROUP_SIZES` on a vulnerable weight.
        threads: that do the work.
        beside: K of other weights that would have the same groups, which must divide these, too.
    """
    rows, columns = weight.shape
    extents = torch.empty(rows, device=weight.device)

    def take(start: int, codes: torch.Tensor, scale: torch.Tensor) -> None:
        extents[start : start + len(scale)] = scale.view(-1) * codes.any(dim=1) * 127  # an all-zero row has scale 1

    loss = quantize_folded(weight, Fold(), take=take, threads=threads)
    error = loss.column_error()
    sizes = [group_size] if group_size else GROUP_SIZES if search and error > VULNERABLE else []
    groups: dict[int, float] = {}
    for size in sizes:
        if all(grouping.fits(k, size) for k in (columns, *beside)):
            groups[size] = quantize_folded(weight, Fold(), size, threads=threads).column_error()
            if groups[size] <= VULNERABLE:
                break
    return Measure(
        shape=(rows, columns),
        column_error=error,
        sqnr=loss.sqnr(),
        columns=Extent.of(Fold().column_extent(weight, threads)),
        rows=Extent.of(extents),
        groups=groups,
    )


def measure_block(
    block: Block, layer: Layer, threads: Threads, group_size: int | None = None, search: bool = False
) -> dict[str, Measure]:
    """Linear (by name inside the block) -> :func:`measure` of its weight; each is released before the next is read."""
    measured, of_experts = {}, {layer.linears[name][1] for name in layer.experts}
    for name in block:
        if (linear := layer.linear_of(name)) is not None:
            beside = of_experts if linear in layer.experts else ()
            measured[linear] = measure(block[name], group_size, search, threads, beside)
            block.release(name)
    return measured


@dataclass(frozen=True)
class Analysis:
    """A whole checkpoint, measured.

    Attributes:
        linears: full name -> its measure, block after block.
        grouped: the linears that ``--method mixed`` gives per-group scales: vulnerable ones, and those that vLLM serves
            like them.
    """

    linears: Mapping[str, Measure]
    grouped: list[str]

    def ranked(self) -> list[str]:
        """All linears, worst first."""
        return sorted(self.linears, key=lambda name: (-self.linears[name].column_error, name))

    def vulnerable(self) -> list[str]:
        """The vulnerable linears, worst first."""
        return [name for name in self.ranked() if self.linears[name].vulnerable()]

    def share(self) -> float:
        """Part of the linears' parameters that is in vulnerable ones, 0 to 1."""
        sizes = {name: math.prod(measure.shape) for name, measure in self.linears.items()}
        return sum(sizes[name] for name in self.vulnerable()) / sum(sizes.values())

    def repair(self) -> tuple[int, float] | None:
        """Group size for :attr:`grouped`, of those measured, and the largest column error that it would leave.

        ``None`` if there is nothing to group, or no measured size divides some K.
        """
        trials = [self.linears[name].groups for name in self.grouped if self.linears[name].vulnerable()]
        if not trials or not all(trials):
            return None
        return min(min(groups) for groups in trials), max(groups[min(groups)] for groups in trials)


def analyze(run: Run, group_size: int | None = None) -> Analysis:
    """Measure every linear, with one block in memory at a time.

    Args:
        run: over the checkpoint; its progress shows the stage ``analyze``.
        group_size: also measure what per-group scales of this size would leave of each linear; without it
            :data:`GROUP_SIZES` are tried on vulnerable ones.

    Raises:
        BismoothError: see :meth:`Checkpoint.read`.
    """
    linears: dict[str, Measure] = {}
    grouped: list[str] = []
    with Threads() as threads:
        for index, block in run.walk(ANALYZE):
            layer = run.source.layers[index]
            measured = measure_block(block, layer, threads, group_size, search=group_size is None)
            linears |= {block.prefix + name: measure for name, measure in measured.items()}
            chosen = vulnerable({name: measure.column_error for name, measure in measured.items()}, layer)
            grouped += [block.prefix + name for name in sorted(chosen)]
    return Analysis(linears, grouped)


def vulnerable(errors: Mapping[str, float], layer: Layer) -> set[str]:
    """The linears of one block (by name inside it) that need finer scales: above :data:`VULNERABLE`, and those that
    must be alike."""
    return layer.alike(name for name, error in errors.items() if error > VULNERABLE)

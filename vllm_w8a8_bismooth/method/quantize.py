"""Symmetric INT8 quantization of weights, per channel and per group, and of some rows to four bits."""

import math
from collections.abc import Callable, Iterator

import torch

from vllm_w8a8_bismooth import grouping
from vllm_w8a8_bismooth.method.compensate import Compensation
from vllm_w8a8_bismooth.method.grids import Even, Grid, Stepped
from vllm_w8a8_bismooth.method.rows import ALONE, Fold, Memory, Threads

TOGETHER = 256  # rows that are compensated at once, or more: each step of a column is a call for all of them


class Loss:
    """What quantization cost a ``[N, K]`` weight, summed up row by row.

    Attributes:
        error: fp64 ``[K]``, sum of squared differences to the folded weight in each column, of the nearest INT8 codes:
            what the scales leave. Compensation moves codes away on purpose, and what it gains shows in the outputs;
            rows of four bits lose more, but lose columns for the same reason.
        power: fp64 ``[K]``, sum of squares of the folded weight in each column.
        written: sum of squared differences of the codes that are written.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.error, self.power = (torch.zeros(columns, dtype=torch.float64, device=device) for _ in range(2))
        self.written = 0.0

    def add(self, other: "Loss") -> None:
        """Count further rows."""
        self.error += other.error
        self.power += other.power
        self.written += other.written

    def column_error(self) -> float:
        """Mean over input columns of the relative error that INT8 leaves in them.

        The usual norm-wise error is blind to the LLaMA3-70B pathology: the huge columns dominate the norm and are
        exactly those that survive. Per column, a weight that is rounded to zero counts as lost, whatever its size.

        Returns:
            0 (exact) to 1 (every column lost): mean of ``min(1, |W_j - Q(W)_j| / |W_j|)`` over the nonzero columns.
        """
        used = self.power > 0
        ratio = (self.error[used] / self.power[used]).sqrt().clamp(max=1)
        return float(ratio.mean()) if used.any() else 0.0

    def sqnr(self) -> float | None:
        """Signal-to-quantization-noise ratio of the whole weight in dB; ``None`` where nothing was lost."""
        power = float(self.power.sum())
        return 10 * math.log10(power / self.written) if self.written > 0 and power > 0 else None


def quantize_weight(weight: torch.Tensor, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight by round-to-nearest-even on a symmetric grid.

    Args:
        weight: fp32 ``[N, K]``, finite.
        group_size: columns that share one scale; ``None`` means all of them (per-channel).

    Returns:
        int8 ``[N, K]`` in [-127, 127] and fp32 ``weight_scale`` ``[N, K / group_size]`` (``[N, 1]`` per-channel), with
        ``scale = amax / 127``; an all-zero row or group has scale 1 and codes 0.

    Raises:
        ValueError: K is not a multiple of ``group_size``.
    """
    codes, rounded = torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight)
    return codes, _quantize(weight, group_size, rounded, codes)


def _quantize(weight: torch.Tensor, group_size: int | None, rounded: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """:func:`quantize_weight` into given memory, fp32 and int8 ``[N, K]``, both of which get the codes."""
    rows, columns = weight.shape
    groups = grouping.groups(columns, group_size)
    shape = (rows, groups, columns // groups)
    amax = torch.abs(weight, out=rounded).view(shape).amax(dim=-1)
    scale = amax / amax.new_tensor(127)  # a tensor, because on CUDA torch multiplies by the reciprocal of a scalar
    scale[scale == 0] = 1
    # The clamp matters only where amax / 127 is subnormal and too coarse to hold the ratio 127.
    torch.div(weight.view(shape), scale.unsqueeze(-1), out=rounded.view(shape)).round_().clamp_(-127, 127)
    codes.copy_(rounded)
    return scale


def dequantize_weight(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The fp32 ``[N, K]`` weight that int8 ``codes`` ``[N, K]`` and fp32 ``scale`` ``[N, G]`` stand for."""
    rows, columns = codes.shape
    groups = codes.view(rows, scale.shape[1], columns // scale.shape[1]).float()
    return (groups * scale.unsqueeze(-1)).view(rows, columns)


def quantize_folded(
    weight: torch.Tensor,
    fold: Fold,
    group_size: int | None = None,
    take: Callable[[int, torch.Tensor, torch.Tensor], None] = lambda start, codes, scale: None,
    threads: Threads = ALONE,
    compensation: Compensation | None = None,
    wide: torch.Tensor | None = None,
) -> Loss:
    """Fold and quantize a stored weight some rows at a time, without an fp32 copy of the whole.

    Args:
        weight: ``[N, K]`` in its storage dtype, finite.
        fold: what to do before rounding.
        group_size: see :func:`quantize_weight`, whose codes and scales these are.
        take: called with the first row, int8 codes ``[n, K]`` and fp32 scales ``[n, G]`` of ``n`` rows, from any thread
            and in any order. The codes do not outlive the call.
        threads: share the rows.
        compensation: rounds instead of round-to-nearest; of the inputs after the fold.
        wide: bool ``[N]``, the rows that have eight bits; the others have four, with a step and an offset for each
            ``group_size`` columns, and all have one scale. ``None`` is INT8.

    Raises:
        ValueError: K is not a multiple of ``group_size``.
    """
    loss = Loss(weight.shape[1], weight.device)
    counts = weight.new_ones(weight.shape[1], dtype=torch.float32)
    if compensation is not None:
        counts = torch.cat(compensation.weights)

    def work(start: int, rows: int, pieces: Iterator[tuple[int, torch.Tensor]], memory: Memory) -> Loss:
        codes, scales = memory.get("codes", rows, weight, torch.int8), []
        cost = Loss(weight.shape[1], weight.device)
        for first, piece in pieces:
            rounded = memory.get("rounded", len(piece), weight)
            made = codes[first : first + len(piece)]
            scale = _quantize(piece, group_size if wide is None else None, rounded, made)
            groups = rounded.view(len(piece), scale.shape[1], -1)
            groups *= scale.unsqueeze(-1)
            error = rounded.sub_(piece).square_().sum(dim=0)
            cost.error += error
            grid: Grid = Even(scale)
            if wide is not None:
                assert group_size is not None
                here = wide[start + first : start + first + len(piece)]
                grid = Stepped.search(piece, scale.view(-1), here, group_size, counts)
                scale = grid.scale.unsqueeze(1)
                made.copy_(grid.rounded(piece))
            if compensation is not None:
                made.copy_(compensation.round(piece, grid))
            if compensation is not None or wide is not None:
                error = dequantize_weight(made, scale).sub_(piece).square_().sum(dim=0)
            cost.written += float(error.sum(dtype=torch.float64))
            cost.power += piece.square_().sum(dim=0)
            scales.append(scale)
        take(start, codes, torch.cat(scales))
        return cost

    least = 1 if compensation is None else len(weight) if weight.is_cuda else TOGETHER
    for cost in threads.over(weight, fold, work, least):  # in order, so that the sums are the same every time
        loss.add(cost)
    return loss

"""Symmetric INT8 quantization of weights, per channel and per group."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_PIECE = 2**19  # elements worked on at once: a few of its fp32 copies fit a core's cache


@dataclass(frozen=True)
class Fold:
    """What smoothing does to one ``[N, K]`` weight: ``W[n, k] / rows[n] * columns[k]``, each fp32 or absent."""

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def __bool__(self) -> bool:
        """Whether it does anything."""
        return self.rows is not None or self.columns is not None

    def pieces(self, weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """First row and folded fp32 rows of a stored weight, a bounded number at a time.

        Row by row the result is that of folding the whole at once. All pieces share one memory, because faulting in
        fresh pages takes longer than the work on them: a piece holds until the next one is asked for.
        """
        step = max(1, _PIECE // weight.shape[1])
        memory = torch.empty(step, weight.shape[1], device=weight.device)
        for start in range(0, len(weight), step):
            stored = weight[start : start + step]
            piece = memory[: len(stored)].copy_(stored)
            if self.rows is not None:
                piece /= self.rows[start : start + step].unsqueeze(1)
            if self.columns is not None:
                piece *= self.columns
            yield start, piece

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The whole folded weight, in its own dtype."""
        folded = torch.empty_like(weight)
        for start, piece in self.pieces(weight):
            folded[start : start + len(piece)] = piece
        return folded

    def column_extent(self, weight: torch.Tensor) -> torch.Tensor:
        """fp32 ``[K]``: largest magnitude of each column of the folded weight."""
        extent = torch.zeros(weight.shape[1], device=weight.device)
        for _, piece in self.pieces(weight):
            extent = torch.maximum(extent, piece.abs_().amax(dim=0))
        return extent


class Loss:
    """What quantization cost a ``[N, K]`` weight, summed up row by row.

    Attributes:
        error: fp64 ``[K]``, sum of squared differences to the folded weight in each column.
        power: fp64 ``[K]``, sum of squares of the folded weight in each column.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.error, self.power = (torch.zeros(columns, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, weight: torch.Tensor, quantized: torch.Tensor) -> None:
        """Take some rows: fp32 ``[n, K]`` before, and what they became. Both are overwritten."""
        self.error += quantized.sub_(weight).square_().sum(dim=0)
        self.power += weight.square_().sum(dim=0)

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
        error, power = float(self.error.sum()), float(self.power.sum())
        return 10 * math.log10(power / error) if error > 0 and power > 0 else None


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
    group_size = group_size or columns
    if columns % group_size:
        raise ValueError(f"K = {columns} is not a multiple of group_size = {group_size}")
    shape = (rows, columns // group_size, group_size)
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
    weight: torch.Tensor, fold: Fold, group_size: int | None, loss: Loss
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Fold and quantize a stored weight some rows at a time, without an fp32 copy of the whole.

    Args:
        weight: ``[N, K]`` in its storage dtype, finite.
        fold: what to do before rounding.
        group_size: see :func:`quantize_weight`, whose codes and scales these are.
        loss: is told of all rows.

    Yields:
        The first row, int8 codes ``[n, K]`` and fp32 scales ``[n, G]`` of ``n`` rows. The codes hold until the next
        ones are asked for.

    Raises:
        ValueError: K is not a multiple of ``group_size``.
    """
    rounded = codes = None
    for start, piece in fold.pieces(weight):
        if rounded is None:
            rounded, codes = torch.empty_like(piece), torch.empty_like(piece, dtype=torch.int8)
        n = len(piece)
        scale = _quantize(piece, group_size, rounded[:n], codes[:n])
        groups = rounded[:n].view(n, scale.shape[1], -1)
        groups *= scale.unsqueeze(-1)
        loss.add(piece, rounded[:n])
        yield start, codes[:n], scale

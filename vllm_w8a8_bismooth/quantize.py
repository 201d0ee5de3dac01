"""Symmetric INT8 quantization of weights, per channel and per group."""

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from vllm_w8a8_bismooth.moments import Moments

_PIECE = 2**19  # elements worked on at once: a few of its fp32 copies fit a core's cache
_SLAB = 2**23  # elements that a thread takes at once; their codes are written at once


class Memory(threading.local):
    """What one thread works in, used again and again: faulting in fresh pages takes longer than the work on them."""

    def __init__(self):
        self._buffers: dict = {}

    def get(self, role: str, rows: int, like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An uninitialized ``[rows, K]`` on the device of ``like`` ``[N, K]``; it holds until the role is asked for."""
        size = rows * like.shape[1]
        buffer = self._buffers.get((role, like.device))
        if buffer is None or len(buffer) < size:
            buffer = torch.empty(max(size, _PIECE), dtype=dtype, device=like.device)
            self._buffers[role, like.device] = buffer
        return buffer[:size].view(rows, like.shape[1])


class Threads:
    """Work on a weight's rows, some at a time, on all cores: torch's own threads would meet after each small step.

    Use as a context manager. A GPU is given its work by the calling thread alone, as is everything outside the context.
    """

    def __init__(self):
        self._memory = Memory()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Threads":
        cores = torch.get_num_threads()
        count = cores + 1  # some wait for the disk
        barrier = threading.Barrier(count)

        def begin() -> None:
            torch.get_num_threads()  # without a first look, a thread later takes over what everybody has
            torch.set_num_threads(1)
            barrier.wait()

        self._pool = ThreadPoolExecutor(count)
        for begun in [self._pool.submit(begin) for _ in range(count)]:
            begun.result()
        torch.set_num_threads(cores)  # part of what a thread sets is everybody's
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def map(self, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Call ``work`` on each item; yields the results in order."""
        return map(work, items) if self._pool is None else self._pool.map(work, items)

    def over(
        self,
        weight: torch.Tensor,
        fold: "Fold",
        work: Callable[[int, int, Iterator[tuple[int, torch.Tensor]], Memory], Any],
    ) -> Iterator[Any]:
        """Share the rows of a stored weight out, a slab a call; yields the results in order.

        ``work(first row, rows, pieces, memory)`` is given the slab's folded rows in pieces, each with its first row
        within the slab; a piece holds until the next one. Row by row that is the folding of the whole at once.
        """
        step, slab = (max(1, size // max(1, weight.shape[1])) for size in (_PIECE, _SLAB))
        slab -= slab % step

        def pieces(start: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
            for first in range(start, end, step):
                stored = weight[first : min(first + step, end)]
                piece = self._memory.get("piece", len(stored), weight).copy_(stored)
                if fold.rows is not None:
                    piece /= fold.rows[first : first + len(stored)].unsqueeze(1)
                if fold.columns is not None:
                    piece *= fold.columns
                yield first - start, piece

        def one(start: int) -> Any:
            end = min(start + slab, len(weight))
            return work(start, end - start, pieces(start, end), self._memory)

        starts = range(0, len(weight), slab)
        return map(one, starts) if weight.is_cuda else self.map(one, starts)


ALONE = Threads()
"""The calling thread."""


@dataclass(frozen=True)
class Fold:
    """What smoothing does to one ``[N, K]`` weight: ``W[n, k] / rows[n] * columns[k]``, each fp32 or absent."""

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def __bool__(self) -> bool:
        """Whether it does anything."""
        return self.rows is not None or self.columns is not None

    def apply(self, weight: torch.Tensor, threads: Threads = ALONE) -> torch.Tensor:
        """The whole folded weight, in its own dtype."""
        folded = torch.empty_like(weight)

        def work(start: int, rows: int, pieces: Iterator[tuple[int, torch.Tensor]], memory: Memory) -> None:
            for first, piece in pieces:
                folded[start + first : start + first + len(piece)] = piece

        for _ in threads.over(weight, self, work):
            pass
        return folded

    def column_extent(self, weight: torch.Tensor, threads: Threads = ALONE) -> torch.Tensor:
        """fp32 ``[K]``: largest magnitude of each column of the folded weight."""

        def work(start: int, rows: int, pieces: Iterator[tuple[int, torch.Tensor]], memory: Memory) -> torch.Tensor:
            return torch.stack([piece.abs_().amax(dim=0) for _, piece in pieces]).amax(dim=0)

        return torch.stack(list(threads.over(weight, self, work))).amax(dim=0)

    def moments(self, weight: torch.Tensor, basis: torch.Tensor, threads: Threads = ALONE) -> Moments:
        """Of the folded weight's columns over its rows, whose size is told with column k times ``basis[k]``, fp32."""
        scaled = Fold(self.rows, basis if self.columns is None else self.columns * basis)

        def work(start: int, rows: int, pieces: Iterator[tuple[int, torch.Tensor]], memory: Memory) -> Moments:
            found = Moments.none(weight.shape[1], weight.device)
            for _, piece in pieces:
                found.add(piece)
            return found

        total = Moments.none(weight.shape[1], weight.device)
        for part in threads.over(weight, scaled, work):  # in order, so that the sums are the same every time
            total.merge(part)
        return total.scaled(1 / basis)

    def row_norms(self, weight: torch.Tensor, threads: Threads = ALONE) -> torch.Tensor:
        """fp32 ``[N]``: Euclidean norm of each row of the folded weight, the size of what it makes of unit noise."""
        found = torch.empty(len(weight), device=weight.device)

        def work(start: int, rows: int, pieces: Iterator[tuple[int, torch.Tensor]], memory: Memory) -> None:
            for first, piece in pieces:
                found[start + first : start + first + len(piece)] = piece.square_().sum(dim=1)

        for _ in threads.over(weight, self, work):
            pass
        return found.sqrt_()


class Loss:
    """What quantization cost a ``[N, K]`` weight, summed up row by row.

    Attributes:
        error: fp64 ``[K]``, sum of squared differences to the folded weight in each column.
        power: fp64 ``[K]``, sum of squares of the folded weight in each column.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.error, self.power = (torch.zeros(columns, dtype=torch.float64, device=device) for _ in range(2))

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
    weight: torch.Tensor,
    fold: Fold,
    group_size: int | None = None,
    take: Callable[[int, torch.Tensor, torch.Tensor], None] = lambda start, codes, scale: None,
    threads: Threads = ALONE,
) -> Loss:
    """Fold and quantize a stored weight some rows at a time, without an fp32 copy of the whole.

    Args:
        weight: ``[N, K]`` in its storage dtype, finite.
        fold: what to do before rounding.
        group_size: see :func:`quantize_weight`, whose codes and scales these are.
        take: called with the first row, int8 codes ``[n, K]`` and fp32 scales ``[n, G]`` of ``n`` rows, from any thread
            and in any order. The codes do not outlive the call.
        threads: that do the work.

    Raises:
        ValueError: K is not a multiple of ``group_size``.
    """
    loss = Loss(weight.shape[1], weight.device)

    def work(start: int, rows: int, pieces: Iterator[tuple[int, torch.Tensor]], memory: Memory) -> Loss:
        codes, scales = memory.get("codes", rows, weight, torch.int8), []
        cost = Loss(weight.shape[1], weight.device)
        for first, piece in pieces:
            rounded = memory.get("rounded", len(piece), weight)
            scale = _quantize(piece, group_size, rounded, codes[first : first + len(piece)])
            groups = rounded.view(len(piece), scale.shape[1], -1)
            groups *= scale.unsqueeze(-1)
            cost.error += rounded.sub_(piece).square_().sum(dim=0)
            cost.power += piece.square_().sum(dim=0)
            scales.append(scale)
        take(start, codes, torch.cat(scales))
        return cost

    for cost in threads.over(weight, fold, work):  # in order, so that the sums are the same every time
        loss.error += cost.error
        loss.power += cost.power
    return loss

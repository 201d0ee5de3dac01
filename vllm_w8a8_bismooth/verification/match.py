"""How a linear of a converted checkpoint relates to its source: the factors by which it may have been multiplied."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf, log10

import torch

from vllm_w8a8_bismooth.checkpoint.reader import Checkpoint
from vllm_w8a8_bismooth.method.quantize import dequantize_weight
from vllm_w8a8_bismooth.method.rows import Threads
from vllm_w8a8_bismooth.model.layers import Runs
from vllm_w8a8_bismooth.verification.likeness import Likeness

_PIECE = 2**20  # elements worked on at once
_HALF = 0.5 + 2e-4  # of a step: fp32 rounds the division before the code is
_ROOM = 1e-5  # relative, between factors that are equal but for fp32


@dataclass
class Range:
    """Factors that are possible, fp32 ``[n]`` each. They are positive."""

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def unknown(cls, n: int) -> "Range":
        return cls(torch.full((n,), -inf), torch.full((n,), inf))

    def narrow(self, low: torch.Tensor, high: torch.Tensor) -> None:
        self.low, self.high = torch.maximum(self.low, low), torch.minimum(self.high, high)

    def empty(self) -> torch.Tensor:
        """bool ``[n]``: no factor is possible."""
        return (self.low > self.high) | (self.high <= 0)

    def misses(self, other: "Range") -> torch.Tensor:
        """bool ``[n]``: the two ranges have nothing in common, though neither is empty."""
        low, high = torch.maximum(self.low, other.low), torch.minimum(self.high, other.high)
        return (low - high > _ROOM * high.abs()) & ~self.empty() & ~other.empty()


@dataclass
class Match:
    """How one ``[N, K]`` linear, INT8 or float, relates to its source's weight times the column factors claimed.

    Attributes:
        rows: factors of the free rows, ``[n]``.
        factor: fp32 ``[n]``, the least-squares estimate of the same.
        columns: factors of the columns over and above the claimed ones, from the other rows; ``[K]``.
        sqnr: in dB, of the stored against the folded weight; ``None`` where nothing was lost.
        unlike: see :meth:`Likeness.unlike`.
    """

    rows: Range
    factor: torch.Tensor
    columns: Range
    sqnr: float | None
    unlike: dict[str, torch.Tensor] = field(default_factory=dict)


def match(
    threads: Threads,
    source: Checkpoint,
    result: Checkpoint,
    name: str,
    columns: torch.Tensor,
    free: Runs = (),
    reach: int = 0,
) -> Match:
    """Compare a linear with its source, a few rows a thread in memory at a time.

    Args:
        threads: that do the work.
        source, result: the two checkpoints.
        name: of the weight, in both.
        columns: fp32 ``[K]`` factors claimed for the columns; 0 where nothing is known and nothing depends on it.
        free: runs of rows that may have been divided by factors yet unknown, ascending.
        reach: how many steps a code may lie from the nearest.
    """
    rows, width = source.headers[name].shape
    silent = (columns == 0).nonzero().view(-1)
    step = max(1, _PIECE // width)
    unknown = sum(number for _, number in free)
    found, likeness = (
        Match(Range.unknown(unknown), torch.ones(unknown), Range.unknown(width), None),
        Likeness(result, name),
    )

    def compare(start: int) -> tuple[Range, float, float, torch.Tensor | None]:
        """Columns' factors, power and error of some rows; the rows' own factors go to their places."""
        count, possible = min(step, rows - start), Range.unknown(width)
        claimed = source.rows(name, start, count).float() * columns
        stored, half = _stored(result, name, start, count, reach)
        half = half.masked_fill(likeness.narrow[start : start + count].unsqueeze(1), inf)
        stored[:, silent] = 0
        inverse = claimed.reciprocal()
        middle, around = stored * inverse, half * inverse.abs()
        low, high = middle - around, middle.add_(around)
        if not low.isfinite().all():
            nothing = inverse.isinf()  # weights of 0 show nothing, but no factor makes anything else of them
            low[nothing], high[nothing] = -inf, inf
            low[(claimed == 0) & (stored.abs() > half)] = inf
        divided = list(_within(free, start, count))
        edges = [0, *(edge for mine, _ in divided for edge in (mine.start, mine.stop)), count]
        for fixed in map(slice, edges[::2], edges[1::2]):
            if fixed.start < fixed.stop:
                possible.narrow(low[fixed].amax(dim=0), high[fixed].amin(dim=0))
        for mine, of in divided:
            found.rows.low[of], found.rows.high[of] = low[mine].amax(dim=1), high[mine].amin(dim=1)
            estimate = (stored[mine] * claimed[mine]).sum(dim=1) / claimed[mine].square().sum(dim=1)
            found.factor[of] = torch.where(estimate.isfinite() & (estimate > 0), estimate, 1.0)
            claimed[mine] *= found.factor[of].unsqueeze(1)
        error, power = stored.sub_(claimed).square_(), claimed.square_()
        return possible, float(power.sum()), float(error.sum()), likeness.see(start, power, error)

    power = error = 0.0
    for possible, more_power, more_error, seen in threads.map(compare, range(0, rows, step)):
        found.columns.narrow(possible.low, possible.high)
        likeness.add(seen)
        power, error = power + more_power, error + more_error
    found.unlike = likeness.unlike()
    found.sqnr = 10 * log10(power / error) if error > 0 and power > 0 else None
    return found


def _within(runs: Runs, start: int, count: int) -> Iterator[tuple[slice, slice]]:
    """Of the runs what lies in ``count`` rows from ``start`` on: where there, and where among all indices in runs."""
    passed = 0
    for begin, number in runs:
        first, last = (min(max(edge - start, 0), count) for edge in (begin, begin + number))
        if first < last:
            shift = start - begin + passed
            yield slice(first, last), slice(first + shift, last + shift)
        passed += number


def _stored(result: Checkpoint, name: str, start: int, count: int, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows of a linear, fp32 ``[n, K]``, and how far from each value may lie what was rounded to it."""
    rows = result.rows(name, start, count)
    if rows.is_floating_point():
        dtype, stored = torch.finfo(rows.dtype), rows.float()
        return stored, stored.abs() * (dtype.eps / 2 + _ROOM) + dtype.eps * dtype.smallest_normal
    scale = result.rows(f"{name}_scale", start, count).float()
    half, width = scale * (_HALF + reach), rows.shape[1] // scale.shape[1]
    return dequantize_weight(rows, scale), half.repeat_interleave(width, dim=1) if scale.shape[1] > 1 else half
